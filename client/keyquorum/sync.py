"""The synchronous client: the asynchronous one on an event loop in a background thread.

Same names, same arguments, same errors. Callbacks run on the background thread. An interrupt (Ctrl-C) cancels what is
going on and leaves the client usable.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Self, TypeVar

from keyquorum.aio import CONFIRM_GRACE, AsyncClient
from keyquorum.ceremonies import CeremonyRecord, Ended
from keyquorum.cluster import ClusterStatus
from keyquorum.data_keys import DEFAULT_NAME, DataFile, DataKey, DataSink, DataSource
from keyquorum.drills import DrillState, Finished, MomentCallback
from keyquorum.jobs import Job, JobEvent
from keyquorum.keyfiles import PassphraseSource
from keyquorum.keys import KeyRecord
from keyquorum.profile import Profile, load_profile
from keyquorum.progress import ProgressCallback
from keyquorum.results import Result
from keyquorum.revoking import Held
from keyquorum.submission import SubmittedJob
from keyquorum.telemetry import Telemetry
from keyquorum_core.derivation import DerivedKey
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.manifest import Resources
from keyquorum_core.sealing import Suite

__all__ = ["Client", "connect"]

T = TypeVar("T")


class Client:
    """See :class:`keyquorum.aio.AsyncClient`, method by method."""

    def __init__(
        self, profile: Profile, *, passphrase: PassphraseSource = None, confirm_grace: float = CONFIRM_GRACE
    ) -> None:
        self.profile = profile
        self._async = AsyncClient(profile, passphrase=passphrase, confirm_grace=confirm_grace)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="keyquorum-client", daemon=True)
        self._thread.start()
        self._closing = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise StateError(Reason.STATE, "this client is closed", next_step="Connect again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise UnavailableError(Reason.UNAVAILABLE, "the client was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Hang up, forget the keys, end the thread. Idempotent; calls still going on in other threads are cancelled."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            try:
                asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._async.close()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def status(self, *, max_skew: float = 5.0, patient: bool = True) -> ClusterStatus:
        """See :meth:`AsyncClient.status`."""
        return self._run(self._async.status(max_skew=max_skew, patient=patient))

    def keys(self) -> tuple[KeyRecord, ...]:
        """See :meth:`AsyncClient.keys`."""
        return self._run(self._async.keys())

    def key(self, key_id: str, epoch: int | None = None) -> KeyRecord:
        """See :meth:`AsyncClient.key`."""
        return self._run(self._async.key(key_id, epoch))

    def key_create(
        self,
        key_id: str,
        *,
        suite: str = Suite.MLKEM768_X25519,
        policy: KeyPolicy | None = None,
        progress: ProgressCallback | None = None,
    ) -> KeyRecord:
        """See :meth:`AsyncClient.key_create`."""
        return self._run(self._async.key_create(key_id, suite=suite, policy=policy, progress=progress))

    def key_epochs(self, key_id: str) -> tuple[KeyRecord, ...]:
        """See :meth:`AsyncClient.key_epochs`."""
        return self._run(self._async.key_epochs(key_id))

    def key_rotate(
        self,
        key_id: str,
        *,
        policy: KeyPolicy | None = None,
        renew: bool = False,
        progress: ProgressCallback | None = None,
    ) -> KeyRecord:
        """See :meth:`AsyncClient.key_rotate`."""
        return self._run(self._async.key_rotate(key_id, policy=policy, renew=renew, progress=progress))

    def key_repair(
        self,
        key_id: str,
        custodian: str,
        *,
        epoch: int = 0,
        replace: bool = False,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        progress: ProgressCallback | None = None,
    ) -> Ended:
        """See :meth:`AsyncClient.key_repair`."""
        return self._run(
            self._async.key_repair(
                key_id, custodian, epoch=epoch, replace=replace, operator_keys=operator_keys, progress=progress
            )
        )

    def key_destroy(
        self,
        key_id: str,
        epoch: int,
        *,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        progress: ProgressCallback | None = None,
    ) -> Ended:
        """See :meth:`AsyncClient.key_destroy`."""
        return self._run(self._async.key_destroy(key_id, epoch, operator_keys=operator_keys, progress=progress))

    def ceremonies(self, key_id: str = "") -> tuple[CeremonyRecord, ...]:
        """See :meth:`AsyncClient.ceremonies`."""
        return self._run(self._async.ceremonies(key_id))

    def ceremony_cancel(self, ceremony_id: str, why: str = "") -> CeremonyRecord:
        """See :meth:`AsyncClient.ceremony_cancel`."""
        return self._run(self._async.ceremony_cancel(ceremony_id, why))

    def drills(self) -> DrillState:
        """See :meth:`AsyncClient.drills`."""
        return self._run(self._async.drills())

    def drill_run(
        self,
        kind: str,
        key_id: str = "canary",
        *,
        operator_keys: Sequence[str | os.PathLike[str]] = (),
        moment: MomentCallback | None = None,
    ) -> Finished:
        """See :meth:`AsyncClient.drill_run`."""
        return self._run(self._async.drill_run(kind, key_id, operator_keys=operator_keys, moment=moment))

    def drill_report(self, drill_id: str) -> Finished:
        """See :meth:`AsyncClient.drill_report`."""
        return self._run(self._async.drill_report(drill_id))

    def drill_cancel(self, drill_id: str) -> bool:
        """See :meth:`AsyncClient.drill_cancel`."""
        return self._run(self._async.drill_cancel(drill_id))

    def revocations(self) -> Held:
        """See :meth:`AsyncClient.revocations`."""
        return self._run(self._async.revocations())

    def revoke(self, document: bytes) -> Held:
        """See :meth:`AsyncClient.revoke`."""
        return self._run(self._async.revoke(document))

    def derive_key(
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
        """See :meth:`AsyncClient.derive_key`."""
        return self._run(
            self._async.derive_key(
                purpose,
                name,
                key=key,
                classification=classification,
                export_control=export_control,
                epoch=epoch,
                key_check=key_check,
                progress=progress,
            )
        )

    def data_key(
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
        """See :meth:`AsyncClient.data_key`."""
        return self._run(
            self._async.data_key(
                key,
                classification=classification,
                export_control=export_control,
                name=name,
                epoch=epoch,
                key_check=key_check,
                progress=progress,
            )
        )

    def encrypt(
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
        """See :meth:`AsyncClient.encrypt`."""
        return self._run(
            self._async.encrypt(
                key,
                source,
                sink,
                classification=classification,
                export_control=export_control,
                name=name,
                progress=progress,
            )
        )

    def decrypt(self, source: DataSource, sink: DataSink, *, progress: ProgressCallback | None = None) -> DataFile:
        """See :meth:`AsyncClient.decrypt`."""
        return self._run(self._async.decrypt(source, sink, progress=progress))

    def rewrap(
        self, path: str | os.PathLike[str], *, to_epoch: int | None = None, progress: ProgressCallback | None = None
    ) -> DataFile:
        """See :meth:`AsyncClient.rewrap`."""
        return self._run(self._async.rewrap(path, to_epoch=to_epoch, progress=progress))

    def submit(
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
        """See :meth:`AsyncClient.submit`."""
        return self._run(
            self._async.submit(
                folder,
                key=key,
                classification=classification,
                regions=regions,
                export_control=export_control,
                evidence=evidence,
                purposes=purposes,
                provenance=provenance,
                entrypoint=entrypoint,
                resources=resources,
                not_before=not_before,
                not_after=not_after,
                progress=progress,
            )
        )

    def job(self, job_id: str) -> Job:
        """See :meth:`AsyncClient.job`."""
        return self._run(self._async.job(job_id))

    def jobs(self, *, limit: int = 100) -> tuple[Job, ...]:
        """See :meth:`AsyncClient.jobs`."""
        return self._run(self._async.jobs(limit=limit))

    def cancel(self, job_id: str, *, why: str = "") -> Job:
        """See :meth:`AsyncClient.cancel`."""
        return self._run(self._async.cancel(job_id, why=why))

    def watch(self, job_id: str, *, after: int = 0) -> Generator[JobEvent, None, None]:
        """See :meth:`AsyncClient.watch`."""
        events = self._async.watch(job_id, after=after)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            if not self._closed:
                self._run(_close(events))

    def wait(self, job_id: str, *, timeout: float | None = None, progress: ProgressCallback | None = None) -> str:
        """See :meth:`AsyncClient.wait`."""
        return self._run(self._async.wait(job_id, timeout=timeout, progress=progress))

    def result(self, job_id: str, *, timeout: float | None = None, progress: ProgressCallback | None = None) -> Result:
        """See :meth:`AsyncClient.result`."""
        return self._run(self._async.result(job_id, timeout=timeout, progress=progress))

    def telemetry(self, job_id: str) -> Telemetry:
        """See :meth:`AsyncClient.telemetry`."""
        return self._run(self._async.telemetry(job_id))


async def _next(events: AsyncGenerator[JobEvent, None]) -> JobEvent | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[JobEvent, None]) -> None:
    for _ in range(100):
        try:
            await events.aclose()
        except RuntimeError:  # an interrupted step of it is still on its way out
            await asyncio.sleep(0.01)
        else:
            return


def connect(
    profile: str | os.PathLike[str] | Profile,
    *,
    passphrase: PassphraseSource = None,
    confirm_grace: float = CONFIRM_GRACE,
) -> Client:
    """A client for the profile's cluster; use it in ``with``. See :func:`keyquorum.aio.connect`."""
    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    return Client(loaded, passphrase=passphrase, confirm_grace=confirm_grace)
