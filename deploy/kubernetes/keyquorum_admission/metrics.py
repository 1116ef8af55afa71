"""Prometheus metrics: counts and times; no names of objects."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from keyquorum_admission.review import Answer, Seat

__all__ = ["Metrics"]

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


class Metrics:
    """One registry per server, so that several may live in one test process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reviews = Counter(
            "keyquorum_admission_reviews", "Reviews, by seat and outcome.", ["seat", "outcome"], registry=self.registry
        )
        self._refusals = Counter(
            "keyquorum_admission_findings", "Rules broken, one for each finding.", ["rule"], registry=self.registry
        )
        self.seconds = Histogram(
            "keyquorum_admission_seconds", "Time to decide one review.", registry=self.registry, buckets=_BUCKETS
        )
        self.failures = Counter(
            "keyquorum_admission_unforeseen", "Reviews denied by a failure of ours.", registry=self.registry
        )
        self.certificate_expires = Gauge(
            "keyquorum_admission_certificate_expires", "When it expires, unix seconds.", registry=self.registry
        )
        self.certificate_refused = Gauge(
            "keyquorum_admission_certificate_refused",
            "1 while the TLS files at hand cannot be used and the ones before stay.",
            registry=self.registry,
        )

    def count(self, seat: Seat, given: Answer) -> None:
        self._reviews.labels(str(seat), given.outcome).inc()
        for finding in given.findings:
            self._refusals.labels(str(finding.rule)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
