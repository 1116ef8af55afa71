"""`keyquorum-custodian init`: a new custodian's folder, whole or not at all.

Everything is made in a folder beside the target (``NAME.init``) and renamed into place last, so that an interrupted
``init`` leaves no half custodian: running it again removes the leftovers, whose keys nobody has seen, and starts over.
A folder that is there already is never touched.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from keyquorum_core import keywrap
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.roster import EnrolmentCard, RosterCustodian, make_card
from keyquorum_core.sealing import RecipientKey, Suite
from keyquorum_core.signing import Identity
from keyquorum_custodian.config import CONFIG_NAME, CustodianConfig, check_names, render_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.sealing.schemes import Wrapping
from keyquorum_custodian.token_leftovers import abandon
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.ports import choose_port, parse_address

__all__ = ["ADMIN_CERTIFICATE", "ADMIN_KEY", "CARD", "TLS_CERTIFICATE", "TLS_KEY", "initialise"]

TLS_CERTIFICATE = "tls-cert.pem"
TLS_KEY = "tls-key.pem"
ADMIN_CERTIFICATE = "admin-cert.pem"
ADMIN_KEY = "admin-key.pem"
CARD = "card.json"


def initialise(
    config: CustodianConfig,
    sealing: str | Wrapping,
    *,
    now: int,
    address: str = "",
    suite: str = Suite.MLKEM768_X25519,
    opslimit: int = keywrap.DEFAULT_OPSLIMIT,
    memlimit: int = keywrap.DEFAULT_MEMLIMIT,
    keystore: type[Keystore] = Keystore,
    furnish: Callable[[Path, Keystore], None] = lambda folder, store: None,
) -> EnrolmentCard:
    """Make ``config.directory`` with a new identity, keystore, TLS certificates, configuration and enrolment card.

    ``sealing``: a passphrase, or another scheme, ready to seal. A port 0 in the configuration is replaced by one that
    is free now. ``address`` is where others reach the custodian, by default where it listens. ``furnish`` puts more
    into the unfinished folder and its keystore. Raises ``EXISTS``, ``STORAGE``, :class:`MalformedError`, or what
    ``furnish`` raises; then nothing is left.
    """
    check_names(config.id, config.jurisdiction, config.cluster)
    config = dataclasses.replace(
        config,
        listen=_choose_port(config.listen, "listen"),
        admin_listen=_choose_port(config.admin_listen, "admin_listen"),
        metrics_listen=_choose_port(config.metrics_listen, "metrics_listen") if config.metrics_listen else "",
        witness_listen=_choose_port(config.witness_listen, "witness_listen") if config.witness_listen else "",
    )
    target = config.directory
    stage = target.with_name(f"{target.name}.init")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StateError(
            Reason.EXISTS,
            f"{target} exists and is not empty; init never overwrites",
            next_step="Name another folder, or serve the custodian that is there.",
        )
    _remove_leftover(stage, config)
    try:
        stage.mkdir(mode=0o700, parents=True)
        card = _fill(
            stage, config, address or config.listen, sealing, now, suite, opslimit, memlimit, keystore, furnish
        )
        for folder in [*(path for path in stage.iterdir() if path.is_dir()), stage]:
            _sync(folder)
        stage.rename(target)
        _sync(target.parent)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise UnavailableError(
            Reason.STORAGE,
            f"the custodian's folder could not be made at {target}",
            actual=error.strerror,
            next_step="Free space, or name a folder inside a file system that takes renames, then run init again.",
        ) from None
    except Exception:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return card


def _fill(
    folder: Path,
    config: CustodianConfig,
    address: str,
    sealing: str | Wrapping,
    now: int,
    suite: str,
    opslimit: int,
    memlimit: int,
    keystore: type[Keystore],
    furnish: Callable[[Path, Keystore], None],
) -> EnrolmentCard:
    identity = Identity.generate()
    recipient = RecipientKey.generate(suite)
    cosigner = Cosigner.generate(witness_name(config.cluster, config.id))
    server = tls.self_signed(config.cluster, "custodian", config.id, now=now)
    admin = tls.self_signed(config.cluster, "operator", f"{config.id}-admin", now=now)
    card = EnrolmentCard(
        config.cluster,
        RosterCustodian(
            id=config.id,
            jurisdiction=config.jurisdiction,
            address=address,
            identity=identity.public,
            hpke=recipient.public,
            tls_certificate=server.certificate.decode(),
            witness_key=cosigner.witness_key,
        ),
        now,
    )
    store = keystore.create(
        folder / config.keystore.name,
        config.id,
        identity,
        recipient,
        cosigner,
        sealing,
        opslimit=opslimit,
        memlimit=memlimit,
    )
    try:
        for name in (config.owners, config.bulletins):
            (folder / name).mkdir(mode=0o700)
        furnish(folder, store)
        for name, data in (
            (TLS_CERTIFICATE, server.certificate),
            (TLS_KEY, server.key),
            (ADMIN_CERTIFICATE, admin.certificate),
            (ADMIN_KEY, admin.key),
            (CARD, make_card(card, identity)),
            (CONFIG_NAME, render_config(config).encode()),
        ):
            write_file(folder / name, data)
    except BaseException:
        abandon(store)
        raise
    finally:
        store.close()
    return card


def _remove_leftover(stage: Path, config: CustodianConfig) -> None:
    """Remove what an interrupted init left; its keys were never shown to anybody. Nothing else is removed."""
    if not stage.exists():
        return
    own = {TLS_CERTIFICATE, TLS_KEY, ADMIN_CERTIFICATE, ADMIN_KEY, CARD, CONFIG_NAME, config.owners, config.bulletins}
    own |= {config.rosters, config.operators, config.policy_signers}
    own |= {config.keystore.name + suffix for suffix in ("", "-wal", "-shm", "-journal")}
    if not stage.is_dir() or {path.name for path in stage.iterdir()} - own:
        raise StateError(
            Reason.EXISTS,
            f"{stage} is in the way and is not what an interrupted init leaves",
            next_step="Move it away.",
        )
    shutil.rmtree(stage)


def write_file(path: Path, data: bytes) -> None:
    """A new file of mode 0600, on the disk when this returns."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _choose_port(address: str, what: str) -> str:
    host, port = parse_address(address, what)
    return address if port else f"{host}:{choose_port(host.strip('[]'))}"
