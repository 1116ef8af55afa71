"""A coordinator that turns the hooks of drills into a weapon: there are none but for a canary."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.backup import BackupReader
from keyquorum_core.backup_checks import BackupCheck
from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_custodian.backing_up import write_epoch
from keyquorum_custodian.canary import MAX_SECONDS, FaultKind
from keyquorum_custodian.node import Node
from keyquorum_custodian.trust import add_owner
from tests.support.canary import CANARY, DRILL, REAL, CanaryScene
from tests.support.ceremonies import Destroy, Make, Rebuild
from tests.support.ledger import MemoryLog

LIAR = "is-1"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[CanaryScene]:
    built = CanaryScene.build(tmp_path)
    yield built
    built.committee.close()


@pytest.fixture
def node(scene: CanaryScene) -> Node:
    return scene.committee.nodes[LIAR]


def refusal(reason: Reason, call: Callable[..., Any], *arguments: Any, **named: Any) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments, **named)
    assert caught.value.reason is reason, caught.value
    return caught.value


def inject(node: Node, kind: str, key_id: str = CANARY, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"seconds": 60, "delay_ms": 250 if kind == "slow" else 0, **changes}
    if kind == "split-view":
        arguments.setdefault("log_key", LogSigner.generate("drill/log").keys.encode())
    return node.canary.inject(arguments.pop("drill_id", DRILL), key_id, kind, **arguments)


@pytest.mark.parametrize("kind", list(FaultKind))
def test_no_fault_is_injected_for_a_key_that_is_not_a_canary(scene: CanaryScene, node: Node, kind: str) -> None:
    before = [(held.key_id, held.epoch, held.indices) for held in node.epochs.all()]
    error = refusal(Reason.CANARY, inject, node, kind, REAL)
    assert "not for drills" in error.message
    refusal(Reason.UNKNOWN_KEY, inject, node, kind, "canary-nobody-knows")
    assert not node.canary.any
    assert [(held.key_id, held.epoch, held.indices) for held in node.epochs.all()] == before


@pytest.mark.parametrize("kind", list(FaultKind))
def test_no_fault_of_the_canary_changes_what_any_other_key_gives(scene: CanaryScene, node: Node, kind: str) -> None:
    request = scene.request(REAL)
    expected, _ = scene.release(request, REAL)
    inject(node, kind)
    found, refusals = scene.release(request, REAL)
    assert (found.key.root, found.blamed, refusals) == (expected.key.root, (), {})
    assert node.witness.open_alarms == ()


def test_a_liar_is_caught_named_and_true_again_when_the_fault_ends(scene: CanaryScene, node: Node) -> None:
    request = scene.request()
    expected, _ = scene.release(request)
    inject(node, "lying")
    found, _ = scene.release(request)
    assert (found.key.root, found.blamed) == (expected.key.root, (LIAR,))
    assert node.canary.lift(DRILL, CANARY) is not None
    assert node.canary.lift(DRILL, CANARY) is None  # idempotent
    assert scene.release(request)[0].blamed == ()
    inject(node, "lying", seconds=60)
    scene.clock.now += 60  # it ends by itself
    assert scene.release(scene.request())[0].blamed == ()


def test_a_liar_stops_a_ceremony_by_name_and_leaves_nothing_behind(scene: CanaryScene, node: Node) -> None:
    request = scene.request()
    expected, _ = scene.release(request)
    inject(node, "lying")
    make = Make.rotate(scene.committee, CANARY).deliver()
    for name in scene.committee.ids:
        error = refusal(Reason.CEREMONY, make.confirm_one, name)
        assert LIAR in str(error)
    make.cancel()
    node.canary.lift(DRILL, CANARY)
    assert scene.release(request)[0].key.root == expected.key.root
    Make.rotate(scene.committee, CANARY).activate()
    assert {held.epoch for held in node.epochs.all() if held.key_id == CANARY} == {1, 2}
    assert scene.release(scene.request(epoch=2), epoch=2)[0].blamed == ()
    assert not node.keystore.accusations()


def test_what_was_lost_is_repaired_and_an_injection_repeated_loses_nothing_older(
    scene: CanaryScene, node: Node
) -> None:
    make = Make.rotate(scene.committee, CANARY)
    make.activate()
    request = scene.request(epoch=2)
    expected, _ = scene.release(request, epoch=2)
    assert inject(node, "lost").seeds == 6
    assert node.keystore.epoch(CANARY, 2) is None
    assert scene.release(request, epoch=2)[1][LIAR].reason is Reason.KEY_STATE
    refusal(Reason.KEY_STATE, inject, node, "lost")  # epoch 1 is retired: it stays
    refusal(Reason.KEY_STATE, make.activate_one, LIAR)  # what it once confirmed brings no seed back
    assert [held.epoch for held in node.epochs.all() if held.key_id == CANARY] == [1]
    scene.committee.nodes.pop(LIAR).close()
    node = scene.committee.open(LIAR)  # and it starts
    refusal(Reason.KEY_STATE, Make.rotate(scene.committee, CANARY).propose_one, LIAR)
    Rebuild(scene.committee, CANARY, 2, LIAR).propose().give().restore()
    found, refusals = scene.release(request, epoch=2)
    assert (found.key.root, found.blamed, refusals) == (expected.key.root, (), {})


def test_a_backup_restores_the_same_seeds(scene: CanaryScene, node: Node) -> None:
    request = scene.request()
    expected, _ = scene.release(request)
    assert inject(node, "restored").seeds == 6
    found, refusals = scene.release(request)
    assert (found.key.root, found.blamed, refusals) == (expected.key.root, (), {})
    assert not node.canary.any


def test_what_is_restored_is_one_epoch_in_a_real_backup_s_form_and_nothing_is_erased_that_it_lacks(
    scene: CanaryScene, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []

    def kept(sink: Any, *arguments: Any) -> Any:
        statement = write_epoch(sink, *arguments)
        written.append(sink.getvalue())
        return statement

    monkeypatch.setattr("keyquorum_custodian.canary.write_epoch", kept)
    before = node.keystore.select("SELECT value FROM meta WHERE name = 'backup-sequence'")
    inject(node, "restored")
    (backup,) = written
    reader, check = BackupReader(io.BytesIO(backup)), BackupCheck(scene.committee.cluster, LIAR)
    kinds = []
    for record in reader.records(node.canary._recipient):
        check.take(record)
        kinds.append(record.kind)
    (epoch,) = check.finish(reader).statement.epochs
    assert (epoch.key_id, epoch.epoch, epoch.seeds) == (CANARY, 1, 6)
    assert kinds == ["roster", "epoch", "seeds"]
    assert node.keystore.select("SELECT value FROM meta WHERE name = 'backup-sequence'") == before

    def changed(sink: Any, *arguments: Any) -> Any:
        statement = write_epoch(sink, *arguments)
        sink.getbuffer()[len(backup) // 2] ^= 1
        return statement

    request = scene.request()
    expected, _ = scene.release(request)
    monkeypatch.setattr("keyquorum_custodian.canary.write_epoch", changed)
    with pytest.raises(KeyquorumError):
        inject(node, "restored")
    found, refusals = scene.release(request)
    assert (found.key.root, found.blamed, refusals) == (expected.key.root, (), {})
    assert len(node.keystore.seeds(node.keystore.epoch(CANARY, 1))) == 6  # type: ignore[arg-type]


def test_a_split_view_of_a_drill_s_log_stops_the_canary_only_and_ends_with_the_fault(
    scene: CanaryScene, node: Node
) -> None:
    signer = LogSigner.generate("drill/log")
    log = MemoryLog(signer, scene.clock)
    log.fill(2)
    fork = log.fork(1)
    fork.fill(2)
    inject(node, "split-view", log_key=signer.keys.encode())
    assert node.canary.show(DRILL, CANARY, log.update(0, size=2)) is None
    alarm = node.canary.show(DRILL, CANARY, fork.update(2, size=2))
    assert alarm is not None
    assert alarm.known != alarm.shown
    canary, real = scene.request(), scene.request(REAL)
    _, refusals = scene.release(canary)
    assert {name: error.reason for name, error in refusals.items()} == {LIAR: Reason.LEDGER_FORK}
    assert refusals[LIAR].details["check"] == "ledger"
    assert scene.release(real, REAL)[1] == {}
    assert node.witness.open_alarms == ()
    assert node.keystore.select("SELECT count(*) FROM ledger_alarms") == [(0,)]
    node.canary.lift(DRILL, CANARY)
    assert scene.release(canary)[1] == {}


def test_a_drill_never_forks_the_cluster_s_own_log(scene: CanaryScene, node: Node) -> None:
    real = scene.committee.roster.log_key
    assert real is not None
    same_name = LogSigner.generate(real.origin).keys.encode()
    for log_key in (real.encode(), same_name):
        refusal(Reason.LEDGER_ORIGIN, inject, node, "split-view", log_key=log_key)
    inject(node, "split-view")
    update = scene.committee.ledger.update(0)
    refusal(Reason.LEDGER_ORIGIN, node.canary.show, DRILL, CANARY, update)
    assert not node.canary.any or node.canary.of(CANARY).witness.open_alarms == ()  # type: ignore[union-attr]


def test_faults_are_bounded_in_time_and_number_and_belong_to_their_drill(scene: CanaryScene, node: Node) -> None:
    for changes in (
        {"seconds": 0},
        {"seconds": MAX_SECONDS + 1},
        {"delay_ms": 1},
        {"log_key": "x"},
        {"drill_id": "0D" * 16},
        {"drill_id": ""},
    ):
        refusal(Reason.MALFORMED, inject, node, "silent", **changes)
    refusal(Reason.MALFORMED, inject, node, "slow", delay_ms=0)
    refusal(Reason.MALFORMED, inject, node, "thunder")
    inject(node, "silent")
    for _ in range(1000):
        inject(node, "lying")
    fault = node.canary.of(CANARY)
    assert fault is not None
    assert fault.kind is FaultKind.LYING
    refusal(Reason.STATE, node.canary.lift, "0e" * 16, CANARY)
    refusal(Reason.STATE, node.canary.show, DRILL, CANARY, scene.committee.ledger.update(0))
    assert node.canary.of(CANARY) is fault


def test_faults_end_with_the_process(scene: CanaryScene, node: Node) -> None:
    inject(node, "lying")
    scene.committee.nodes.pop(LIAR).close()
    again = scene.committee.open(LIAR)
    assert again.canary.of(CANARY) is None
    assert scene.release(scene.request())[0].blamed == ()


def test_an_owner_for_drills_gets_canaries_only_and_canaries_are_for_such_owners_only(scene: CanaryScene) -> None:
    for request in (scene.request(REAL, scene.drill), scene.request(CANARY, scene.committee.owner)):
        for node in scene.committee.nodes.values():
            error = refusal(Reason.CANARY, node.gate.release, request)
            assert error.details["check"] == "key"


def test_whom_an_owner_is_for_is_not_changed_in_passing(scene: CanaryScene, tmp_path: Path) -> None:
    folder = scene.committee.directory(LIAR) / "owners"
    public = (tmp_path / "drill.pub.json").read_bytes()
    refusal(Reason.EXISTS, add_owner, folder, public)
    add_owner(folder, public, canary=True)
    refusal(Reason.EXISTS, add_owner, folder, (tmp_path / "alice.pub.json").read_bytes(), canary=True)


@pytest.mark.parametrize("key_id", [CANARY, REAL])
def test_a_key_is_a_canary_from_its_first_epoch_on_and_for_ever(scene: CanaryScene, key_id: str) -> None:
    policy = KeyPolicy(canary=key_id == REAL)
    make = Make.rotate(scene.committee, key_id, policy=policy)
    for name in scene.committee.ids:
        assert "first epoch" in refusal(Reason.CANARY, make.propose_one, name).message


def test_drills_rotate_and_destroy_without_waiting_and_nothing_else_may(scene: CanaryScene) -> None:
    committee = scene.committee
    by_policy = {"ordered_by": OrderedBy.POLICY}
    make = Make.rotate(committee, REAL, **by_policy)
    for name in committee.ids:
        refusal(Reason.STATE, make.propose_one, name)
    Make.rotate(committee, CANARY, **by_policy).activate()
    Destroy(committee, CANARY, 1, **by_policy).propose().erase()
    assert all(held.epoch == 2 for held in committee.nodes[LIAR].epochs.all() if held.key_id == CANARY)
    in_use = Destroy(committee, CANARY, 2, **by_policy)
    for name in committee.ids:
        refusal(Reason.STATE, in_use.propose_one, name)


def test_a_canary_s_leaf_over_another_key_s_manifest_is_refused_like_any_other(scene: CanaryScene, node: Node) -> None:
    """What keeps an answer back looks at the leaf; what releases looks at what the owner signed."""
    inject(node, "silent")
    request = scene.request(REAL)
    claimed = dataclasses.replace(request, leaf=request.leaf.replace(REAL.encode(), CANARY.encode()))
    refusal(Reason.LEAF, node.gate.release, claimed)
