"""The coordinator's seat: a bundle of its own, replaced while it runs, never rolled back; denials are in the ledger."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from typer.testing import CliRunner

from keyquorum_coordinator import migrations
from keyquorum_coordinator.cli import app
from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.database import Database, make_engine
from keyquorum_coordinator.leaf_records import denying_decision
from keyquorum_coordinator.policy import CoordinatorPolicy, install_document
from keyquorum_core.bulletin import Bulletin, peek_bulletin, sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.leaves import NO_POLICY, JobDenied, parse_leaf
from keyquorum_core.policy.lists import ControlledList, ListEntry
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support import policies
from tests.support.coordinator import Owner, Running, make_folder
from tests.support.fake_ceremonies import start_committee
from tests.support.fake_custodian import CLUSTER, FakeCommittee
from tests.support.ledger_log import all_leaves

SUBMIT = 'principal is Owner, action == Action::"submit", resource'
RESEARCH = f'@id("research") permit({SUBMIT}) when {{ resource.classification == "research" }};\n'


class Clock:
    now: float = 0

    def __call__(self) -> float:
        return self.now or time.time()


class Desk:
    """A seat on a folder and a database of its own; :meth:`again` is a restart."""

    def __init__(self, folder: Path, committee: FakeCommittee) -> None:
        self.committee = committee
        self.clock = Clock()
        self.config: CoordinatorConfig = make_folder(folder, committee)
        self.again()

    def again(self) -> None:
        engine = make_engine(self.config.database_url)
        migrations.upgrade(engine)
        self.database = Database(engine)
        quorum = self.committee.roster.quorum_of()
        self.policy = CoordinatorPolicy(self.config, quorum, self.database, clock=self.clock)

    @property
    def file(self) -> Path:
        return self.config.path(self.config.bulletins) / "policy.json"

    def write(self, text: str, version: int, **changes: object) -> bytes:
        members = {"cluster": CLUSTER, "text": text, "version": version}
        envelope = policies.bundle([self.committee.operator], **{**members, **changes})  # type: ignore[arg-type]
        self.file.write_bytes(envelope)
        return envelope

    def denies(self, reason: Reason = Reason.POLICY, **changes: object) -> KeyquorumError:
        with pytest.raises(KeyquorumError) as caught:
            self.policy.check_submission(policies.job(**changes))
        assert caught.value.reason is reason, caught.value
        return caught.value


@pytest.fixture
async def committee() -> AsyncIterator[FakeCommittee]:
    committee = await FakeCommittee.start()
    yield committee
    await committee.stop()


@pytest.fixture
def desk(tmp_path: Path, committee: FakeCommittee) -> Iterator[Desk]:
    desk = Desk(tmp_path / "coordinator", committee)
    yield desk
    desk.database.close()


def test_without_a_policy_nothing_is_taken_in(desk: Desk) -> None:
    desk.file.unlink()
    error = desk.denies()
    assert "coordinator has no policy" in error.message
    assert "keyquorum-coordinator policy install" in error.next_step


def test_a_bundle_decides_from_the_next_submission_on(desk: Desk) -> None:
    assert desk.policy.check_submission(policies.job()).policies == ("test.everything",)
    desk.write(RESEARCH, 2)
    assert desk.policy.check_submission(policies.job()).policies == ("research",)
    error = desk.denies(classification="secret")
    assert error.expected == 'resource.classification == "research"'
    assert error.actual == "resource.classification = secret"
    decision = denying_decision(error)
    assert (decision.policy_version, decision.policy_sha256) == (2, peek_bulletin(desk.file.read_bytes()).digest)
    assert decision.decision_sha256 == error.details["decision_sha256"]


def test_what_is_refused_leaves_the_last_good_one_also_over_a_restart(desk: Desk) -> None:
    strict = desk.write(RESEARCH, 5)
    desk.denies(classification="secret")
    bad = f'@id("x") permit({SUBMIT}) when {{ resource.colour == "red" }};'
    body = {"custodians": [], "policies": {"bad.cedar": bad}, "seat": "coordinator"}
    now = int(time.time())
    unfit = sign_bulletin(Bulletin(CLUSTER, "policy", 6, now - 5, now + 500, body), [desk.committee.operator])
    for refused in (
        lambda: desk.write(policies.ALLOW_ALL, 4),
        lambda: desk.write(policies.ALLOW_ALL, 5),
        lambda: desk.write(policies.ALLOW_ALL, 6, custodians=["ch-1"]),
        lambda: desk.write(policies.ALLOW_ALL, 6, cluster="other"),
        lambda: desk.write(policies.ALLOW_ALL, 6, issued_at=1000, seconds=5),
        lambda: desk.file.write_bytes(unfit),
        lambda: desk.file.write_bytes(strict[:-7]),
        lambda: desk.file.unlink(),
    ):
        refused()
        assert desk.denies(classification="secret").details["policy_version"] == "5"
        desk.database.close()
        desk.again()
        assert desk.denies(classification="secret").details["policy_version"] == "5"


def test_an_expired_bundle_or_list_takes_nothing_in(desk: Desk) -> None:
    start = int(time.time())
    desk.write(RESEARCH + f'@id("s") forbid({SUBMIT}) when {{ context.sanctions.owner }};', 2, seconds=5000)
    assert desk.denies().details["field"] == "context.sanctions"
    body = ControlledList(1, [ListEntry("owner", "mallory")]).body()
    listed = Bulletin(CLUSTER, "sanctions-list", 1, start - 5, start + 1000, body)
    install_document(desk.config, sign_bulletin(listed, [desk.committee.operator]))
    assert desk.policy.check_submission(policies.job()).list_versions == {"export": 0, "sanctions": 1}
    assert desk.denies(owner="mallory").details["policies"] == "s"
    desk.clock.now = start + 1500
    assert "sanctions-list" in desk.denies(Reason.EXPIRED).message
    desk.clock.now = start + 9000
    assert "policy" in desk.denies(Reason.EXPIRED).message


def test_a_clock_set_back_is_noticed_also_over_a_restart(desk: Desk) -> None:
    now = int(time.time())
    desk.clock.now = now + 4000
    desk.policy.check_submission(policies.job())
    desk.clock.now = now + 3900
    desk.policy.check_submission(policies.job())
    desk.clock.now = now
    desk.denies(Reason.STATE)
    desk.database.close()
    desk.again()
    assert desk.denies(Reason.STATE).expected == f"at least {now + 4000 - 120}"


def test_installing_verifies_first(desk: Desk, committee: FakeCommittee) -> None:
    before = desk.file.read_bytes()
    good = policies.bundle([committee.operator], cluster=CLUSTER, version=9)
    for bad, reason in (
        (policies.bundle([committee.operator], cluster=CLUSTER, custodians=["ch-1"]), Reason.POLICY),
        (policies.bundle([Identity.generate()], cluster=CLUSTER), Reason.SIGNATURE),
        (b"{}", Reason.MALFORMED),
    ):
        with pytest.raises(KeyquorumError) as caught:
            install_document(desk.config, bad)
        assert caught.value.reason is reason
        assert desk.file.read_bytes() == before
    assert install_document(desk.config, good).version == 9
    assert desk.file.read_bytes() == good


def test_the_command_installs_and_refuses(desk: Desk, committee: FakeCommittee, tmp_path: Path) -> None:
    def install(envelope: bytes) -> tuple[int, str]:
        path = tmp_path / "bundle.json"
        path.write_bytes(envelope)
        arguments = ["policy", "install", str(path), "--dir", str(desk.config.directory), "--json"]
        done = CliRunner().invoke(app, arguments)
        return done.exit_code, done.stdout

    code, out = install(policies.bundle([committee.operator], cluster=CLUSTER, version=2, text=RESEARCH))
    assert (code, json.loads(out)["version"]) == (0, 2)
    assert desk.policy.check_submission(policies.job()).bundle_version == 2
    code, out = install(policies.bundle([Identity.generate()], cluster=CLUSTER, version=3))
    assert (code, json.loads(out)["error"]["reason"]) == (1, "SIGNATURE")


def test_a_bundle_that_could_not_be_kept_does_not_decide(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be forgotten by a crash is not in force; once it can be kept, it is."""
    monkeypatch.setattr("keyquorum_coordinator.policy._SETTLED_NS", -(10**18))  # no file is too new to be remembered
    desk.policy.check_submission(policies.job())

    def full(work: object) -> object:
        raise UnavailableError(Reason.STORAGE, "the disk is full")

    write = desk.database.run_write
    desk.write(RESEARCH, 2)
    monkeypatch.setattr(desk.database, "run_write", full)
    assert desk.policy.check_submission(policies.job(classification="secret")).bundle_version == 1
    monkeypatch.setattr(desk.database, "run_write", write)
    assert desk.denies(classification="secret").details["policy_version"] == "2"


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"policy_sha256": "ab" * 32, "policy_version": "1"},
        {"policy_sha256": "ab" * 32, "policy_version": "0", "decision_sha256": "cd" * 32},
        {"policy_sha256": "ab" * 32, "policy_version": "9" * 40, "decision_sha256": "cd" * 32},
        {"policy_sha256": "x", "policy_version": "1", "decision_sha256": "cd" * 32},
    ],
)
def test_details_that_name_no_sound_decision_name_none(details: dict[str, str]) -> None:
    assert denying_decision(RefusedError(Reason.POLICY, "no", details=details)) == NO_POLICY


