"""The coordinator as a process over mTLS: health, status, folders, init, stopping, metrics."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from keyquorum_coordinator.config import load_trust
from keyquorum_coordinator.init import initialise, issue_certificate
from keyquorum_coordinator.status import fetch_status
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_protos.wire.tls import self_signed
from tests.support.coordinator import Caller, Owner, Running, claim, make_folder, refusal, submit
from tests.support.fake_custodian import FakeCommittee

BUNDLE = os.urandom(300_000)


async def test_health_is_answered_per_service_and_reflection_lists_them(running: Running, alice: Caller) -> None:
    names = [f"keyquorum.v1.{name}" for name in ("Cluster", "Keys", "Jobs", "Artifacts", "Workers")]
    health = health_pb2_grpc.HealthStub(alice.channel)
    for name in ("", *names):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(alice.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    listed = [service.name async for answer in call for service in answer.list_services_response.service]
    assert set(names) | {"grpc.health.v1.Health"} <= set(listed)


async def test_status_tells_of_every_custodian(running: Running, committee: FakeCommittee) -> None:
    await committee.custodians["ch-1"].stop()
    for _ in range(100):
        found = await fetch_status(running.config.directory)
        by_id = {each["custodian"]: each for each in found["custodians"]}  # type: ignore[attr-defined]
        if by_id["ch-1"]["last_error"]:
            break
        await asyncio.sleep(0.05)
    assert not by_id["ch-1"]["reachable"]
    assert by_id["de-1"]["reachable"]
    assert "UNAVAILABLE" in by_id["ch-1"]["last_error"]


async def test_only_one_coordinator_uses_a_folder(running: Running, committee: FakeCommittee) -> None:
    with pytest.raises(StateError):
        await Running.again(running.config, committee)


async def test_a_roster_that_does_not_name_this_coordinator_is_refused(
    tmp_path: Path, committee: FakeCommittee
) -> None:
    config = make_folder(tmp_path / "c", committee)
    config.path(config.tls_certificate).write_bytes(self_signed("demo", "coordinator", "main", now=0).certificate)
    with pytest.raises(RefusedError) as caught:
        load_trust(config, int(time.time()))
    assert caught.value.reason is Reason.ROSTER


async def test_init_and_issued_certificates_are_never_overwritten(running: Running, tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        initialise(running.config, now=0)
    assert caught.value.reason is Reason.EXISTS
    issue_certificate(running.config.directory, "owner", "carol", tmp_path / "out", now=int(time.time()))
    assert (tmp_path / "out" / "carol-key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError):
        issue_certificate(running.config.directory, "owner", "carol", tmp_path / "out", now=int(time.time()))
    with pytest.raises(MalformedError):
        issue_certificate(running.config.directory, "coordinator", "carol", tmp_path / "out", now=0)
    assert running.config.path(running.config.tls_key).stat().st_mode & 0o777 == 0o600


async def test_stopping_sends_those_who_wait_away_at_once(
    tmp_path: Path, committee: FakeCommittee, owner: Owner
) -> None:
    running = await Running.start(tmp_path / "stopping", committee)
    alice, worker = running.caller("owner", "alice"), running.caller("worker", "w1")
    job = await submit(alice, owner)
    watching = asyncio.create_task(refusal(alice.watch(job)))
    claiming = asyncio.create_task(refusal(claim(worker, wait=60)))
    await asyncio.sleep(0.1)
    await running.server.stop(3600)  # whoever used up that grace would never see the test's end
    for waiting in (watching, claiming):
        assert isinstance(await waiting, UnavailableError)
    for caller in running.callers:
        await caller.close()


async def test_metrics_show_jobs_releases_and_circuits(tmp_path: Path, committee: FakeCommittee, owner: Owner) -> None:
    running = await Running.start(tmp_path / "metrics", committee)
    address = running.server.metrics.serve("127.0.0.1:0")
    alice = running.caller("owner", "alice")
    await alice.open(await submit(alice, owner))
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read().decode())
    assert 'keyquorum_coordinator_jobs{state="opened"} 1.0' in page
    assert 'keyquorum_coordinator_release_seconds_count{recipient="owner"} 1.0' in page
    assert 'keyquorum_coordinator_custodian_circuit{custodian="ch-1"} 0.0' in page
    assert 'reason="OK"' in page
    await running.stop()
