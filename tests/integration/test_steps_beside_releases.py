"""A custodian that computes in a ceremony serves meanwhile: releases, health checks and its operator.

Of a key's ceremonies it goes through one step at a time, and stores nothing of one that its caller gave up on. Nothing
is timed: either the step's work stands still until all else was answered, or answers are counted before it ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.ceremonies import LOST, SEVENTEEN, TEN_THOUSAND
from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate, commitments_to
from keyquorum_core.ceremony_states import Kind, State, Step
from keyquorum_core.rebuilding import GIFT_TYPE, seal_gift
from keyquorum_core.signing import Identity, merge, sign
from keyquorum_custodian.epochs import HeldEpoch
from keyquorum_custodian.pacing import Beside
from keyquorum_custodian.server import CustodianServer
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.ceremonies import Make, Rebuild
from tests.support.custodian import Committee, build_committee

ME = "ch-1"
KEY = "key-1"


class Held(Beside):
    """Work stands still while ``go`` is not set; ``entered`` says that there is some."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()
        self.go = threading.Event()
        self.go.set()

    async def __call__(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        def when_it_may() -> Any:
            assert self.go.wait(60)
            return function(*args, **kwargs)

        self.entered.set()
        return await super().__call__(when_it_may)

    def hold(self) -> None:
        self.entered.clear()
        self.go.clear()


class Served:
    """One custodian on the network, and who calls it."""

    def __init__(self, committee: Committee, name: str, work: Beside) -> None:
        self.committee, self.name, self.work = committee, name, work
        self.server = CustodianServer(committee.open(name))
        self.server._beside.close()
        self.server._beside = work
        self._requests = 0

    async def start(self) -> None:
        await self.server.start()
        folder = self.committee.directory(self.name)
        operator = tls.TlsIdentity((folder / "admin-cert.pem").read_bytes(), (folder / "admin-key.pem").read_bytes())
        self.channel = self.committee.channel(self.name, self.server.address)
        self.operator = self.committee.channel(self.name, self.server.admin_address, operator)
        self.ceremonies = rpc.CeremoniesStub(self.channel)
        self.stream: Any = rpc.CustodianStub(self.channel).Release()

    async def stop(self) -> None:
        self.stream.cancel()
        await self.channel.close()
        await self.operator.close()
        await self.server.stop(0)

    async def release(self) -> None:
        self._requests += 1
        request = self.committee.owner_request()
        await self.stream.write(self.committee.message(self.name, request, f"r{self._requests}"))
        answer = await self.stream.read()
        assert (answer.request_id, answer.WhichOneof("outcome")) == (f"r{self._requests}", "share"), answer.refusal

    async def answers_everything(self) -> None:
        """A release, a health check, and its operator's question."""
        await self.release()
        health = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        status = await rpc.CustodianAdminStub(self.operator).Status(pb.StatusRequest())
        assert status.description.custodian == self.name


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    committee = build_committee(tmp_path / "committee")
    committee.open_all()
    committee.generate()
    found = Served(committee, ME, Held())
    await found.start()
    yield found
    await found.stop()
    committee.close()


def parts_to(make: Make, name: str) -> list[pb.SealedParts]:
    return [pb.SealedParts(**{"from": part.sender}, to=part.to, sealed=part.sealed) for part in make.parts(name)]


async def rotation_at(served: Served, step: Step) -> tuple[Make, Callable[[], Awaitable[Any]]]:
    """A rotation that has come to a step at the custodian that is served, and that step."""
    make = Make.rotate(served.committee, KEY)
    calls = served.ceremonies
    if step is Step.PROPOSE:
        return make, lambda: calls.Propose(pb.ProposeRequest(plan=make.envelope))
    make.propose()
    if step is Step.DELIVER:
        request = pb.DeliverRequest(ceremony_id=make.id, headers=make.headers, parts=parts_to(make, ME))
        return make, lambda: calls.Deliver(request)
    make.deliver()
    if step is Step.CONFIRM:
        stated = [make.commitments[name] for name in make.present]
        return make, lambda: calls.Confirm(pb.ConfirmRequest(ceremony_id=make.id, commitments=stated))
    make.confirm()
    return make, lambda: calls.Activate(pb.ActivateRequest(ceremony_id=make.id, certificate=make.certificate))


async def rebuild_at(served: Served, step: Step) -> Callable[[], Awaitable[Any]]:
    committee, calls = served.committee, served.ceremonies
    target = ME if step is Step.RESTORE else "no-1"
    present = [name for name in committee.ids if name != target]
    Make.rotate(committee, KEY, present=present).activate()
    rebuild = Rebuild(committee, KEY, 2, target).propose()
    if step is Step.GIVE:
        return lambda: calls.Give(pb.GiveRequest(ceremony_id=rebuild.id, request=rebuild.request))
    rebuild.give()
    gifts = [
        pb.Gift(**{"from": part.sender}, statement=statement, sealed=part.sealed) for statement, part in rebuild.gifts
    ]
    request = pb.RestoreRequest(ceremony_id=rebuild.id, certificate=rebuild.certificate, gifts=gifts)
    return lambda: calls.Restore(request)


def held(served: Served) -> Held:
    assert isinstance(served.work, Held)
    return served.work


STEPS = [Step.PROPOSE, Step.DELIVER, Step.CONFIRM, Step.ACTIVATE, Step.GIVE, Step.RESTORE]


@pytest.mark.parametrize("step", STEPS)
async def test_everything_else_is_answered_while_a_step_is_under_way(served: Served, step: Step) -> None:
    if step in (Step.GIVE, Step.RESTORE):
        call = await rebuild_at(served, step)
    else:
        _, call = await rotation_at(served, step)
    work = held(served)
    work.hold()
    under_way = asyncio.ensure_future(call())
    await work.entered.wait()
    await served.answers_everything()
    await served.release()
    assert not under_way.done()
    work.go.set()
    await under_way
    await served.answers_everything()


async def test_a_key_s_next_step_waits_for_the_one_under_way(served: Served) -> None:
    make, deliver = await rotation_at(served, Step.DELIVER)
    work = held(served)
    work.hold()
    first = asyncio.ensure_future(deliver())
    await work.entered.wait()
    again = asyncio.ensure_future(deliver())
    await served.answers_everything()  # asked after it, and answered: so it has come as far as it can
    cancel = asyncio.ensure_future(served.ceremonies.Cancel(pb.CancelRequest(ceremony_id=make.id, cause="enough")))
    await served.answers_everything()
    assert not cancel.done()
    assert not again.done()
    work.go.set()
    assert (await first).commitments == (await again).commitments
    assert (await cancel).was == "delivered"
    row = served.committee.nodes[ME].keystore.ceremony(make.id)
    assert row is not None
    assert (row.state, row.cancelled_from) == (State.CANCELLED, State.DELIVERED)


async def test_another_key_s_step_does_not_wait(served: Served) -> None:
    """For its turn: what it computes comes after what was begun, in the one thread there is for that."""
    other = Make(served.committee, served.committee.plan("key-2"))
    _, deliver = await rotation_at(served, Step.DELIVER)
    work = held(served)
    work.hold()
    first = asyncio.ensure_future(deliver())
    await work.entered.wait()
    assert (await served.ceremonies.Cancel(pb.CancelRequest(ceremony_id=other.id))).was == "unknown"
    work.entered.clear()
    second = asyncio.ensure_future(served.ceremonies.Propose(pb.ProposeRequest(plan=other.envelope)))
    await work.entered.wait()
    work.go.set()
    await asyncio.gather(first, second)


async def test_nothing_is_stored_of_a_step_that_its_caller_gave_up_on(served: Served) -> None:
    make, deliver = await rotation_at(served, Step.DELIVER)
    work = held(served)
    store = served.committee.nodes[ME].keystore
    work.hold()
    call: Any = deliver()
    await work.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await served.answers_everything()
    work.go.set()
    await work(int)  # what was begun is through
    row = store.ceremony(make.id)
    assert row is not None
    assert (row.state, store.answer(make.id, Step.DELIVER)) == (State.PROPOSED, None)
    assert store.seeds(row) == {}
    answer = await deliver()
    make.commitments[ME] = answer.commitments
    make.activate()


async def test_releases_are_answered_while_ten_thousand_seeds_are_rebuilt(tmp_path: Path) -> None:
    committee = build_committee(tmp_path / "committee", SEVENTEEN, TEN_THOUSAND)
    try:
        await _rebuild_ten_thousand(committee)
    finally:
        committee.close()


async def _rebuild_ten_thousand(committee: Committee) -> None:
    for name in set(committee.ids) - set(committee.ids[3:6]):  # those three are a quorum; a checkpoint has room for few
        del committee.ledger.witnesses[name]
    node = committee.open(LOST)
    quorum, small = committee.quorum, committee.plan("key-1")
    assert len(quorum.indices_of(LOST)) == 10_000
    # An epoch to release from. What a release costs is not the question here: it has one seed.
    first = quorum.indices_of(LOST)[0]
    certified = EpochCertificate(small, (bytes(32),) * quorum.seed_count)
    node.epochs.add(HeldEpoch(certified, {first: os.urandom(32)}))
    made, certificate, seeds = _made_elsewhere(committee)
    repair = committee.plan("key-2", kind=Kind.REPAIR, certificate=made.digest, target=LOST, policy=made.plan.policy)
    gifts = []
    for name in quorum.ids:
        if name != LOST:
            identity = _identity(committee, name)
            mine = {index: seeds[index] for index in quorum.indices_of(name)}
            gift, sealed = seal_gift(repair, name, mine, committee.roster.custodian(LOST).hpke)
            statement = sign(identity, GIFT_TYPE, gift.to_payload())
            gifts.append(pb.Gift(**{"from": name}, statement=statement, sealed=sealed))
    served = Served(committee, LOST, Beside())
    await served.start()
    try:
        proposal = pb.ProposeRequest(plan=committee.sign_plan(repair), certificate=certificate)
        await served.ceremonies.Propose(proposal)
        await served.release()
        request = pb.RestoreRequest(ceremony_id=repair.ceremony_id, certificate=certificate, gifts=gifts)
        restoring = asyncio.ensure_future(served.ceremonies.Restore(request))
        answered = 0
        while not restoring.done():
            await served.answers_everything()
            answered += not restoring.done()
        await restoring
        assert answered >= 3
        assert len(node.epochs.active("key-2", 1).indices) == 10_000
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, LOST) from None
    finally:
        await served.stop()


def _identity(committee: Committee, name: str) -> Identity:
    return committee.open(name).keystore.identity()


def _made_elsewhere(committee: Committee) -> tuple[EpochCertificate, bytes, dict[int, bytes]]:
    """An epoch that all made together, one would think: what it is certified as, the envelope, and every seed of it."""
    plan = committee.plan("key-2")
    seeds = {index: os.urandom(32) for index in range(committee.quorum.seed_count)}
    made = EpochCertificate(plan, tuple(commitments_to(plan.ceremony_id, seeds).values()))
    signed = [sign(_identity(committee, name), CERTIFICATE_TYPE, made.to_payload()) for name in committee.ids]
    return made, merge(signed, max_bytes=MAX_CERTIFICATE), seeds
