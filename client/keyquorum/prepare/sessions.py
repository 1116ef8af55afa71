"""A run with the cluster: the owner's identity signs, the custodians give the key, the profile's folder keeps the
ledger.

A pipeline that needs no key needs no custodian and no network.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from keyquorum import __version__
from keyquorum.keyfiles import PassphraseSource, unlock
from keyquorum.prepare.budget import PrivacyLedger, ledger_path
from keyquorum.prepare.extra import require
from keyquorum.prepare.pipeline import KeySettings, Pipeline, load_pipeline
from keyquorum.profile import Profile, load_profile
from keyquorum.progress import ProgressCallback, silent
from keyquorum.sync import Client
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys

if TYPE_CHECKING:
    from keyquorum.prepare.mapping import MappingHeader
    from keyquorum.prepare.running import Prepared, PrepareKeys

__all__ = ["check", "detokenize", "prepare"]

_Path = str | os.PathLike[str]
TOOL = f"keyquorum {__version__}"


def check(pipeline: _Path, source: _Path | None = None) -> tuple[Pipeline, tuple[str, ...]]:
    """The pipeline, and the columns that come out; with ``source``, whether it fits that file. Reads no rows.

    Raises :class:`MalformedError` and :class:`RefusedError` for what :func:`prepare` would refuse.
    """
    require("pyarrow", "numpy")
    from keyquorum.prepare.running import check_input, columns_out

    loaded = load_pipeline(Path(pipeline))
    if loaded.aggregates:
        require("opendp")
    if source is not None:
        check_input(loaded, Path(source))
    return loaded, columns_out(loaded)


def prepare(
    profile: _Path | Profile,
    pipeline: _Path,
    source: _Path,
    output: _Path,
    *,
    mapping: _Path | None = None,
    passphrase: PassphraseSource = None,
    progress: ProgressCallback = silent,
) -> Prepared:
    """Run the pipeline on ``source``: writes ``output``, ``OUTPUT.provenance.json`` and, where asked for, ``mapping``.

    Raises as :func:`keyquorum.prepare.running.run`, and what :meth:`Client.derive_key` raises.
    """
    loaded, _ = check(pipeline, source)
    from keyquorum.prepare.running import run

    own = profile if isinstance(profile, Profile) else load_profile(profile)
    owner = _owner(own, passphrase)
    keys = None
    if loaded.keys is not None:
        keys = _keys(own, passphrase, loaded.name, loaded.keys, progress)
    return run(
        loaded,
        Path(source),
        Path(output),
        owner=owner,
        now=int(time.time()),
        tool=TOOL,
        keys=keys,
        ledger=PrivacyLedger(ledger_path(own.state_dir)),
        mapping=None if mapping is None else Path(mapping),
        progress=progress,
    )


def _owner(profile: Profile, passphrase: PassphraseSource) -> LoadedKeys:
    principal = profile.principal("owner")
    return unlock(principal.key_file, "owner", principal.name, passphrase)


def _keys(
    profile: Profile, passphrase: PassphraseSource, name: str, settings: KeySettings, progress: ProgressCallback
) -> PrepareKeys:
    from keyquorum.prepare.mapping import MappingHeader
    from keyquorum.prepare.running import PrepareKeys

    with Client(profile, passphrase=passphrase) as client:
        epoch = client.key(settings.key).epoch if settings.epoch is None else settings.epoch
        derived = client.derive_key(
            "tokenize",
            name,
            key=settings.key,
            classification=settings.classification,
            export_control=settings.export_control,
            epoch=epoch,
            key_check=bytes.fromhex(settings.key_check) if settings.key_check else None,
            progress=progress,
        )
    header = MappingHeader(
        owner=profile.principal("owner").name,
        key_id=settings.key,
        epoch=epoch,
        name=name,
        classification=settings.classification,
        export_control=settings.export_control,
        key_check=derived.key_check.hex(),
    )
    return PrepareKeys(
        tokenize=derived.purpose_key("tokenize"),
        mapping=derived.purpose_key("mapping"),
        projection=derived.purpose_key("projection"),
        header=header,
    )


def detokenize(
    profile: _Path | Profile,
    source: _Path,
    output: _Path,
    *,
    mapping: _Path,
    columns: tuple[str, ...],
    passphrase: PassphraseSource = None,
    progress: ProgressCallback = silent,
) -> int:
    """Write ``source`` to ``output`` with the tokens in ``columns`` replaced by what they stand for; returns the rows.

    Only the owner can: the mapping's key comes from the custodians. Memory grows with the mapping. Raises
    :class:`RefusedError` (``UNKNOWN_OWNER``, ``ARTIFACT``, and ``NOT_FOUND`` for a token that the mapping lacks).
    """
    require("pyarrow", "numpy")
    from keyquorum.prepare.mapping import read_header, read_mapping
    from keyquorum.prepare.reversal import replace_tokens

    own = profile if isinstance(profile, Profile) else load_profile(profile)
    try:
        with Path(mapping).open("rb") as file:
            header = read_header(file)
            _check_owner(header, own.principal("owner").name)
            settings = KeySettings(
                header.key_id, header.classification, header.export_control, header.epoch, header.key_check
            )
            key = _keys(own, passphrase, header.name, settings, progress).mapping
            table = read_mapping(file, header, key)
    except OSError as error:
        raise UnavailableError(Reason.NOT_FOUND, f"{mapping} can't be read", actual=error.strerror) from None
    return replace_tokens(Path(source), Path(output), columns, table, progress)


def _check_owner(header: MappingHeader, owner: str) -> None:
    if header.owner != owner:
        raise RefusedError(Reason.UNKNOWN_OWNER, "the mapping is another owner's", expected=owner, actual=header.owner)
