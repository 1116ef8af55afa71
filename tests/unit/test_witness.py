"""A custodian as witness: what moves it on, what it refuses, what is proof of a fork, and what stays on its disk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import CLOCK_SKEW, witnessed
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.notes import Note, NoteSignature
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.witness import NOWHERE, CheckpointUpdate
from tests.support.ledger import MemoryLog
from tests.support.witness_scene import AGE, COSIGNERS, LOG, ME, OTHERS, START, TRUST, Scene, make_scene


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = make_scene(tmp_path)
    yield made
    made.keystore.close()


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason
    return caught.value


# -- what moves it on --------------------------------------------------------------------------------------------------


def test_a_leaf_that_the_log_shows_and_a_quorum_vouches_for_passes(scene: Scene) -> None:
    scene.log.fill(5)
    inclusion = scene.show(b"leaf")
    scene.witness.require_shown(leaf_hash(b"leaf"), inclusion)
    assert (scene.witness.size, scene.witness.witnessed_at) == (6, START)


def test_older_checkpoints_accepted_before_still_show_their_leaves(scene: Scene) -> None:
    """Requests under way name the checkpoint they were sent with, while others have moved the custodian on."""
    shown = [(b"%d" % number, scene.show(b"%d" % number)) for number in range(20)]
    for leaf, inclusion in shown:
        scene.witness.require_shown(leaf_hash(leaf), inclusion)
    again = scene.log.update(3, size=4)
    scene.witness.update(again)  # over the other stream, late
    assert scene.witness.size == 20


def test_what_was_accepted_survives_a_restart_and_a_quorums_word_does_not(scene: Scene) -> None:
    inclusion = scene.show(b"leaf")
    witness = scene.restart()
    assert (witness.size, witness.root) == (1, scene.log.root())
    refused(Reason.LEDGER_UNWITNESSED, lambda: witness.require_shown(leaf_hash(b"leaf"), inclusion))
    scene.vouch()
    witness.require_shown(leaf_hash(b"leaf"), inclusion)


def test_a_new_log_is_cosigned_from_nothing(scene: Scene) -> None:
    for size in (0, 0, 3):
        scene.log.fill(size - scene.log.size)
        update = scene.log.update(scene.witness.size)
        lines = scene.witness.serve(update, cosign=True)
        note = scene.log.checkpoint().note.with_signatures(*lines)
        seen = witnessed(note, scene.log.checkpoint().checkpoint, {ME: COSIGNERS[ME].keys}, now=START, oldest=START)
        assert seen.current == {ME: START}
    assert scene.witness.serve(scene.log.update(3), cosign=False) == ()


def test_the_same_again_writes_nothing(scene: Scene) -> None:
    scene.log.fill(3)
    update = scene.log.update(0)
    scene.witness.update(update)
    before = scene.keystore._db.total_changes
    scene.witness.update(update)
    scene.witness.update(scene.log.update(3))  # signed anew, the same tree
    assert scene.keystore._db.total_changes == before


def test_releases_that_share_a_checkpoint_cost_one_commit(scene: Scene) -> None:
    leaves = [b"%d" % number for number in range(64)]
    for leaf in leaves:
        scene.log.append(leaf)
    before = scene.keystore._db.total_changes
    scene.vouch()
    for index, leaf in enumerate(leaves):
        scene.witness.require_shown(leaf_hash(leaf), scene.log.inclusion(index))
    assert scene.keystore._db.total_changes == before + 1


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_request_that_shows_nothing_is_refused(scene: Scene) -> None:
    scene.show()
    assert isinstance(
        refused(Reason.LEDGER_PROOF, lambda: scene.witness.require_shown(leaf_hash(b"leaf"), NOWHERE)), MalformedError
    )


def test_another_leaf_than_the_one_shown_is_refused(scene: Scene) -> None:
    inclusion = scene.show(b"leaf")
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.require_shown(leaf_hash(b"another"), inclusion))


@pytest.mark.parametrize("change", ["short", "long", "far too long", "not hashes", "index", "swapped"])
def test_inclusion_proofs_are_exact(scene: Scene, change: str) -> None:
    scene.log.fill(9)
    good = scene.show(b"leaf")
    bad = {
        "short": dataclasses.replace(good, proof=good.proof[:-1]),
        "long": dataclasses.replace(good, proof=(*good.proof, bytes(32))),
        "far too long": dataclasses.replace(good, proof=(bytes(32),) * 64),
        "not hashes": dataclasses.replace(good, proof=(b"x",) * len(good.proof)),
        "index": dataclasses.replace(good, index=10),
        "swapped": scene.log.inclusion(3),
    }[change]
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.require_shown(leaf_hash(b"leaf"), bad))
    scene.witness.require_shown(leaf_hash(b"leaf"), good)


def test_a_tree_this_custodian_never_accepted_shows_nothing(scene: Scene) -> None:
    scene.show()
    ahead = scene.log.append(b"unseen")
    error = refused(Reason.LEDGER_CONFLICT, lambda: scene.witness.require_shown(leaf_hash(b"unseen"), ahead))
    assert error.details["size"] == "1"


def _note(signed: SignedCheckpoint, text: bytes | None = None, *lines: NoteSignature) -> bytes:
    return Note(text or signed.note.text, lines or signed.note.signatures).encode()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("another origin", Reason.LEDGER_ORIGIN),
        ("another log's keys", Reason.SIGNATURE_MISSING),
        ("another size", Reason.SIGNATURE),
        ("another root", Reason.SIGNATURE),
        ("ed25519 alone", Reason.SIGNATURE_MISSING),
        ("ml-dsa alone", Reason.SIGNATURE_MISSING),
        ("another key id", Reason.SIGNATURE_MISSING),
        ("a line twice", Reason.SIGNATURE_EXTRA),
        ("seventeen lines", Reason.TOO_LARGE),
        ("trailing bytes", Reason.MALFORMED),
        ("an over-long line", Reason.TOO_LARGE),
        ("an extension line", Reason.UNSUPPORTED),
        ("no signatures", Reason.SIGNATURE_MISSING),
        ("nothing", Reason.MALFORMED),
    ],
)
def test_a_checkpoint_that_is_not_the_logs_moves_nothing(scene: Scene, what: str, reason: Reason) -> None:
    scene.log.fill(3)
    good = scene.log.checkpoint()
    text, (first, second) = good.note.text, good.note.signatures
    other = MemoryLog(LogSigner.generate("demo/other"), scene.clock)
    other.fill(3)
    same_name = MemoryLog(LogSigner.generate("demo/ledger"), scene.clock)
    same_name.fill(3)
    strangers = [NoteSignature(f"who/{number}", b"\0\0\0\1", b"x") for number in range(15)]
    note = {
        "another origin": other.checkpoint().encode(),
        "another log's keys": same_name.checkpoint().encode(),
        "another size": _note(good, text.replace(b"\n3\n", b"\n4\n")),
        "another root": _note(good, scene.log.fork(2).checkpoint().note.text),
        "ed25519 alone": _note(good, None, first),
        "ml-dsa alone": _note(good, None, second),
        "another key id": _note(good, None, dataclasses.replace(first, key_id=b"\0\0\0\0"), second),
        "a line twice": good.encode() + first.line().encode(),
        "seventeen lines": good.encode() + "".join(line.line() for line in strangers).encode(),
        "trailing bytes": good.encode() + b"x",
        "an over-long line": good.encode() + b"\xe2\x80\x94 who " + b"A" * 9000 + b"\n",
        "an extension line": _note(good, text + b"extension\n"),
        "no signatures": text + b"\n",
        "nothing": b"",
    }[what]
    refused(reason, lambda: scene.witness.update(CheckpointUpdate(0, (), note)))
    assert scene.witness.size == 0
    assert scene.restart().size == 0
    assert scene.witness.open_alarms == ()


def test_sixteen_lines_with_strangers_are_fine(scene: Scene) -> None:
    scene.log.fill(3)
    strangers = [NoteSignature(f"who/{number}", b"\0\0\0\1", b"x") for number in range(14)]
    note = scene.log.checkpoint().with_signatures(*strangers).encode()
    scene.witness.update(CheckpointUpdate(0, (), note))
    assert scene.witness.size == 3


@pytest.mark.parametrize("change", ["short", "long", "swapped", "none", "of another log"])
def test_a_bad_consistency_proof_is_refused_and_stops_nothing(scene: Scene, change: str) -> None:
    """Anybody between could have spoilt it: an alarm would let them stop this custodian for good."""
    scene.log.fill(5)
    scene.vouch()
    scene.log.fill(6)
    good = scene.log.update(5)
    proof = {
        "short": good.proof[:-1],
        "long": (*good.proof, bytes(32)),
        "swapped": good.proof[::-1],
        "none": (),
        "of another log": scene.log.fork(5).consistency(5),
    }[change]
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.update(dataclasses.replace(good, proof=proof)))
    assert (scene.witness.size, scene.witness.open_alarms) == (5, ())
    scene.witness.update(good)
    assert scene.witness.size == 11


def test_a_larger_tree_of_a_fork_cannot_be_proven_and_stops_nothing(scene: Scene) -> None:
    scene.log.fill(5)
    scene.vouch()
    fork = scene.log.fork(3)
    fork.fill(6)
    update = dataclasses.replace(fork.update(5), proof=scene.log.fork(5).consistency(5))
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.update(update))
    assert scene.witness.open_alarms == ()


@pytest.mark.parametrize(("old", "size"), [(3, 4), (0, 10), (7, 10), (3, 5)])
def test_an_older_or_unchained_checkpoint_is_told_where_this_custodian_is(scene: Scene, old: int, size: int) -> None:
    """C2SP's 409: no fork, only stale."""
    scene.log.fill(6)
    scene.vouch()
    scene.log.fill(4)
    error = refused(Reason.LEDGER_CONFLICT, lambda: scene.witness.update(scene.log.update(min(old, size), size=size)))
    assert isinstance(error, StateError)
    assert error.details["size"] == "6"
    assert (scene.witness.size, scene.witness.open_alarms) == (6, ())


