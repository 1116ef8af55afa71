"""A log verified from its leaves: what is served is the tree that was signed, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.replay import Replay, check_growth, edge_tiles, plan
from keyquorum_core.ledger.tiles import Bundle, Tile, tiles_between
from tests.support.ledger_world import NOW, ORIGIN, TestLog, World, log_signer

WORLD = World()
LEAVES = [b'{"type":"test","n":%d}' % number for number in range(70_000)]


@pytest.fixture(scope="module")
def long_log() -> TestLog:
    """Three levels of tiles; every width of partial tiles asked for is made by :func:`at`."""
    return TestLog(WORLD, LEAVES)


@pytest.fixture(scope="module")
def log() -> TestLog:
    return TestLog(WORLD, LEAVES[:777])


def checkpoint(log: TestLog, size: int) -> Checkpoint:
    return Checkpoint(ORIGIN, size, log.root(size))


def at(log: TestLog, size: int) -> dict[str, bytes]:
    """The files that a log of the first ``size`` leaves serves."""
    out = {}
    for tile in tiles_between(0, size):
        full = Tile(tile.level, tile.index)
        whole = log.files.get(full.path) or log.files[next(p for p in log.files if p.startswith(f"{full.path}.p/"))]
        out[tile.path] = whole[: 32 * tile.width]
        if tile.level == 0:
            bundle = Bundle(tile.index, tile.width)
            first = tile.index * 256
            entries = log.leaves[first : first + tile.width]
            out[bundle.path] = b"".join(len(e).to_bytes(2, "big") + e for e in entries)
    return out


def replay(
    files: dict[str, bytes], size: int, root: bytes, past: Checkpoint | None = None, *, scratch: bool = True
) -> list[bytes]:
    edge = None
    if past is not None and not scratch:
        edge = {tile: files[tile.path] for tile in edge_tiles(past.size, size)}
    run = Replay(size, past, edge)
    leaves: list[bytes] = []
    while (name := run.expected) is not None:
        leaves += run.accept(name, files[name.path])
    assert run.finish(root).end == size
    return leaves


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 511, 512, 777])
def test_every_leaf_of_a_log_is_given_out_once_and_in_order(log: TestLog, size: int) -> None:
    assert replay(at(log, size), size, log.root(size)) == LEAVES[:size]


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 65_792, 70_000])
def test_three_levels_of_tiles_are_checked(long_log: TestLog, size: int) -> None:
    files = at(long_log, size)
    names = list(plan(0, size))
    assert {name.path for name in names} == set(files)
    assert len(names) == len(files)
    assert replay(files, size, long_log.root(size)) == LEAVES[:size]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 777), st.integers(0, 777))
def test_only_new_leaves_are_read_after_a_past_tree(first: int, second: int) -> None:
    log = _cached()
    past, size = sorted((first, second))
    known = checkpoint(log, past)
    assert replay(at(log, size), size, log.root(size), known, scratch=False) == LEAVES[past:size]
    assert replay(at(log, size), size, log.root(size), known) == LEAVES[:size]


@pytest.mark.parametrize("past", [255, 256, 65_535, 65_536, 65_537, 66_000, 69_999, 70_000])
def test_a_replay_after_a_past_tree_reads_few_files(long_log: TestLog, past: int) -> None:
    size = 70_000
    known = checkpoint(long_log, past)
    assert replay(at(long_log, size), size, long_log.root(), known, scratch=False) == LEAVES[past:size]
    read = len(edge_tiles(past, size)) + len(list(plan(past, size)))
    assert read <= 2 * ((size - past) // 256 + 2) + 6


_LOG: list[TestLog] = []


def _cached() -> TestLog:
    if not _LOG:
        _LOG.append(TestLog(WORLD, LEAVES[:777]))
    return _LOG[0]


def refusal(call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    return caught.value


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_change_of_any_served_byte_is_refused(data: st.DataObject) -> None:
    log = _cached()
    size = data.draw(st.sampled_from([1, 2, 300, 600, 777]))
    past_size = data.draw(st.sampled_from([None, *(n for n in (1, 255, 256, 300, 512) if n <= size)]))
    files = at(log, size)
    past = None if past_size is None else checkpoint(log, past_size)
    edge = () if past_size is None else edge_tiles(past_size, size)
    read = sorted({name.path for name in (*edge, *plan(past_size or 0, size))})
    path = data.draw(st.sampled_from(read))
    content = bytearray(files[path])
    where = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            content[where] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[where : where + data.draw(st.integers(1, 64))]
        case _:
            content[where:where] = data.draw(st.binary(min_size=1, max_size=64))
    if bytes(content) == files[path]:
        return
    files[path] = bytes(content)
    error = refusal(lambda: replay(files, size, log.root(size), past, scratch=past is None))
    assert error.reason in (Reason.LEDGER_PROOF, Reason.MALFORMED)
    assert error.expected or error.actual


def swapped(files: dict[str, bytes], one: str, other: str) -> dict[str, bytes]:
    return {**files, one: files[other], other: files[one]}


def test_reordered_and_duplicated_tiles_and_bundles_are_refused(log: TestLog) -> None:
    files = at(log, 777)
    for changed in (
        swapped(files, "tile/0/000", "tile/0/001"),
        swapped(files, "tile/entries/000", "tile/entries/001"),
        swapped(swapped(files, "tile/entries/000", "tile/entries/001"), "tile/0/000", "tile/0/001"),
        {**files, "tile/0/001": files["tile/0/000"]},
        {**files, "tile/0/001": files["tile/0/000"], "tile/entries/001": files["tile/entries/000"]},
    ):
        assert refusal(partial(replay, changed, 777, log.root())).reason is Reason.LEDGER_PROOF


def test_a_tile_in_another_width_is_malformed(log: TestLog) -> None:
    files = at(log, 777)
    for path in ("tile/0/003.p/9", "tile/1/000.p/3", "tile/0/000"):
        for change in (files[path][:-32], files[path] + files[path][:32], files[path][:-1], b""):
            error = refusal(partial(replay, {**files, path: change}, 777, log.root()))
            assert (type(error), error.reason) == (MalformedError, Reason.MALFORMED)


def test_leaves_that_are_left_out_do_not_make_the_signed_tree(log: TestLog) -> None:
    other = TestLog(WORLD, LEAVES[:300] + LEAVES[301:778])
    error = refusal(lambda: replay(at(other, 777), 777, log.root()))
    assert error.reason is Reason.LEDGER_PROOF
    assert log.root().hex() in error.expected


def test_a_fork_is_told_from_tiles_that_were_served_wrong(log: TestLog) -> None:
    forked = TestLog(WORLD, [*LEAVES[:300], b"another", *LEAVES[301:777]])
    past = checkpoint(log, 512)
    error = refusal(lambda: replay(at(forked, 777), 777, forked.root(), past, scratch=False))
    assert error.reason is Reason.LEDGER_PROOF
    error = refusal(lambda: replay(at(forked, 777), 777, forked.root(), past))
    assert error.reason is Reason.LEDGER_FORK
    assert past.root.hex() in error.expected
    # The old tree's tiles under the new root: nothing that the log signed, and so no proof of a fork.
    error = refusal(lambda: replay(at(forked, 777), 777, log.root(), past))
    assert error.reason is Reason.LEDGER_PROOF


def test_an_edge_of_another_tree_is_refused(long_log: TestLog) -> None:
    forked = Checkpoint(ORIGIN, 66_048, bytes(32))
    files = at(long_log, 70_000)
    edge = {tile: files[tile.path] for tile in edge_tiles(66_048, 70_000)}
    assert refusal(lambda: Replay(70_000, forked, edge)).reason is Reason.LEDGER_PROOF
    with pytest.raises(StateError):
        Replay(70_000, forked, {})


def test_files_come_in_turn_and_all_of_them(log: TestLog) -> None:
    files = at(log, 300)
    run = Replay(300)
    with pytest.raises(StateError, match=re.escape("tile/entries/000")):
        run.accept(Tile(0, 0), files["tile/0/000"])
    with pytest.raises(StateError, match="not all files were read"):
        run.finish(log.root(300))
    while (name := run.expected) is not None:
        run.accept(name, files[name.path])
    with pytest.raises(StateError, match="nothing more"):
        run.accept(Tile(0, 0), files["tile/0/000"])
    assert run.leaves == 300


def test_a_tree_never_shrinks(log: TestLog) -> None:
    with pytest.raises(StateError):
        Replay(10, checkpoint(log, 11))
    past = checkpoint(log, 300)
    check_growth(past, past)
    check_growth(past, checkpoint(log, 301))
    for later, reason in (
        (checkpoint(log, 299), Reason.LEDGER_ROLLBACK),
        (Checkpoint(ORIGIN, 300, log.root(301)), Reason.LEDGER_FORK),
    ):
        with pytest.raises(RefusedError) as caught:
            check_growth(past, later)
        assert caught.value.reason is reason
    with pytest.raises(MalformedError):
        check_growth(past, Checkpoint("another.log", 300, past.root))


def test_a_quorum_of_custodians_must_have_cosigned(log: TestLog) -> None:
    names = tuple(WORLD.witnesses)
    for by in (names[:3], names[2:], names):
        done = WORLD.trust.verify(log.checkpoint(by=by), now=NOW)
        assert (set(done.times), done.quorum_time) == (set(by), NOW)
    for by in ((), names[:2]):
        error = refusal(partial(WORLD.trust.verify, log.checkpoint(by=by), now=NOW))
        assert error.reason is Reason.NO_QUORUM
        assert error.next_step
    assert refusal(lambda: WORLD.trust.verify(log.checkpoint(), now=NOW + 100, oldest=NOW + 1)).reason is Reason.STALE
    assert refusal(lambda: WORLD.trust.verify(log.checkpoint(), now=NOW - 100)).reason is Reason.STALE


def test_the_time_of_a_quorum_is_when_its_last_needed_member_had_signed(log: TestLog) -> None:
    signed = WORLD.signer.sign(log.size, log.root(), NOW)
    for at_time, name in ((NOW - 50, "ch-1"), (NOW - 40, "de-1"), (NOW - 30, "fr-1"), (NOW - 5, "is-1")):
        signed = WORLD.cosign(signed, at_time, [name])
    assert WORLD.trust.verify(signed.encode(), now=NOW).quorum_time == NOW - 40
    only_two_lately = refusal(lambda: WORLD.trust.verify(signed.encode(), now=NOW, oldest=NOW - 35))
    assert only_two_lately.reason is Reason.STALE


def test_another_logs_checkpoint_and_half_a_witness_do_not_count(log: TestLog) -> None:
    other = World(log_signer("other.log", "other"))
    with pytest.raises(RefusedError) as caught:
        WORLD.trust.verify(other.cosigned(1, bytes(32)), now=NOW)
    assert caught.value.reason is Reason.LEDGER_ORIGIN
    signed = WORLD.cosign(WORLD.signer.sign(log.size, log.root(), NOW), NOW, ["ch-1", "de-1"])
    half = signed.with_signatures(WORLD.witnesses["fr-1"].cosign(signed.checkpoint, NOW)[0])
    assert refusal(lambda: WORLD.trust.verify(half.encode(), now=NOW)).reason is Reason.NO_QUORUM
