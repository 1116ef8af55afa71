"""What the operators revoked, as the coordinator goes by it and hands it on (docs/spec/revocations.md).

Custodians go by the document themselves, with or without this coordinator. Here it is verified the same way, stored in
one transaction with all that follows from it (jobs ended, workers put in quarantine or let out, leaves for the ledger),
and handed to every custodian that says it has an older one, again and again: a coordinator killed after the transaction
goes on from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import grpc.aio
import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import BulletinRow, Database, ReleaseRow
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.jobs import Job, JobStore
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.outbox import enter
from keyquorum_coordinator.quarantine import let_out, withdraw
from keyquorum_core import manifest as manifests
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.naming import claims_hardware, claims_measurement
from keyquorum_core.bulletin import Bulletin, check_successor, peek_bulletin, verify_bulletin
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.leaves import JobSubmitted
from keyquorum_core.ledger.leaves import Revocation as RevocationLeaf
from keyquorum_core.revocations import NOTHING, REVOCATIONS, Revocation, Revocations, check_follows
from keyquorum_core.roster import Roster
from keyquorum_core.signing import peek_payload
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["MAX_RELAYED", "Withdrawals"]

MAX_RELAYED: Final = 3 << 20
"""Bytes of an envelope that go over the wire in one piece. A larger one reaches custodians as a file."""
_EVERY_SECONDS: Final = 5.0
_CALL_SECONDS: Final = 5.0
_OF_WORKERS: Final = ("worker", "hardware", "measurement")

_log = structlog.get_logger("revocations")


class Withdrawals:
    """``on_leaf`` hears that leaves are in the outbox."""

    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        jobs: JobStore,
        roster: Roster,
        *,
        clock: Callable[[], float] = time.time,
        on_leaf: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._fanout = fanout
        self._jobs = jobs
        self._roster = roster
        self._clock = clock
        self._on_leaf = on_leaf
        self._kept = NOTHING
        self._waking = asyncio.Event()
        self.problems: dict[str, str] = {}
        """By custodian: why it could not be given the present document."""

    # -- the document -------------------------------------------------------------------------------------------------

    def current(self, session: Session) -> Revocations:
        """Inside a transaction: the document in force here. One that expired counts on: revoked is revoked."""
        row = session.get(BulletinRow, REVOCATIONS.name)
        if row is None:
            return NOTHING
        kept = self._kept
        if kept.digest != row.digest:
            kept = self._kept = Revocations.read(peek_bulletin(row.envelope))
        return kept

    async def document(self) -> bytes:
        """The envelope accepted last; empty where there never was one."""
        return await self._database.read(_envelope)

    async def accept(self, envelope: bytes) -> list[Job]:
        """Store it and act on it; returns the jobs that ended or lost their worker. The same one again changes nothing.

        Raises ``TOO_LARGE``, :class:`MalformedError`, and :class:`RefusedError` as custodians would: ``SIGNATURE…``,
        ``BULLETIN``, ``EXPIRED``, ``NOT_YET_VALID``, ``ROLLBACK``; ``STORAGE``.
        """
        if len(envelope) > MAX_RELAYED:
            raise MalformedError(
                Reason.TOO_LARGE,
                "the revocations are too large to be handed on by the coordinator",
                expected=f"at most {MAX_RELAYED} bytes",
                actual=len(envelope),
                next_step="Give the file to each custodian's operator: `keyquorum-custodian revoke FILE`.",
            )
        bulletin, revocations = await asyncio.to_thread(self.verified, envelope)
        now = int(self._clock())

        def work(session: Session) -> list[Job] | None:
            row = session.get(BulletinRow, REVOCATIONS.name)
            if row is not None:
                check_successor(bulletin, row.version, row.digest)
                if row.digest == revocations.digest:
                    return None
            previous = self.current(session)
            check_follows(previous, revocations)
            session.merge(
                BulletinRow(
                    kind=bulletin.kind,
                    version=bulletin.version,
                    digest=revocations.digest,
                    envelope=envelope,
                    accepted_at=now,
                )
            )
            return _apply(session, previous, revocations, now)

        changed = await self._database.write(work)
        self._waking.set()
        if changed is None:
            return []
        _log.warning("revocations.accepted", version=bulletin.version, digest=revocations.digest, jobs=len(changed))
        self._on_leaf()
        self._jobs.heard(changed)
        return changed

    def verified(self, envelope: bytes) -> tuple[Bulletin, Revocations]:
        """A document that would be accepted, but for what it follows. Raises as :meth:`accept`."""
        bulletin = verify_bulletin(
            envelope,
            REVOCATIONS.name,
            self._roster.operator_identities(),
            self._roster.operator_threshold,
            cluster=self._roster.cluster,
        )
        bulletin.check_time(int(self._clock()))
        return bulletin, Revocations.read(bulletin)

    # -- refusing early -----------------------------------------------------------------------------------------------

    def require_asker(self, session: Session, owner: str, leaf: JobSubmitted) -> None:
        """Inside a transaction: neither the job, nor its owner (fingerprint), nor the policy that let it in, nor the
        roster. Raises :class:`RefusedError` (``REVOKED``)."""
        present = self.current(session)
        present.require_asker(job_id=leaf.job_id, owner=owner, roster=self._roster.digest)
        present.require_standing("policy", leaf.policy_sha256)

    async def check_asker(self, owner: str, leaf: JobSubmitted) -> None:
        """As :meth:`require_asker`, for what is not stored."""
        await self._database.read(lambda session: self.require_asker(session, owner, leaf))

    async def check_worker(self, job: Job, evidence: bytes) -> None:
        """Nothing that the worker's evidence claims is revoked; a worker of which something is loses its jobs.

        The evidence is not verified here: custodians do that, and refuse by what it proves. Raises
        :class:`RefusedError` (``REVOKED``), and :class:`MalformedError` for no evidence document.
        """
        document = EvidenceDocument.parse(evidence)
        present = await self._database.read(self.current)
        entry = _claimed(present, document)
        if entry is None:
            return
        now, digest = int(self._clock()), hashlib.sha256(evidence).hexdigest()
        taken = await self._database.write(lambda session: withdraw(session, job.worker, entry, digest, now))
        self._jobs.heard(taken)
        present.require_standing(*entry.name)

    # -- handing it on ------------------------------------------------------------------------------------------------

    async def relay(self) -> None:
        """Give the document to every custodian that has an older one, for ever."""
        while True:
            self._waking.clear()
            try:
                await self.relay_once()
            except KeyquorumError as error:
                _log.error("revocations.not_relayed", reason=str(error.reason), message=error.message)
            try:
                async with asyncio.timeout(_EVERY_SECONDS):
                    await self._waking.wait()
            except TimeoutError:
                continue

    async def relay_once(self) -> None:
        """One round. Raises ``STORAGE``."""
        row = await self._database.read(_row)
        if row is None:
            return
        version, digest, envelope = row
        links = [link for link in self._fanout.links.values() if link.revocations != (version, digest)]
        await asyncio.gather(*(self._give(link, version, envelope) for link in links))
        for link in self._fanout.links.values():
            if link.revocations == (version, digest):
                self.problems.pop(link.id, None)

    async def _give(self, link: Link, version: int, envelope: bytes) -> None:
        has = link.revocations[0]
        if has > version:
            self._problem(link, f"it has version {has} already; give that one to the coordinator too")
            return
        try:
            answer = await link.stub.Revoke(pb.RevokeRequest(document=envelope), timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, link.id)
            self._problem(link, f"{failure.reason}: {failure.message}")
        except KeyquorumError as error:
            self._problem(link, f"{error.reason}: {error.message}")
        else:
            link.revocations = answer.version, answer.digest[:64]
            _log.info("revocations.relayed", custodian=link.id, version=answer.version)

    def _problem(self, link: Link, text: str) -> None:
        if self.problems.get(link.id) != text:
            self.problems[link.id] = text
            _log.warning("revocations.not_taken", custodian=link.id, why=text)


def _row(session: Session) -> tuple[int, str, bytes] | None:
    row = session.get(BulletinRow, REVOCATIONS.name)
    return None if row is None else (row.version, row.digest, bytes(row.envelope))


def _envelope(session: Session) -> bytes:
    row = _row(session)
    return b"" if row is None else row[2]


def _apply(session: Session, previous: Revocations, present: Revocations, now: int) -> list[Job]:
    """All that follows from a new version, in its transaction."""
    for entry in present.revoked.values():
        if entry.name not in previous.revoked:
            leaf = RevocationLeaf(
                target=entry.target,
                subject_sha256=hashlib.sha256(entry.subject.encode()).hexdigest(),
                document_sha256=present.digest,
                document_version=present.version,
                time=now,
            )
            enter(session, leaf, entry.target, entry.subject, str(present.version))
    let_out(session, {f"{target} {subject}" for target, subject in present.revoked}, present.version, now)
    changed = []
    if present.of("job") or present.of("owner"):
        changed += JobStore.end_all(session, lambda job_id, manifest: _why_ended(present, job_id, manifest), now)
    if any(present.of(target) for target in _OF_WORKERS):
        for worker, evidence in _latest_evidence(session).items():
            about = _of_evidence(present, evidence)
            if about is not None:
                changed += withdraw(session, worker, about, hashlib.sha256(evidence).hexdigest(), now)
    return changed


def _why_ended(present: Revocations, job_id: str, manifest: bytes) -> RefusedError | None:
    """Its owner is told by the manifest, which was verified when the job was submitted."""
    entry = present.find("job", job_id)
    if entry is None and present.of("owner"):
        signed = manifests.parse(peek_payload(manifest, manifests.MANIFEST_TYPE, "manifest"))
        entry = present.find("owner", signed.owner_identity.fingerprint)
    if entry is None:
        return None
    return RefusedError(
        Reason.REVOKED,
        f"the operators revoked this {entry.target}: {entry.reason}",
        next_step="If that was a mistake, have them lift it, and submit the job anew",
        details={"target": entry.target},
    )


def _latest_evidence(session: Session) -> Mapping[str, bytes]:
    """By worker: what it showed last, as far as a release to it is on record."""
    newest = select(ReleaseRow.worker, func.max(ReleaseRow.recorded_at).label("at")).group_by(ReleaseRow.worker)
    latest = newest.subquery()
    both = (ReleaseRow.worker == latest.c.worker) & (ReleaseRow.recorded_at == latest.c.at)
    rows = session.execute(select(ReleaseRow.worker, ReleaseRow.evidence).join(latest, both))
    return {worker: bytes(evidence) for worker, evidence in rows}


def _of_evidence(present: Revocations, evidence: bytes) -> Revocation | None:
    try:
        return _claimed(present, EvidenceDocument.parse(evidence))
    except MalformedError:
        return None


def _claimed(present: Revocations, document: EvidenceDocument) -> Revocation | None:
    """The first entry that is about what the document claims."""
    by_key = present.find("worker", hashlib.sha256(document.hpke_key).hexdigest())
    return by_key or _first(
        entry
        for target, claims in (("hardware", claims_hardware), ("measurement", claims_measurement))
        for entry in present.of(target)
        if claims(document, *entry.subject.split(":", 1))
    )


def _first(entries: Iterable[Revocation]) -> Revocation | None:
    return next(iter(entries), None)