def test_a_proof_from_a_larger_tree_makes_no_sense(scene: Scene) -> None:
    scene.log.fill(6)
    scene.vouch()
    update = dataclasses.replace(scene.log.update(2, size=4), old_size=6)
    refused(Reason.MALFORMED, lambda: scene.witness.update(update))


def test_cosigning_needs_the_size_seen_last(scene: Scene) -> None:
    scene.log.fill(3)
    request = scene.log.update(0)
    assert len(scene.witness.cosign(0, request.proof, request.checkpoint)) == 2
    refused(Reason.LEDGER_CONFLICT, lambda: scene.witness.cosign(0, (), request.checkpoint))
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.cosign(3, (bytes(32),), request.checkpoint))
    assert len(scene.witness.cosign(3, (), request.checkpoint)) == 2
    scene.log.fill(1)
    scene.witness.update(scene.log.update(3))
    refused(Reason.LEDGER_CONFLICT, lambda: scene.witness.serve(scene.log.update(3, size=3), cosign=True))


def test_a_roster_without_a_log_means_that_nothing_is_shown(scene: Scene) -> None:
    inclusion = scene.show(b"leaf")
    witness = scene.restart(None)
    refused(Reason.LEDGER_ORIGIN, lambda: witness.require_shown(leaf_hash(b"leaf"), inclusion))
    refused(Reason.LEDGER_ORIGIN, lambda: witness.update(scene.log.update(0)))
    refused(Reason.LEDGER_ORIGIN, lambda: witness.cosign(0, (), scene.log.checkpoint().encode()))