# -- over the wire -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    committee, _ = await start_committee()
    started = await Running.start(tmp_path / "coordinator", committee)
    yield started
    await started.stop()
    await committee.stop()


async def test_a_job_denied_at_submission_is_told_to_its_owner_and_to_the_ledger(running: Running) -> None:
    config = running.server.config
    text = RESEARCH + f'@id("life") forbid({SUBMIT}) unless {{ resource.lifetime_seconds <= 600 }};'
    assert isinstance(running.committee, FakeCommittee)
    bundle = policies.bundle([running.committee.operator], cluster=CLUSTER, text=text, version=2)
    (config.path(config.bulletins) / "policy.json").write_bytes(bundle)
    alice, owner = running.caller("owner", "alice"), Owner()
    now = int(time.time())
    job, manifest = owner.manifest(classification="research", not_before=now - 10, not_after=now + 3000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    error = from_rpc_error(caught.value, "coordinator")
    assert (error.reason, error.expected) == (Reason.POLICY, "resource.lifetime_seconds <= 600")
    assert error.actual == "resource.lifetime_seconds = 3010"
    assert error.details["policies"] == "life"
    assert error.details["field"] == "resource.lifetime_seconds"
    (leaf,) = await denials(running)
    assert (leaf.job_id, leaf.seat, leaf.reason) == (job, "coordinator", "POLICY")
    assert (leaf.policy_sha256, leaf.policy_version) == (peek_bulletin(bundle).digest, 2)
    assert leaf.decision_sha256 == error.details["decision_sha256"]
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await alice.jobs.Get(pb.GetJobRequest(job_id=job))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def denials(running: Running) -> list[JobDenied]:
    for _ in range(500):
        leaves = [parse_leaf(leaf) for leaf in all_leaves(running.server.sequencer._ledger)]
        found = [leaf for leaf in leaves if isinstance(leaf, JobDenied)]
        if found:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("no denial in the ledger")
