"""What breaks, and what still works: custodians down or slow, and every role killed in the middle of its work."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import keyquorum
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.cluster import Running, eventually


@contextmanager
def down(running: Running, *names: str) -> Iterator[None]:
    """These custodians are killed, and started again at the end."""
    processes = [running.cluster.custodians[name] for name in names]
    for process in processes:
        process.kill()
    try:
        yield
    finally:
        running.cluster.start(processes)


@contextmanager
def stalled(running: Running, name: str) -> Iterator[None]:
    """This custodian's process is stopped: its connections stay open, and nothing answers."""
    pid = running.cluster.custodians[name].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def everyone_is_reachable(client: keyquorum.Client) -> None:
    eventually(lambda: all(each.reachable for each in client.status().custodians), "all custodians reachable")


def run(client: keyquorum.Client, running: Running, job: Path) -> keyquorum.Result:
    submitted = client.submit(job, key=running.key, regions=[running.region])
    return client.result(submitted.id)


def test_g6_two_custodians_down_of_five_still_make_a_quorum(running: Running, job: Path) -> None:
    """G6: any quorum suffices."""
    with running.connect() as client, down(running, "ch-2", "jp-1"):
        result = run(client, running, job)
        assert set(result.custodians) == {"ch-1", "de-1", "is-1"}
        assert not result.confirmed  # no seed is reported twice by a bare quorum, and the result says so
    with running.connect() as client:
        everyone_is_reachable(client)


def test_g8_three_custodians_down_is_a_clear_refusal_that_names_them(running: Running, job: Path) -> None:
    """G8: fails closed, says which check failed, and leaves the state as it was."""
    with running.connect() as client, down(running, "ch-2", "de-1", "jp-1"):
        with pytest.raises(KeyquorumError) as caught:
            client.submit(job, key=running.key, regions=[running.region])
        assert caught.value.reason is Reason.NO_QUORUM
        for name in ("ch-2", "de-1", "jp-1"):
            assert name in caught.value.details
        assert "ch-1" not in caught.value.details
        assert caught.value.next_step
    with running.connect() as client:
        everyone_is_reachable(client)
        assert json.loads(run(client, running, job).files["result.json"])["echo"]


def test_a_stalled_custodian_is_not_waited_for(running: Running, job: Path) -> None:
    with running.connect() as client, stalled(running, "de-1"):
        assert "de-1" not in run(client, running, job).custodians
    with running.connect() as client:
        everyone_is_reachable(client)


def test_a_killed_coordinator_goes_on_with_the_job(running: Running, job: Path) -> None:
    (job / "input.json").write_text('{"text": "survives", "seconds": 6}')
    coordinator = running.cluster.coordinator
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        coordinator.kill()
        running.cluster.start([coordinator])
        result = client.result(submitted.id)
        states = [event.state for event in client.watch(submitted.id)]
    assert json.loads(result.files["result.json"]) == {"echo": "survives"}
    assert states[0] == "submitted"
    assert states[-1] == "completed"


def test_a_killed_worker_loses_the_job_to_the_next_one(running: Running, job: Path) -> None:
    (job / "input.json").write_text('{"text": "second try", "seconds": 3}')
    worker = running.cluster.worker
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        worker.kill()
        running.cluster.start([worker])
        result = client.result(submitted.id)
    assert json.loads(result.files["result.json"]) == {"echo": "second try"}


def test_a_killed_custodian_serves_again_after_a_restart(running: Running, job: Path) -> None:
    with down(running, "is-1"):
        pass
    with running.connect() as client:
        everyone_is_reachable(client)
        keys = client.keys()
    assert running.key in [key.key_id for key in keys]
    with running.connect() as client, down(running, "ch-2", "jp-1"):  # now is-1 has to be one of the three
        assert "is-1" in run(client, running, job).custodians
    with running.connect() as client:
        everyone_is_reachable(client)


def test_a_job_that_fails_gives_its_exit_status_and_its_log(running: Running, job: Path) -> None:
    (job / "main.py").write_text("print('about to fail'); raise SystemExit(3)\n")
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        with pytest.raises(keyquorum.JobFailedError) as caught:
            client.result(submitted.id)
    assert caught.value.reason is Reason.JOB_FAILED
    assert "3" in str(caught.value)
    assert b"about to fail" in caught.value.result.log


def test_a_lost_owner_key_and_a_wrong_passphrase_are_clear_errors(running: Running, job: Path) -> None:
    with (
        pytest.raises(KeyquorumError) as caught,
        keyquorum.connect(running.layout.profile, passphrase="wrong") as client,
    ):
        client.submit(job, key=running.key, regions=[running.region])
    assert caught.value.reason is Reason.PASSPHRASE
    key = running.layout.root / "alice.key.json"
    moved = key.rename(key.with_suffix(".away"))
    try:
        with pytest.raises(KeyquorumError) as caught, running.connect() as client:
            client.submit(job, key=running.key, regions=[running.region])
    finally:
        moved.rename(key)
    assert caught.value.reason is Reason.NOT_FOUND
    assert "backup" in caught.value.next_step