def test_a_new_log_of_a_new_roster_begins_anew(scene: Scene) -> None:
    scene.log.fill(4)
    scene.vouch()
    fresh = LogSigner.generate("demo/ledger")
    witness = scene.restart(dataclasses.replace(TRUST, log=fresh.keys))
    assert witness.size == 0
    log = MemoryLog(fresh, scene.clock)
    log.fill(2)
    witness.update(log.update(0))
    assert witness.size == 2
    assert scene.restart().size == 4, "the old one is remembered"


def test_a_checkpoint_on_disk_that_is_not_of_this_log_ends_the_start(scene: Scene) -> None:
    scene.log.fill(4)
    scene.vouch()
    with scene.keystore.transaction():
        scene.keystore.change("UPDATE ledgers SET size = 3")
    assert isinstance(refused(Reason.STORAGE, scene.restart), UnavailableError)
    with scene.keystore.transaction():
        scene.keystore.change("UPDATE ledgers SET size = 4, note = ?", MemoryLog(LOG, scene.clock).root())
    refused(Reason.STORAGE, scene.restart)


# -- a quorum's word ---------------------------------------------------------------------------------------------------


def test_nothing_is_shown_before_a_quorum_vouched_or_long_after(scene: Scene) -> None:
    inclusion = scene.log.append(b"leaf")
    scene.witness.update(scene.log.update(0))

    def shown() -> None:
        scene.witness.require_shown(leaf_hash(b"leaf"), inclusion)

    assert "none seen" in refused(Reason.LEDGER_UNWITNESSED, shown).actual
    scene.vouch()
    shown()
    scene.now += AGE
    shown()
    scene.now += 1
    refused(Reason.LEDGER_UNWITNESSED, shown)
    scene.vouch()
    shown()
    scene.now -= CLOCK_SKEW
    shown()
    scene.now -= 1  # a clock that was set back makes an old word no younger
    refused(Reason.LEDGER_UNWITNESSED, shown)


