"""Who holds a key under a lease from this custodian, and what a renewal must be (DESIGN §6; docs/spec/release.md).

A worker's first release begins a lease for its job and its recipient key. A further release to the same two is a
renewal: the evidence must be newer than, and continue, the evidence before it (same keys, same hardware, no TPM reset),
and be no older than the key's policy allows. That a lease ends, the worker enforces, by the attested code that it runs;
what is kept here is who has one, so that a worker that turns out to be another is known by name.

Evidence that was refused at a renewal either says nothing about the worker (too old, not signed by hardware: anybody
could have sent it), or that its machine is not any more what a key was given to (:data:`SUSPECT`). Then the worker is
quarantined: its leases are revoked, the appraisals of its hardware dropped, its hardware and its key refused. But only
if it was the worker that handed the evidence in: its keys are public, and genuine hardware of anybody's binds its
evidence to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from keyquorum_core.attestation.appraisal import Appraisal, check_continues
from keyquorum_core.attestation.inventory import HardwareId
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.presentation import check_presentation
from keyquorum_core.release import WINDOW_LIFETIME
from keyquorum_core.signing import PublicIdentity
from keyquorum_custodian.appraisal_rows import decode, encode
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.quarantine import Quarantine

__all__ = ["SUSPECT", "Lease", "Leases"]

SUSPECT: Final = frozenset(
    {
        Reason.DEBUG_ENABLED,
        Reason.MEASUREMENT,
        Reason.TCB,
        Reason.VMPL,
        Reason.PLATFORM,
        Reason.CHIP_ID,
        Reason.BINDING,
        Reason.PROVENANCE,
        Reason.REVOKED,
    }
)
"""Why genuine evidence is refused that says that the machine is not, or not any more, what it was. Not among them:
what time or the network does to good evidence (``STALE``, ``EXPIRED``), and what hardware did not sign (``SIGNATURE``,
``CHAIN``, ``ROOT_NOT_PINNED``, ``MALFORMED``), which says nothing about anybody."""
_KEPT_SECONDS: Final = 86400
_SWEEP_SECONDS: Final = 60
_KEPT_LEASES: Final = 1024
_COLUMNS: Final = "job_id, recipient_sha256, key_id, epoch, granted_at, until, renewals, revoked"


@dataclass(frozen=True, slots=True)
class Lease:
    """``until``: unix seconds by this custodian's clock. ``revoked``: the reason code, empty while it is good."""

    job_id: str
    recipient_sha256: str
    key_id: str
    epoch: int
    granted_at: int
    until: int
    renewals: int
    revoked: str


