"""What the operators revoked, as this custodian applies it: to the next request, to leases, to kept appraisals.

The document is a bulletin of kind ``revocations`` and reaches a custodian as its operator likes, as a file too: no
coordinator is needed, and none can keep it away. Where none was ever accepted nothing is revoked; one that expired, or
that the present operators did not sign, stops every release until a new one is accepted.
"""

from __future__ import annotations

from keyquorum_core.attestation.inventory import HardwareId
from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.revocations import NOTHING, REVOCATIONS, Revocations, changes
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.bulletins import Accepted, Bulletins
from keyquorum_custodian.leases import Leases

__all__ = ["Withdrawn"]


class Withdrawn:
    """One custodian's revocations; used from one thread."""

    def __init__(self, bulletins: Bulletins, leases: Leases, appraisals: Appraisals) -> None:
        self._bulletins = bulletins
        self._leases = leases
        self._appraisals = appraisals
        # Not kept across restarts: applying a document twice changes nothing, and a crash may have cut the first short.
        self._applied = ""

    def current(self) -> Revocations:
        """The document in force, its leases ended and its appraisals dropped.

        Raises ``EXPIRED``, ``NOT_YET_VALID``, ``SIGNATURE…`` where the document accepted last is not in force, and
        ``STORAGE`` when its effects could not be written: nothing may be released then.
        """
        found = self._bulletins.find(REVOCATIONS)
        if found is None:
            return NOTHING
        if found.digest != self._applied:
            self._apply(found.value)
            self._applied = found.digest
        return found.value

    def accept(self, envelope: bytes) -> tuple[Accepted[object], tuple[str, ...]]:
        """Take a document of this kind, and no other, from whoever hands it over, and act on it. What it changes, line
        by line. Raises as :meth:`Bulletins.accept`; ``BULLETIN`` for another kind."""
        claimed = peek_bulletin(envelope)
        if claimed.kind != REVOCATIONS.name:
            raise RefusedError(
                Reason.BULLETIN, "a document of another kind", expected=REVOCATIONS.name, actual=claimed.kind
            )
        before = self._bulletins.last(REVOCATIONS) or NOTHING
        accepted = self._bulletins.accept(envelope)
        return accepted, changes(before, self.current())

    def _apply(self, revocations: Revocations) -> None:
        hardware = [HardwareId(*entry.subject.split(":", 1)) for entry in revocations.of("hardware")]
        if hardware:
            self._leases.revoke(Reason.REVOKED, hardware=hardware)
        for entry in revocations.of("worker"):
            self._leases.revoke(Reason.REVOKED, recipient_sha256=entry.subject)
        for entry in revocations.of("job"):
            self._leases.revoke(Reason.REVOKED, job_id=entry.subject)
        if measurements := [entry.subject for entry in revocations.of("measurement")]:
            self._leases.revoke(Reason.REVOKED, measurements=measurements)
        for each in hardware:
            self._appraisals.drop(hardware=each)
