"""The worker process: prove that jobs can be confined, sweep what a dead worker left, then take jobs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_gpu_worker.config import WorkerConfig, load_roster, load_sources, load_tls
from keyquorum_gpu_worker.ending import JobEnd
from keyquorum_gpu_worker.job import JobLostError, Surroundings, run_one
from keyquorum_gpu_worker.link import Link
from keyquorum_gpu_worker.logs import logger
from keyquorum_gpu_worker.runner import probe
from keyquorum_gpu_worker.scratch import choose_base, file_system_of, sweep
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["Worker"]

_CLAIM_SECONDS = 20
_LONGEST_PAUSE = 10.0


class Worker:
    """Use :meth:`prepare`, then :meth:`one` or :meth:`serve`; close at the end."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._log = logger().bind(worker=config.name)
        self._scratch: Path = choose_base(config.scratch)
        self._sources = load_sources(config)
        self._tls = load_tls(config)
        self._roster = load_roster(config)
        self._link: Link | None = None

    def prepare(self) -> dict[str, object]:
        """Blocking. The facts of the ready line. Raises :class:`RefusedError` (``SANDBOX``), what the configuration's
        files raise, and what the sources of evidence do: what cannot attest takes no job that another could."""
        swept = sweep(self._scratch)
        if swept:
            self._log.warning("removed what a killed worker left", folders=swept)
        if self._sources.development:
            self._log.warning("DEVELOPMENT EVIDENCE: this worker proves nothing about its hardware")
        kind = file_system_of(self._scratch)
        if kind not in ("tmpfs", "ramfs"):
            self._log.warning("plaintext will be on a disk while a job runs", folder=str(self._scratch), kind=kind)
        self._sources.probe()
        layers = probe(self._scratch)
        self._log.info("jobs can be confined", layers=layers)
        return {
            "ready": True,
            "worker": self._config.name,
            "address": self._config.coordinator,
            "evidence": self._sources.name,
            "confinement": layers,
        }

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def one(self, job_id: str = "") -> JobEnd:
        """Claim a job (this one, or the queue's next, waiting for it) and do it.

        Raises what the coordinator says about a ``job_id`` that cannot be had, and as :func:`run_one`.
        """
        await self._refresh()
        claimed = await self._claim(job_id)
        if claimed is None:
            raise StateError(Reason.NOT_FOUND, "the job cannot be run yet", actual=job_id)
        return await self._do(claimed)

    async def serve(self, ended: Callable[[JobEnd], None]) -> None:
        """Do jobs from the queue until cancelled. A coordinator that is away is waited for."""
        pause = 0.2
        while True:
            try:
                ended(await self.one())
                pause = 0.2
            except JobLostError as error:
                self._log.warning("job lost", why=error.message, **error.details)
            except KeyquorumError as error:
                self._log.error("cannot go on with jobs for now", **error.as_dict())
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads callers
                pause = min(_LONGEST_PAUSE, 2 * pause)

    async def _claim(self, job_id: str) -> pb.Job | None:
        """The job claimed. With no id, waits for one."""
        link = self._connect()
        away = False
        pause = 0.2
        while True:
            request = pb.ClaimRequest(job_id=job_id, wait_seconds=_CLAIM_SECONDS)
            try:
                response = await link.once(link.workers.Claim, request, timeout=_CLAIM_SECONDS + 10)
            except StateError as error:
                if error.reason is Reason.NOT_FOUND and not job_id:
                    continue  # none within the wait
                raise
            except UnavailableError as error:
                if job_id:
                    raise
                if not away:
                    self._log.warning("waiting for the coordinator", **error.as_dict())
                away = True
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)
            else:
                return response.job if response.job.job_id else None

    async def _do(self, job: pb.Job) -> JobEnd:
        log = self._log.bind(job=job.job_id[:32])
        log.info("job claimed")
        surroundings = Surroundings(
            link=self._connect(),
            roster=self._roster,
            sources=self._sources,
            scratch=self._scratch,
            said=lambda event, values: log.info(event, **values),
        )
        end = await run_one(surroundings, job)
        log.info("job done", **{name: value for name, value in end.as_dict().items() if name != "job_id"})
        return end

    async def _refresh(self) -> None:
        """Go on with the roster that is on disk now. Raises as :func:`load_roster`: then no job is claimed."""
        roster = await asyncio.to_thread(load_roster, self._config)
        if roster.version < self._roster.version:
            raise RefusedError(
                Reason.ROSTER,
                "the roster on disk is older than the one in use",
                expected=f"version {self._roster.version} or later",
                actual=f"version {roster.version}",
            )
        if roster.coordinator_tls != self._roster.coordinator_tls:
            await self.close()
        self._roster = roster

    def _connect(self) -> Link:
        if self._link is None:
            self._link = Link(self._config, self._roster, self._tls)
        return self._link
