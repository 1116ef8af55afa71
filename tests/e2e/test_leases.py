"""Leases on a real cluster: a job longer than its lease is renewed; without a coordinator it is stopped, and wiped."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

import keyquorum
from keyquorum_gpu_worker.scratch import choose_base
from tests.support.cluster import Running, eventually

LEASE = keyquorum.KeyPolicy(lease_seconds=14, reattest_seconds=4)
KEY = "leased"


@pytest.fixture(scope="module")
def leased(running: Running) -> Running:
    with running.connect() as client:
        client.key_create(KEY, policy=LEASE)
    return Running(running.layout, running.cluster, KEY)


def folders() -> list[Path]:
    """The private folders of jobs on this machine."""
    return [path for path in choose_base(None).iterdir() if path.is_dir() and path.name.startswith("keyquorum-")]


def plaintext(marker: str) -> list[Path]:
    """Where the job's input lies in the clear."""
    found = []
    for folder in folders():
        with contextlib.suppress(OSError):  # somebody's job that ends just now
            found += [path for path in folder.rglob("input.json") if marker in path.read_text()]
    return found


def test_g5_a_job_longer_than_its_lease_attests_anew_and_ends_well(leased: Running, job: Path) -> None:
    (job / "input.json").write_text('{"text": "a long job", "seconds": 16}')
    with leased.connect() as client:
        submitted = client.submit(job, key=KEY, regions=[leased.region])
        with client.result(submitted.id) as result:
            assert result.exit_code == 0
        telemetry = client.telemetry(submitted.id)
    events = [record.event for record in telemetry.records]
    assert events.count("lease-renewed") >= 2
    assert events[-1] == "ended"
    assert telemetry.complete
    assert telemetry.reason == ""


def test_g5_without_a_coordinator_the_job_stops_and_its_plaintext_goes(leased: Running, job: Path) -> None:
    (job / "input.json").write_text('{"text": "wiped at the deadline", "seconds": 100}')
    coordinator = leased.cluster.coordinator
    with leased.connect() as client:
        submitted = client.submit(job, key=KEY, regions=[leased.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        eventually(lambda: plaintext("wiped at the deadline") != [], "the job's input is there")
        coordinator.kill()
        try:
            eventually(lambda: plaintext("wiped at the deadline") == [], "the plaintext is gone", 60)
        finally:
            leased.cluster.start([coordinator])
        # The worker is still there and says so, now that it can: the job has ended, by its own signed word.
        eventually(lambda: client.job(submitted.id).state in ("failed", "ready"), "the job is the worker's no more", 60)
        if client.job(submitted.id).state == "ready":
            client.cancel(submitted.id)
        telemetry = client.telemetry(submitted.id)
    assert telemetry.reason == "LEASE"
    assert telemetry.complete
    assert telemetry.records[-1].event == "wiped"
    assert telemetry.records[-1].time <= time.time()
