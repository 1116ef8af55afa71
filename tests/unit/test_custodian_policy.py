"""G2: a custodian decides by its own policy: installed, replaced while it runs, never rolled back, never another's."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keyquorum_core import manifest
from keyquorum_core.attestation.appraisal import Appraisal
from keyquorum_core.attestation.appraisers import AppraisedItem
from keyquorum_core.attestation.inventory import INVENTORY, HardwareId, Machine
from keyquorum_core.bulletin import Bulletin, sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.policy.facts import WorkerFacts, custodian_entity
from keyquorum_core.policy.lists import ControlledList, ListEntry
from keyquorum_core.release import Leaf
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.node import Node, open_node
from keyquorum_custodian.policy import worker_facts
from keyquorum_custodian.policy_files import forget_time, leave_document
from tests.support import policies
from tests.support.custodian import PASSPHRASE, Committee, build_committee

START = 1_800_000_000
JOBS = 'action in [Action::"submit", Action::"release"]'
TO_WORKER = 'principal is Worker, action == Action::"release", resource'
INTERNAL = f'@id("internal") permit(principal, {JOBS}, resource) when {{ resource.classification == "internal" }};\n'


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Committee, Clock]]:
    clock = Clock()
    committee = build_committee(tmp_path_factory.mktemp("policy"), clock=clock)
    committee.open_all()
    committee.generate()
    yield committee, clock
    committee.close()


@pytest.fixture
def clock(built: tuple[Committee, Clock]) -> Clock:
    built[1].now += 600
    return built[1]


@pytest.fixture
def committee(built: tuple[Committee, Clock], clock: Clock) -> Committee:
    return built[0]


Install = Callable[..., None]


@pytest.fixture
def node(committee: Committee) -> Node:
    return committee.open("ch-1")


@pytest.fixture
def install(committee: Committee, node: Node) -> Install:
    """Have ch-1 accept a bundle of the next version."""

    def accept(text: str, **changes: object) -> None:
        members = {"custodians": ["ch-1"], "version": version_of(node) + 1, "issued_at": int(committee.clock()) - 10}
        envelope = policies.bundle([committee.operator.identity], text=text, **{**members, **changes})  # type: ignore[arg-type]
        node.bulletins.accept(envelope)

    return accept


def version_of(node: Node, kind: str = "policy") -> int:
    return next((each.version for name, each, _ in node.bulletins.states() if name == kind and each), 0)


def worker_request(committee: Committee) -> ReleaseRequest:
    evidence = committee.evidence(RecipientKey.generate(), Identity.generate(), nodes=["ch-1"])
    signed = manifest.sign_manifest(committee.manifest(), committee.owner.identity)
    return committee.worker_request(evidence, signed)


def denied(node: Node, request: ReleaseRequest, reason: Reason = Reason.POLICY) -> KeyquorumError:
    """Refused by the check of the policy, and nothing recorded (G8)."""
    before = node.keystore.release_count()
    with pytest.raises(KeyquorumError) as caught:
        node.gate.release(request)
    assert (caught.value.details["check"], caught.value.reason) == ("policy", reason), caught.value
    assert node.keystore.release_count() == before
    return caught.value


# -- deciding ----------------------------------------------------------------------------------------------------------


def test_a_release_is_recorded_with_the_policy_that_permitted_it(
    committee: Committee, node: Node, install: Install
) -> None:
    install(INTERNAL)
    for request in (committee.owner_request(), worker_request(committee)):
        node.gate.release(request)
        record = node.keystore.release_record(Leaf.parse(request.leaf).hash())
        assert record is not None
        (_, accepted, _) = next(each for each in node.bulletins.states() if each[0] == "policy")
        assert accepted is not None
        assert (record.policy_sha256, record.policy_version) == (accepted.digest, accepted.version)
        assert len(record.decision_sha256) == 64


def test_a_denial_names_policy_condition_field_and_value(committee: Committee, node: Node, install: Install) -> None:
    install(INTERNAL + f'@id("place") forbid({TO_WORKER}) unless {{ ["IS", "NO"].contains(principal.region) }};')
    error = denied(node, worker_request(committee))
    assert "custodian ch-1 forbids it by policy place" in error.message
    assert error.expected == '["IS", "NO"].contains(principal.region)'
    assert error.actual == "principal.region = CH"
    assert error.details["policies"] == "place"
    assert error.details["field"] == "principal.region"
    assert len(error.details["decision_sha256"]) == len(error.details["policy_sha256"]) == 64
    assert error.next_step
    node.gate.release(committee.owner_request())  # the owner's own release is another question


def test_an_owner_can_be_denied_too(committee: Committee, node: Node, install: Install) -> None:
    install(f'@id("w") permit({TO_WORKER});')
    assert denied(node, committee.owner_request()).details["field"] == "action"
    node.gate.release(worker_request(committee))


def test_region_and_provider_are_the_inventorys_and_not_the_workers(
    committee: Committee, node: Node, install: Install
) -> None:
    install(INTERNAL + f'@id("p") forbid({TO_WORKER}) unless {{ principal.provider == "elsewhere" }};')
    error = denied(node, worker_request(committee))
    machine = next(iter(node.bulletins.get(INVENTORY).value.machines.values()))
    assert error.actual == f"principal.provider = {machine.provider}"


def test_ceremonies_and_enrolments_are_asked_of_the_same_seat(
    committee: Committee, node: Node, install: Install
) -> None:
    install(
        INTERNAL + '@id("rotate") permit(principal, action == Action::"rotate", resource)'
        ' when { context.operators.contains("olga") && resource.age_seconds >= 60 };'
        '@id("enrol") permit(principal is Custodian, action == Action::"enrol", resource)'
        ' when { principal.jurisdiction == "IS" && context.operator_count >= 2 };'
    )
    assert node.policy.check_ceremony("rotate", "key-1", 1, 60, ["olga"]).policies == ("rotate",)
    newcomer = custodian_entity("is-2", "IS")
    assert node.policy.check_enrolment(newcomer, "demo", ["olga", "per"]).policies == ("enrol",)
    for action, age, operator in (("rotate", 59, "olga"), ("rotate", 60, "mallory"), ("destroy", 60, "olga")):
        with pytest.raises(KeyquorumError) as caught:
            node.policy.check_ceremony(action, "key-1", 1, age, [operator])
        assert caught.value.reason is Reason.POLICY
    with pytest.raises(KeyquorumError) as caught:
        node.policy.check_enrolment(newcomer, "demo", ["olga"])
    assert caught.value.details["field"] == "context.operator_count"


def test_facts_of_a_worker_are_those_of_its_appraisal() -> None:
    """Each type's levels under its own name, the chips that GPU evidence proved, the inventory's word for the rest."""
    machine = Machine("rack-7", "eu-north-1", "acme", "DGX-H100", "acme-ltd")

    def item(kind: str, product: str, tcb: dict[str, int], *ids: str) -> AppraisedItem:
        hardware = tuple(HardwareId(kind, each) for each in ids)
        return AppraisedItem(kind, hardware, product, "image-1", "", tcb, kind == "sev-snp", 0, 2**40)

    appraisal = Appraisal(
        hpke_key=b"k",
        signing_key=b"s",
        items=(
            item("sev-snp", "Milan", {"microcode": 213, "snp": 22}, "aa"),
            item("nvidia-gpu", "GB100, GH100", {}, "02", "01"),
        ),
        machine=machine,
        evidence_sha256="ab" * 32,
        reference_version=1,
        reference_digest="cd" * 32,
        inventory_version=1,
        inventory_digest="ef" * 32,
        attested_at=0,
        not_before=0,
        not_after=2**40,
    )
    assert worker_facts(appraisal) == WorkerFacts(
        hardware="nvidia-gpu:01,nvidia-gpu:02,sev-snp:aa",
        region="eu-north-1",
        provider="acme",
        evidence=("sev-snp", "nvidia-gpu"),
        machine="rack-7",
        model="DGX-H100",
        products=("Milan",),
        gpu_models=("GB100", "GH100"),
        tcb={"sev-snp.microcode": 213, "sev-snp.snp": 22},
        development=True,
    )


# -- documents ---------------------------------------------------------------------------------------------------------


def test_without_a_policy_nothing_is_released(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    for name in committee.ids:
        (committee.directory(name) / "bulletins" / "policy.json").unlink()
    committee.open_all()
    committee.generate()
    try:
        error = denied(committee.nodes["ch-1"], committee.owner_request())
        assert "custodian ch-1 has no policy" in error.message
        assert "keyquorum-custodian policy install" in error.next_step
    finally:
        committee.close()


def test_a_file_replaced_while_it_runs_decides_the_next_request(committee: Committee, node: Node) -> None:
    file = node.config.path(node.config.bulletins) / "policy.json"
    request = committee.owner_request()
    node.gate.release(request)
    now = int(committee.clock())
    none = policies.bundle(
        [committee.operator.identity],
        custodians=["ch-1"],
        text=f'@id("none") forbid(principal, {JOBS}, resource);',
        version=version_of(node) + 1,
        issued_at=now - 5,
    )
    file.write_bytes(none)
    assert denied(node, request).details["policies"] == "none"
    for broken in (b"", none[:-40], none.replace(b'"payload":"', b'"payload":"AAAA')):
        file.write_bytes(broken)
        assert denied(node, request).details["policies"] == "none"
        assert any("policy at hand is refused" in warning for warning in node.warnings())


def test_a_bundle_that_does_not_fit_the_schema_leaves_the_last_good_one(
    committee: Committee, node: Node, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(INTERNAL)
    before = version_of(node)
    bad = f'@id("x") permit({TO_WORKER}) when {{ principal.regoin == "CH" }};'
    body = {"custodians": ["ch-1"], "policies": {"bad.cedar": bad}, "seat": "custodian"}
    now = int(committee.clock())
    envelope = sign_bulletin(
        Bulletin("demo", "policy", before + 1, now - 5, now + 500, body), [committee.operator.identity]
    )
    with pytest.raises(KeyquorumError) as caught:
        node.bulletins.accept(envelope)
    assert caught.value.reason is Reason.POLICY
    assert "regoin" in caught.value.actual
    assert version_of(node) == before
    node.gate.release(committee.owner_request())


def test_whose_signature_counts_is_the_custodians_own_configuration(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    lawyer = Identity.generate()
    folder = committee.directory("ch-1")
    signers = {"threshold": 1, "operators": {"lea": base64.b64encode(lawyer.public.to_bytes()).decode()}}
    (folder / "policy-signers.json").write_text(json.dumps(signers))
    config = folder / "custodian.toml"
    config.write_text(
        config.read_text().replace('policy_signers = "operators.json"', 'policy_signers = "policy-signers.json"')
    )
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    try:
        error = denied(node, committee.owner_request())  # the bundle at hand is signed by the roster's operator
        assert "has no policy" in error.message
        node.bulletins.accept(policies.bundle([lawyer], custodians=["ch-1"]))
        node.gate.release(committee.owner_request())
        committee.nodes["is-1"].gate.release(committee.owner_request())
    finally:
        committee.close()


def test_an_expired_bundle_permits_nothing(committee: Committee, node: Node, install: Install, clock: Clock) -> None:
    install(INTERNAL, seconds=700)
    request = committee.owner_request()
    node.gate.release(request)
    clock.now += 800
    denied(node, committee.owner_request(), Reason.EXPIRED)
    install(INTERNAL)
    node.gate.release(committee.owner_request())


# -- lists -------------------------------------------------------------------------------------------------------------


def test_lists_are_needed_current_and_read(committee: Committee, node: Node, install: Install, clock: Clock) -> None:
    install(INTERNAL + f'@id("sanctions") forbid({TO_WORKER}) when {{ context.sanctions.region }};')
    error = denied(node, worker_request(committee))
    assert error.details["field"] == "context.sanctions"
    assert "there is none" in error.message

    def publish(version: int, *entries: ListEntry) -> None:
        now = int(clock.now)
        body = ControlledList(version, entries).body()
        bulletin = Bulletin("demo", "sanctions-list", version, now - 5, now + 1000, body)
        node.bulletins.accept(sign_bulletin(bulletin, [committee.operator.identity]))

    publish(1, ListEntry("region", "NO"))
    request = worker_request(committee)
    node.gate.release(request)
    first = node.keystore.release_record(Leaf.parse(request.leaf).hash())
    publish(2, ListEntry("region", "CH"))
    assert denied(node, worker_request(committee)).details["policies"] == "sanctions"
    publish(3, ListEntry("region", "CH", ("5A*",)))
    node.gate.release(request)
    assert first is not None
    clock.now += 1500
    error = denied(node, worker_request(committee), Reason.EXPIRED)
    assert "sanctions-list" in error.message
    with pytest.raises(KeyquorumError) as caught:
        publish(2, ListEntry("region", "NO"))
    assert caught.value.reason is Reason.ROLLBACK


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_clock_set_back_brings_nothing_expired_back(
    committee: Committee, node: Node, install: Install, clock: Clock
) -> None:
    install(INTERNAL)
    node.gate.release(committee.owner_request())
    real = clock.now
    clock.now = real - 50  # a small correction: time stands still
    node.gate.release(committee.owner_request())
    clock.now = real - 500
    with pytest.raises(KeyquorumError) as caught:
        node.policy.check_ceremony("rotate", "key-1", 1, 0, [])
    assert caught.value.reason is Reason.STATE
    assert caught.value.expected == f"at least {int(real) - 120}"
    assert caught.value.actual == str(int(real) - 500)
    with pytest.raises(KeyquorumError) as caught:  # a release does not even come that far: by such a clock
        node.gate.release(committee.owner_request())  # the ledger's cosignatures are of the future
    assert caught.value.reason is Reason.LEDGER_UNWITNESSED
    clock.now = real


def test_the_latest_time_survives_a_restart_until_the_operator_says_otherwise(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 1_700_000_000
    committee = build_committee(tmp_path, clock=clock)
    node = committee.open("ch-1")
    clock.now += 5000
    node.gate.flush()
    committee.close()
    clock.now -= 4000
    again = open_node(committee.directory("ch-1"), PASSPHRASE, clock=clock)
    try:
        with pytest.raises(KeyquorumError) as caught:
            again.policy.check_ceremony("rotate", "key-1", 1, 0, [])
        assert caught.value.reason is Reason.STATE
    finally:
        again.close()
    before, now = forget_time(committee.directory("ch-1"), PASSPHRASE)
    assert before == 1_700_005_000
    assert now > before
    store = Keystore.open(committee.directory("ch-1") / "keystore.db", PASSPHRASE)
    assert store.highest_time() == now
    store.close()


# -- the operator's commands -------------------------------------------------------------------------------------------


def test_a_document_left_for_a_stopped_custodian_is_verified_first(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    folder = committee.directory("ch-1")
    good = policies.bundle([committee.operator.identity], custodians=["ch-1"], version=5, text=INTERNAL)
    assert leave_document(folder, good).version == 5
    file = folder / "bulletins" / "policy.json"
    assert file.read_bytes() == good
    for bad, reason in (
        (policies.bundle([Identity.generate()], custodians=["ch-1"]), Reason.SIGNATURE),
        (policies.bundle([committee.operator.identity], custodians=["is-1"]), Reason.POLICY),
        (policies.bundle([committee.operator.identity], custodians=["ch-1"], cluster="other"), Reason.BULLETIN),
        (
            policies.bundle([committee.operator.identity], custodians=["ch-1"], issued_at=1000, seconds=10),
            Reason.EXPIRED,
        ),
        (b"{}", Reason.MALFORMED),
    ):
        with pytest.raises(KeyquorumError) as caught:
            leave_document(folder, bad)
        assert caught.value.reason is reason
        assert file.read_bytes() == good
    node = committee.open("ch-1")
    assert version_of(node) == 5
    committee.close()
