"""The coordinator's own seat: may this job be submitted? (DESIGN §6; docs/spec/policy.md)

Its answer spares owners and custodians the rest, and is nobody's permit: each custodian decides again for itself. The
rules are core's (:class:`~keyquorum_core.policy.seat.PolicySeat`). Here is where bundle and lists come from: files
``KIND.json`` in the folder of bulletins, looked at anew for every submission, signed by whom the configuration names.
What was accepted last stands in the database, with the latest time the clock showed, so that neither a restart, a
removed file nor another replica brings an older one back; a file that is refused leaves the last good one in force.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast

import structlog
from sqlalchemy.orm import Session

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.database import BulletinRow, ClockRow, Database
from keyquorum_core.bulletin import (
    MAX_BULLETIN_ENVELOPE,
    Bulletin,
    Kind,
    check_successor,
    peek_bulletin,
    verify_bulletin,
)
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.policy.bundle import EXPORT, POLICY_KIND, SANCTIONS, policy_kind
from keyquorum_core.policy.engine import Decision, PolicyEngine
from keyquorum_core.policy.facts import JobFacts, QuorumFacts, Seat
from keyquorum_core.policy.lists import LIST_KINDS, ControlledList
from keyquorum_core.policy.seat import PolicySeat, SteadyTime
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import parse_operators
from keyquorum_core.signing import PublicIdentity
from keyquorum_protos.wire.files import read_bytes

__all__ = ["KINDS", "SEAT", "CoordinatorPolicy", "install_document", "policy_signers"]

SEAT: Final = Seat("coordinator")
KINDS: Final[tuple[Kind[object], ...]] = (policy_kind(SEAT), EXPORT, SANCTIONS)
_HOW_TO_INSTALL: Final = (
    "Sign a bundle with `keyquorum policy sign`, and run `keyquorum-coordinator policy install FILE --dir DIR`."
)
_SAVE_SECONDS: Final = 60
_TRANSIENT: Final = frozenset({Reason.NOT_YET_VALID, Reason.STORAGE})
"""What may pass by itself: such a file is tried again."""
_SETTLED_NS: Final = 1_000_000_000
_CLOCK: Final = "policy"

T = TypeVar("T")
Signers = tuple[Mapping[str, PublicIdentity], int]
"""By name, and how many of them must have signed."""
_Stamp = tuple[int, int, int, int]

_log = structlog.get_logger("policy")


def policy_signers(config: CoordinatorConfig) -> Signers:
    """Whose signatures count. Raises ``NOT_FOUND`` or :class:`MalformedError`."""
    return parse_operators(read_bytes(config.path(config.policy_signers), "the file of policy signers"))


@dataclass(slots=True)
class _Slot:
    """One kind: the last document accepted, what it means, and the file as it was looked at last."""

    kind: Kind[object]
    path: Path
    bulletin: Bulletin | None = None
    value: object = None
    seen: _Stamp | None = None
    problem: str = ""


class _Documents:
    """Bundle and lists in force."""

    def __init__(
        self, folder: Path, signers: Signers, cluster: str, database: Database, now: Callable[[], int]
    ) -> None:
        self._signers = signers
        self._cluster = cluster
        self._database = database
        self._now = now
        self._slots = {kind.name: _Slot(kind, folder / f"{kind.name}.json") for kind in KINDS}

    def engine(self) -> PolicyEngine | None:
        return cast("PolicyEngine | None", self._find(POLICY_KIND))

    def list_named(self, name: str) -> ControlledList | None:
        return cast("ControlledList | None", self._find(LIST_KINDS[name]))

    def _find(self, name: str) -> object:
        """What the document in force means; None where there never was one. Raises ``EXPIRED``, ``NOT_YET_VALID``."""
        slot = self._slots[name]
        self._look(slot)
        if slot.bulletin is None:
            return None
        slot.bulletin.check_time(self._now())
        return slot.value

    def _look(self, slot: _Slot) -> None:
        """Take the file in, if it is another one than at the last look, and what was accepted before it."""
        stamp = _stamp_of(slot.path)
        if stamp is not None and stamp == slot.seen:
            return
        slot.seen = stamp
        self._restore(slot)
        if not slot.path.exists():
            return
        try:
            self._judge(slot, read_bytes(slot.path, f"the file of {slot.kind.name}", MAX_BULLETIN_ENVELOPE))
            slot.problem = ""
        except KeyquorumError as error:
            if error.reason in _TRANSIENT:
                slot.seen = None
            if str(error) != slot.problem:
                slot.problem = str(error)
                _log.error("bulletin.refused", file=str(slot.path), **error.as_dict())

    def _restore(self, slot: _Slot) -> None:
        row = self._database.run_read(lambda session: session.get(BulletinRow, slot.kind.name))
        if row is None or (slot.bulletin is not None and slot.bulletin.version >= row.version):
            return
        try:
            bulletin = self._verify(slot, row.envelope)
            slot.bulletin, slot.value = bulletin, slot.kind.read(bulletin)
        except KeyquorumError as error:  # as when its signers are not asked any more: then nothing is in force
            _log.error("bulletin.not_restored", kind=slot.kind.name, **error.as_dict())

    def _verify(self, slot: _Slot, envelope: bytes) -> Bulletin:
        signers, threshold = self._signers
        return verify_bulletin(envelope, slot.kind.name, signers, threshold, cluster=self._cluster)

    def _judge(self, slot: _Slot, envelope: bytes) -> None:
        bulletin = self._verify(slot, envelope)
        if slot.bulletin is not None and slot.bulletin.digest == bulletin.digest:
            return
        bulletin.check_time(self._now())
        value = slot.kind.read(bulletin)

        def save(session: Session) -> None:
            row = session.get(BulletinRow, slot.kind.name)
            if row is not None:
                check_successor(bulletin, row.version, row.digest)
            session.merge(
                BulletinRow(
                    kind=bulletin.kind,
                    version=bulletin.version,
                    digest=bulletin.digest,
                    envelope=envelope,
                    accepted_at=self._now(),
                )
            )

        self._database.run_write(save)
        slot.bulletin, slot.value = bulletin, value
        _log.info("bulletin.accepted", kind=bulletin.kind, version=bulletin.version, digest=bulletin.digest)


class CoordinatorPolicy:
    """May be called from any thread; waits for disk and database."""

    def __init__(
        self, config: CoordinatorConfig, quorum: Quorum, database: Database, *, clock: Callable[[], float]
    ) -> None:
        row = database.run_read(lambda session: session.get(ClockRow, _CLOCK))
        self._database = database
        self._time = SteadyTime(clock, row.highest if row is not None else 0)
        self._saved = self._time.highest
        documents = _Documents(
            config.path(config.bulletins), policy_signers(config), config.cluster, database, self._time.now
        )
        self._seat = PolicySeat(SEAT, QuorumFacts.of(quorum), documents, self._time, how_to_install=_HOW_TO_INSTALL)
        self._lock = threading.Lock()

    def check_submission(self, job: JobFacts) -> Decision:
        """May this job be submitted? Raises as :meth:`PolicySeat.decide`, and ``STORAGE``."""
        with self._lock:
            decision = self._seat.check_submission(job)
            self._save_time()
            return decision

    def _save_time(self) -> None:
        now = self._time.highest
        if now < self._saved + _SAVE_SECONDS:
            return

        def save(session: Session) -> None:
            row = session.get(ClockRow, _CLOCK)
            session.merge(ClockRow(name=_CLOCK, highest=max(now, row.highest if row is not None else 0)))

        self._database.run_write(save)
        self._saved = now


def _stamp_of(path: Path) -> _Stamp | None:
    """What tells one version of a file from another; None, which equals nothing, for no file, and for one so new that
    it may change again without looking newer."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) <= _SETTLED_NS:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def install_document(config: CoordinatorConfig, envelope: bytes) -> Bulletin:
    """Verify a bundle or list as the coordinator will, and leave it as the file that it looks at.

    Raises what the coordinator would refuse it for, but for an older version, which its database knows; ``STORAGE``.
    """
    kinds = {kind.name: kind for kind in KINDS}
    claimed = peek_bulletin(envelope)
    if claimed.kind not in kinds:
        raise RefusedError(
            Reason.BULLETIN, "neither a policy nor a list", expected=", ".join(sorted(kinds)), actual=claimed.kind
        )
    signers, threshold = policy_signers(config)
    bulletin = verify_bulletin(envelope, claimed.kind, signers, threshold, cluster=config.cluster)
    bulletin.check_time(int(time.time()))
    kinds[claimed.kind].read(bulletin)
    target = config.path(config.bulletins) / f"{claimed.kind}.json"
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with partial.open("wb") as file:
            file.write(envelope)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UnavailableError(Reason.STORAGE, f"{target} could not be written", actual=error.strerror) from None
    return bulletin
