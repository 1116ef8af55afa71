"""The generate ceremony at a custodian: only legal moves, every step repeatable, every lie caught, its author named."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyquorum_core import ceremony, derivation
from keyquorum_core.ceremony import Commitments, PartsHeader
from keyquorum_core.ceremony_plan import PLAN_TYPE
from keyquorum_core.ceremony_states import MOVES, Kind, State, Step
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.parts import parts_header, seal_parts
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.sealing import Suite, seal
from keyquorum_core.signing import Identity, merge, peek_payload, sign
from keyquorum_custodian.epochs import load_epoch
from keyquorum_custodian.node import Node, open_node
from keyquorum_custodian.seed_records import CeremonyRow
from tests.support.ceremonies import Make
from tests.support.custodian import PASSPHRASE, Committee, build_committee

ME = "ch-1"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    committee = build_committee(tmp_path_factory.mktemp("ceremonies"))
    committee.open_all()
    yield committee
    committee.close()


class Run(Make):
    """One ceremony of a key of its own over a committee."""

    def __init__(self, committee: Committee, key_id: str, suite: str = Suite.MLKEM768_X25519) -> None:
        super().__init__(committee, committee.plan(key_id, suite=suite))
        self.nodes = committee.nodes

    @property
    def stated(self) -> list[bytes]:
        return [self.commitments[name] for name in self.present]

    @property
    def me(self) -> Node:
        return self.nodes[ME]

    def state(self) -> str:
        row = self.me.keystore.ceremony(self.id)
        return str(row.state) if row else ""


@pytest.fixture
def run(built: Committee, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A ceremony of a key of its own; cancelled afterwards, where it is not over."""
    name = f"key-{abs(hash(request.node.name)) % 10**12}"
    started = Run(built, name)
    yield started
    for node in started.nodes.values():
        row = node.keystore.ceremony(started.id)
        if row is not None and row.state != "active":
            node.ceremonies.cancel(started.id)


def refusal(reason: Reason, call: Any, *arguments: Any) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)
    assert caught.value.reason is reason, caught.value
    return caught.value


# -- what goes right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", list(Suite))
def test_a_ceremony_ends_with_an_active_epoch_that_all_hold_alike(built: Committee, suite: Suite) -> None:
    run = Run(built, f"whole-{suite.lower().replace('_', '-')}", suite)
    run.activate()
    certificate = ceremony.EpochCertificate.parse(
        peek_payload(run.certificate, ceremony.CERTIFICATE_TYPE, "certificate")
    )
    context = derivation.context(run.plan.key_id, 1, "job", b"s" * 32)
    together: dict[int, bytes] = {}
    for name, node in run.nodes.items():
        held = node.epochs.active(run.plan.key_id, 1)
        assert held.suite == suite
        assert held.indices == built.quorum.indices_of(name)
        assert held.certificate_digest == certificate.digest
        row = node.keystore.epoch(run.plan.key_id, 1)
        assert row is not None
        assert held.contributions(context) == derivation.contributions(node.keystore.seeds(row), context)
        for index, value in held.contributions(context).items():
            assert together.setdefault(index, value) == value
    assert sorted(together) == list(range(built.quorum.seed_count))


def test_no_seed_can_be_used_before_the_certificate(run: Run) -> None:
    for step in (run.propose, run.deliver, run.confirm):
        step()
        assert run.plan.key_id not in {held.key_id for held in run.me.epochs.all()}
        refusal(Reason.KEY_STATE, run.me.epochs.active, run.plan.key_id, 1)


