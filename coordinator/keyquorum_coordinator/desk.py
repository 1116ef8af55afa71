"""Whose job it is, and what each caller may do with it: the coordinator's front desk.

An owner acts on jobs whose manifest names it; a worker on the job it holds. Somebody else's job looks like none, so
that job ids cannot be tried out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from keyquorum_coordinator.admission import Epochs, admit, admit_key_request, check_opening, check_statement, facts_of
from keyquorum_coordinator.artifacts import ArtifactStore, WriteRight
from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.certified import CertifiedEpochs, Handed
from keyquorum_coordinator.denials import Denials
from keyquorum_coordinator.fanout import Arrival, Fanout
from keyquorum_coordinator.job_states import FINAL, JobState
from keyquorum_coordinator.jobs import Job, JobEvent, JobStore
from keyquorum_coordinator.outbox import Outbox, request_id
from keyquorum_coordinator.policy import CoordinatorPolicy
from keyquorum_coordinator.quarantine import Verdicts, WorkerQuarantine
from keyquorum_coordinator.releases import ReleaseRecord, Releases, Shown
from keyquorum_coordinator.telemetry import StoredBatch, TelemetryStore
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.leaves import JobSubmitted
from keyquorum_core.policy.engine import Decision
from keyquorum_core.policy.facts import JobFacts
from keyquorum_protos.wire.guard import Peer

__all__ = ["Desk"]

_MAX_CLAIM_WAIT = 300
_POLL = 5.0  # seconds: another coordinator on the same database cannot wake our waiters
_MIB = 1 << 20


Admitted = TypeVar("Admitted")
_Decide = Callable[[JobFacts], Decision]
_Admission = Callable[[bytes, str, int, Epochs, _Decide], Admitted]


class Desk:
    """``stopping`` is set when the coordinator shuts down: those who wait are sent away to come back later."""

    def __init__(
        self,
        *,
        jobs: JobStore,
        artifacts: ArtifactStore,
        releases: Releases,
        ceremonies: Ceremonies,
        certified: CertifiedEpochs,
        epochs: Epochs,
        fanout: Fanout,
        outbox: Outbox,
        denials: Denials,
        quarantine: WorkerQuarantine,
        telemetry: TelemetryStore,
        withdrawals: Withdrawals,
        policy: CoordinatorPolicy,
        roster_envelope: bytes,
        max_artifact_mib: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.jobs = jobs
        self.artifacts = artifacts
        self.releases = releases
        self.ceremonies = ceremonies
        self.certified = certified
        self._epochs = epochs
        self.fanout = fanout
        self.outbox = outbox
        self.denials = denials
        self.quarantine = quarantine
        self.telemetry = telemetry
        self.withdrawals = withdrawals
        self.policy = policy
        self.roster_envelope = roster_envelope
        self.stopping = asyncio.Event()
        self._max_artifact = max_artifact_mib * _MIB
        self._clock = clock

    # -- owners -------------------------------------------------------------------------------------------------------

    async def submit(self, peer: Peer, manifest: bytes) -> Job:
        """The job, and in the ledger that it was submitted, before its owner hears of it; or that it was denied."""
        try:
            new = await self._admit(peer, manifest, admit)
            stands = partial(self.withdrawals.require_asker, owner=new.owner_fingerprint, leaf=new.leaf)
            job = await self.jobs.submit(new, stands)
        except RefusedError as error:
            await self.denials.of_submission(manifest, peer.name, error)
            raise
        await self.outbox.settle(request_id(JobSubmitted.TYPE, job.job_id))
        return job

    async def derive(self, peer: Peer, request: bytes) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """A key for data of its owner's own: as :meth:`Releases.of_key`, once the ledger has the decision on it."""
        try:
            admitted = await self._admit(peer, request, admit_key_request)
            await self.withdrawals.check_asker(admitted.request.owner_identity.fingerprint, admitted.leaf)
        except RefusedError as error:
            await self.denials.of_submission(request, peer.name, error)
            raise
        await self.outbox.write(admitted.leaf, admitted.job_id)
        await self.outbox.settle(request_id(JobSubmitted.TYPE, admitted.job_id))
        async with aclosing(self.releases.of_key(admitted)) as answers:
            async for shown, arrival in answers:
                self.denials.hear(admitted, shown.leaf, arrival)
                yield shown, arrival

    async def _admit(self, peer: Peer, envelope: bytes, how: _Admission[Admitted]) -> Admitted:
        now = int(self._clock())
        decide = self.policy.check_submission
        try:
            return await asyncio.to_thread(how, envelope, peer.name, now, self._epochs, decide)
        except RefusedError as error:
            if error.reason not in (Reason.UNKNOWN_KEY, Reason.EPOCH, Reason.KEY_STATE):
                raise
            # What is known of keys may be older than the key, or this process too young to know any: ask.
            await self._ask_for_keys(error)
            return await asyncio.to_thread(how, envelope, peer.name, now, self._epochs, decide)

    async def _ask_for_keys(self, doubt: RefusedError) -> None:
        """Have all custodians describe themselves. Raises ``NO_QUORUM`` when too few do for a "no" to mean anything."""
        reached = await self.fanout.probe_all()
        if not self.fanout.quorum.is_qualified(reached):
            raise UnavailableError(
                Reason.NO_QUORUM,
                f"too few custodians can be asked whether it is so that {doubt.message}",
                expected=self.fanout.quorum.words(),
                actual=", ".join(sorted(reached)) or "nobody",
                next_step="Try again when more custodians can be reached",
            )

    async def owned(self, peer: Peer, job_id: str) -> Job:
        """Raises ``NOT_FOUND`` also for somebody else's job."""
        job = await self.jobs.get(job_id)
        if job.owner != peer.name:
            raise StateError(Reason.NOT_FOUND, "no such job", actual=job_id[:26])
        return job

    async def open(self, peer: Peer, job_id: str) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """The job's key for its owner: as :meth:`Releases.to_owner`."""
        job = await self.owned(peer, job_id)
        async with aclosing(self.releases.to_owner(job)) as answers:
            async for shown, arrival in answers:
                self.denials.hear(job, shown.leaf, arrival)
                yield shown, arrival

    async def commit(self, peer: Peer, job_id: str, opening: bytes) -> Job:
        job = await self.owned(peer, job_id)
        if job.opening != opening:
            bundle = await self.artifacts.state(job_id, "bundle")
            await asyncio.to_thread(check_opening, job, opening, bundle)
        return await self.jobs.commit(job_id, opening)

    async def watch(self, peer: Peer, job_id: str, after: int) -> AsyncGenerator[JobEvent]:
        """Events above ``after`` until the job has ended. Raises ``UNAVAILABLE`` when the coordinator stops."""
        while True:
            changed = self.jobs.changes(job_id)
            # Before the events: a job that ended by now has its last event among them.
            over = (await self.owned(peer, job_id)).state in FINAL
            events = await self.jobs.events(job_id, after)
            for event in events:
                yield event
                after = event.sequence
            if over and not events:
                return
            if not events:
                await self._wait(changed, _POLL)

    async def outcome(self, peer: Peer, job_id: str) -> tuple[Job, ReleaseRecord | None, bytes]:
        """The job, the release to its worker, and the ledger's proof of that: empty until a quorum cosigned so far."""
        job = await self.owned(peer, job_id)
        if job.state not in FINAL:
            raise StateError(
                Reason.STATE,
                f"job {job_id} has not ended",
                expected=" or ".join(FINAL),
                actual=job.state,
                next_step="Watch it until it has",
            )
        return await self.release_of(peer, job_id)

    async def release_of(self, peer: Peer, job_id: str) -> tuple[Job, ReleaseRecord | None, bytes]:
        """As :meth:`outcome`, also while the job runs."""
        job = await self.owned(peer, job_id)
        record = await self.releases.recorded(job_id)
        return job, record, await self.releases.proof(record) if record is not None else b""

    async def telemetry_of(self, peer: Peer, job_id: str) -> AsyncGenerator[StoredBatch]:
        """The telemetry of the owner's job so far."""
        await self.owned(peer, job_id)
        async with aclosing(self.telemetry.batches(job_id)) as batches:
            async for batch in batches:
                yield batch

    # -- artifacts ----------------------------------------------------------------------------------------------------

    async def may_stat(self, peer: Peer, job_id: str) -> Job:
        return await (self.jobs.held(job_id, peer.name) if peer.role == "worker" else self.owned(peer, job_id))

    async def may_upload(self, peer: Peer, job_id: str, kind: str) -> WriteRight:
        """Owners write the bundle until the job is committed, the worker that holds the job the rest. The right is
        asked for again in every transaction that changes the artifact: an upload outlives many a claim."""
        job = await self.may_stat(peer, job_id)
        self._check_kind(kind, ("result", "log") if peer.role == "worker" else ("bundle",), peer, "write")
        if peer.role == "worker":
            # The job's own bound on its output, and a little for the envelope and the packaging.
            output = facts_of(job).manifest.resources.output_mib * _MIB
            limit = min(self._max_artifact, output + output // 64 + 4 * _MIB)
            return WriteRight(limit, lambda session: self.jobs.check_output_write(session, job_id, peer.name))
        return WriteRight(self._max_artifact, lambda session: self.jobs.check_bundle_write(session, job_id))

    async def may_download(self, peer: Peer, job_id: str, kind: str) -> None:
        await self.may_stat(peer, job_id)
        self._check_kind(kind, ("bundle",) if peer.role == "worker" else ("result", "log"), peer, "read")

    @staticmethod
    def _check_kind(kind: str, allowed: tuple[str, ...], peer: Peer, what: str) -> None:
        if kind not in allowed:
            raise RefusedError(
                Reason.ROLE,
                f"role {peer.role} does not {what} this artifact",
                expected=" or ".join(allowed),
                actual=kind,
            )

    # -- workers ------------------------------------------------------------------------------------------------------

    async def claim(self, peer: Peer, job_id: str, wait_seconds: int) -> Job:
        """Raises ``NOT_FOUND`` when nothing came to be run in time."""
        until = time.monotonic() + min(wait_seconds, _MAX_CLAIM_WAIT)
        while True:
            changed = self.jobs.changes("")
            job = await self.jobs.claim(peer.name, job_id)
            if job is not None:
                return job
            left = until - time.monotonic()
            if left <= 0:
                raise StateError(
                    Reason.NOT_FOUND,
                    f"job {job_id} is not ready" if job_id else "no job is ready",
                    next_step="Claim again later",
                )
            await self._wait(changed, min(left, _POLL))

    async def handed(self, job: Job) -> Handed | None:
        """What a worker needs to combine the job's key where its epoch has another rule than the roster."""
        return await self.certified.handed(job.key_id, job.epoch, self.fanout.roster)

    async def challenge(self, peer: Peer, job_id: str) -> list[bytes]:
        """Window statements; raises ``NO_QUORUM`` when those at hand could never make a quorum of answers, by the rule
        of the epoch of the worker's job, where it names one."""
        quorum = self.fanout.quorum
        if job_id:
            job = await self.jobs.held(job_id, peer.name)
            certified = await self.certified.of(job.key_id, job.epoch)
            quorum = certified.quorum if certified is not None else quorum
        statements = await self.fanout.windows()
        at_hand = {name for name, link in self.fanout.links.items() if link.window_statement() is not None}
        if not quorum.is_qualified(at_hand):
            missing = {
                name: f"{link.last_error.reason}: {link.last_error.message}" if link.last_error else "not reached yet"
                for name, link in self.fanout.links.items()
                if name not in at_hand
            }
            raise UnavailableError(
                Reason.NO_QUORUM,
                f"too few custodians can be reached for a challenge; without: {', '.join(sorted(missing))}",
                expected=quorum.words(),
                actual=", ".join(sorted(at_hand)) or "nobody",
                details=missing,
            )
        return statements

    async def release(
        self, peer: Peer, job_id: str, evidence: bytes, presentation: bytes
    ) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """The job's key for the worker that holds it: as :meth:`Releases.to_worker`."""
        job = await self.jobs.held(job_id, peer.name)
        await self.withdrawals.check_worker(job, evidence)
        verdicts = Verdicts(job, evidence)
        try:
            async with aclosing(self.releases.to_worker(job, evidence, presentation)) as answers:
                async for shown, arrival in answers:
                    self.denials.hear(job, shown.leaf, arrival)
                    verdicts.hear(arrival)
                    yield shown, arrival
        finally:
            self.quarantine.judge(verdicts)

    async def complete(self, peer: Peer, job_id: str, statement: bytes, error: KeyquorumError | None) -> Job:
        job = await self.jobs.get(job_id)
        if job.worker == peer.name and job.state in FINAL and job.statement == statement:
            return job
        job = await self.jobs.held(job_id, peer.name)
        if not statement:
            if error is None:
                raise MalformedError(Reason.MALFORMED, "neither a statement nor an error", expected="one of them")
            return await self.jobs.finish(job_id, peer.name, JobState.FAILED, b"", error)
        record = await self.releases.recorded(job_id)
        artifacts = {kind: await self.artifacts.state(job_id, kind) for kind in ("result", "log")}
        evidence = record.evidence if record is not None and record.worker == peer.name else None
        state, failure = await asyncio.to_thread(check_statement, job, statement, evidence, artifacts)
        return await self.jobs.finish(job_id, peer.name, state, statement, failure or error)

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self, changed: asyncio.Event, timeout: float) -> None:
        tasks = [asyncio.create_task(changed.wait()), asyncio.create_task(self.stopping.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.stopping.is_set():
            raise UnavailableError(
                Reason.UNAVAILABLE, "the coordinator is stopping", next_step="Ask again; what was stored stays"
            )