class Leases:
    """One custodian's leases; used from one thread."""

    def __init__(self, keystore: Keystore, appraisals: Appraisals, quarantine: Quarantine) -> None:
        self._keystore = keystore
        self._appraisals = appraisals
        self._quarantine = quarantine
        self._swept_at = 0
        # Rows as they stand in the keystore, or in the group of releases under way there: only this class writes them.
        self._kept: OrderedDict[tuple[str, str], tuple[Lease, Appraisal]] = OrderedDict()
        keystore.on_lost.append(self._kept.clear)

    def all(self, now: int) -> tuple[Lease, ...]:
        """Those that have not ended at ``now``, revoked ones too, oldest first."""
        rows = self._keystore.select(
            f"SELECT {_COLUMNS} FROM leases WHERE until > ? ORDER BY granted_at, job_id",  # noqa: S608
            now,
        )
        return tuple(Lease(*row) for row in rows)  # type: ignore[arg-type]

    def count(self, now: int) -> int:
        """How many are good."""
        return sum(not lease.revoked for lease in self.all(now))

    def appraise(
        self,
        document: bytes,
        digest: bytes,
        required_types: Iterable[str],
        now: int,
        *,
        job_id: str,
        recipient_sha256: str,
        policy: KeyPolicy,
        presentation: bytes,
    ) -> Appraisal:
        """The appraisal of the evidence with which this recipient asks for this job's key, or asks anew.

        Raises what :meth:`Appraisals.appraise` raises; ``QUARANTINED``; and for a renewal ``LEASE`` (it was revoked),
        ``STALE`` (older evidence than before, or too old), and as :func:`check_continues`. A worker with a lease whose
        evidence is :data:`SUSPECT`, and who signed that it is its own, is in quarantine when this raises.
        """
        self._quarantine.require_worker(recipient_sha256)
        held = self._held(job_id, recipient_sha256)
        if held is not None and held[0].revoked:
            raise RefusedError(
                Reason.LEASE,
                "the worker's lease was revoked",
                expected="a lease in force",
                actual=held[0].revoked,
                next_step="Stop the job and wipe its key; another worker may take it.",
            )
        try:
            appraisal = self._appraisals.appraise(document, digest, tuple(required_types), now)
            if held is not None:
                _check_renewal(held[1], appraisal, policy, now)
        except KeyquorumError as error:
            if held is not None and error.reason in SUSPECT and _presents(held[1], presentation, job_id, digest, error):
                self._suspect(*held, error, document, now)
            raise
        self._quarantine.require_hardware(appraisal.hardware)
        return appraisal

    def grant(self, lease: Lease, appraisal: Appraisal) -> None:
        """Inside a group: this lease begins, or goes on, on this evidence."""
        key = (lease.job_id, lease.recipient_sha256)
        if lease.granted_at >= self._swept_at + _SWEEP_SECONDS:
            self._keystore.change("DELETE FROM leases WHERE until < ?", lease.granted_at - _KEPT_SECONDS)
            self._swept_at = lease.granted_at
            self._kept.clear()
        held = self._held(*key)
        if held is None:
            self._keystore.change(
                "INSERT INTO leases (job_id, recipient_sha256, key_id, epoch, granted_at, until, sealed)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                *key,
                lease.key_id,
                lease.epoch,
                lease.granted_at,
                lease.until,
                self._keystore.seal_row(encode(appraisal), "leases", *key),
            )
        else:
            lease = replace(held[0], until=lease.until, renewals=held[0].renewals + 1)
            self._renew(held[0], lease, None if appraisal == held[1] else appraisal)
        self._keep(key, (lease, appraisal))

    def _renew(self, before: Lease, lease: Lease, appraisal: Appraisal | None) -> None:
        """Write what changed and no more: the sealed appraisal is long, and ``until`` stands in an index too."""
        key = (lease.job_id, lease.recipient_sha256)
        changes = ["renewals = ?"]
        values: list[object] = [lease.renewals]
        if lease.until != before.until:
            changes.append("until = ?")
            values.append(lease.until)
        if appraisal is not None:
            changes.append("sealed = ?")
            values.append(self._keystore.seal_row(encode(appraisal), "leases", *key))
        statement = f"UPDATE leases SET {', '.join(changes)} WHERE job_id = ? AND recipient_sha256 = ?"  # noqa: S608
        self._keystore.change(statement, *values, *key)

    def revoke(
        self,
        reason: Reason,
        *,
        hardware: Iterable[HardwareId] = (),
        measurements: Iterable[str] = (),
        recipient_sha256: str = "",
        job_id: str = "",
        key_id: str = "",
    ) -> tuple[Lease, ...]:
        """Renew none of these any more: those of a recipient key, a job, a key, of any of this hardware, or of a
        machine on which any of these was measured (``type:hex``). Returns those that were good until now. On the disk
        when this returns. Raises ``STORAGE``."""
        wanted = {str(each) for each in hardware} | set(measurements)

        def meant(lease: Lease) -> bool:
            if lease.revoked:
                return False
            if recipient_sha256 == lease.recipient_sha256 or job_id == lease.job_id or key_id == lease.key_id:
                return True
            held = self._held(lease.job_id, lease.recipient_sha256) if wanted else None
            if held is None:
                return False
            shown = held[1]
            measured = (f"{item.type}:{item.measurement}" for item in shown.items if item.measurement)
            return not wanted.isdisjoint([*map(str, shown.hardware), *measured])

        rows = self._keystore.select(f"SELECT {_COLUMNS} FROM leases")  # noqa: S608
        gone = tuple(lease for lease in (Lease(*row) for row in rows) if meant(lease))  # type: ignore[arg-type]
        for lease in gone:
            self._kept.pop((lease.job_id, lease.recipient_sha256), None)
        with self._keystore.transaction():
            for lease in gone:
                self._keystore.change(
                    "UPDATE leases SET revoked = ? WHERE job_id = ? AND recipient_sha256 = ?",
                    str(reason),
                    lease.job_id,
                    lease.recipient_sha256,
                )
        return gone

    def _held(self, job_id: str, recipient_sha256: str) -> tuple[Lease, Appraisal] | None:
        key = (job_id, recipient_sha256)
        held = self._kept.get(key)
        if held is None:
            rows = self._keystore.select(
                f"SELECT {_COLUMNS}, sealed FROM leases WHERE job_id = ? AND recipient_sha256 = ?",  # noqa: S608
                *key,
            )
            if not rows:
                return None
            *members, sealed = rows[0]
            lease = Lease(*members)  # type: ignore[arg-type]
            held = lease, decode(self._keystore.unseal_row(sealed, "leases", *key))
            self._keep(key, held)
        return held

    def _keep(self, key: tuple[str, str], held: tuple[Lease, Appraisal]) -> None:
        self._kept[key] = held
        self._kept.move_to_end(key)
        if len(self._kept) > _KEPT_LEASES:
            self._kept.popitem(last=False)

    def _suspect(self, lease: Lease, before: Appraisal, error: KeyquorumError, document: bytes, now: int) -> None:
        """Quarantine the worker. What cannot be written is still in force until a restart, and the refusal stands."""
        entry = self._quarantine.put(
            reason=error.reason,
            message=error.message,
            now=now,
            hardware=before.hardware,
            workers=[lease.recipient_sha256],
            job_id=lease.job_id,
            evidence=document,
        )
        error.details["quarantine"] = str(entry.number)
        self.revoke(error.reason, hardware=before.hardware, recipient_sha256=lease.recipient_sha256)
        for hardware in before.hardware:
            self._appraisals.drop(hardware=hardware)


def _presents(before: Appraisal, presentation: bytes, job_id: str, digest: bytes, error: KeyquorumError) -> bool:
    """Whether the worker of an earlier appraisal signed that it hands in this evidence for this job."""
    try:
        worker = PublicIdentity.from_bytes(before.signing_key)
        check_presentation(presentation, worker, job_id, digest.hex())
    except KeyquorumError as doubt:
        error.details["presentation"] = str(doubt.reason)
        return False
    return True


def _check_renewal(before: Appraisal, now_shown: Appraisal, policy: KeyPolicy, now: int) -> None:
    if now_shown.evidence_sha256 != before.evidence_sha256:  # the same again: an answer that got lost
        check_continues(before, now_shown)
    # A nonce is good for a window's lifetime, so nobody's evidence is fresher than that for sure.
    oldest = max(before.attested_at, now - policy.reattest_seconds - WINDOW_LIFETIME)
    if now_shown.attested_at < oldest:
        raise RefusedError(
            Reason.STALE,
            "a lease is renewed on new evidence only",
            expected=f"evidence of {oldest} or later",
            actual=now_shown.attested_at,
            next_step="Attest anew, over the custodians' present nonces.",
        )