def test_the_epoch_is_there_again_after_a_restart(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    Run(committee, "key-1").activate()
    before = committee.nodes[ME].epochs.active("key-1", 1).contributions(b"c" * 32)
    committee.close()
    assert committee.open(ME).epochs.active("key-1", 1).contributions(b"c" * 32) == before
    committee.close()


def test_every_step_repeated_gets_the_same_answer(run: Run) -> None:
    run.propose()
    assert run.me.ceremonies.propose(run.envelope).proposal == run.proposals[ME]
    anew = run.committee.sign_plan(run.plan)  # other signatures, the same plan
    assert run.me.ceremonies.propose(anew).proposal == run.proposals[ME]
    run.deliver()
    again = run.me.ceremonies.deliver(run.id, run.headers[::-1], run.parts(ME)[::-1])
    assert again == run.commitments[ME]
    run.confirm()
    one = run.me.ceremonies.confirm(run.id, run.stated)
    assert one == run.me.ceremonies.confirm(run.id, run.stated[::-1])
    run.activate()
    run.me.ceremonies.activate(run.id, run.certificate)
    proposed = run.me.ceremonies.propose(run.envelope).proposal
    assert proposed == dataclasses.replace(run.proposals[ME], went_by=run.committee.ids)
    assert run.state() == "active"


def test_another_request_under_the_same_id_is_refused(run: Run) -> None:
    run.deliver()
    other = dataclasses.replace(run.plan, created_at=run.plan.created_at + 1)
    refusal(Reason.CEREMONY, run.me.ceremonies.propose, run.committee.sign_plan(other))
    refusal(Reason.CEREMONY, run.me.ceremonies.deliver, run.id, run.headers[1:], run.parts(ME))
    run.confirm()
    refusal(Reason.CEREMONY, run.me.ceremonies.confirm, run.id, run.stated[1:])
    assert run.state() == "confirmed"


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_of_nobody_in_the_roster_is_refused(run: Run) -> None:
    forged = sign(Identity.generate(), PLAN_TYPE, run.plan.to_payload())
    refusal(Reason.SIGNATURE, run.me.ceremonies.propose, forged)
    forged = sign(run.committee.owner.identity, PLAN_TYPE, run.plan.to_payload())
    refusal(Reason.SIGNATURE, run.me.ceremonies.propose, forged)
    assert run.state() == ""


def _other_quorum(committee: Committee) -> Quorum:
    return Quorum({"at_least": 3}, [Custodian(c.id, c.jurisdiction) for c in committee.roster.custodians])


@pytest.mark.parametrize("what", ["cluster", "roster_digest", "quorum"])
def test_a_plan_for_another_cluster_roster_or_quorum_is_refused(run: Run, what: str) -> None:
    change = {"cluster": "other", "roster_digest": "0" * 64, "quorum": _other_quorum(run.committee)}[what]
    plan = dataclasses.replace(run.plan, **{what: change})  # type: ignore[arg-type]
    refusal(Reason.CEREMONY, run.me.ceremonies.propose, run.committee.sign_plan(plan))
    assert run.me.keystore.ceremony(plan.ceremony_id) is None


def test_a_plan_with_a_suite_nobody_has_is_refused(run: Run) -> None:
    plan = dataclasses.replace(run.plan, suite="ROT13")
    with pytest.raises(UnavailableError) as caught:
        run.me.ceremonies.propose(run.committee.sign_plan(plan))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_plan_for_a_key_that_exists_is_refused(run: Run) -> None:
    run.activate()
    plan = run.committee.plan(run.plan.key_id)
    error = refusal(Reason.EXISTS, run.me.ceremonies.propose, run.committee.sign_plan(plan))
    assert isinstance(error, StateError)
    assert error.expected == "a new key id"


def test_two_ceremonies_of_one_epoch_do_not_run_together(run: Run) -> None:
    run.propose()
    rival = run.committee.plan(run.plan.key_id)
    error = refusal(Reason.EXISTS, run.me.ceremonies.propose, run.committee.sign_plan(rival))
    assert run.id in error.next_step
    run.cancel()
    run.me.ceremonies.propose(run.committee.sign_plan(rival))
    run.me.ceremonies.cancel(rival.ceremony_id)


# -- lies --------------------------------------------------------------------------------------------------------------


class EquivocatingCustodian:
    """A custodian with a real identity that gives one co-holder other parts than the rest, under a header that fits."""

    def __init__(self, run: Run, name: str, victim: str) -> None:
        node = run.nodes[name]
        keys = {custodian.id: custodian.hpke for custodian in run.committee.roster.custodians}
        one, two = (ceremony.new_parts(run.plan.quorum, name) for _ in range(2))
        honest = [part for part in seal_parts(run.plan, name, one, keys) if part.to != victim]
        lies = [part for part in seal_parts(run.plan, name, two, keys) if part.to == victim]
        self.parts = (*honest, *lies)
        header = parts_header(run.plan, name, self.parts)
        self.header = sign(node.keystore.identity(), ceremony.PARTS_TYPE, header.to_payload())


def test_an_equivocating_custodian_is_caught_before_anything_is_active(run: Run) -> None:
    run.propose()
    liar = EquivocatingCustodian(run, "no-1", victim="is-1")
    run.proposals["no-1"] = dataclasses.replace(run.proposals["no-1"], header=liar.header, parts=liar.parts)
    headers = [proposal.header for proposal in run.proposals.values()]
    commitments = [run.nodes[name].ceremonies.deliver(run.id, headers, run.parts(name)) for name in (ME, "is-1")]
    seeds = run.me.keystore.seeds(run.me.keystore.ceremony(run.id))  # type: ignore[arg-type]
    opened = [PartsHeader.parse(peek_payload(header, ceremony.PARTS_TYPE, "header")) for header in headers]
    theirs = Commitments.to_seeds(
        run.plan,
        "no-1",
        {i: seeds.get(i, b"?" * 32) for i in run.plan.quorum.indices_of("no-1")},
        {header.custodian: header.digest for header in opened},
    )
    identity = run.nodes["no-1"].keystore.identity()
    commitments.append(sign(identity, ceremony.COMMITMENTS_TYPE, theirs.to_payload()))
    error = refusal(Reason.CEREMONY, run.me.ceremonies.confirm, run.id, commitments)
    assert "index" in error.details
    assert error.details["custodians"]
    assert run.state() == "delivered"


@pytest.mark.parametrize("which", ["missing", "twice", "a stranger's", "another plan's", "forged"])
def test_wrong_headers_are_refused(run: Run, which: str) -> None:
    run.propose()
    headers = list(run.headers)
    identity = run.nodes["no-1"].keystore.identity()
    header = PartsHeader.parse(peek_payload(headers[-1], ceremony.PARTS_TYPE, "header"))
    if which == "missing":
        headers.pop()
    elif which == "twice":
        headers.append(headers[-1])
    elif which == "a stranger's":
        headers[-1] = sign(identity, ceremony.PARTS_TYPE, dataclasses.replace(header, custodian="xx-1").to_payload())
    elif which == "another plan's":
        other = dataclasses.replace(header, plan_digest="0" * 64)
        headers[-1] = sign(identity, ceremony.PARTS_TYPE, other.to_payload())
    else:
        headers[-1] = sign(Identity.generate(), ceremony.PARTS_TYPE, header.to_payload())
    reason = {"a stranger's": Reason.UNKNOWN_CUSTODIAN, "forged": Reason.SIGNATURE}.get(which, Reason.CEREMONY)
    refusal(reason, run.me.ceremonies.deliver, run.id, headers, run.parts(ME))
    assert run.state() == "proposed"
    run.deliver()


@pytest.mark.parametrize("which", ["missing", "twice", "for another", "changed", "another's", "short"])
def test_wrong_parts_are_refused_and_the_right_ones_still_taken(run: Run, which: str) -> None:
    run.propose()
    parts, headers = run.parts(ME), list(run.headers)
    if which == "missing":
        parts.pop()
    elif which == "twice":
        parts.append(parts[0])
    elif which == "for another":
        parts[0] = dataclasses.replace(parts[0], to="is-1")
    elif which == "changed":
        blob = parts[0].sealed
        parts[0] = dataclasses.replace(parts[0], sealed=blob[:-1] + bytes([blob[-1] ^ 1]))
    elif which == "another's":
        parts[0] = dataclasses.replace(parts[0], sealed=parts[1].sealed)
    else:
        keys = {custodian.id: custodian.hpke for custodian in run.committee.roster.custodians}
        sealed = seal_parts(run.plan, "no-1", {i: bytes(32) for i in run.plan.quorum.indices_of("no-1")}, keys)
        wrong = tuple(
            dataclasses.replace(part, sealed=seal(keys[part.to], bytes(36), b"another info")) if part.to == ME else part
            for part in sealed
        )
        parts = [part for part in parts if part.sender != "no-1"] + [part for part in wrong if part.to == ME]
        header = parts_header(run.plan, "no-1", wrong)
        identity = run.nodes["no-1"].keystore.identity()
        headers[list(run.nodes).index("no-1")] = sign(identity, ceremony.PARTS_TYPE, header.to_payload())
    error = refusal(Reason.CEREMONY, run.me.ceremonies.deliver, run.id, headers, parts)
    if which in ("changed", "another's", "short"):
        assert error.details["custodians"] in ("is-1", "no-1")
    assert run.state() == "proposed"
    run.deliver()
    assert run.state() == "delivered"


@pytest.mark.parametrize("which", ["missing", "twice", "short", "another value", "forged"])
def test_wrong_commitments_are_refused_and_their_author_named(run: Run, which: str) -> None:
    run.deliver()
    commitments = list(run.stated)
    identity = run.nodes["no-1"].keystore.identity()
    stated = Commitments.parse(peek_payload(commitments[-1], ceremony.COMMITMENTS_TYPE, "commitments"))
    first = min(stated.commitments)
    if which == "missing":
        commitments.pop()
    elif which == "twice":
        commitments.append(commitments[-1])
    elif which == "short":
        fewer = {index: value for index, value in stated.commitments.items() if index != first}
        payload = dataclasses.replace(stated, commitments=fewer).to_payload()
        commitments[-1] = sign(identity, ceremony.COMMITMENTS_TYPE, payload)
    elif which == "another value":
        lie = dataclasses.replace(stated, commitments={**stated.commitments, first: b"\1" * 32})
        commitments[-1] = sign(identity, ceremony.COMMITMENTS_TYPE, lie.to_payload())
    else:
        commitments[-1] = sign(Identity.generate(), ceremony.COMMITMENTS_TYPE, stated.to_payload())
    reason = Reason.SIGNATURE if which == "forged" else Reason.CEREMONY
    error = refusal(reason, run.me.ceremonies.confirm, run.id, commitments)
    assert "no-1" in (error.details.get("custodians", "") + error.message)
    assert run.state() == "delivered"
    run.me.ceremonies.confirm(run.id, run.stated)


def test_a_certificate_without_everybody_s_signature_activates_nothing(run: Run) -> None:
    run.confirm()
    own = run.me.ceremonies.confirm(run.id, run.stated)
    refusal(Reason.SIGNATURE_MISSING, run.me.ceremonies.activate, run.id, own)
    other = Run(run.committee, f"{run.plan.key_id}-b")
    other.confirm()
    refusal(Reason.CEREMONY, run.me.ceremonies.activate, run.id, other.certificate)
    refusal(Reason.MALFORMED, run.me.ceremonies.activate, run.id, b"{}")
    assert run.state() == "confirmed"
    other.cancel()


# -- moves -------------------------------------------------------------------------------------------------------------


def test_no_step_is_skipped(run: Run) -> None:
    call = run.me.ceremonies
    for step in (
        lambda: call.deliver(run.id, [], []),
        lambda: call.confirm(run.id, []),
        lambda: call.activate(run.id, b""),
    ):
        refusal(Reason.NOT_FOUND, step)
    assert call.cancel(run.id) == "unknown"
    run.propose()
    refusal(Reason.STATE, call.confirm, run.id, [])
    refusal(Reason.STATE, call.activate, run.id, b"")
    run.deliver()
    refusal(Reason.STATE, call.activate, run.id, b"")


@pytest.mark.parametrize("step", ["propose", "deliver"])
def test_a_cancelled_ceremony_keeps_no_secret_and_goes_nowhere(run: Run, step: str) -> None:
    getattr(run, step)()
    was = run.state()
    assert run.me.ceremonies.cancel(run.id) == was
    assert run.me.ceremonies.cancel(run.id) == was
    row = run.me.keystore.ceremony(run.id)
    assert row is not None
    assert run.me.keystore.parts(row) == run.me.keystore.seeds(row) == {}
    refusal(Reason.STATE, run.me.ceremonies.propose, run.envelope)
    refusal(Reason.STATE, run.me.ceremonies.deliver, run.id, run.headers, run.parts(ME))
    refusal(Reason.STATE, run.me.ceremonies.confirm, run.id, [])
    refusal(Reason.STATE, run.me.ceremonies.activate, run.id, b"")


def test_an_active_epoch_is_not_cancelled(run: Run) -> None:
    run.activate()
    refusal(Reason.STATE, run.me.ceremonies.cancel, run.id)
    assert run.me.epochs.active(run.plan.key_id, 1).indices


def test_a_coordinator_cannot_talk_a_custodian_out_of_seeds_that_others_rely_on(run: Run) -> None:
    """Everybody confirmed, the others are active, and one was told to cancel: the certificate still counts for it."""
    run.confirm()
    for name, node in run.nodes.items():
        if name != ME:
            node.ceremonies.activate(run.id, run.certificate)
    assert run.me.ceremonies.cancel(run.id) == "confirmed"
    rival = run.committee.plan(run.plan.key_id)
    run.me.ceremonies.propose(run.committee.sign_plan(rival))
    refusal(Reason.EXISTS, run.me.ceremonies.activate, run.id, run.certificate)
    run.me.ceremonies.cancel(rival.ceremony_id)
    run.me.ceremonies.activate(run.id, run.certificate)
    assert run.me.epochs.active(run.plan.key_id, 1).indices


def test_the_seeds_of_a_confirmed_and_cancelled_ceremony_go_when_another_succeeds(run: Run) -> None:
    run.confirm()
    run.cancel()
    old = run.me.keystore.ceremony(run.id)
    assert old is not None
    assert run.me.keystore.seeds(old)
    again = Run(run.committee, run.plan.key_id)
    again.activate()
    assert run.me.keystore.seeds(old) == {}
    refusal(Reason.EXISTS, run.me.ceremonies.activate, run.id, run.certificate)


def test_a_certificate_over_a_mebibyte_activates_and_loads_again(tmp_path: Path) -> None:
    """7 of 17 have 12 376 seeds. Their ceremony takes minutes; here it is put into the state before *activate*."""
    names = [(f"c-{number}", "CH") for number in range(17)]
    committee = build_committee(tmp_path, names, {"at_least": 7})
    plan, me = committee.plan(), "c-0"
    seeds = {index: index.to_bytes(32, "big") for index in plan.quorum.indices_of(me)}
    commitments = [bytes(32)] * plan.quorum.seed_count
    for index, secret in seeds.items():
        commitments[index] = ceremony.commitment(plan.ceremony_id, index, secret)
    payload = ceremony.EpochCertificate(plan, tuple(commitments)).to_payload()
    signed = {}
    for name in committee.ids:
        identity = committee.open(name).keystore.identity()
        signed[name] = sign(identity, ceremony.CERTIFICATE_TYPE, payload)
    certificate = merge(signed.values(), max_bytes=ceremony.MAX_CERTIFICATE)
    assert len(certificate) > 1 << 20
    node = committee.nodes[me]
    row = CeremonyRow(
        plan.ceremony_id, Kind.GENERATE, plan.key_id, plan.epoch, State.CONFIRMED, None, plan.to_payload(), ("olga",)
    )
    with node.keystore.transaction():
        node.keystore.insert_ceremony(row, 1)
        node.keystore.replace_parts_by_seeds(row, seeds)
        node.keystore.save_answer(row.ceremony_id, Step.CONFIRM, b"", signed[me])
    node.ceremonies.activate(plan.ceremony_id, certificate)
    assert node.epochs.active(plan.key_id, 1).indices == tuple(seeds)
    committee.nodes.pop(me).close()
    assert committee.open(me).epochs.active(plan.key_id, 1).indices == tuple(seeds)
    committee.close()


_NUMBERS = itertools.count()
_STEPS = ("propose", "deliver", "confirm", "activate", "cancel")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(_STEPS), max_size=8))
def test_whatever_the_order_of_calls_the_state_follows_the_table(built: Committee, steps: list[str]) -> None:
    """Every call either makes one move of the table, repeats an answer, or is refused and changes nothing."""
    run = Run(built, f"order-{next(_NUMBERS)}")
    run.propose()
    for name in run.nodes:  # the others are through; only this custodian is called in odd orders
        if name != ME:
            run.deliver_one(name)
    state = "proposed"
    for step in steps:
        try:
            if step == "propose":
                run.me.ceremonies.propose(run.envelope)
            elif step == "deliver":
                run.deliver_one(ME)
            elif step == "confirm":
                run.commitments.setdefault(ME, b"{}")
                run.confirm_one(ME)
                run.confirm()
            elif step == "activate":
                run.me.ceremonies.activate(run.id, run.certificate)
            else:
                run.me.ceremonies.cancel(run.id)
        except (MalformedError, RefusedError, StateError):
            assert run.state() == state
        assert run.state() == state or run.state() in MOVES[Kind.GENERATE][State(state)]
        state = run.state()
        assert (run.plan.key_id in {held.key_id for held in run.me.epochs.all()}) == (state == "active")
    for node in run.nodes.values():
        if node.keystore.ceremony(run.id).state != "active":  # type: ignore[union-attr]
            node.ceremonies.cancel(run.id)


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_answers_nothing_and_moves_nothing(run: Run) -> None:
    run.propose()
    db = run.me.keystore._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    db.execute("CREATE TABLE filler (x)")
    db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(Exception, match="full"):
        db.execute("INSERT INTO filler VALUES (zeroblob(?))", (4096 * (free + 10) * 2,))
    db.execute("INSERT INTO filler VALUES (zeroblob(?))", (max(4096 * free - 2048, 0),))
    with pytest.raises(UnavailableError) as caught:
        run.me.ceremonies.deliver(run.id, run.headers, run.parts(ME))
    assert caught.value.reason is Reason.STORAGE
    assert run.state() == "proposed"
    db.execute("PRAGMA max_page_count = 1000000")
    db.execute("DROP TABLE filler")
    run.deliver()
    assert run.state() == "delivered"


