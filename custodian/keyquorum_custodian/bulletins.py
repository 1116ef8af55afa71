"""The operators' signed documents as this custodian accepted them: the last good one of each kind.

The format is docs/spec/bulletin.md. A document arrives as a file ``KIND.json`` in the custodian's folder of bulletins,
noticed by its stamp whenever it is asked for, or through the operator's listener (:meth:`Bulletins.accept`). It is
verified against the roster's operators, compared with the last one accepted, read by its kind, and only then kept:
version, digest and envelope in the keystore, so that neither a restart nor a removed file brings an older one back. A
file that is refused changes nothing; the last good document stays, and :meth:`Bulletins.warnings` says so. Whether a
document is in date is asked at every use.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from keyquorum_core.bulletin import (
    MAX_BULLETIN_ENVELOPE,
    Bulletin,
    Kind,
    check_successor,
    peek_bulletin,
    verify_bulletin,
)
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError
from keyquorum_core.signing import PublicIdentity
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.stamps import Stamp, settled, stamp_of
from keyquorum_custodian.trust import Operators
from keyquorum_protos.wire.files import read_bytes

__all__ = ["Accepted", "Bulletins", "replace_file"]

T = TypeVar("T", covariant=True)
_SOON = 14 * 86400
_TRANSIENT = frozenset({Reason.NOT_YET_VALID, Reason.STORAGE})
"""What may pass by itself: such a file is tried again, once a second at most."""


@dataclass(frozen=True, slots=True)
class Accepted(Generic[T]):
    """A document this custodian accepted, and what its body means."""

    kind: str
    version: int
    digest: str
    """SHA-256 of the payload, hex."""
    issued_at: int
    expires_at: int
    signers: tuple[str, ...]
    value: T


@dataclass(slots=True)
class _Slot:
    """One kind: the floor below which nothing is taken, the document in force, and how its file was found last."""

    kind: Kind[object]
    path: Path
    version: int = 0
    digest: str = ""
    accepted: Accepted[object] | None = None
    last: object = None
    """What the document accepted last means, also once it is no longer in force."""
    fallen: KeyquorumError | None = None
    """Why the document accepted last is no longer in force, though it is in date."""
    problem: KeyquorumError | None = None
    """What is wrong with the file."""
    tried: Stamp | None = None
    tried_at: int = -1
    settled: bool = False


class Bulletins:
    """One custodian's documents of ``kinds``, used from one thread. ``clock`` gives unix seconds. ``own_signers``:
    for kinds whose signers this custodian's configuration names, in place of the roster's operators.

    What was accepted before is verified and read anew; where that fails (the operators changed, say) nothing of that
    kind is in force until a new one is accepted. Raises ``STORAGE``.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Iterable[Kind[object]],
        *,
        cluster: str,
        operators: Mapping[str, PublicIdentity],
        threshold: int,
        keystore: Keystore,
        clock: Callable[[], float],
        own_signers: Mapping[str, Operators] | None = None,
    ) -> None:
        self._own_signers = dict(own_signers or {})
        self._folder = folder
        self._cluster = cluster
        self._operators = operators
        self._threshold = threshold
        self._keystore = keystore
        self._clock = clock
        self._slots = {kind.name: _Slot(kind, folder / f"{kind.name}.json") for kind in kinds}
        self._events: list[tuple[str, dict[str, object]]] = []
        for slot in self._slots.values():
            self._restore(slot)
            self._look(slot, int(clock()))

    # -- use -------------------------------------------------------------------------------------------------------

    def find(self, kind: Kind[T]) -> Accepted[T] | None:
        """The document of ``kind`` in force, or ``None`` where there never was one.

        Raises :class:`RefusedError` (``EXPIRED``, ``NOT_YET_VALID``) when the last accepted one is not in date, and
        what it was refused for when it no longer stands under the present operators.
        """
        slot = self._slots[kind.name]
        now = int(self._clock())
        self._look(slot, now)
        found = slot.accepted
        if found is None:
            if slot.fallen is not None:
                raise slot.fallen
            return None
        if not found.issued_at <= now < found.expires_at:
            early = now < found.issued_at
            raise RefusedError(
                Reason.NOT_YET_VALID if early else Reason.EXPIRED,
                f"this custodian's {found.kind} (version {found.version}) {'is not yet valid' if early else 'expired'}",
                expected=f"{found.issued_at}…{found.expires_at}",
                actual=now,
                next_step="Compare clocks." if early else "Have the operators sign a new version.",
            )
        return cast("Accepted[T]", found)

    def get(self, kind: Kind[T]) -> Accepted[T]:
        """As :meth:`find`; raises :class:`StateError` (``NOT_FOUND``) where there never was one."""
        found = self.find(kind)
        if found is None:
            raise StateError(
                Reason.NOT_FOUND,
                f"this custodian has accepted no {kind.name}",
                expected=f"a document signed by {self._threshold} of the operators",
                next_step=f"Put it at {self._slots[kind.name].path}, or run `keyquorum-custodian bulletin accept`.",
            )
        return found

    def accepted(self, kind: Kind[T]) -> Accepted[T] | None:
        """The document of ``kind`` accepted last, in date or not: for telling, never for deciding."""
        return cast("Accepted[T] | None", self._slots[kind.name].accepted)

    def last(self, kind: Kind[T]) -> T | None:
        """What the document of ``kind`` accepted last means, also where it is no longer in force: to compare with the
        next one."""
        return cast("T | None", self._slots[kind.name].last)

    def digest(self, kind: str) -> str:
        """The digest of the document of ``kind`` accepted last, in date or not; empty where there is none, or where
        this custodian has no use for the kind. What was kept under another digest is not found any more."""
        slot = self._slots.get(kind)
        return "" if slot is None or slot.accepted is None else slot.accepted.digest

    # -- accepting -------------------------------------------------------------------------------------------------

    def accept(self, envelope: bytes) -> Accepted[object]:
        """Accept a document given by the operator, and leave it as the file of its kind.

        Raises what a file would be refused for, and ``BULLETIN`` for a kind that this custodian has no use for.
        """
        claimed = peek_bulletin(envelope)
        slot = self._slots.get(claimed.kind)
        if slot is None:
            raise RefusedError(
                Reason.BULLETIN,
                "a bulletin of a kind that this custodian has no use for",
                expected=", ".join(sorted(self._slots)),
                actual=claimed.kind,
            )
        accepted = self._judge(slot, envelope, int(self._clock()))
        slot.problem = None
        with contextlib.suppress(OSError):  # accepted all the same; an older file left there is reported as one
            replace_file(slot.path, envelope)
        return accepted

    def refresh(self) -> None:
        """Look at every file now, rather than when its kind is next asked for."""
        for slot in self._slots.values():
            self._look(slot, int(self._clock()))

    def _restore(self, slot: _Slot) -> None:
        row = self._keystore.bulletin(slot.kind.name)
        if row is None:
            return
        slot.version, slot.digest, envelope = row
        with contextlib.suppress(KeyquorumError):
            slot.last = slot.kind.read(peek_bulletin(envelope))
        try:
            bulletin = self._verify(slot, envelope)
            slot.accepted = _accepted(bulletin, slot.digest, slot.kind.read(bulletin))
        except KeyquorumError as error:
            slot.fallen = error

    def _look(self, slot: _Slot, now: int) -> None:
        """Take the kind's file in, if it is another one than at the last look."""
        try:
            stamp = stamp_of(slot.path)
        except FileNotFoundError:
            slot.tried, slot.problem = None, None
            return
        except OSError:
            stamp = (0, 0, 0, 0)  # reading it says what is wrong
        if stamp == slot.tried and (slot.settled or now == slot.tried_at):
            return
        slot.tried, slot.tried_at = stamp, now
        try:
            self._judge(slot, read_bytes(slot.path, f"the file of {slot.kind.name}", MAX_BULLETIN_ENVELOPE), now)
        except KeyquorumError as error:
            if str(error) != str(slot.problem):
                self._events.append(("bulletin refused", {"file": str(slot.path), **error.as_dict()}))
            slot.problem = error
        else:
            slot.problem = None
        transient = slot.problem is not None and slot.problem.reason in _TRANSIENT
        slot.settled = not transient and settled(stamp) is not None

    def _verify(self, slot: _Slot, envelope: bytes) -> Bulletin:
        signers, threshold = self._operators, self._threshold
        own = self._own_signers.get(slot.kind.name)
        if own is not None:
            signers, threshold = own.identities, own.threshold
        bulletin = verify_bulletin(envelope, slot.kind.name, signers, threshold, cluster=self._cluster)
        check_successor(bulletin, slot.version, slot.digest)
        return bulletin

    def _judge(self, slot: _Slot, envelope: bytes, now: int) -> Accepted[object]:
        bulletin = self._verify(slot, envelope)
        digest = bulletin.digest
        if slot.accepted is not None and slot.accepted.digest == digest:
            return slot.accepted
        bulletin.check_time(now)
        accepted = _accepted(bulletin, digest, slot.kind.read(bulletin))
        if slot.last is not None and bulletin.version != slot.version:
            slot.kind.follows(slot.last, accepted.value)
        self._keystore.save_bulletin(slot.kind.name, bulletin.version, digest, envelope, now)
        slot.version, slot.digest, slot.accepted, slot.fallen = bulletin.version, digest, accepted, None
        slot.last = accepted.value
        self._events.append(
            ("bulletin accepted", {"kind": accepted.kind, "version": accepted.version, "digest": digest})
        )
        return accepted

    # -- telling ---------------------------------------------------------------------------------------------------

    def states(self) -> list[tuple[str, Accepted[Any] | None, str]]:
        """Kind, the last document accepted (in date or not), and what is wrong (empty: nothing)."""
        return [
            (name, slot.accepted, "; ".join(str(each) for each in (slot.fallen, slot.problem) if each is not None))
            for name, slot in sorted(self._slots.items())
        ]

    def warnings(self) -> list[str]:
        """For ``status``: refused files, documents that expired or will soon."""
        out = []
        now = int(self._clock())
        for name, accepted, problem in self.states():
            if problem:
                stays = f"version {accepted.version} stays in force" if accepted else "none is in force"
                out.append(f"the {name} at hand is refused, {stays}: {problem}")
            if accepted is not None and now >= accepted.expires_at:
                out.append(f"the {name} expired: nothing that needs it is answered; have the operators sign a new one")
            elif accepted is not None and accepted.expires_at - now < _SOON:
                out.append(f"the {name} expires within 14 days; have the operators sign a new one")
        return out

    def take_events(self) -> list[tuple[str, dict[str, object]]]:
        """What happened since the last call, for the log: a message and its members."""
        events, self._events = self._events, []
        return events


def _accepted(bulletin: Bulletin, digest: str, value: object) -> Accepted[object]:
    return Accepted(
        kind=bulletin.kind,
        version=bulletin.version,
        digest=digest,
        issued_at=bulletin.issued_at,
        expires_at=bulletin.expires_at,
        signers=bulletin.signers,
        value=value,
    )


def replace_file(path: Path, data: bytes) -> None:
    """The file, whole or as it was. Raises :class:`OSError`."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