@pytest.mark.parametrize("what", ["one custodian", "one key each", "too old", "from the future", "a forged line"])
def test_cosignatures_short_of_a_quorum_vouch_for_nothing(scene: Scene, what: str) -> None:
    scene.log.fill(3)
    good = scene.log.cosigned(by=OTHERS)
    lines = good.note.signatures
    cosigned = {
        "one custodian": scene.log.cosigned(by=["is-1"]),
        "one key each": dataclasses.replace(good, note=Note(good.note.text, (*lines[:3], lines[4]))),
        "too old": scene.log.cosigned(by=OTHERS, at=START - AGE - 1),
        "from the future": scene.log.cosigned(by=OTHERS, at=START + CLOCK_SKEW + 1),
        "a forged line": dataclasses.replace(
            good, note=Note(good.note.text, (*lines[:5], dataclasses.replace(lines[5], signature=bytes(2428))))
        ),
    }[what]
    reason = Reason.SIGNATURE if what == "a forged line" else Reason.LEDGER_UNWITNESSED
    refused(reason, lambda: scene.witness.update(scene.log.update(0, cosigned=cosigned)))
    assert scene.witness.witnessed_at == 0
    assert scene.witness.size == 3, "the checkpoint itself is accepted"


def test_a_quorums_time_is_that_of_its_slowest_member(scene: Scene) -> None:
    scene.log.fill(3)
    signed = scene.log.cosigned(by=["is-1"], at=START - 100)
    signed = signed.with_signatures(*COSIGNERS["no-1"].cosign(signed.checkpoint, START - 5))
    scene.witness.update(scene.log.update(0, cosigned=signed))
    assert scene.witness.witnessed_at == START - 100
    scene.vouch()
    assert scene.witness.witnessed_at == START
    scene.witness.update(scene.log.update(3, cosigned=signed))
    assert scene.witness.witnessed_at == START, "an older word takes nothing back"


def test_what_a_quorum_cosigned_must_be_in_what_is_shown(scene: Scene) -> None:
    """The half of the custodians that is shown a fork is not vouched for by the other half."""
    scene.log.fill(4)
    scene.witness.update(scene.log.update(0))
    theirs = scene.log.fork(2)
    theirs.fill(5)
    update = dataclasses.replace(scene.log.update(4), cosigned=theirs.cosigned(by=OTHERS).encode(), cosigned_proof=())
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.update(update))  # larger than what is shown
    scene.log.fill(20)
    update = dataclasses.replace(
        scene.log.update(4),
        cosigned=theirs.cosigned(by=OTHERS).encode(),
        cosigned_proof=scene.log.consistency(theirs.size, 24),
    )
    refused(Reason.LEDGER_PROOF, lambda: scene.witness.update(update))
    assert scene.witness.witnessed_at == 0


