"""Faults for a canary at a serving custodian: who may inject them, and that nobody else's answers wait for them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from keyquorum_core.errors import Reason
from keyquorum_protos.v1 import custodian_pb2 as custodian_pb
from keyquorum_protos.v1 import custodian_pb2_grpc as custodian_rpc
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.v1 import drills_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.canary import CANARY, DRILL, REAL, CanaryScene
from tests.support.ceremonies import Make
from tests.support.custodian import CustodianProcess, start_custodian_process

NAME = "ch-1"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CanaryScene]:
    built = CanaryScene.build(tmp_path_factory.mktemp("canary"), real_time=True)
    built.committee.nodes.pop(NAME).close()
    yield built
    built.committee.close()


@pytest.fixture(scope="module")
def process(scene: CanaryScene) -> Iterator[CustodianProcess]:
    started = start_custodian_process(scene.committee.directory(NAME))
    yield started
    assert started.stop() == 0


@pytest.fixture
async def channel(scene: CanaryScene, process: CustodianProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with scene.committee.channel(NAME, process.address) as opened:
        yield opened


async def inject(channel: grpc.aio.Channel, fault: str, **members: object) -> pb.FaultState:
    members = {"drill_id": DRILL, "key_id": CANARY, "seconds": 30, **members}
    return await rpc.CanaryFaultsStub(channel).Inject(pb.InjectFaultRequest(fault=fault, **members), timeout=5)  # type: ignore[arg-type]


async def lift(channel: grpc.aio.Channel) -> pb.FaultState:
    return await rpc.CanaryFaultsStub(channel).Lift(pb.LiftFaultRequest(drill_id=DRILL, key_id=CANARY), timeout=5)


async def test_answers_for_other_keys_do_not_wait_for_a_slow_or_silent_canary(
    scene: CanaryScene, channel: grpc.aio.Channel
) -> None:
    committee = scene.committee
    made = {"canary": scene.request(), "real": scene.request(REAL)}
    requests = {  # both shown in the newest tree
        which: dataclasses.replace(each, inclusion=committee.ledger.inclusion(each.inclusion.index))
        for which, each in made.items()
    }
    call: Any = custodian_rpc.CustodianStub(channel).Release()

    async def ask(which: str, request_id: str) -> None:
        await call.write(committee.message(NAME, requests[which], request_id))

    await inject(channel, "slow", delay_ms=400)
    for which, request_id in (("canary", "late-1"), ("real", "now-1"), ("canary", "late-2"), ("real", "now-2")):
        await ask(which, request_id)
    order = [(await call.read()).request_id for _ in range(4)]
    assert order == ["now-1", "now-2", "late-1", "late-2"]
    await inject(channel, "silent")
    await ask("canary", "never")
    await ask("real", "now-3")
    assert (await call.read()).request_id == "now-3"
    assert (await lift(channel)).fault == "silent"
    await ask("canary", "again")
    answer = await call.read()
    assert (answer.request_id, answer.WhichOneof("outcome")) == ("again", "share"), answer.refusal
    call.cancel()


async def test_a_silent_custodian_says_nothing_in_a_canary_s_ceremony_until_the_fault_ends(
    scene: CanaryScene, channel: grpc.aio.Channel
) -> None:
    ceremonies = custodian_rpc.CeremoniesStub(channel)
    make = Make.rotate(scene.committee, CANARY, present=scene.committee.ids)
    real = Make.rotate(scene.committee, REAL, present=scene.committee.ids)
    await inject(channel, "silent")
    waiting = asyncio.ensure_future(ceremonies.Propose(custodian_pb.ProposeRequest(plan=make.envelope), timeout=20))
    await ceremonies.Propose(custodian_pb.ProposeRequest(plan=real.envelope), timeout=10)
    assert not waiting.done()
    await lift(channel)
    assert (await waiting).header
    for each in (make, real):
        cancelled = await ceremonies.Cancel(custodian_pb.CancelRequest(ceremony_id=each.id), timeout=5)
        assert cancelled.was == "proposed"


async def test_refusals_say_why_and_only_the_coordinator_is_heard(
    scene: CanaryScene, process: CustodianProcess, channel: grpc.aio.Channel
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inject(channel, "lying", key_id=REAL)
    assert from_rpc_error(caught.value, NAME).reason is Reason.CANARY
    folder = scene.committee.directory(NAME)
    operator = tls.TlsIdentity((folder / "admin-cert.pem").read_bytes(), (folder / "admin-key.pem").read_bytes())
    async with scene.committee.channel(NAME, process.address, operator) as stranger:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inject(stranger, "lying")
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED)
    assert (await lift(channel)).fault == ""
