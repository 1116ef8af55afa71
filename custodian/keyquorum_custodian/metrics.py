"""Prometheus metrics: counts, times and versions; no names of jobs, and nothing secret."""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian import __version__
from keyquorum_protos.wire.ports import parse_address

__all__ = ["Metrics"]

_BUCKETS = (0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1, 1.0)


class Metrics:
    """One registry per custodian, so that several may live in one test process."""

    def __init__(self, custodian_id: str, jurisdiction: str) -> None:
        self.registry = CollectorRegistry()
        Info("keyquorum_custodian", "Who this is.", registry=self.registry).info(
            {"custodian": custodian_id, "jurisdiction": jurisdiction, "version": __version__}
        )
        self.releases = Counter("keyquorum_custodian_releases", "Releases answered.", registry=self.registry)
        self.refusals = Counter(
            "keyquorum_custodian_refusals", "Releases refused, by reason code.", ["reason"], registry=self.registry
        )
        self.release_seconds = Histogram(
            "keyquorum_custodian_release_seconds",
            "Time to judge and answer one release request.",
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self.calls = Counter(
            "keyquorum_custodian_calls",
            "RPCs finished, by method and reason code.",
            ["method", "reason"],
            registry=self.registry,
        )
        self.sealed = Gauge(
            "keyquorum_custodian_sealed",
            "1 while its keystore is sealed and it serves status only.",
            registry=self.registry,
        )
        self.window = Gauge("keyquorum_custodian_window", "Number of the current window.", registry=self.registry)
        self.epochs = Gauge("keyquorum_custodian_epochs", "Active epochs.", registry=self.registry)
        self.seeds = Gauge("keyquorum_custodian_seeds", "Seeds of active epochs.", registry=self.registry)
        self.development = Gauge(
            "keyquorum_custodian_development_hardware_trusted",
            "1 when the reference values name a development root: never in production.",
            registry=self.registry,
        )

        self.ledger_size = Gauge(
            "keyquorum_custodian_ledger_size",
            "Leaves in the newest checkpoint of the ledger accepted.",
            registry=self.registry,
        )
        self.ledger_witnessed = Gauge(
            "keyquorum_custodian_ledger_witnessed",
            "When the latest quorum known had cosigned the ledger, unix seconds; 0 before the first.",
            registry=self.registry,
        )
        self.ledger_alarms = Gauge(
            "keyquorum_custodian_ledger_alarms",
            "Open ledger alarms: proof of a fork or rollback, which stops all releases.",
            registry=self.registry,
        )
        self.leases = Gauge(
            "keyquorum_custodian_leases", "Leases under which workers hold keys now.", registry=self.registry
        )
        self.quarantined = Gauge(
            "keyquorum_custodian_quarantined",
            "Quarantine entries in force: workers whose attestation failed anew. An alarm until it is lifted.",
            registry=self.registry,
        )
        self.bulletin_version = self._by_kind("version", "Version of the signed document in force; 0 for none.")
        self.bulletin_expires = self._by_kind("expires", "When it expires, unix seconds.")
        self.bulletin_refused = self._by_kind("refused", "1 while the document at hand is refused.")

    def _by_kind(self, name: str, text: str) -> Gauge:
        return Gauge(f"keyquorum_custodian_bulletin_{name}", text, ["kind"], registry=self.registry)

    def track_window(self, number: Callable[[], float]) -> None:
        """Read the window's number when asked, instead of writing it every 30 seconds."""
        self.window.set_function(number)

    def serve(self, address: str) -> Callable[[], None]:
        """Serve /metrics over HTTP at ``host:port``; returns what stops it. Raises :class:`UnavailableError`."""
        host, port = parse_address(address, "metrics_listen")
        server: WSGIServer
        thread: threading.Thread
        try:
            server, thread = start_http_server(port, addr=host.strip("[]"), registry=self.registry)
        except OSError as error:
            raise UnavailableError(
                Reason.UNAVAILABLE, f"metrics could not be served at {address}", actual=error.strerror
            ) from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

        return stop
