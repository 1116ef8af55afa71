"""Prometheus metrics, in a registry of their own, served over HTTP when the configuration names an address."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keyquorum_coordinator.circuit import CircuitState
from keyquorum_coordinator.drills.store import KindRecord
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.job_states import JobState
from keyquorum_coordinator.link import Link
from keyquorum_core.drill_report import FULL, KINDS
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.ledger.log_keys import SignedCheckpoint
from keyquorum_protos.wire.ports import parse_address

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_CIRCUIT = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.calls = Counter("keyquorum_coordinator_calls", "Calls, by reason", ["method", "reason"], registry=registry)
        self.release_seconds = Histogram(
            "keyquorum_coordinator_release_seconds",
            "From request to a quorum of shares",
            ["recipient"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.release_failures = Counter(
            "keyquorum_coordinator_release_failures", "Releases without a quorum", ["recipient"], registry=registry
        )
        self.custodian_seconds = Histogram(
            "keyquorum_coordinator_custodian_seconds",
            "One custodian's answer to a release",
            ["custodian"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.circuit = Gauge(
            "keyquorum_coordinator_custodian_circuit",
            "0 closed, 1 half-open, 2 open",
            ["custodian"],
            registry=registry,
        )
        self.reachable = Gauge(
            "keyquorum_coordinator_custodian_reachable", "1 while connected", ["custodian"], registry=registry
        )
        self.key_losses = Gauge(
            "keyquorum_coordinator_key_losses_survivable",
            "Custodians that may yet be lost before the key's active epoch has no quorum; -1 when it has none",
            ["key"],
            registry=registry,
        )
        self.artifact_bytes = Counter(
            "keyquorum_coordinator_artifact_bytes", "Artifact bytes", ["direction"], registry=registry
        )
        self.ledger_append_seconds = Histogram(
            "keyquorum_coordinator_ledger_append_seconds",
            "From a leaf's arrival to its durable checkpoint, the longest of each batch",
            buckets=_SECONDS,
            registry=registry,
        )
        self.ledger_batch_leaves = Histogram(
            "keyquorum_coordinator_ledger_batch_leaves",
            "Leaves under one new checkpoint",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=registry,
        )
        self.ledger_size = Gauge(
            "keyquorum_coordinator_ledger_size", "Leaves under the latest checkpoint", registry=registry
        )
        self.ledger_checkpoint_time = Gauge(
            "keyquorum_coordinator_ledger_checkpoint_time", "When it was signed, unix seconds", registry=registry
        )
        self.quarantined = Counter(
            "keyquorum_coordinator_workers_quarantined",
            "Workers put in quarantine by custodians' word since the start: an alarm",
            registry=registry,
        )
        self._keys: set[str] = set()
        self._server: WSGIServer | None = None

    def ledger_batch(self, leaves: int, seconds: float) -> None:
        self.ledger_batch_leaves.observe(leaves)
        self.ledger_append_seconds.observe(seconds)

    def track_ledger(self, latest: Callable[[], SignedCheckpoint]) -> None:
        self.ledger_size.set_function(lambda: latest().checkpoint.size)
        self.ledger_checkpoint_time.set_function(lambda: latest().signed_at)

    def survivable(self, losses: Mapping[str, int]) -> None:
        """By key id; keys that are gone are not shown any more."""
        for gone in self._keys - set(losses):
            self.key_losses.remove(gone)
        for key_id, count in losses.items():
            self.key_losses.labels(key_id).set(count)
        self._keys = set(losses)

    def released(self, recipient: str, seconds: float | None) -> None:
        if seconds is None:
            self.release_failures.labels(recipient).inc()
        else:
            self.release_seconds.labels(recipient).observe(seconds)

    def observe_call(self, method: str, reason: str) -> None:
        self.calls.labels(method, reason or "OK").inc()

    def track(self, fanout: Fanout, count_jobs: Callable[[], dict[str, int]]) -> None:
        """Figures that are looked up when they are asked for. ``count_jobs`` runs on the metrics server's thread."""
        for name, link in fanout.links.items():
            self.circuit.labels(name).set_function(partial(_circuit, link))
            self.reachable.labels(name).set_function(partial(_reachable, link))
        self.registry.register(_Jobs(count_jobs))

    def track_drills(self, kinds: Callable[[], Mapping[str, KindRecord]], clock: Callable[[], float]) -> None:
        """How drills went, looked up when it is asked for. ``kinds`` runs on the metrics server's thread."""
        self.registry.register(_Drills(kinds, clock))

    def serve(self, address: str) -> str:
        """Listen at ``host:port``; returns the address in use. Raises :class:`UnavailableError`."""
        host, port = parse_address(address, "metrics_listen")
        try:
            server, _ = start_http_server(port, host.strip("[]"), self.registry)
        except OSError as error:
            raise UnavailableError(
                Reason.UNAVAILABLE, f"cannot serve metrics at {address}", actual=error.strerror
            ) from None
        self._server = server
        return f"{host}:{server.server_port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _circuit(link: Link) -> float:
    return _CIRCUIT[link.circuit_state()]


def _reachable(link: Link) -> float:
    return float(link.connected)


class _Drills(Collector):
    """A kind that never passed has an age without end, so that an alert on the age finds it."""

    def __init__(self, kinds: Callable[[], Mapping[str, KindRecord]], clock: Callable[[], float]) -> None:
        self._kinds = kinds
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        prefix = "keyquorum_coordinator_drill"
        age = GaugeMetricFamily(
            f"{prefix}_passed_age_seconds", "Since the last drill of the kind that passed", labels=["kind"]
        )
        passed = GaugeMetricFamily(f"{prefix}_passed", "1 if the last drill of the kind passed", labels=["kind"])
        seconds = GaugeMetricFamily(
            f"{prefix}_seconds", "What the last drill of the kind measured", labels=["kind", "what"]
        )
        try:
            records = self._kinds()
        except KeyquorumError:
            return []
        now = self._clock()
        for kind in (*KINDS, FULL):
            record = records.get(kind)
            since = record.last_passed if record is not None else 0
            age.add_metric([kind], max(0.0, now - since) if since else math.inf)
            if record is None:
                continue
            passed.add_metric([kind], float(record.passed))
            measured = {"detect": record.detect_ms, "recover": record.recover_ms, "duration": record.duration_ms}
            for what, value in measured.items():
                if value is not None:
                    seconds.add_metric([kind, what], value / 1000)
        return [age, passed, seconds]


class _Jobs(Collector):
    def __init__(self, count: Callable[[], dict[str, int]]) -> None:
        self._count = count

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("keyquorum_coordinator_jobs", "Jobs, by state", labels=["state"])
        try:
            counts = self._count()
        except KeyquorumError:
            return []  # the database is away: other figures are still worth having
        for state in JobState:
            family.add_metric([state], counts.get(state, 0))
        return [family]
