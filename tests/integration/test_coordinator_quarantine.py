"""A worker whose attestation custodians find to have failed gets no more jobs, until an operator says otherwise."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_coordinator.quarantine import ALARM, entries
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.ledger.leaves import Alarm, parse_leaf
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Owner, Running, Worker, claim, refusal, run_job
from tests.support.fake_ceremonies import start_committee
from tests.support.fake_custodian import FakeCommittee
from tests.support.ledger_log import all_leaves

REFUSED = RefusedError(Reason.DEBUG_ENABLED, "debugging is allowed", details={"quarantine": "1"})


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    committee, _ = await start_committee()
    made = await Running.start(tmp_path / "coordinator", committee)
    yield made
    await made.stop()
    await committee.stop()


def command(running: Running, *arguments: str) -> tuple[int, dict[str, Any]]:
    options = ("--json", "--dir", str(running.config.directory))
    done = subprocess.run(
        [sys.executable, "-m", "keyquorum_coordinator", "worker", *arguments, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


async def ask(
    running: Running, worker: Worker, name: str, job: str, refusing: int, error: RefusedError = REFUSED
) -> None:
    """One release to the worker, which the first ``refusing`` custodians refuse."""
    committee = running.committee
    assert isinstance(committee, FakeCommittee)
    for number, custodian in enumerate(committee.custodians.values()):
        custodian.behaviour.refusal = error if number < refusing else None
    caller = running.caller("worker", name)
    statements = (await caller.workers.GetChallenge(pb.GetChallengeRequest())).window_statements
    with contextlib.suppress(grpc.aio.AioRpcError):  # that there was no quorum
        await caller.release(job, worker.evidence(statements))
    await running.server.quarantine.settled()


async def alarms(running: Running) -> list[Alarm]:
    await running.server.outbox._some()
    found = [parse_leaf(leaf) for leaf in all_leaves(running.server.sequencer._ledger)]
    return [leaf for leaf in found if isinstance(leaf, Alarm)]


async def test_a_worker_that_enough_custodians_quarantined_loses_its_jobs_and_gets_none(running: Running) -> None:
    alice, w1, w2 = running.caller("owner", "alice"), running.caller("worker", "w1"), running.caller("worker", "w2")
    job = await run_job(Owner(), alice)
    assert (await claim(w1, job)).job_id == job
    total = len(running.server.fanout.quorum.ids)
    await ask(running, Worker(), "w1", job, total)
    assert await running.server.database.read(lambda session: [each.worker for each in entries(session)]) == ["w1"]
    # The job is back in the queue, with the reason; the worker is told to stop, and gets nothing more.
    assert (await alice.jobs.Get(pb.GetJobRequest(job_id=job))).state == "ready"
    events = await running.server.jobs.events(job, 0)
    assert any("quarantine" in event.detail for event in events)
    assert not await w1.report(job, "running")
    error = await refusal(claim(w1))
    assert error.reason is Reason.QUARANTINED
    (alarm,) = await alarms(running)
    assert (alarm.alarm, alarm.seat) == (ALARM, "coordinator")
    assert (await claim(w2, job)).job_id == job
    # It stays so, and once, until it is lifted.
    await running.server.quarantine.put("w1", Reason.TCB, "again")
    status, found = command(running, "list")
    (entry,) = found["entries"]
    assert (status, entry["worker"], entry["reason"], len(entry["custodians"])) == (1, "w1", "DEBUG_ENABLED", total)
    assert command(running, "lift", "1", "--why", "the firmware was updated")[0] == 0
    assert command(running, "lift", "1", "--why", "again")[1]["error"]["reason"] == "NOT_FOUND"
    assert (await refusal(claim(w1))).reason is Reason.NOT_FOUND
    assert len(await alarms(running)) == 1


@pytest.mark.parametrize(
    "error",
    [RefusedError(Reason.STALE, "too old"), RefusedError(Reason.MEASUREMENT, "unknown image", details={"check": "x"})],
)
async def test_refusals_that_quarantine_nobody_quarantine_nobody_here(running: Running, error: RefusedError) -> None:
    job = await run_job(Owner(), running.caller("owner", "alice"))
    await claim(running.caller("worker", "w1"), job)
    await ask(running, Worker(), "w1", job, len(running.server.fanout.quorum.ids), error)
    assert await running.server.database.read(entries) == []


async def test_custodians_whom_a_quorum_can_do_without_take_no_worker_out_of_service(running: Running) -> None:
    """A lying custodian says of every worker that it is in quarantine."""
    job = await run_job(Owner(), running.caller("owner", "alice"))
    await claim(running.caller("worker", "w1"), job)
    await ask(running, Worker(), "w1", job, 1)
    assert await running.server.database.read(entries) == []


async def test_an_operator_takes_a_worker_out_of_service(running: Running) -> None:
    w1 = running.caller("worker", "w1")
    job = await run_job(Owner(), running.caller("owner", "alice"))
    await claim(w1, job)
    assert command(running, "list") == (0, {"entries": []})
    assert command(running, "quarantine", "w1", "--why", " ")[1]["error"]["reason"] == "MALFORMED"
    assert command(running, "quarantine", "w1", "--why", "it is to be moved")[0] == 0
    assert command(running, "quarantine", "w1", "--why", "twice")[1]["error"]["reason"] == "EXISTS"
    assert not await w1.report(job, "running")
    assert (await refusal(claim(w1))).reason is Reason.QUARANTINED
    assert len(await alarms(running)) == 1


async def test_a_job_without_attempts_left_fails_with_the_reason(running: Running) -> None:
    alice = running.caller("owner", "alice")
    job = await run_job(Owner(), alice)
    for name in ("w1", "w2", "w3"):
        await claim(running.caller("worker", name), job)
        await running.server.quarantine.put(name, Reason.TCB, "old firmware")
    stored = await running.server.jobs.get(job)
    assert stored.state == "failed"
    assert stored.error is not None
    assert stored.error.reason is Reason.QUARANTINED
