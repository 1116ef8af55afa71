"""The asynchronous client. :mod:`keyquorum.sync` offers the same methods to code without an event loop.

::

    async with keyquorum.aio.connect("profile.toml", passphrase=…) as client:
        job = await client.submit("examples/h2_vqe", key="demo", regions=["eu"])
        async for event in client.watch(job.id):
            print(event.state)
        result = await client.result(job.id)
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import grpc.aio

from keyquorum import data_sessions
from keyquorum.data_keys import DEFAULT_NAME, DataFile, DataKey, DataSink, DataSource
from keyquorum.folder import read_folder
from keyquorum.jobs import Job, JobEvent, event_from_wire, job_from_wire, own_manifest
from keyquorum.keyfiles import PassphraseSource
from keyquorum.keys import KeyRecord
from keyquorum.opening import encrypt_folder, gather, prepare
from keyquorum.operating import ClusterClient
from keyquorum.outcomes import no_statement, outcome_from_wire
from keyquorum.ownkeys import make_request, require_confirmed
from keyquorum.profile import Profile, load_profile
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum.results import JobFailedError, Result, fetch_result
from keyquorum.rootcache import RootCache
from keyquorum.session import Connection
from keyquorum.submission import SubmittedJob
from keyquorum.telemetry import Telemetry, fetch_batches, verify_telemetry
from keyquorum.transfer import upload
from keyquorum.verify import MadeFor, VerifiedOutcome, VerifiedRelease, verify_outcome, verify_release
from keyquorum_core.answers import Answers, JobBinding
from keyquorum_core.derivation import Combination, DerivedKey
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.key_request import Asked, sign_key_request
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.manifest import Opening, Resources, sign_opening
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["AsyncClient", "connect"]

_LOG = logging.getLogger("keyquorum")
COSIGNED_SECONDS = 15.0  # how long a result waits for custodians to cosign the ledger as far as its release
CONFIRM_GRACE = 3.0  # seconds to wait for the answers that confirm a key, once it is there


class AsyncClient(ClusterClient):
    """An owner's (and, with a section ``[operator]``, an operator's) view of one cluster.

    Key files are opened when first needed. Everything the coordinator says is verified against the profile's roster and
    the owner's own signatures; what can't be verified (states, times, health) decides nothing. All methods raise
    :class:`keyquorum.KeyquorumError` and nothing else for what goes wrong outside this process.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        passphrase: PassphraseSource = None,
        confirm_grace: float = CONFIRM_GRACE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(profile, passphrase=passphrase, clock=clock)
        self._grace = confirm_grace
        self._cache = RootCache(profile.state_dir)

    async def derive_key(
        self,
        purpose: str,
        name: str,
        *,
        key: str,
        classification: str,
        export_control: str = "",
        epoch: int | None = None,
        key_check: bytes | None = None,
        progress: ProgressCallback | None = None,
    ) -> DerivedKey:
        """A key for data of the owner's own, of purpose ``tokenize`` or ``data``: always the same one for the same
        owner, purpose, name, key and epoch.

        ``epoch`` defaults to the key's active one; keep what it was (:attr:`KeyRecord.epoch`) beside what the key made.
        ``key_check``: of the same key from an earlier time. Raises :class:`UnavailableError` (``NO_QUORUM``) when
        neither that nor enough answers confirm the key.
        """
        owner = await self._keys("owner")
        connection = self._connection("owner")
        if epoch is None:
            record = await self._newest(connection, key)
            await self._check_usable(record)
            epoch = record.epoch
        request = make_request(
            owner,
            key_id=key,
            epoch=epoch,
            purpose=purpose,
            name=name,
            classification=classification,
            export_control=export_control,
            now=int(self._clock()),
        )
        envelope = await asyncio.to_thread(sign_key_request, request, owner.identity)
        binding = Asked(request, request.payload()).binding()
        answers = self._answers(binding, await self._made_for(connection, key, epoch), owner, key_check)
        opened = await gather(
            connection,
            answers,
            binding.job_id,
            grace=self._grace,
            progress=progress or silent,
            total=len(answers.committee),
            request=envelope,
        )
        require_confirmed(opened, request)
        for custodian in opened.blamed:
            _LOG.warning("%s key %s: custodian %s gave wrong contributions", purpose, name, custodian)
        return opened.key

    # Data that stays home

    async def data_key(
        self,
        key: str,
        *,
        classification: str,
        export_control: str = "",
        name: str = DEFAULT_NAME,
        epoch: int | None = None,
        key_check: bytes | None = None,
        progress: ProgressCallback | None = None,
    ) -> DataKey:
        """Open the owner's data key ``name`` for any number of files; close it, or use it in ``with``.

        Its own methods block; :meth:`encrypt` and the like do all in one. Raises as :meth:`derive_key`, and
        :class:`StateError` (``KEY_STATE``) where the epoch was destroyed.
        """
        return await data_sessions.open_key(
            self,
            key,
            classification=classification,
            export_control=export_control,
            name=name,
            epoch=epoch,
            key_check=key_check,
            progress=progress,
        )

    async def encrypt(
        self,
        key: str,
        source: DataSource,
        sink: DataSink,
        *,
        classification: str,
        export_control: str = "",
        name: str = DEFAULT_NAME,
        progress: ProgressCallback | None = None,
    ) -> DataFile:
        """Encrypt ``source`` into ``sink`` under the key's newest epoch. Raises as :meth:`data_key` and
        :meth:`DataKey.encrypt`."""
        opened = await self.data_key(
            key, classification=classification, export_control=export_control, name=name, progress=progress
        )
        with opened:
            return await data_sessions.in_thread(
                lambda report: opened.encrypt(source, sink, progress=report), progress or silent
            )

    async def decrypt(
        self, source: DataSource, sink: DataSink, *, progress: ProgressCallback | None = None
    ) -> DataFile:
        """Decrypt the data file ``source`` into ``sink``: its header says which key to ask for.

        Raises as :meth:`data_key` and :meth:`DataKey.decrypt`. A source that is no path must be seekable.
        """
        return await data_sessions.decrypt(self, source, sink, progress or silent)

    async def rewrap(
        self, path: str | os.PathLike[str], *, to_epoch: int | None = None, progress: ProgressCallback | None = None
    ) -> DataFile:
        """Put a data file under a later epoch of its key, the newest by default; does nothing where it is there.

        Raises as :meth:`data_key` and :meth:`DataKey.rewrap`.
        """
        return await data_sessions.rewrap(self, Path(path), to_epoch, progress or silent)

    # Jobs

    async def submit(
        self,
        folder: str | os.PathLike[str],
        *,
        key: str,
        classification: str | None = None,
        regions: Sequence[str] | None = None,
        export_control: str | None = None,
        evidence: Sequence[str] | None = None,
        purposes: Sequence[str] | None = None,
        provenance: Sequence[str | os.PathLike[str]] = (),
        entrypoint: Sequence[str] | None = None,
        resources: Resources | None = None,
        not_before: int | None = None,
        not_after: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> SubmittedJob:
        """Submit a folder as a job: sign its manifest, open its key with the custodians, encrypt, upload, commit.

        Arguments go before what the folder's ``job.toml`` says (:mod:`keyquorum.folder`). Times are unix seconds.
        ``provenance``: files with signed statements of how files of the folder were prepared.
        """
        report = progress or silent
        found = await asyncio.to_thread(read_folder, Path(folder))
        settings = found.settings.overridden(
            entrypoint=entrypoint,
            classification=classification,
            export_control=export_control,
            regions=regions,
            evidence_types=evidence,
            purposes=purposes,
            resources=resources,
        )
        owner = await self._keys("owner")
        connection = self._connection("owner")
        record = await self._newest(connection, key)
        await self._check_usable(record)
        subjects = await asyncio.to_thread(found.subjects)
        prepared = await asyncio.to_thread(
            prepare,
            owner,
            settings,
            subjects,
            key_id=record.key_id,
            epoch=record.epoch,
            now=int(self._clock()),
            not_before=not_before,
            not_after=not_after,
            provenance=[Path(each) for each in provenance],
        )
        job = prepared.binding
        try:
            accepted = await connection.unary(connection.jobs.Submit, pb.SubmitRequest(manifest=prepared.envelope))
            job_from_wire(accepted, owner.identity.public, job.job_id)
            answers = self._answers(job, MadeFor(record.quorum, self.profile.roster), owner)
            opened = await gather(
                connection, answers, job.job_id, grace=self._grace, progress=report, total=len(answers.committee)
            )
            self._warn(job.job_id, opened)
            await asyncio.to_thread(self._cache.store, job, opened.key, owner.recipient)
            bundle = await asyncio.to_thread(
                encrypt_folder, found, subjects, job.job_id, opened.key.purpose_key("bundle"), report
            )
            with bundle.file:
                await upload(connection, job.job_id, "bundle", bundle.file, bundle.size, bundle.sha256, report)
            opening = Opening(
                job_id=job.job_id,
                key_check=opened.key.key_check.hex(),
                bundle_sha256=bundle.sha256.hex(),
                bundle_size=bundle.size,
                confirmed=opened.confirmed,
            )
            committed = await connection.unary(
                connection.jobs.Commit,
                pb.CommitRequest(job_id=job.job_id, opening=sign_opening(opening, owner.identity)),
            )
            state = job_from_wire(committed, owner.identity.public, job.job_id)
        except KeyquorumError as error:
            error.details.setdefault("job", job.job_id)
            raise
        return SubmittedJob(
            job=state,
            custodians=tuple(sorted(answers.answered)),
            blamed=opened.blamed,
            suspected=opened.suspected,
            refused={name: str(error) for name, error in (answers.refused | answers.rejected).items()},
            confirmed=opened.confirmed,
        )

    async def _check_usable(self, record: KeyRecord) -> None:
        """Raise :class:`RefusedError` unless what is new can be begun under this epoch by this owner."""
        record.check_usable_by(await self._keys("owner"), self.profile)

    async def _made_for(self, connection: Connection, key_id: str, epoch: int) -> MadeFor:
        """The committee and rule that an epoch was certified for, which the roster may have left behind since."""
        record = await self._certified(connection, key_id, epoch)
        return MadeFor(record.quorum, self.profile.roster_of(record.roster_digest))

    def _answers(
        self, job: JobBinding, made_for: MadeFor, owner: LoadedKeys, key_check: bytes | None = None
    ) -> Answers:
        return Answers(
            job,
            self.profile.roster,
            made_for.quorum,
            owner.recipient,
            "owner",
            clock=self._clock,
            key_check=key_check,
        )

    def _warn(self, job_id: str, opened: Combination) -> None:
        if not opened.confirmed:
            _LOG.warning(
                "job %s: its key is not confirmed: some seed was reported by one custodian only, so if that one lied, "
                "no worker will be able to use the key; submit again when more custodians answer",
                job_id,
            )
        for name in opened.blamed:
            _LOG.warning("job %s: custodian %s gave wrong contributions", job_id, name)

    async def job(self, job_id: str) -> Job:
        """The job as the coordinator reports it, against the manifest that the owner signed."""
        owner = await self._keys("owner")
        connection = self._connection("owner")
        message = await connection.unary(connection.jobs.Get, pb.GetJobRequest(job_id=job_id))
        return job_from_wire(message, owner.identity.public, job_id)

    async def jobs(self, *, limit: int = 100) -> tuple[Job, ...]:
        """The owner's jobs, latest first."""
        owner = await self._keys("owner")
        connection = self._connection("owner")
        message = await connection.unary(connection.jobs.List, pb.ListJobsRequest(limit=limit))
        return tuple(job_from_wire(each, owner.identity.public) for each in message.jobs[:limit])

    async def cancel(self, job_id: str, *, why: str = "") -> Job:
        """Have a job that isn't over stopped. Idempotent."""
        owner = await self._keys("owner")
        connection = self._connection("owner")
        message = await connection.unary(connection.jobs.Cancel, pb.CancelJobRequest(job_id=job_id, why=why))
        return job_from_wire(message, owner.identity.public, job_id)

    async def watch(self, job_id: str, *, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """The job's events after a sequence number, past ones first, until it is over; across coordinator restarts.

        Raises :class:`RefusedError` (``STATE``) for a history that goes backwards.
        """
        connection = self._connection("owner")
        backoff = connection.backoff()
        while True:
            try:
                request = pb.WatchRequest(job_id=job_id, after=after)
                async with aclosing(connection.stream(connection.jobs.Watch, request)) as events:
                    async for message in events:
                        backoff.reset()
                        event = event_from_wire(message, after)
                        after = event.sequence
                        yield event
                        if event.final:
                            return
            except grpc.aio.AioRpcError as error:
                if not (connection.transient(error) and await backoff.wait()):
                    raise connection.error(error) from None
            else:
                if not await backoff.wait():
                    raise UnavailableError(Reason.UNAVAILABLE, "the coordinator stops reporting before the job is over")

    async def wait(self, job_id: str, *, timeout: float | None = None, progress: ProgressCallback | None = None) -> str:
        """The state in which the job ended. Raises :class:`UnavailableError` (``TIMEOUT``); the job then goes on."""
        report = progress or silent
        state = "submitted"
        try:
            async with asyncio.timeout(timeout), aclosing(self.watch(job_id)) as events:
                async for event in events:
                    state = event.state
                    report(Progress(Stage.WAIT, event.sequence, 0, f"{event.state} {event.detail}".strip()))
        except TimeoutError:
            raise UnavailableError(
                Reason.TIMEOUT, f"job {job_id} is not over yet", expected=f"within {timeout} s", actual=state
            ) from None
        return state

    async def result(
        self, job_id: str, *, timeout: float | None = None, progress: ProgressCallback | None = None
    ) -> Result:
        """Wait for the job to end, then fetch, verify and decrypt what it left.

        Raises :class:`JobFailedError` (with the result, so also its log) for a job that failed by its worker's signed
        word, :class:`StateError` (``JOB_FAILED``, ``STATE``) for one that ended without a worker's statement, and
        :class:`RefusedError` for anything that doesn't verify.
        """
        report = progress or silent
        await self.wait(job_id, timeout=timeout, progress=progress)
        owner = await self._keys("owner")
        connection = self._connection("owner")
        message = await self._outcome(connection, job_id)
        job = job_from_wire(message.job, owner.identity.public, job_id)
        if not message.statement:
            raise no_statement(job)
        manifest, _ = own_manifest(message.job.manifest, owner.identity.public, job_id)
        outcome = verify_outcome(
            outcome_from_wire(message),
            job=job_id,
            owner=owner.identity.public,
            roster=self.profile.roster,
            made_for=await self._made_for(connection, manifest.key_id, manifest.epoch),
            now=int(self._clock()),
        )
        ran = outcome.statement.outcome
        if (ran == "completed") != (job.state == "completed"):
            raise RefusedError(
                Reason.STATE,
                "the coordinator reports another end of the job than the worker signed",
                expected=ran,
                actual=job.state,
                details={"job": job_id},
            )
        key, from_cache = await self._job_key(connection, outcome, owner, report)
        result = await fetch_result(connection, outcome, key, from_cache=from_cache, progress=report)
        if ran != "completed" or result.exit_code != 0:
            raise JobFailedError(result)
        return result

    async def telemetry(self, job_id: str) -> Telemetry:
        """What the worker that has, or had, the job's key says of itself, so far: verified, and decrypted.

        Raises :class:`StateError` (``STATE``) while no worker has the key, and as :meth:`result` for anything that
        does not verify.
        """
        owner = await self._keys("owner")
        connection = self._connection("owner")
        message = await self._release(connection, job_id)
        manifest, _ = own_manifest(message.job.manifest, owner.identity.public, job_id)
        release = verify_release(
            outcome_from_wire(message),
            job=job_id,
            owner=owner.identity.public,
            roster=self.profile.roster,
            made_for=await self._made_for(connection, manifest.key_id, manifest.epoch),
            now=int(self._clock()),
        )
        batches = await fetch_batches(connection, job_id)
        key, _ = await self._job_key(connection, release, owner, silent)
        return await asyncio.to_thread(
            verify_telemetry,
            batches,
            release,
            key,
            roster=self.profile.roster,
            quorum=self.profile.quorum,
            now=int(self._clock()),
        )

    async def _release(self, connection: Connection, job_id: str) -> pb.Outcome:
        """The latest release to a worker; waits a while for custodians to cosign the ledger so far."""
        until = time.monotonic() + COSIGNED_SECONDS
        pause = 0.05
        while True:
            message = await connection.unary(connection.jobs.GetRelease, pb.GetOutcomeRequest(job_id=job_id))
            if not message.leaf:
                raise StateError(
                    Reason.STATE,
                    f"no worker has got the key of job {job_id}",
                    expected="a release to a worker",
                    actual=message.job.state[:32],
                )
            if message.leaf_proof or time.monotonic() + pause > until:
                return message
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def _outcome(self, connection: Connection, job_id: str) -> pb.Outcome:
        """What the coordinator has to show; waits a while for custodians to cosign the ledger as far as the release."""
        until = time.monotonic() + COSIGNED_SECONDS
        pause = 0.05
        while True:
            message = await connection.unary(connection.jobs.GetOutcome, pb.GetOutcomeRequest(job_id=job_id))
            if message.leaf_proof or not message.statement or time.monotonic() + pause > until:
                return message
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def _job_key(
        self,
        connection: Connection,
        outcome: VerifiedOutcome | VerifiedRelease,
        owner: LoadedKeys,
        report: ProgressCallback,
    ) -> tuple[DerivedKey, bool]:
        """The job's key from the owner's own keeping, or from the custodians once more."""
        check = outcome.opening.key_check_bytes
        kept = await asyncio.to_thread(self._cache.load, outcome.binding, owner.recipient, check)
        if kept is not None:
            return kept, True
        binding = outcome.binding
        made_for = await self._made_for(connection, binding.key_id, binding.epoch)
        answers = self._answers(binding, made_for, owner, check)
        opened = await gather(
            connection,
            answers,
            outcome.binding.job_id,
            grace=0.0,
            progress=report,
            total=len(answers.committee),
        )
        await asyncio.to_thread(self._cache.store, outcome.binding, opened.key, owner.recipient)
        return opened.key, False


def connect(
    profile: str | os.PathLike[str] | Profile,
    *,
    passphrase: PassphraseSource = None,
    confirm_grace: float = CONFIRM_GRACE,
) -> AsyncClient:
    """A client for the profile's cluster; use it in ``async with``.

    ``passphrase`` opens the key files: text, something that is called with a key file's path when needed, or ``None``
    for the environment variable ``KEYQUORUM_PASSPHRASE``. Raises as :func:`keyquorum.profile.load_profile`.
    """
    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    return AsyncClient(loaded, passphrase=passphrase, confirm_grace=confirm_grace)
