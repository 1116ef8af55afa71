"""Generate ceremonies over real gRPC: keys made and listed, custodians that lie, refuse or vanish for a moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_coordinator.making import Making
from keyquorum_core.ceremony import CERTIFICATE_TYPE, EpochCertificate
from keyquorum_core.ceremony_plan import CeremonyPlan, new_ceremony_id
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.signing import Identity, open_multi, sign
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2 as custodian_pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.coordinator import Owner, Running, plan_envelope
from tests.support.fake_ceremonies import FakeCeremonies, start_committee
from tests.support.fake_custodian import FakeCommittee


@pytest.fixture
async def parts() -> AsyncIterator[tuple[FakeCommittee, dict[str, FakeCeremonies]]]:
    committee, ceremonies = await start_committee()
    yield committee, ceremonies
    await committee.stop()


@pytest.fixture
async def committee(parts: tuple[FakeCommittee, dict[str, FakeCeremonies]]) -> FakeCommittee:
    return parts[0]


@pytest.fixture
async def ceremonies(parts: tuple[FakeCommittee, dict[str, FakeCeremonies]]) -> dict[str, FakeCeremonies]:
    return parts[1]


@pytest.fixture
async def running(tmp_path: Path, committee: FakeCommittee) -> AsyncIterator[Running]:
    running = await Running.start(tmp_path / "coordinator", committee)
    yield running
    await running.stop()


async def refusal(call: Awaitable[Any]) -> KeyquorumError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, "coordinator")


async def test_a_key_is_made_certified_and_listed(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]
) -> None:
    operator, alice = running.caller("operator", "root"), running.caller("owner", "alice")
    plan = plan_envelope(committee)
    events = [event async for event in operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]
    assert list(dict.fromkeys(event.step for event in events)) == ["propose", "deliver", "confirm", "activate", "done"]
    for step in ("propose", "deliver", "confirm", "activate"):
        assert {event.custodian for event in events if event.step == step} == {"", *committee.custodians}
    identities = {each.id: each.identity for each in committee.roster.custodians}
    open_multi(events[-1].certificate, CERTIFICATE_TYPE, identities, 5, "certificate")
    assert all(len(each.active) == 1 for each in ceremonies.values())
    (key,) = (await alice.keys.List(pb.ListKeysRequest())).keys
    assert (key.key_id, key.epoch, key.state, key.certificate) == ("k2", 1, "active", events[-1].certificate)
    assert await alice.keys.Get(pb.GetKeyRequest(key_id="k2")) == key
    assert (await refusal(alice.keys.Get(pb.GetKeyRequest(key_id="k9")))).reason is Reason.UNKNOWN_KEY
    _, manifest = Owner().manifest(key_id="k2")
    await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))

    again = [event async for event in operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]
    assert [event.step for event in again] == ["done"]
    assert again[0].certificate == events[-1].certificate
    assert all(each.calls == ["propose", "deliver", "confirm", "activate"] for each in ceremonies.values())
    error = await refusal(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan_envelope(committee))).read())
    assert error.reason is Reason.EXISTS


def test_a_certificate_over_a_mebibyte_is_made_whole() -> None:
    quorum = Quorum({"at_least": 8}, [Custodian(f"c-{number}", "CH") for number in range(16)])
    plan = CeremonyPlan(new_ceremony_id(), "k1", 1, "MLKEM768_X25519", "demo", "0" * 64, quorum, 1)
    certificate = EpochCertificate(plan, (bytes(32),) * quorum.seed_count)
    identities = {name: Identity.generate() for name in quorum.ids}
    generate = object.__new__(Making)
    generate.plan = plan
    generate.identities = {name: identity.public for name, identity in identities.items()}
    confirmed = {
        name: custodian_pb.ConfirmResponse(certificate=sign(identity, CERTIFICATE_TYPE, certificate.to_payload()))
        for name, identity in identities.items()
    }
    whole = generate._whole_certificate(certificate, confirmed)
    assert len(whole) > 1 << 20
    assert generate._opened(whole) == certificate


async def drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_lying_custodian_stops_the_ceremony_which_names_it_and_is_cancelled(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]
) -> None:
    ceremonies["is-1"].lie = True
    operator = running.caller("operator", "root")
    plan = plan_envelope(committee)
    error = await refusal(drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))))
    assert error.reason is Reason.CEREMONY
    assert error.details["step"] == "deliver"
    assert "is-1" in error.details["custodian"]
    assert all(each.calls == ["propose", "deliver", "cancel"] for each in ceremonies.values())
    again = await refusal(drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))))
    assert again.message == error.message
    ceremonies["is-1"].lie = False
    await drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan_envelope(committee))))


@pytest.mark.parametrize("step", ["propose", "deliver", "confirm"])
async def test_a_refusal_before_the_certificate_cancels_and_names_who_where_and_why(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies], step: str
) -> None:
    ceremonies["jp-1"].errors[step] = [RefusedError(Reason.SEALED, "the keystore is sealed")]
    operator = running.caller("operator", "root")
    error = await refusal(drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan_envelope(committee)))))
    assert error.reason is Reason.SEALED
    assert error.message == f"the ceremony stopped at {step}: jp-1: SEALED: the keystore is sealed"
    assert (error.details["custodian"], error.details["step"]) == ("jp-1", step)
    assert all(each.calls[-1] == "cancel" for each in ceremonies.values())
    assert not any(each.active for each in ceremonies.values())


async def test_after_the_certificate_a_failure_is_not_cancelled_and_can_be_resumed(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]
) -> None:
    ceremonies["jp-1"].errors["activate"] = [StateError(Reason.STATE, "not now")]
    operator = running.caller("operator", "root")
    plan = plan_envelope(committee)
    error = await refusal(drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))))
    assert (error.details["custodian"], error.details["step"]) == ("jp-1", "activate")
    assert not any("cancel" in each.calls for each in ceremonies.values())
    await drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan)))
    assert all(len(set(each.active)) == 1 for each in ceremonies.values())


async def test_a_custodian_out_of_reach_for_a_moment_is_asked_again(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]
) -> None:
    ceremonies["de-2"].errors["deliver"] = [UnavailableError(Reason.STORAGE, "disk full for a moment")]
    operator = running.caller("operator", "root")
    await drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan_envelope(committee))))
    assert ceremonies["de-2"].calls.count("deliver") == 2


async def test_a_plan_not_in_order_is_refused_before_anybody_is_asked(
    running: Running, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]
) -> None:
    operator = running.caller("operator", "root")
    for plan, reason in (
        (plan_envelope(committee, signer=Identity.generate()), Reason.SIGNATURE),
        (plan_envelope(committee, cluster="other"), Reason.CEREMONY),
        (plan_envelope(committee, roster_digest="0" * 64), Reason.CEREMONY),
        (b"garbage", Reason.MALFORMED),
    ):
        error = await refusal(drain(operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))))
        assert error.reason is reason
    assert not any(each.calls for each in ceremonies.values())