# -- alarms ------------------------------------------------------------------------------------------------------------


def test_two_trees_of_one_size_are_a_fork_that_stops_everything(scene: Scene) -> None:
    inclusion = scene.show(b"leaf")
    fork = scene.log.fork(0)
    error = refused(Reason.LEDGER_FORK, lambda: scene.witness.update(fork.update(1)))
    assert isinstance(error, RefusedError)
    (alarm,) = scene.heard
    assert (alarm.kind, alarm.cleared_at) == ("fork", None)
    for _ in range(2):
        assert [each.number for each in scene.witness.open_alarms] == [alarm.number]
        halted = refused(Reason.LEDGER_FORK, lambda: scene.witness.require_shown(leaf_hash(b"leaf"), inclusion))
        assert halted.details == {"alarm": "fork", "evidence": alarm.evidence.hex()}
        refused(Reason.LEDGER_FORK, lambda: scene.witness.update(scene.log.update(1)))
        refused(Reason.LEDGER_FORK, lambda: scene.witness.cosign(1, (), scene.log.checkpoint().encode()))
        scene.restart()
    notes = {TRUST.open(note).checkpoint.root for note in (alarm.known, alarm.shown)}
    assert notes == {scene.log.root(), fork.root()}, "both are kept as they were signed"


def test_a_fork_among_older_checkpoints_is_one_as_well(scene: Scene) -> None:
    for _ in range(5):
        scene.show()
    fork = scene.log.fork(2)
    refused(Reason.LEDGER_FORK, lambda: scene.witness.update(fork.update(0)))
    assert len(scene.heard) == 1


def test_a_fork_in_what_a_quorum_cosigned_is_one_as_well(scene: Scene) -> None:
    scene.log.fill(3)
    scene.witness.update(scene.log.update(0))
    fork = scene.log.fork(2)
    update = scene.log.update(3, cosigned=fork.cosigned(by=OTHERS))
    refused(Reason.LEDGER_FORK, lambda: scene.witness.update(update))
    assert scene.heard[0].kind == "fork"


def test_both_halves_in_one_update_are_compared_too(scene: Scene) -> None:
    scene.log.fill(3)
    fork = scene.log.fork(2)
    update = scene.log.update(0, cosigned=fork.cosigned(by=OTHERS))
    refused(Reason.LEDGER_FORK, lambda: scene.witness.update(update))
    assert len(scene.witness.open_alarms) == 1


def test_clearing_an_alarm_takes_a_reason_and_keeps_the_evidence(scene: Scene) -> None:
    inclusion = scene.show(b"leaf")
    fork = scene.log.fork(0)
    refused(Reason.LEDGER_FORK, lambda: scene.witness.update(fork.update(1)))
    for why in ("", "   ", "x" * 401, "a\nb"):
        refused(Reason.MALFORMED, lambda why=why: scene.witness.clear(1, why))  # type: ignore[misc]
    refused(Reason.NOT_FOUND, lambda: scene.witness.clear(2, "no such alarm"))
    scene.now += 60
    scene.witness.clear(1, "the log was rebuilt by mistake; operators agreed")
    refused(Reason.NOT_FOUND, lambda: scene.witness.clear(1, "again"))
    (alarm,) = scene.witness.alarms()
    assert (alarm.cleared_at, alarm.why) == (START + 60, "the log was rebuilt by mistake; operators agreed")
    scene.vouch()
    scene.witness.require_shown(leaf_hash(b"leaf"), inclusion)
    # The same evidence again stops nothing: whoever has it could otherwise stop this custodian as often as they like.
    assert isinstance(refused(Reason.LEDGER_FORK, lambda: scene.witness.update(fork.update(1))), RefusedError)
    scene.witness.require_shown(leaf_hash(b"leaf"), inclusion)
    assert len(scene.heard) == 1


