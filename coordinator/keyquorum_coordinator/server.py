"""``keyquorum-coordinator serve``: one process around a database, an artifact store and links to all custodians.

Everything on disk is checked before anything listens. Only one coordinator may use a folder at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import IO

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keyquorum_coordinator import __version__, migrations
from keyquorum_coordinator.artifacts import ArtifactStore
from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.certified import CertifiedEpochs
from keyquorum_coordinator.config import CoordinatorConfig, Trust, load_config, load_trust
from keyquorum_coordinator.database import Database, make_engine
from keyquorum_coordinator.denials import Denials
from keyquorum_coordinator.desk import Desk
from keyquorum_coordinator.drill_key import load_drill_key
from keyquorum_coordinator.drills import store as drill_store
from keyquorum_coordinator.drills.engine import Circumstances, Drills
from keyquorum_coordinator.drills.schedule import Schedule
from keyquorum_coordinator.drills.service import ROLES as DRILL_ROLES
from keyquorum_coordinator.drills.service import DrillsService, kind_messages
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.jobs import JobStore
from keyquorum_coordinator.known_epochs import KnownEpochs
from keyquorum_coordinator.ledger.http import LedgerReader
from keyquorum_coordinator.ledger.setup import check_log_key, open_log
from keyquorum_coordinator.metrics import Metrics
from keyquorum_coordinator.objects import ObjectStorage, open_objects
from keyquorum_coordinator.outbox import Outbox
from keyquorum_coordinator.policy import CoordinatorPolicy
from keyquorum_coordinator.quarantine import WorkerQuarantine
from keyquorum_coordinator.releases import Releases
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_coordinator.services import (
    ROLES,
    ArtifactsService,
    ClusterService,
    JobsService,
    KeysService,
    RevocationsService,
    WorkersService,
)
from keyquorum_coordinator.standing import Standing
from keyquorum_coordinator.telemetry import TelemetryStore
from keyquorum_coordinator.tending import Tending
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.leaves import RosterInUse
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.v1 import drills_pb2_grpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.guard import Guard

__all__ = ["CoordinatorServer", "lock_folder", "serve"]

_SERVICES = tuple(
    f"keyquorum.v1.{name}" for name in ("Cluster", "Keys", "Jobs", "Artifacts", "Workers", "Revocations", "Drills")
)
_MAX_RECEIVE = 4 << 20  # a manifest, an evidence document or a piece of an artifact, each at most 1 MiB, and its frame
_MAX_CALLS = 1024
_SWEEP_SECONDS = 1.0
_MEASURE_SECONDS = 5.0
_STOP_LOCK = "serve.lock"

_log = structlog.get_logger("coordinator")


def lock_folder(directory: Path) -> IO[str]:
    """Keep others off the folder while the result is open. Raises :class:`StateError` (``STATE``)."""
    try:
        file = (directory / _STOP_LOCK).open("w")
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"cannot write in {directory}", actual=error.strerror) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StateError(Reason.STATE, f"another coordinator is using {directory}") from None
    return file


class CoordinatorServer:
    """The coordinator of one folder. ``clock`` and ``objects`` are for tests."""

    def __init__(
        self,
        config: CoordinatorConfig,
        trust: Trust,
        *,
        clock: Callable[[], float] = time.time,
        objects: ObjectStorage | None = None,
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self.address = ""
        self.metrics_address = ""
        self.ledger_url = ""
        self._trust = trust
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._lock = lock_folder(config.directory)
        try:
            engine = make_engine(config.database_url)
            migrations.upgrade(engine)
            self.database = Database(engine)
            store = objects or open_objects(config.store_place)
            log = open_log(config, clock=clock)
            check_log_key(log.keys, trust.roster.log_key)
            drill_key = load_drill_key(config.directory)
            policy = CoordinatorPolicy(config, trust.roster.quorum_of(), self.database, clock=clock)
        except BaseException:
            self._lock.close()
            raise
        self.sequencer = Sequencer(log, batch_window=self._batch_window, on_batch=self._batched)
        self._reader = LedgerReader(self.sequencer)
        self.fanout = Fanout(
            trust.roster,
            trust.tls,
            deadline=config.release_deadline,
            max_releases=config.max_releases,
            clock=clock,
            on_latency=lambda custodian, seconds: self.metrics.custodian_seconds.labels(custodian).observe(seconds),
        )
        self.outbox = Outbox(self.database, self.sequencer)
        self.denials = Denials(self.outbox, clock=clock)
        self.witnesses = Witnesses(self.sequencer, self.fanout, clock=clock, interval=config.cosign_interval)
        self.jobs = JobStore(
            self.database,
            clock=clock,
            worker_timeout=config.worker_timeout,
            max_open_jobs_per_owner=config.max_open_jobs_per_owner,
            on_leaf=lambda: self.outbox.wake(),
        )
        self.quarantine = WorkerQuarantine(
            self.database,
            self.jobs,
            self.fanout.quorum,
            clock=clock,
            on_entry=self.metrics.quarantined.inc,
            on_leaf=self.outbox.wake,
        )
        self.withdrawals = Withdrawals(
            self.database, self.fanout, self.jobs, trust.roster, clock=clock, on_leaf=self.outbox.wake
        )
        self.artifacts = ArtifactStore(
            self.database,
            store,
            clock=clock,
            on_bytes=lambda direction, count: self.metrics.artifact_bytes.labels(direction).inc(count),
        )
        self.ceremonies = Ceremonies(
            self.database, self.fanout, clock=clock, on_end=self._ceremony_ended, spared=self._drilled
        )
        self.tending = Tending(self.database, self.fanout, self.ceremonies, clock=clock, spared=self._drilled)
        self.certified = CertifiedEpochs(self.database)
        self.drills = Drills(
            Circumstances(
                name=config.name,
                keys=drill_key,
                settings=config.drills,
                tls=trust.tls,
                database=self.database,
                fanout=self.fanout,
                sequencer=self.sequencer,
                witnesses=self.witnesses,
                jobs=self.jobs,
                ceremonies=self.ceremonies,
                certified=self.certified,
                withdrawals=self.withdrawals,
                outbox=self.outbox,
                decide=policy.check_submission,
                clock=clock,
            )
        )
        self.standing = Standing(
            self.fanout,
            self.ceremonies,
            self.certified,
            self.sequencer,
            trust.roster_envelope,
            drills=partial(kind_messages, self.drills),
            clock=clock,
        )
        self.releases = Releases(
            self.fanout,
            self.sequencer,
            self.witnesses,
            self.jobs,
            self.database,
            self.certified,
            clock=clock,
            on_release=self.metrics.released,
        )
        self.desk = Desk(
            jobs=self.jobs,
            artifacts=self.artifacts,
            releases=self.releases,
            ceremonies=self.ceremonies,
            certified=self.certified,
            epochs=KnownEpochs(self.database, self.fanout.links),
            fanout=self.fanout,
            outbox=self.outbox,
            denials=self.denials,
            quarantine=self.quarantine,
            telemetry=TelemetryStore(
                self.database, self.jobs, self.releases, self.sequencer, clock=clock, on_leaf=self.outbox.wake
            ),
            withdrawals=self.withdrawals,
            policy=policy,
            roster_envelope=trust.roster_envelope,
            max_artifact_mib=config.max_artifact_mib,
            clock=clock,
        )

    async def _drilled(self) -> Collection[str]:
        return await self.database.read(drill_store.drilled)

    def _batch_window(self) -> float:
        return max(self.config.ledger_batch_ms / 1000, self.witnesses.patience())

    def _batched(self, count: int, seconds: float) -> None:
        self.metrics.ledger_batch(count, seconds)
        self.witnesses.poke()

    async def start(self) -> None:
        """Listen. Raises :class:`UnavailableError` when an address cannot be had."""
        guard = Guard(self.config.cluster, ROLES | DRILL_ROLES, observe=self.metrics.observe_call, report=_report)
        server = grpc.aio.server(interceptors=[guard], options=_server_options(), maximum_concurrent_rpcs=_MAX_CALLS)
        rpc.add_ClusterServicer_to_server(ClusterService(self.desk, self.standing), server)
        rpc.add_KeysServicer_to_server(KeysService(self.desk), server)
        rpc.add_JobsServicer_to_server(JobsService(self.desk), server)
        rpc.add_ArtifactsServicer_to_server(ArtifactsService(self.desk), server)
        rpc.add_WorkersServicer_to_server(WorkersService(self.desk), server)
        rpc.add_RevocationsServicer_to_server(RevocationsService(self.desk), server)
        drills_pb2_grpc.add_DrillsServicer_to_server(DrillsService(self.drills), server)
        for name in ("", *_SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        # Its own certificate is among the roots so that `status` can ask: role coordinator reaches health and Cluster.
        roots = [self._trust.clients_ca, self._trust.tls.certificate]
        try:
            port = server.add_secure_port(self.config.listen, tls.server_credentials(self._trust.tls, roots))
        except RuntimeError:
            port = 0
        if not port:
            raise UnavailableError(
                Reason.UNAVAILABLE,
                f"cannot listen at {self.config.listen}",
                next_step="Check that no other process listens there, and that the address is this machine's",
            )
        if self.config.metrics_listen:
            self.metrics_address = self.metrics.serve(self.config.metrics_listen)
        self.metrics.track_ledger(lambda: self.sequencer.latest)
        self.metrics.track(self.fanout, lambda: self.database.run_read(self.jobs.count_by_state))
        self.metrics.track_drills(lambda: self.database.run_read(drill_store.kinds), self._clock)
        if self.config.ledger_listen:
            self.ledger_url = await self._reader.start(self.config.ledger_listen, *self.config.ledger_tls)
        await self.fanout.start()
        await self.outbox.write(self._roster_leaf(), self._trust.roster.digest)
        self._server = server
        await server.start()
        self.address = f"{self.config.listen.rpartition(':')[0]}:{port}"
        self._tasks = [
            asyncio.create_task(self.witnesses.run()),
            asyncio.create_task(self.outbox.run()),
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._measure()),
            asyncio.create_task(self.withdrawals.relay()),
            asyncio.create_task(self._resume()),
        ]

    def _roster_leaf(self) -> RosterInUse:
        roster = self._trust.roster
        return RosterInUse(
            roster_sha256=roster.digest,
            roster_version=roster.version,
            custodians=len(roster.custodians),
            expires_at=roster.expires_at,
            time=int(self._clock()),
        )

    def _ceremony_ended(self) -> None:
        self.outbox.wake()
        self.tending.wake()

    async def _resume(self) -> None:
        with contextlib.suppress(TimeoutError):
            await self.fanout.ready()
        try:
            await self.ceremonies.remember_roster(self._trust.roster_envelope)
            count = await self.ceremonies.resume()
        except KeyquorumError as error:
            _log.error("ceremonies.not_resumed", reason=str(error.reason), message=error.message)
        else:
            if count:
                _log.info("ceremonies.resumed", count=count)
        self._tasks.append(asyncio.create_task(Schedule(self.drills, self._clock).forever()))
        await self.tending.forever()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                for job in await self.jobs.sweep():
                    _log.info("job.swept", job=job.job_id, state=str(job.state), attempts=job.attempts)
            except KeyquorumError as error:
                _log.error("job.sweep_failed", reason=str(error.reason), message=error.message)

    async def _measure(self) -> None:
        while True:
            try:
                self.metrics.survivable(await self.standing.survivable())
            except KeyquorumError as error:
                _log.error("metrics.not_measured", reason=str(error.reason), message=error.message)
            await asyncio.sleep(_MEASURE_SECONDS)

    async def stop(self, grace: float) -> None:
        """Accept nothing more, send waiting callers away, give the rest ``grace`` seconds, close everything."""
        self.desk.stopping.set()
        await self.drills.close()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ceremonies.close()
        await self.fanout.close()
        await self.releases.settled()
        await self.denials.settled()
        await self.quarantine.settled()
        await self._reader.stop()
        await self.sequencer.close()
        await asyncio.to_thread(self.metrics.close)
        await asyncio.to_thread(self.database.close)
        self._lock.close()


def _server_options() -> list[tuple[str, int]]:
    options = dict(tls.server_options())
    options |= {
        "grpc.max_receive_message_length": _MAX_RECEIVE,
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
    }
    return list(options.items())


def _report(method: str, reference: str, error: BaseException) -> None:
    # The type and where it came from; never its text, which could carry anything.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    _log.error("call.unforeseen", method=method, reference=reference, error=type(error).__name__, where=where)


async def serve(directory: Path) -> None:
    """Serve until SIGTERM or SIGINT. Prints one line of JSON on standard output when callers can be served."""
    config = load_config(directory)
    server = CoordinatorServer(config, load_trust(config, int(time.time())))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await server.start()
        print(
            json.dumps(
                {
                    "ready": True,
                    "name": config.name,
                    "cluster": config.cluster,
                    "address": server.address,
                    "metrics": server.metrics_address,
                    "ledger": server.ledger_url,
                    "pid": os.getpid(),
                    "version": __version__,
                }
            ),
            flush=True,
        )
        _log.info("serving", name=config.name, cluster=config.cluster, address=server.address)
        await stop.wait()
        _log.info("stopping", grace=config.shutdown_grace)
    finally:
        await server.stop(config.shutdown_grace)
    _log.info("stopped")
