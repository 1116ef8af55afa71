"""One job from claim to signed statement: verify, attest, combine, decrypt, run, encrypt, sign (DESIGN §6).

The order is the security argument: nothing is asked for before the owner's documents verify and the machine has shown
that it can confine a job; nothing runs before every file is the manifest's; nothing leaves but ciphertext and a
statement signed with the key that the evidence binds. Whatever happens, leaving :func:`run_one` removes the plaintext
and drops the keys.

From the moment it has the key the worker holds it under a lease (``lease.py``), which it renews beside everything else.
When the lease is over the job ends as a cancelled one does: processes killed, plaintext removed, keys dropped; after
that, and not before, the coordinator is told.

Until the worker holds the job's key it can only say why it gives up (``CompleteRequest.error``); from then on every
end is a signed statement that names a log, be it an empty one.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from keyquorum_core.artifact import binding
from keyquorum_core.derivation import Combination, DerivedKey
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import ArtifactDigest
from keyquorum_core.roster import Roster
from keyquorum_core.sealing import suite_of
from keyquorum_gpu_worker.documents import JobDocuments, open_documents
from keyquorum_gpu_worker.ending import LAPSED, NOT_RUN, Ending, JobEnd
from keyquorum_gpu_worker.evidence import Collection
from keyquorum_gpu_worker.heartbeat import HEARTBEAT_SECONDS, Heartbeat
from keyquorum_gpu_worker.keys import JobKeys, wipe
from keyquorum_gpu_worker.lease import Grant, Lease, Stop, boottime, keep
from keyquorum_gpu_worker.link import Link
from keyquorum_gpu_worker.plaintext import Sealed, collect_output, seal_log, seal_output, unpack
from keyquorum_gpu_worker.release import obtain_key
from keyquorum_gpu_worker.runner import LOG_BYTES, JobRun, run_job
from keyquorum_gpu_worker.scratch import JobFolder
from keyquorum_gpu_worker.specification import check_gpus, choose_user
from keyquorum_gpu_worker.telemetry import TELEMETRY_SECONDS, Telemetry
from keyquorum_gpu_worker.transfer import download_through, upload
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import to_status

__all__ = ["JobLostError", "Surroundings", "run_one"]

_RELEASE_REPEATS = 2
_TOLD = frozenset({"seconds", "renewals", "reason"})
"""What telemetry says of a renewal."""
_NOT_ON_RECORD = frozenset({Reason.STATE, Reason.SIGNATURE, Reason.SIGNATURE_MISSING, Reason.SIGNATURE_EXTRA})
"""Why a statement is refused whose release the coordinator does not know of, or only an earlier one's."""


class JobLostError(UnavailableError):
    """The job is no longer this worker's: cancelled, or given to another."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a worker has for all its jobs. ``said(event, values)`` logs; it is never given a secret."""

    link: Link
    roster: Roster
    sources: Collection
    scratch: Path
    said: Callable[[str, dict[str, object]], None] = lambda event, values: None
    clock: Callable[[], float] = time.time
    lease_clock: Callable[[], float] = boottime
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    release_patience: float = 30.0
    telemetry_seconds: float = TELEMETRY_SECONDS
    telling_seconds: float = 30.0
    """How long a coordinator is tried to be told that a lease is over; the job is gone by then either way."""
    log_bytes: int = LOG_BYTES
    devices: Path = Path("/dev")


async def run_one(surroundings: Surroundings, job: pb.Job) -> JobEnd:
    """Do one claimed job to its end and tell the coordinator. Cancelling this removes everything first.

    Raises :class:`JobLostError` when the job is no longer this worker's, and :class:`KeyquorumError` when the
    coordinator cannot be told. A job that fails, or whose lease is over, is no error here: its end says so.
    """
    started = time.monotonic()
    link = surroundings.link
    telemetry = Telemetry(
        link, job.job_id, clock=surroundings.clock, every=surroundings.telemetry_seconds, said=surroundings.said
    )
    over = await _work(surroundings, job, telemetry)
    if isinstance(over, JobEnd):
        return over
    # Processes, plaintext and keys are gone by now.
    surroundings.said("the lease is over: the job was stopped, its key and plaintext wiped", over.as_dict())
    await telemetry.drain(surroundings.telling_seconds)
    try:
        async with asyncio.timeout(surroundings.telling_seconds):
            await link.unary(link.workers.Complete, pb.CompleteRequest(job_id=job.job_id, error=to_status(over)))
    except (KeyquorumError, TimeoutError) as error:
        surroundings.said("the coordinator was not told that the lease is over", {"why": str(error)})
    return JobEnd(job.job_id, LAPSED, str(over), NOT_RUN, seconds=time.monotonic() - started)


