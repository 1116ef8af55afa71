"""A custodian as a real process over real mTLS: who may call what, what it answers, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from keyquorum_core import manifest
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.parts import SealedPart
from keyquorum_core.release import Answer, Leaf, open_share, open_window, verify_answer
from keyquorum_core.signing import Identity, merge
from keyquorum_custodian.answering import MAX_GROUP
from keyquorum_custodian.server import CustodianServer
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error, from_status
from tests.support import policies
from tests.support.custodian import PASSPHRASE, Committee, CustodianProcess, build_committee, start_custodian_process
from tests.support.ledger import update_message
from tests.support.vendor import bulletin, reference_json

NAME = "ch-1"
SECRETS: list[bytes] = []
"""Of the custodian under test, to look for where they must not be."""


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    built = build_committee(tmp_path_factory.mktemp("server"), metrics=True)
    built.generate()
    store = built.nodes[NAME].keystore
    SECRETS.extend([*store.identity().seeds(), *store.seeds(store.epochs()[0]).values()])
    built.close()
    yield built
    built.close()


@pytest.fixture(scope="module")
def process(committee: Committee) -> Iterator[CustodianProcess]:
    started = start_custodian_process(committee.directory(NAME))
    yield started
    assert started.stop() == 0


@pytest.fixture
async def channel(committee: Committee, process: CustodianProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with committee.channel(NAME, process.address) as opened:
        yield opened


def admin_identity(committee: Committee) -> tls.TlsIdentity:
    folder = committee.directory(NAME)
    return tls.TlsIdentity((folder / "admin-cert.pem").read_bytes(), (folder / "admin-key.pem").read_bytes())


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**{k: v for k, v in os.environ.items() if k != "KEYQUORUM_PASSPHRASE"}, **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )


# -- releases ----------------------------------------------------------------------------------------------------------


async def test_requests_on_one_stream_are_each_answered_in_order(
    committee: Committee, channel: grpc.aio.Channel
) -> None:
    stub = rpc.CustodianStub(channel)
    identity = committee.roster.custodian(NAME).identity
    statement = (await stub.GetWindow(pb.GetWindowRequest(), timeout=5)).statement
    request = committee.owner_request()
    _, payload = manifest.open_manifest(request.manifest, committee.owner.identity.public)
    leaf = Leaf.parse(request.leaf)
    call = stub.Release()
    sent = [("good-1", request.leaf), ("bad", b"no leaf"), ("good-2", request.leaf), ("good-1", request.leaf)]
    for request_id, leaf_bytes in sent:
        await call.write(committee.message(NAME, dataclasses.replace(request, leaf=leaf_bytes), request_id))
    await call.done_writing()
    answers = [answer async for answer in call]
    assert [answer.request_id for answer in answers] == [request_id for request_id, _ in sent]
    assert {answer.custodian for answer in answers} == {NAME}
    refusal = from_status(answers[1].refusal)
    assert isinstance(refusal, KeyquorumError)
    assert (refusal.reason, refusal.details["check"]) == (Reason.MALFORMED, "leaf")
    shares = []
    for answer in (answers[0], answers[2], answers[3]):
        assert answer.WhichOneof("outcome") == "share"
        share = answer.share
        if (
            share.window * 30
            != open_window(statement, identity, custodian=NAME, cluster="demo", now=int(committee.clock())).not_before
        ):
            statement = (await stub.GetWindow(pb.GetWindowRequest(), timeout=5)).statement
        window = open_window(statement, identity, custodian=NAME, cluster="demo", now=int(committee.clock()))
        received = Answer(NAME, share.key_id, share.epoch, share.window, share.sealed, share.signature)
        verify_answer(received, window, manifest.subject(payload), leaf.hash(), key_id="key-1", epoch=1)
        shares.append(open_share(received, committee.owner.recipient, leaf.hash(), committee.quorum))
    assert shares[0] == shares[1] == shares[2]


async def test_a_group_is_answered_in_one_message_each_request_by_itself(
    committee: Committee, channel: grpc.aio.Channel
) -> None:
    stub = rpc.CustodianStub(channel)
    assert (await stub.Describe(pb.DescribeRequest(), timeout=5)).release_group == MAX_GROUP
    first, second = committee.owner_request(), committee.owner_request()
    first = dataclasses.replace(first, inclusion=committee.ledger.inclusion(first.inclusion.index))
    group = [
        committee.message(NAME, first, "1"),
        committee.message(NAME, dataclasses.replace(first, leaf=b"no leaf"), "2"),
        pb.ReleaseRequest(request_id="3", update=update_message(committee.ledger.update(committee.ledger.size))),
        pb.ReleaseRequest(request_id="4", group=[committee.message(NAME, first, "inner")]),
        committee.message(NAME, second, "5"),
    ]
    many = [committee.message(NAME, first, f"{number}") for number in range(MAX_GROUP + 1)]
    call = stub.Release()
    for sent in (group, many, many[1:]):
        await call.write(pb.ReleaseRequest(group=sent))
    await call.done_writing()
    answers = [answer async for answer in call]
    assert [each.request_id for each in answers[0].group] == ["1", "2", "3", "4", "5"]
    outcomes = [each.WhichOneof("outcome") for each in answers[0].group]
    assert outcomes == ["share", "refusal", "cosignatures", "refusal", "share"]
    assert [from_status(answers[0].group[place].refusal).reason for place in (1, 3)] == ["MALFORMED", "TOO_LARGE"]
    assert from_status(answers[1].refusal).reason is Reason.TOO_LARGE
    assert [each.WhichOneof("outcome") for each in answers[2].group] == ["share"] * MAX_GROUP


async def test_health_is_answered_while_a_stream_is_busy(committee: Committee, channel: grpc.aio.Channel) -> None:
    request = committee.owner_request()
    call = rpc.CustodianStub(channel).Release()
    message = committee.message(NAME, request)

    async def flood() -> None:
        for _ in range(300):
            await call.write(message)
        await call.done_writing()

    sending = asyncio.create_task(flood())
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="keyquorum.v1.Custodian"), timeout=2)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await sending
    assert len([answer async for answer in call]) == 300


async def test_describe_says_what_is_held(committee: Committee, channel: grpc.aio.Channel) -> None:
    found = await rpc.CustodianStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    assert (found.custodian, found.jurisdiction, found.cluster) == (NAME, "CH", "demo")
    assert found.roster_digest == committee.roster.digest
    assert found.trusts_development_hardware
    assert [(key.key_id, key.epoch, key.state, key.seeds) for key in found.keys] == [("key-1", 1, "active", 2)]
    assert abs(found.now - committee.clock()) < 10


# -- who may call what -------------------------------------------------------------------------------------------------


async def test_only_the_roster_s_coordinator_gets_in(committee: Committee, process: CustodianProcess) -> None:
    now = int(committee.clock())
    strangers = {
        "another coordinator": tls.self_signed("demo", "coordinator", "main", now=now),
        "the operator of this custodian": admin_identity(committee),
    }
    for stranger in strangers.values():
        async with committee.channel(NAME, process.address, stranger) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.CustodianStub(channel).Describe(pb.DescribeRequest(), timeout=5)
            assert isinstance(from_rpc_error(caught.value, NAME), UnavailableError)


async def test_the_coordinator_does_not_reach_the_operator_s_listener(
    committee: Committee, process: CustodianProcess, channel: grpc.aio.Channel
) -> None:
    async with committee.channel(NAME, process.admin_address) as admin:
        with pytest.raises(grpc.aio.AioRpcError):
            await rpc.CustodianAdminStub(admin).Status(pb.StatusRequest(), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.CustodianAdminStub(channel).Status(pb.StatusRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with committee.channel(NAME, process.admin_address, admin_identity(committee)) as admin:
        assert (await rpc.CustodianAdminStub(admin).Status(pb.StatusRequest(), timeout=5)).started_at


async def test_the_work_between_requests_goes_on_after_a_failure(
    committee: Committee, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("keyquorum_custodian.server._PREPARE_SECONDS", 0.01)
    monkeypatch.setattr("keyquorum_custodian.server._FLUSH_SECONDS", 0.01)
    node = committee.open("is-1")
    calls: list[str] = []

    def broken(which: str) -> Callable[[], None]:
        def call() -> None:
            calls.append(which)
            if calls.count(which) < 3:
                raise RuntimeError("dictionary changed size during iteration")

        return call

    monkeypatch.setattr(node.windows, "prepare_next", broken("prepare"))
    monkeypatch.setattr(node.gate, "flush", broken("flush"))
    server = CustodianServer(node)
    tasks = [asyncio.create_task(server._prepare_windows()), asyncio.create_task(server._flush())]
    for _ in range(500):
        if min(calls.count("prepare"), calls.count("flush")) > 3:
            break
        await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert min(calls.count("prepare"), calls.count("flush")) > 3


def test_a_serving_custodian_is_hardened(process: CustodianProcess) -> None:
    assert re.search(r"Max core file size +0 +0", Path(f"/proc/{process.pid}/limits").read_text())
    # What serves was given the passphrase through a pipe: it stands neither in its arguments nor in its environment.
    for place in ("cmdline", "environ"):
        try:
            assert PASSPHRASE.encode() not in Path(f"/proc/{process.pid}/{place}").read_bytes()
        except PermissionError:
            assert place == "environ"  # closed to everybody but root, which is the point


def test_what_only_reads_command_lines_does_not_stay_in_a_serving_custodian(process: CustodianProcess) -> None:
    maps = Path(f"/proc/{process.pid}/maps")
    if not os.access(maps, os.R_OK) or os.geteuid() != 0:
        pytest.skip("another process's mappings are closed to this user")
    assert "pydantic" not in maps.read_text()


def test_a_passphrase_that_no_pipe_holds_is_refused(committee: Committee) -> None:
    done = command("serve", "--dir", str(committee.directory(NAME)), KEYQUORUM_PASSPHRASE="x" * 5000)
    assert done.returncode == 1
    assert "PASSPHRASE" in done.stderr


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    answers = [answer async for answer in call]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"keyquorum.v1.Custodian", "keyquorum.v1.Ceremonies", "grpc.health.v1.Health"} <= names


# -- ceremonies over the wire ------------------------------------------------------------------------------------------


async def test_a_ceremony_runs_over_the_wire(committee: Committee, process: CustodianProcess) -> None:
    """One custodian is the real process, the other two are here: what they say to each other is the same."""
    plan = committee.plan("wire-key")
    envelope = committee.sign_plan(plan)
    others = {name: committee.open(name) for name in committee.ids if name != NAME}
    async with committee.channel(NAME, process.address) as channel:
        stub = rpc.CeremoniesStub(channel)
        mine = await stub.Propose(pb.ProposeRequest(plan=envelope), timeout=10)
        proposals = [made for node in others.values() if (made := node.ceremonies.propose(envelope).proposal)]
        headers = [mine.header, *(proposal.header for proposal in proposals)]
        for_me = [part for proposal in proposals for part in proposal.parts if part.to == NAME]
        wire = [pb.SealedParts(**{"from": part.sender}, to=part.to, sealed=part.sealed) for part in for_me]
        commitments = [
            (
                await stub.Deliver(
                    pb.DeliverRequest(ceremony_id=plan.ceremony_id, headers=headers, parts=wire), timeout=10
                )
            ).commitments
        ]
        from_me = [SealedPart(getattr(part, "from"), part.to, part.sealed) for part in mine.parts]
        for name, node in others.items():
            parts = [part for part in from_me if part.to == name]
            parts += [part for proposal in proposals for part in proposal.parts if part.to == name]
            commitments.append(node.ceremonies.deliver(plan.ceremony_id, headers, parts))
        confirm = pb.ConfirmRequest(ceremony_id=plan.ceremony_id, commitments=commitments)
        signed = [(await stub.Confirm(confirm, timeout=10)).certificate]
        signed += [node.ceremonies.confirm(plan.ceremony_id, commitments) for node in others.values()]
        activate = pb.ActivateRequest(ceremony_id=plan.ceremony_id, certificate=merge(signed))
        await stub.Activate(activate, timeout=10)
        await stub.Activate(activate, timeout=10)
        found = await rpc.CustodianStub(channel).Describe(pb.DescribeRequest(), timeout=5)
        assert "wire-key" in [key.key_id for key in found.keys]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(pb.CancelRequest(ceremony_id=plan.ceremony_id), timeout=5)
        assert from_rpc_error(caught.value, NAME).reason is Reason.STATE
        assert (await stub.Cancel(pb.CancelRequest(ceremony_id="0" * 32), timeout=5)).was == "unknown"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Propose(pb.ProposeRequest(plan=b"{}"), timeout=5)
        assert from_rpc_error(caught.value, NAME).reason is Reason.MALFORMED
    committee.close()


# -- the command -------------------------------------------------------------------------------------------------------


async def test_status_metrics_and_logs_tell_what_happened(
    committee: Committee, process: CustodianProcess, channel: grpc.aio.Channel
) -> None:
    request = committee.owner_request()
    call = rpc.CustodianStub(channel).Release()
    for request_id, leaf in (("1", request.leaf), ("2", request.leaf), ("3", request.leaf), ("bad", b"no leaf")):
        await call.write(committee.message(NAME, dataclasses.replace(request, leaf=leaf), request_id))
    await call.done_writing()
    assert len([answer async for answer in call]) == 4
    await asyncio.to_thread(_look_at_everything, committee, process)


def _look_at_everything(committee: Committee, process: CustodianProcess) -> None:
    folder = str(committee.directory(NAME))
    found = json.loads(command("status", "--dir", folder, "--json").stdout)
    assert found["custodian"] == NAME
    assert found["releases"] >= 3
    assert any("DEVELOPMENT" in warning for warning in found["warnings"])
    shown = command("status", "--dir", folder).stdout
    assert "WARNING: DEVELOPMENT HARDWARE IS TRUSTED" in shown
    assert "key-1 epoch 1: active" in shown
    with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=5) as response:
        metrics = response.read().decode()
    for line in (
        "keyquorum_custodian_development_hardware_trusted 1.0",
        'keyquorum_custodian_refusals_total{reason="MALFORMED"} ',
        "keyquorum_custodian_release_seconds_bucket",
        "keyquorum_custodian_window ",
        'keyquorum_custodian_info{custodian="ch-1",jurisdiction="CH"',
    ):
        assert line in metrics
    log = process.log.read_text()
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert "serving" in events
    assert "release refused" in events
    assert "Traceback" not in log
    assert len(SECRETS) == 4
    for secret in [PASSPHRASE, *(secret.hex() for secret in SECRETS)]:
        assert secret not in log + metrics + shown + json.dumps(found)


def test_bulletins_are_accepted_over_the_operator_s_listener_listed_and_never_rolled_back(
    committee: Committee, process: CustodianProcess, tmp_path: Path
) -> None:
    folder = str(committee.directory(NAME))

    def accept(version: int, age: int, signers: int = 1) -> dict[str, Any]:
        made = bulletin("reference-values", reference_json() | {"max_evidence_age": age}, version)
        path = tmp_path / f"{version}-{age}.json"
        path.write_bytes(sign_bulletin(made, [committee.operator.identity] * signers))
        done = command("bulletin", "accept", str(path), "--dir", folder, "--json")
        out: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (1 if "error" in out else 0)
        return out

    accepted = accept(7, 601)
    assert (accepted["kind"], accepted["version"], accepted["signers"]) == ("reference-values", 7, ["olga"])
    assert accept(6, 600)["error"]["reason"] == "ROLLBACK"
    assert accept(7, 602)["error"]["reason"] == "ROLLBACK"
    assert accept(8, 602, signers=0)["error"]["reason"] == "SIGNATURE_MISSING"
    assert (committee.directory(NAME) / "bulletins" / "reference-values.json").read_bytes() == (
        tmp_path / "7-601.json"
    ).read_bytes()
    listed = json.loads(command("bulletin", "list", "--dir", folder, "--json").stdout)["bulletins"]
    assert {each["kind"]: (each["version"], each["problem"]) for each in listed if each["version"]} == {
        "inventory": (1, ""),
        "policy": (1, ""),
        "reference-values": (7, ""),
    }
    assert "version 7" in command("bulletin", "list", "--dir", folder).stdout
    assert re.search(r"reference-values +version 7", command("status", "--dir", folder).stdout)


def test_a_policy_is_installed_at_a_running_custodian_and_left_for_a_stopped_one(
    committee: Committee, process: CustodianProcess, tmp_path: Path
) -> None:
    def bundle(custodian: str, version: int, *signers: Identity) -> str:
        path = tmp_path / f"{custodian}-{version}.json"
        path.write_bytes(policies.bundle(signers, custodians=[custodian], version=version))
        return str(path)

    operator = committee.operator.identity
    running, stopped = str(committee.directory(NAME)), str(committee.directory("no-1"))
    done = command("policy", "install", bundle(NAME, 2, operator), "--dir", running, "--json")
    assert json.loads(done.stdout)["accepted"] is True
    for refused, reason in (
        (bundle(NAME, 1, operator), "ROLLBACK"),
        (bundle("no-1", 3, operator), "POLICY"),
        (bundle(NAME, 3, Identity.generate()), "SIGNATURE"),
    ):
        done = command("policy", "install", refused, "--dir", running, "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["reason"]) == (1, reason)
    assert re.search(r"policy +version 2", command("bulletin", "list", "--dir", running).stdout)

    file = committee.directory("no-1") / "bulletins" / "policy.json"
    before = file.read_bytes()
    done = command("policy", "install", bundle(NAME, 2, operator), "--dir", stopped)
    assert done.stderr.startswith("refused: POLICY: this policy bundle is not for custodian no-1")
    assert file.read_bytes() == before
    done = command("policy", "install", bundle("no-1", 2, operator), "--dir", stopped)
    assert done.stdout.startswith("Left for the next start: policy version 2")
    assert file.read_bytes() == (tmp_path / "no-1-2.json").read_bytes()
    done = command("policy", "forget-time", "--dir", stopped, "--json", KEYQUORUM_PASSPHRASE=PASSPHRASE)
    assert json.loads(done.stdout)["now"] > 1_700_000_000
    done = command("policy", "forget-time", "--dir", running, KEYQUORUM_PASSPHRASE=PASSPHRASE)
    assert done.stderr.startswith("refused: STATE: ")


def test_an_idle_custodian_stays_under_90_mib(committee: Committee) -> None:
    process = start_custodian_process(committee.directory("no-1"))
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        assert resident < 90, f"{resident:.0f} MiB"
    finally:
        process.stop()


def test_init_card_owner_and_serve_from_an_empty_folder(tmp_path: Path, committee: Committee) -> None:
    folder = str(tmp_path / "de-1")
    arguments = ["init", "--dir", folder, "--id", "de-1", "--jurisdiction", "DE", "--cluster", "demo"]
    made = command(*arguments, "--listen", "127.0.0.1:0", "--json", KEYQUORUM_PASSPHRASE="long enough")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["custodian"] == "de-1"
    assert json.loads(command("card", "--dir", folder).stdout)["payloadType"].endswith("enrolment-card.v1+json")
    added = command("owner", "add", str(committee.folder / "alice.pub.json"), "--dir", folder)
    assert added.returncode == 0, added.stderr
    assert json.loads(command("owner", "list", "--dir", folder, "--json").stdout)["owners"][0]["owner"] == "alice"
    again = command(*arguments, "--listen", "127.0.0.1:0", KEYQUORUM_PASSPHRASE="long enough")
    assert (again.returncode, again.stderr.splitlines()[0].split(":")[1]) == (1, " EXISTS")
    served = command("serve", "--dir", folder, KEYQUORUM_PASSPHRASE="long enough")
    assert served.returncode == 1
    assert served.stderr.startswith("refused: NOT_FOUND: operators file is missing")


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "reason"),
    [
        (["serve"], {"KEYQUORUM_PASSPHRASE": "wrong"}, 1, "PASSPHRASE"),
        (["serve"], {}, 1, "PASSPHRASE"),
        (["serve", "--passphrase-file", "/nonexistent"], {}, 1, "NOT_FOUND"),
        (["status", "--json"], {}, 1, "UNAVAILABLE"),
        (["serve", "--log-level", "loud"], {}, 2, ""),
        (["dance"], {}, 2, ""),
    ],
)
def test_the_command_refuses_with_a_reason_and_an_exit_status(
    committee: Committee, arguments: list[str], environment: dict[str, str], status: int, reason: str
) -> None:
    if arguments != ["dance"]:
        arguments = [*arguments, "--dir", str(committee.directory("is-1"))]
    done = command(*arguments, **environment)
    assert done.returncode == status
    assert "Traceback" not in done.stderr + done.stdout
    if "--json" in arguments:
        assert json.loads(done.stdout)["error"]["reason"] == reason
    elif reason:
        assert done.stderr.startswith(f"refused: {reason}: ")


def test_a_second_process_on_the_same_folder_is_refused(committee: Committee, process: CustodianProcess) -> None:
    done = command("serve", "--dir", str(committee.directory(NAME)), KEYQUORUM_PASSPHRASE=PASSPHRASE)
    assert done.returncode == 1
    assert done.stderr.startswith("refused: STATE: ")


async def test_a_custodian_that_ends_answers_what_is_under_way(committee: Committee) -> None:
    config = committee.directory("is-1") / "custodian.toml"
    config.write_text(re.sub(r"shutdown_grace = \d+", "shutdown_grace = 60", config.read_text()))
    started = start_custodian_process(committee.directory("is-1"))
    try:
        async with committee.channel("is-1", started.address) as channel:
            request = committee.owner_request()
            call = rpc.CustodianStub(channel).Release()
            await call.write(committee.message("is-1", request, "1"))
            first = await call.read()
            assert isinstance(first, pb.ReleaseAnswer)
            assert first.WhichOneof("outcome") == "share", first
            stopping = asyncio.create_task(asyncio.to_thread(started.stop, 50))
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
            # Within `stop`'s patience: the stream that its caller never ends did not use up the grace.
            assert await stopping == 0
    finally:
        started.kill()
    log = started.log.read_text()
    assert [json.loads(line)["event"] for line in log.splitlines()][-2:] == ["stopping", "stopped"]


def test_a_killed_custodian_serves_again_and_remembers_its_releases(committee: Committee) -> None:
    folder = committee.directory("no-1")
    node = committee.open("no-1")
    node.gate.release(committee.owner_request())
    count = node.keystore.release_count()
    committee.close()
    started = start_custodian_process(folder)
    started.kill()
    started = start_custodian_process(folder)
    assert started.stop() == 0
    assert committee.open("no-1").keystore.release_count() == count
    committee.close()


def test_quarantine_is_listed_and_lifted_by_the_operator(tmp_path: Path) -> None:
    committee = build_committee(tmp_path / "committee")
    try:
        node = committee.open(NAME)
        folder = str(node.config.directory)
        for number in (1, 2):
            node.quarantine.put(
                reason=Reason.MEASUREMENT,
                message="an image that nobody listed",
                now=int(committee.clock()),
                workers=[f"{number}{number}" * 32],
                job_id="a" * 26,
                evidence=b"evidence %d" % number,
            )
    finally:
        committee.close()
    offline = ("--dir", folder, "--offline", "--json")
    listed = command(
        "quarantine", "list", *offline, "--evidence", str(tmp_path / "kept"), KEYQUORUM_PASSPHRASE=PASSPHRASE
    )
    assert [each["reason"] for each in json.loads(listed.stdout)["entries"]] == ["MEASUREMENT", "MEASUREMENT"]
    assert listed.returncode == 1
    assert (tmp_path / "kept" / "2-evidence.json").read_bytes() == b"evidence 2"
    lifted = command(
        "quarantine", "lift", "1", "--why", "the image is listed now", *offline, KEYQUORUM_PASSPHRASE=PASSPHRASE
    )
    assert lifted.returncode == 0
    running = start_custodian_process(committee.directory(NAME))
    try:
        assert json.loads(command("status", "--dir", folder, "--json").stdout)["quarantined"] == 1
        assert "worker:" + "22" * 32 in command("quarantine", "list", "--dir", folder).stdout
        again = command("quarantine", "lift", "1", "--why", "again", "--dir", folder, "--json")
        assert (again.returncode, json.loads(again.stdout)["error"]["reason"]) == (1, "NOT_FOUND")
        assert command("quarantine", "lift", "2", "--why", "the machine was replaced", "--dir", folder).returncode == 0
        told = json.loads(command("quarantine", "list", "--dir", folder, "--json").stdout)["entries"]
        assert [each["why"] for each in told] == ["the image is listed now", "the machine was replaced"]
        assert command("quarantine", "list", "--dir", folder).returncode == 0
        assert json.loads(command("status", "--dir", folder, "--json").stdout)["quarantined"] == 0
    finally:
        running.stop()
