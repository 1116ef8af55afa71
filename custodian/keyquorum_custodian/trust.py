"""Whom this custodian's own operator decided to trust: roster signers, owners, hardware. Files, read strictly.

``operators.json``: ``{"threshold": n, "operators": {name: identity}}``, who may sign rosters and ceremony plans.
``owners/NAME.json``: ``{"name": NAME, "identity": identity}``, one file for each owner whose manifests count; with
``"canary": true`` an owner for drills, who gets canary keys only. An identity is base64 of 1984 bytes. Nothing here
comes from the network.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core import names
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.roster import parse_operators
from keyquorum_core.signing import PUBLIC_IDENTITY_SIZE, PublicIdentity
from keyquorum_core.strictjson import Fields, loads
from keyquorum_custodian.stamps import Stamp, settled, stamp_of
from keyquorum_protos.wire.files import read_bytes

__all__ = ["Operators", "Owners", "add_owner", "load_operators"]

_MAX_OWNERS = 100_000


@dataclass(frozen=True, slots=True)
class Operators:
    """Who may sign rosters (``threshold`` of them together) and ceremony plans."""

    threshold: int
    identities: Mapping[str, PublicIdentity]


def load_operators(path: Path, what: str = "operators file") -> Operators:
    """Raises ``NOT_FOUND`` or :class:`MalformedError`."""
    identities, threshold = parse_operators(read_bytes(path, what))
    return Operators(threshold, identities)


def _identity(fields: Fields, name: str) -> PublicIdentity:
    raw = fields.base64(name, min_bytes=PUBLIC_IDENTITY_SIZE, max_bytes=PUBLIC_IDENTITY_SIZE)
    return PublicIdentity.from_bytes(raw)


class Owners:
    """The owners in a folder, read anew whenever a file there is added, replaced, rewritten or removed.

    A file added, removed or renamed changes the folder's stamp, a file rewritten in place only its own. A look at one
    owner therefore takes two ``stat`` calls, of the folder and of that owner's file, however many owners there are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder_stamp: Stamp | None = None
        self._identities: dict[str, PublicIdentity] = {}
        self._canary: frozenset[str] = frozenset()
        self._stamps: dict[str, tuple[str, Stamp | None]] = {}

    def all(self) -> Mapping[str, PublicIdentity]:
        """Identities by name. Raises :class:`MalformedError` or ``STORAGE`` when the folder cannot be read whole."""
        self._refresh(tuple(self._stamps))
        return self._identities

    def _refresh(self, looked_at: tuple[str, ...]) -> None:
        """Read the folder again unless it, and the files of the owners ``looked_at``, are as they were."""
        try:
            stamp = stamp_of(self._folder)
        except OSError as error:
            raise UnavailableError(
                Reason.STORAGE, "the owners' folder cannot be read", expected=self._folder, actual=error.strerror
            ) from None
        if stamp == self._folder_stamp and all(self._unchanged(name) for name in looked_at):
            return
        self._folder_stamp = None
        self._identities = self._read()
        self._folder_stamp = settled(stamp)

    def _unchanged(self, name: str) -> bool:
        known = self._stamps.get(name)
        if known is None:  # an unknown owner: its file would have changed the folder
            return True
        path, stamp = known
        try:
            return stamp == stamp_of(path)
        except OSError:
            return False

    def _read(self) -> dict[str, PublicIdentity]:
        paths = sorted(self._folder.glob("*.json"))
        if len(paths) > _MAX_OWNERS:
            raise MalformedError(Reason.TOO_LARGE, "too many owners", expected=f"at most {_MAX_OWNERS}")
        out: dict[str, PublicIdentity] = {}
        canary: set[str] = set()
        stamps: dict[str, tuple[str, Stamp | None]] = {}
        for path in paths:
            what = f"owner file {path.name}"
            with contextlib.suppress(OSError):  # reading it says what is wrong
                stamps[path.stem] = (str(path), settled(stamp_of(path)))
            fields = Fields(loads(read_bytes(path, what, 64 << 10), what, max_depth=1), what)
            fields.literal("name", path.stem)
            names.check(names.PRINCIPAL, path.stem, "owner name")
            out[path.stem] = _identity(fields, "identity")
            if "canary" in fields and fields.boolean("canary"):
                canary.add(path.stem)
            fields.done()
        self._stamps = stamps
        self._canary = frozenset(canary)
        return out

    def for_drills(self, name: str) -> bool:
        """Whether this owner, as last looked at, gets canary keys and no other."""
        return name in self._canary

    def identity(self, name: str) -> PublicIdentity:
        """Raises :class:`RefusedError` (``UNKNOWN_OWNER``)."""
        self._refresh((name,))
        found = self._identities.get(name)
        if found is None:
            raise RefusedError(
                Reason.UNKNOWN_OWNER,
                "the manifest's owner is not known to this custodian",
                expected="an owner that this custodian's operator added",
                actual=name[:64],
                next_step="Have the custodian's operator run `keyquorum-custodian owner add`.",
            )
        return found


def add_owner(folder: Path, public_file: bytes, *, canary: bool = False) -> tuple[str, PublicIdentity]:
    """Trust the owner of a ``NAME.pub.json`` file (name, role, identity, HPKE key); ``canary``: for drills only.
    Idempotent.

    Raises :class:`MalformedError`, ``ROLE`` (an operator's file) or ``EXISTS`` (another identity has that name).
    """
    what = "public identity file"
    fields = Fields(loads(public_file, what, max_bytes=4 << 20, max_depth=1), what)
    name = fields.text("name", max_length=64)
    names.check(names.PRINCIPAL, name, "owner name")
    role = fields.text("role", max_length=32)
    identity = _identity(fields, "identity")
    if "hpke" in fields:
        fields.base64("hpke", max_bytes=2 << 20)
    fields.done()
    if role != "owner":
        raise RefusedError(Reason.ROLE, "only owners sign manifests", expected="role owner", actual=role)
    owners = Owners(folder)
    known = owners.all().get(name)
    if known is not None and known != identity:
        raise StateError(
            Reason.EXISTS,
            f"an owner named {name} is known with another identity",
            expected=known.fingerprint,
            actual=identity.fingerprint,
            next_step=f"If the owner changed keys, remove {folder / name}.json first.",
        )
    if known is not None and owners.for_drills(name) != canary:
        raise StateError(
            Reason.EXISTS,
            f"an owner named {name} is known already",
            expected="for drills only" if owners.for_drills(name) else "for every key but canaries",
            actual="for drills only" if canary else "for every key but canaries",
            next_step=f"Remove {folder / name}.json first.",
        )
    document: dict[str, object] = {"name": name, "identity": base64.b64encode(identity.to_bytes()).decode()}
    if canary:
        document["canary"] = True
    target = folder / f"{name}.json"
    partial = folder / f".{name}.partial"
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UnavailableError(Reason.STORAGE, f"{target} could not be written", actual=error.strerror) from None
    return name, identity