def test_a_disk_that_was_turned_back_is_found_out_by_its_own_cosignature(scene: Scene) -> None:
    """A rollback of this database: a peer shows a checkpoint that this custodian cosigned and no longer knows."""
    scene.log.fill(5)
    scene.vouch()
    old = scene.keystore.select("SELECT * FROM ledgers")[0]
    scene.log.fill(5)
    lines = scene.witness.serve(scene.log.update(5), cosign=True)
    cosigned = scene.log.cosigned(by=OTHERS).with_signatures(*lines)
    with scene.keystore.transaction():
        scene.keystore.change("INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?)", *old)
    witness = scene.restart()
    assert witness.size == 5
    refused(Reason.LEDGER_ROLLBACK, lambda: witness.update(scene.log.update(5, cosigned=cosigned)))
    assert [alarm.kind for alarm in scene.heard] == ["rollback"]
    refused(Reason.LEDGER_FORK, lambda: witness.update(scene.log.update(5)))
    scene.now += 1
    witness.clear(1, "restored from last night's backup")
    witness.update(scene.log.update(5, cosigned=cosigned))  # what it cosigned before is forgiven from then on
    assert witness.size == 10
    with scene.keystore.transaction():
        scene.keystore.change("INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?)", *old)
    lines = COSIGNERS[ME].cosign(scene.log.checkpoint().checkpoint, int(scene.now) + 1)
    later = scene.log.cosigned(by=OTHERS).with_signatures(*lines)
    witness = scene.restart()
    refused(Reason.LEDGER_ROLLBACK, lambda: witness.update(scene.log.update(5, cosigned=later)))


def test_one_line_under_its_name_is_no_proof_of_a_rollback(scene: Scene) -> None:
    """Ed25519 alone may be forged one day; that must not stop custodians."""
    scene.log.fill(5)
    (first, _) = COSIGNERS[ME].cosign(scene.log.checkpoint().checkpoint, START)
    cosigned = scene.log.cosigned(by=OTHERS).with_signatures(first)
    scene.witness.update(scene.log.update(0, cosigned=cosigned))
    assert (scene.witness.size, scene.heard) == (5, [])


def test_a_failing_disk_leaves_everything_as_it_was(scene: Scene) -> None:
    class Full(Keystore):
        __slots__ = ()

        def _commit(self) -> None:
            raise UnavailableError(Reason.STORAGE, "the disk is full")

    scene.log.fill(3)
    scene.vouch()
    scene.log.fill(2)
    scene.keystore.close()
    scene.keystore = Full.open(scene.path, "p")
    witness = scene.restart()
    refused(Reason.STORAGE, lambda: witness.update(scene.log.update(3)))
    refused(Reason.STORAGE, lambda: witness.cosign(3, scene.log.consistency(3), scene.log.checkpoint().encode()))
    assert witness.size == 3
    fork = scene.log.fork(2)
    refused(Reason.STORAGE, lambda: witness.update(fork.update(3)))
    assert (witness.open_alarms, scene.heard) == ((), [])
    scene.keystore.close()
    scene.keystore = Keystore.open(scene.path, "p")
    witness = scene.restart()
    assert (witness.size, witness.alarms()) == (3, ())
    witness.update(scene.log.update(3))


# -- any order of events -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=12))
@settings(max_examples=40, deadline=None)
def test_whatever_is_shown_in_whatever_order_only_extensions_are_accepted(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    """Honest and forked checkpoints, right and wrong sizes: what was accepted is always a prefix of what is now."""
    scene = make_scene(tmp_path_factory.mktemp("w"))
    scene.log.fill(1)
    accepted: list[tuple[int, bytes]] = []
    for grow, back, forked in steps:
        scene.log.fill(grow)
        source = scene.log.fork(max(0, scene.log.size - back)) if forked else scene.log
        old = max(0, scene.witness.size - back)
        with contextlib.suppress(KeyquorumError):
            scene.witness.update(source.update(min(old, source.size)))
        accepted.append((scene.witness.size, scene.witness.root))
        if scene.witness.open_alarms:
            break
    sizes = [size for size, _ in accepted]
    assert sizes == sorted(sizes)
    if accepted and not any(forked for _, _, forked in steps):
        assert all(root == scene.log.root(size) for size, root in accepted)
        assert not scene.heard
    reopened = scene.restart()
    assert not accepted or (reopened.size, reopened.root) == accepted[-1]
    scene.keystore.close()