def test_start_up_refuses_seeds_that_are_not_the_certificate_s(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    Run(committee, "key-1").activate()
    store = committee.nodes[ME].keystore
    row = store.live_ceremony("key-1", 1)
    assert row is not None
    with store.transaction():
        store._db.execute("DELETE FROM seeds WHERE idx = 1")
        # Well sealed, and not the seed that everybody committed to.
        store.insert_seeds(row.ceremony_id, "key-1", 1, {1: b"\x07" * 32})
    committee.close()
    with pytest.raises(RefusedError) as caught:
        open_node(committee.directory(ME), PASSPHRASE)
    assert caught.value.reason is Reason.CEREMONY
    assert (caught.value.details["key_id"], caught.value.details["epoch"]) == ("key-1", "1")
    assert caught.value.details["index"] == "1"
    assert "07" * 32 not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM seeds WHERE idx = 1", Reason.CEREMONY),
        (
            "UPDATE epochs SET certificate = (SELECT answer FROM ceremony_steps WHERE step = 'confirm')",
            Reason.SIGNATURE_MISSING,
        ),
        ("UPDATE epochs SET certificate = x'7b7d'", Reason.MALFORMED),
        ("DELETE FROM rosters", Reason.ROSTER),
        ("UPDATE seeds SET sealed = zeroblob(60)", Reason.STORAGE),
    ],
)
def test_start_up_refuses_a_keystore_that_contradicts_itself(tmp_path: Path, change: str, reason: Reason) -> None:
    committee = build_committee(tmp_path)
    Run(committee, "key-1").activate()
    store = committee.nodes[ME].keystore
    store._db.execute(change)
    epochs = committee.nodes[ME].keystore.epochs()
    error = refusal(reason, load_epoch, store, epochs[0], ME)
    assert error.details["key_id"] == "key-1"
    committee.close()


@pytest.mark.parametrize("what", ["identity", "jurisdiction", "TLS certificate", "roster signature"])
def test_start_up_refuses_a_custodian_that_is_not_the_one_enrolled(tmp_path: Path, what: str) -> None:
    committee = build_committee(tmp_path)
    folder = committee.directory(ME)
    reason = Reason.ROSTER
    if what == "identity":
        (folder / "keystore.db").write_bytes((committee.directory("is-1") / "keystore.db").read_bytes())
    elif what == "jurisdiction":
        text = (folder / "custodian.toml").read_text().replace('"CH"', '"DE"')
        (folder / "custodian.toml").write_text(text)
    elif what == "TLS certificate":
        (folder / "tls-cert.pem").write_bytes((committee.directory("is-1") / "tls-cert.pem").read_bytes())
    else:
        (folder / "roster.json").write_bytes(
            sign(Identity.generate(), "application/vnd.keyquorum.roster.v1+json", committee.roster.payload())
        )
        reason = Reason.SIGNATURE
    refusal(reason, open_node, folder, PASSPHRASE)