async def _work(surroundings: Surroundings, job: pb.Job, telemetry: Telemetry) -> JobEnd | KeyquorumError:
    """The job's end, or why its lease is over. Nothing of it is left when this returns or raises."""
    losing: asyncio.Future[KeyquorumError] = asyncio.get_running_loop().create_future()
    stop = Stop()

    def lose(why: KeyquorumError) -> None:
        stop.set()
        if not losing.done():
            losing.set_result(why)

    def lost(why: str) -> None:
        lose(JobLostError(Reason.STATE, why, details={"job": job.job_id}))

    work = asyncio.create_task(_Work(surroundings, job, stop, lost, lose, telemetry).run())
    telling = asyncio.create_task(telemetry.run())
    try:
        await asyncio.wait((work, losing), return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception() is None:
            return work.result()
        if stop.lease is not None and stop.lease.over:
            assert stop.lease.why is not None  # noqa: S101 - over, so there is a reason
            return stop.lease.why
        if work.done():
            return work.result()
        raise losing.result()
    finally:
        stop.set()
        work.cancel()
        telling.cancel()
        await asyncio.wait([work, telling])
        losing.cancel()
        lapsed = stop.lease is not None and stop.lease.over
        # Sealed with the last of the job's keys, which goes with it.
        telemetry.close(
            "wiped",
            {"why": str(stop.lease.why)[:200] if stop.lease is not None and lapsed else "the job was taken away"},
            reason=str(Reason.LEASE) if lapsed else "",
        )


class _Work:
    def __init__(
        self,
        surroundings: Surroundings,
        job: pb.Job,
        stop: Stop,
        lost: Callable[[str], None],
        lose: Callable[[KeyquorumError], None],
        telemetry: Telemetry,
    ) -> None:
        self._telemetry = telemetry
        self._with = surroundings
        self._job = job
        self._stop = stop
        self._lost = lost
        self._lose = lose
        self._started = time.monotonic()

    async def run(self) -> JobEnd:
        """The whole job. Leaving it, in whatever way, removes the folder and ends the processes."""
        around = self._with
        beat = Heartbeat(around.link, self._job.job_id, self._lost, every=around.heartbeat_seconds)
        async with beat:
            try:
                documents = await asyncio.to_thread(open_documents, self._job, around.roster, int(around.clock()))
                check_gpus(documents.manifest.resources, around.devices)
                keys = JobKeys.generate(suite_of(documents.manifest.owner_hpke))
                combination, grant = await self._obtain_key(documents, keys)
            except KeyquorumError as error:
                return await self._give_up(error)
            end = Ending(self._job.job_id, keys, int(around.clock()))
            self._telemetry.begin(keys.identity, combination.key.purpose_key("telemetry"))
            self._telemetry.note(
                "key-released", {"custodians": len(combination.used), "lease_seconds": grant.terms.seconds}
            )
            lease = self._stop.lease = Lease(grant, around.lease_clock)
            keeping = asyncio.create_task(self._keep(lease, documents, keys, combination.key))
            try:
                await self._do(documents, combination.key, end, beat)
                end.forget()
                self._telemetry.close("ended", {"outcome": end.outcome, "exit_code": end.exit_code})
                await self._telemetry.drain(around.telling_seconds)
                await self._complete(documents, keys, end)
            except JobLostError:
                raise
            except KeyquorumError as error:
                if end.statement:
                    raise
                # A statement without a log is none: what remains is to say why.
                return await self._give_up(error)
            finally:
                end.forget()
                keeping.cancel()
                await asyncio.wait([keeping])
            return JobEnd(
                self._job.job_id,
                end.outcome,
                end.reason,
                end.exit_code,
                combination.used,
                combination.blamed,
                end.layers,
                time.monotonic() - self._started,
            )

    async def _keep(self, lease: Lease, documents: JobDocuments, keys: JobKeys, key: DerivedKey) -> None:
        """Renew the lease until it is over; then the job ends."""

        async def renew() -> Grant:
            again, grant = await self._obtain_key(documents, keys)
            if not hmac.compare_digest(again.key.key_check, key.key_check):  # the opening's key check holds it already
                raise RefusedError(Reason.BLAME, "the custodians' answers to a renewal give another key")
            return grant

        around = self._with

        def said(event: str, values: dict[str, object]) -> None:
            around.said(event, values)
            shown = {name: v for name, v in values.items() if name in _TOLD and isinstance(v, str | int)}
            self._telemetry.note("lease-renewed" if "renewals" in values else "lease-not-renewed", shown)

        self._lose(await keep(lease, renew, said, clock=around.lease_clock))

    async def _obtain_key(self, documents: JobDocuments, keys: JobKeys) -> tuple[Combination, Grant]:
        around = self._with
        return await obtain_key(
            around.link,
            documents,
            around.roster,
            keys,
            around.sources,
            clock=around.clock,
            lease_clock=around.lease_clock,
            patience=around.release_patience,
            said=around.said,
        )

    async def _complete(self, documents: JobDocuments, keys: JobKeys, end: Ending) -> None:
        """Hand in the statement.

        A coordinator that was killed between passing the shares on and writing the release down has no release on
        record, or only an earlier worker's, and refuses a statement that no owner could verify. The release is then
        repeated for the same keys, over a new challenge since the old one has passed by now.
        """
        link = self._with.link
        request = pb.CompleteRequest(job_id=self._job.job_id, statement=end.statement)
        for _ in range(_RELEASE_REPEATS):
            try:
                await link.unary(link.workers.Complete, request)
            except KeyquorumError as error:
                if error.reason not in _NOT_ON_RECORD:
                    raise
                self._with.said("the release is not on record, asking again", error.as_dict())
                await self._obtain_key(documents, keys)
            else:
                return
        await link.unary(link.workers.Complete, request)

    async def _give_up(self, error: KeyquorumError) -> JobEnd:
        """Without a key, or without a log stored, there is no statement that an owner would take."""
        link = self._with.link
        await link.unary(link.workers.Complete, pb.CompleteRequest(job_id=self._job.job_id, error=to_status(error)))
        return JobEnd(self._job.job_id, "refused", str(error), NOT_RUN, seconds=time.monotonic() - self._started)

    async def _do(self, documents: JobDocuments, key: DerivedKey, end: Ending, beat: Heartbeat) -> None:
        around = self._with
        user = await asyncio.to_thread(choose_user, around.scratch)
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(JobFolder(around.scratch, user))
                if not folder.in_memory:
                    around.said("the job's folder is on a disk, not in memory", {"folder": str(around.scratch)})
                self._enter(beat, "downloading")
                await self._unpack(documents, key, folder, user)
                self._enter(beat, "running")
                end.take(await self._run(documents, folder, user))
                self._enter(beat, "uploading")
                await self._upload_output(documents, key, folder, end, stack)
            except JobLostError:
                raise
            except KeyquorumError as error:
                end.refuse(error)
            # Also an empty one: owners refuse a statement without a log, so that nobody can keep one from them.
            await self._upload_log(documents, key, end)
            end.sign(int(around.clock()))

    def _enter(self, beat: Heartbeat, step: str) -> None:
        beat.enter(step)
        self._telemetry.note("progress", {"step": step})

    async def _unpack(self, documents: JobDocuments, key: DerivedKey, folder: JobFolder, user: int | None) -> None:
        opening = documents.opening
        bound = binding(documents.job_id, "bundle")
        bundle_key = key.purpose_key("bundle")
        await download_through(
            self._with.link,
            documents.job_id,
            "bundle",
            opening.bundle_size,
            bytes.fromhex(opening.bundle_sha256),
            lambda source: unpack(bundle_key, source, bound, folder, documents.manifest, user),
        )

    async def _run(self, documents: JobDocuments, folder: JobFolder, user: int | None) -> JobRun:
        manifest = documents.manifest
        # In a thread, which is told to stop and waited for: a job must not outlive its folder.
        running = asyncio.get_running_loop().run_in_executor(
            None,
            lambda: run_job(
                manifest.entrypoint,
                folder,
                manifest.resources,
                user=user,
                cancelled=self._stop,
                # The store takes a log no larger than the output may be, and a little.
                log_bytes=min(self._with.log_bytes, (manifest.resources.output_mib + 3) << 20),
                confined=lambda layers: self._with.said("job confined", {"layers": layers}),
                using=self._telemetry.usage,
            ),
        )
        try:
            run = await asyncio.shield(running)
        except asyncio.CancelledError:
            self._stop.set()
            await asyncio.wait([running])
            if running.exception() is None:
                wipe(running.result().log)
            raise
        self._with.said("job ended", {"outcome": run.outcome, "exit_code": run.exit_code, "seconds": run.seconds})
        if run.outcome == "cancelled":
            wipe(run.log)
            raise JobLostError(Reason.STATE, run.reason)
        return run

    async def _upload_output(
        self, documents: JobDocuments, key: DerivedKey, folder: JobFolder, end: Ending, stack: ExitStack
    ) -> None:
        """What the job left, of a failed one too: it may be what shows why."""

        def seal(sink: BinaryIO) -> Sealed:
            files = collect_output(folder.output, documents.manifest.resources.output_mib << 20)
            bound = binding(documents.job_id, "result", end.maker)
            return seal_output(key.purpose_key("result"), files, bound, sink)[0]

        try:
            sink = cast(BinaryIO, tempfile.TemporaryFile(dir=folder.path))  # noqa: SIM115 - the stack closes it
            stack.enter_context(sink)
            sealed = await asyncio.to_thread(seal, sink)
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, "no room for the result", actual=error.strerror) from None
        await self._upload("result", sealed, end)

    async def _upload_log(self, documents: JobDocuments, key: DerivedKey, end: Ending) -> None:
        """Its ciphertext stays in memory, where the log is: where the folder is full or cannot be made there is one."""
        bound = binding(documents.job_id, "log", end.maker)
        sealed = await asyncio.to_thread(seal_log, key.purpose_key("telemetry"), end.log, bound, io.BytesIO())
        await self._upload("log", sealed, end)

    async def _upload(self, kind: str, sealed: Sealed, end: Ending) -> None:
        await upload(self._with.link, self._job.job_id, kind, sealed.file, sealed.size, sealed.sha256)
        end.artifacts[kind] = ArtifactDigest(sealed.sha256.hex(), sealed.size)
