"""The sequencer on real stores: group commit, request ids, proofs, sealing, and everything that must stop it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.log import Entry, Log
from keyquorum_coordinator.ledger.setup import check_log_key, create_ledger, open_log
from keyquorum_coordinator.log_key import load_log_key
from keyquorum_coordinator.objects import Objects, open_objects
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.merkle import leaf_hash, verify_consistency, verify_inclusion
from keyquorum_core.ledger.tiles import Bundle, Tile
from tests.support.ledger_log import NOW, ORIGIN, HandedOut, add, all_leaves, leaf, make_config, make_log, request


def seal_all(log: Log) -> None:
    while log.seal():
        pass


# -- appending ---------------------------------------------------------------------------------------------------------


async def test_appends_that_come_together_share_a_checkpoint(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    batches: list[int] = []
    sequencer = Sequencer(log, on_batch=lambda count, seconds: batches.append(count))
    entries = await asyncio.gather(*(sequencer.append(leaf(n), b"%d" % n) for n in range(100)))
    assert sum(batches) == 100
    assert len(batches) <= 3
    assert len({entry.checkpoint.checkpoint.size for entry in entries}) == len(batches)
    assert [entry.index for entry in entries] == list(range(100))
    handed_out = HandedOut()
    for number, entry in enumerate(entries):
        handed_out.take(number, entry, sequencer.keys)
    handed_out.check(log)
    await sequencer.close()


async def test_a_batch_window_waits_for_more(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    batches: list[int] = []
    sequencer = Sequencer(log, batch_window=lambda: 0.2, on_batch=lambda count, seconds: batches.append(count))

    async def late(number: int) -> Entry:
        await asyncio.sleep(0.01 * number)
        return await sequencer.append(leaf(number), b"%d" % number)

    await asyncio.gather(*(late(number) for number in range(5)))
    assert batches == [5]
    await sequencer.close()


async def test_the_same_request_again_has_the_same_place_and_another_leaf_is_refused(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    first = await sequencer.append(leaf(1), b"a")
    both = await asyncio.gather(
        *(sequencer.append(leaf(2), b"b"), sequencer.append(leaf(2), b"b"), sequencer.append(leaf(1), b"a")),
        sequencer.append(leaf(3), b"a"),
        return_exceptions=True,
    )
    assert [entry.index for entry in both[:3] if isinstance(entry, Entry)] == [1, 1, 0]
    refused = both[3]
    assert isinstance(refused, StateError)
    assert refused.reason is Reason.EXISTS
    await sequencer.close()
    sequencer = Sequencer(open_log(config))
    again = await sequencer.append(leaf(1), b"a")
    assert (again.index, again.leaf_hash) == (first.index, first.leaf_hash)
    assert again.checkpoint.checkpoint.size == 2, "the newest checkpoint"
    verify_inclusion(again.leaf_hash, 0, 2, again.proof, again.checkpoint.checkpoint.root)
    with pytest.raises(StateError):
        await sequencer.append(leaf(2), b"a")
    await sequencer.close()


async def test_the_same_leaf_under_two_request_ids_is_two_leaves(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    assert [(await sequencer.append(leaf(1), each)).index for each in (b"a", b"b")] == [0, 1]
    await sequencer.close()


@pytest.mark.parametrize(
    ("data", "request_id", "reason"),
    [
        (bytes(65_536), b"a", Reason.TOO_LARGE),
        (b"", b"a", Reason.MALFORMED),
        (b"leaf", b"", Reason.MALFORMED),
        (b"leaf", bytes(65), Reason.MALFORMED),
    ],
)
async def test_a_leaf_or_request_id_of_the_wrong_size_is_refused_alone(
    tmp_path: Path, data: bytes, request_id: bytes, reason: Reason
) -> None:
    _, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    good = asyncio.ensure_future(sequencer.append(bytes(65_535), bytes(64)))
    with pytest.raises(MalformedError) as caught:
        await sequencer.append(data, request_id)
    assert caught.value.reason is reason
    assert (await good).index == 0
    assert all_leaves(log) == [bytes(65_535)]
    await sequencer.close()


async def test_who_goes_away_loses_no_leaf_and_stops_nobody(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    gone = asyncio.ensure_future(sequencer.append(leaf(1), b"a"))
    stays = asyncio.ensure_future(sequencer.append(leaf(2), b"b"))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).index == 1
    assert (await sequencer.append(leaf(1), b"a")).index == 0
    await sequencer.close()
    with pytest.raises(UnavailableError):
        await sequencer.append(leaf(3), b"c")


# -- proofs and tiles --------------------------------------------------------------------------------------------------


def test_every_proof_holds_across_sealing_and_restarts(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    handed_out = HandedOut()
    number = 0
    for count in (1, 2, 253, 1, 300, 211, 600, 3):  # to 256 and 768 exactly, and past them
        numbers = range(number, number + count)
        for each, entry in zip(numbers, add(log, *numbers), strict=True):
            handed_out.take(each, entry, log.keys)
        number += count
        seal_all(log)
        handed_out.check(log)
        log.close()
        log = open_log(config)
        handed_out.check(log)
    sizes = sorted(handed_out.roots)
    for old in sizes:
        for new in sizes:
            if old <= new:
                proof = log.consistency(old, new)
                verify_consistency(old, handed_out.roots[old], new, handed_out.roots[new], proof)
                for index in {0, old - 1, old // 2}:
                    proof = log.inclusion(index, new)
                    verify_inclusion(leaf_hash(leaf(index)), index, new, proof, handed_out.roots[new])
    log.close()


def test_sealed_leaves_leave_the_database_and_partial_tiles_are_prefixes(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(700))
    early = log.tile(Tile(0, 0, 100)), log.tile(Bundle(0, 100)), log.tile(Tile(1, 0, 1)), log.tile(Bundle(1))
    assert log.unsealed == 700
    seal_all(log)
    assert log.unsealed == 700 - 512
    rows = sqlite3.connect(config.path(config.ledger_database)).execute(
        "SELECT min(number), count(*) FROM ledger_leaves"
    )
    assert rows.fetchone() == (512, 188)
    late = log.tile(Tile(0, 0, 100)), log.tile(Bundle(0, 100)), log.tile(Tile(1, 0, 1)), log.tile(Bundle(1))
    assert late == early
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "ledger").rglob("*") if path.is_file()) == [
        "ledger/tile/0/000", "ledger/tile/0/001", "ledger/tile/entries/000", "ledger/tile/entries/001",
    ]  # fmt: skip
    for name in (Tile(0, 2, 189), Tile(0, 3, 1), Tile(1, 0, 3), Bundle(2, 189), Bundle(7), Tile(2, 0, 1)):
        with pytest.raises(StateError) as caught:
            log.tile(name)
        assert caught.value.reason is Reason.NOT_FOUND
    log.close()


async def test_an_object_store_that_fails_stops_no_append_until_too_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    objects = BrokenObjects(open_objects(config.ledger_tiles_place))
    log = open_log(config, objects=objects)
    sequencer = Sequencer(log)
    await asyncio.gather(*(sequencer.append(leaf(n), b"%d" % n) for n in range(300)))
    for _ in range(200):
        if objects.refused:
            break
        await asyncio.sleep(0.01)
    assert objects.refused
    assert (await sequencer.append(leaf(300), b"300")).index == 300
    assert len(all_leaves(log)) == 301
    monkeypatch.setattr("keyquorum_coordinator.sequencer._MAX_UNSEALED", 301)
    with pytest.raises(UnavailableError) as caught:
        await sequencer.append(leaf(301), b"301")
    assert caught.value.reason is Reason.STORAGE
    objects.broken = False
    for _ in range(300):
        if log.unsealed < 256:
            break
        await asyncio.sleep(0.01)
    assert (await sequencer.append(leaf(301), b"301")).index == 301
    assert len(all_leaves(log)) == 302
    await sequencer.close()


class BrokenObjects:
    """An object store whose disk is full."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.broken = True
        self.refused = 0

    def put_durable(self, path: str, data: bytes) -> None:
        if self.broken:
            self.refused += 1
            raise OSError(28, "No space left on device")
        self._objects.put_durable(path, data)

    def read(self, path: str, max_bytes: int) -> bytes | None:
        return self._objects.read(path, max_bytes)

    def exists(self, path: str) -> bool:
        return self._objects.exists(path)


# -- what must stop it -------------------------------------------------------------------------------------------------


def copy(config: CoordinatorConfig, *names: str) -> Callable[[], None]:
    """A backup of these files; calling it puts it back in place of what is there then."""
    backup = config.directory / "backup"
    backup.mkdir(exist_ok=True)
    for name in names:
        source = sqlite3.connect(config.path(name))
        target = sqlite3.connect(backup / name)
        source.backup(target)
        target.close()
        source.close()

    def restore() -> None:
        for name in names:
            for suffix in ("-wal", "-shm"):
                config.path(name + suffix).unlink(missing_ok=True)
            shutil.copy(backup / name, config.path(name))

    return restore


def refusal(config: CoordinatorConfig) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        open_log(config)
    return caught.value


def test_a_rolled_back_database_is_a_refusal_to_start(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(10))
    restore = copy(config, config.ledger_database)
    add(log, 10)
    log.close()
    restore()
    error = refusal(config)
    assert (error.reason, "rolled back" in error.message) == (Reason.STATE, True)
    assert (error.expected, error.actual) == ("at least 11 leaves", "10 leaves")


def test_a_rolled_back_checkpoint_is_a_refusal_to_start(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(10))
    restore = copy(config, config.ledger_checkpoint)
    add(log, 10)
    add(log, 11)
    log.close()
    restore()
    error = refusal(config)
    assert (error.reason, "checkpoint store was rolled back" in error.message) == (Reason.STATE, True)


def test_a_checkpoint_rolled_back_by_its_last_write_is_like_a_kill_before_it(tmp_path: Path) -> None:
    """Nothing tells the two apart, and nothing needs to: the same leaves come into the checkpoint again."""
    config, log = make_log(tmp_path)
    handed_out = HandedOut()
    add(log, *range(10))
    restore = copy(config, config.ledger_checkpoint)
    handed_out.take(10, add(log, 10)[0], log.keys)
    log.close()
    restore()
    log = open_log(config)
    handed_out.check(log)
    log.close()


def test_both_rolled_back_together_are_behind_the_tiles(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(10))
    restore = copy(config, config.ledger_database, config.ledger_checkpoint)
    add(log, *range(10, 300))
    seal_all(log)
    log.close()
    restore()
    error = refusal(config)
    assert (error.reason, "object store is ahead" in error.message) == (Reason.STATE, True)


def test_a_tile_that_differs_is_never_replaced(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(300))
    tile = tmp_path / "ledger" / "tile" / "0" / "000"
    tile.parent.mkdir(parents=True)
    tile.write_bytes(bytes(8192))
    with pytest.raises(RefusedError) as caught:
        log.seal()
    assert caught.value.reason is Reason.LEDGER_FORK
    assert tile.read_bytes() == bytes(8192)
    assert len(all_leaves(log)) == 300, "still served from the database"
    log.close()
    assert config.path(config.ledger_database).exists()


@pytest.mark.parametrize("what", ["ledger_database", "ledger_checkpoint"])
def test_a_missing_store_is_a_refusal_and_is_not_made(tmp_path: Path, what: str) -> None:
    config, log = make_log(tmp_path)
    add(log, 0)
    log.close()
    path = config.path(getattr(config, what))
    path.unlink()
    error = refusal(config)
    assert error.reason is Reason.NOT_FOUND
    assert not path.exists()
    with pytest.raises(StateError) as caught:  # and init does not make it either: there was a log
        create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    assert caught.value.reason is (Reason.STATE if what == "ledger_checkpoint" else Reason.EXISTS)


def test_a_log_that_lost_both_databases_but_has_tiles_is_not_begun_anew(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(256))
    seal_all(log)
    log.close()
    for name in (config.ledger_database, config.ledger_checkpoint):
        config.path(name).unlink()
    with pytest.raises(StateError) as caught:
        create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    assert (caught.value.reason, caught.value.actual) == (Reason.STATE, "tiles in ledger_tiles")


def damage(config: CoordinatorConfig, statement: str) -> None:
    connection = sqlite3.connect(config.path(config.ledger_database))
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE ledger_leaves SET leaf = x'00' WHERE number = 290", Reason.LEDGER_FORK),
        ("DELETE FROM ledger_leaves WHERE number = 290", Reason.STATE),
        ("DELETE FROM ledger_leaves WHERE number = 299", Reason.STATE),
        ("UPDATE ledger_edge SET hashes = zeroblob(32)", Reason.LEDGER_FORK),
        ("UPDATE ledger_edge SET hashes = zeroblob(64)", Reason.LEDGER_PROOF),
        ("DELETE FROM ledger_edge", Reason.LEDGER_PROOF),
        ("UPDATE ledger_log SET origin = 'other/ledger'", Reason.STATE),
        ("UPDATE ledger_log SET format = 2", Reason.STATE),
        ("DELETE FROM ledger_log", Reason.NOT_FOUND),
    ],
)
def test_a_damaged_database_is_a_refusal_to_start(tmp_path: Path, statement: str, reason: Reason) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(300))
    seal_all(log)
    log.close()
    damage(config, statement)
    assert refusal(config).reason is reason


def test_another_logs_keys_are_refused(tmp_path: Path) -> None:
    config, log = make_log(tmp_path / "a")
    add(log, 0)
    log.close()
    other = make_config(tmp_path / "b")
    shutil.copy(other.path(other.log_key), config.path(config.log_key))
    assert refusal(config).reason is Reason.SIGNATURE_MISSING
    keys = load_log_key(other.path(other.log_key)).keys
    check_log_key(keys, keys)
    for roster in (None, LogSigner.generate(ORIGIN).keys):
        with pytest.raises(RefusedError) as caught:
            check_log_key(keys, roster)
        assert caught.value.reason is Reason.ROSTER


def test_keys_that_others_may_read_are_refused(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    log.close()
    config.path(config.log_key).chmod(0o640)
    assert refusal(config).reason is Reason.ROLE


def test_a_database_that_is_rolled_back_under_a_running_log_stops_it(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, *range(10))
    other = open_log(config)  # another coordinator on these stores writes, and they fall back
    add(other, 10)
    other.close()
    log.follow()
    damage(config, "DELETE FROM ledger_leaves WHERE number = 10")
    damage(config, "DELETE FROM ledger_requests WHERE number = 10")
    with pytest.raises(StateError, match="rolled back"):
        log.add([request(11)])
    log.close()


# -- two at once -------------------------------------------------------------------------------------------------------


def test_two_sequencers_at_once_write_one_log(tmp_path: Path) -> None:
    config, first = make_log(tmp_path)
    second = open_log(config)
    handed_out = HandedOut()
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work(log: Log, numbers: range) -> None:
        try:
            for start in range(0, len(numbers), 7):
                some = numbers[start : start + 7]
                for number, entry in zip(some, add(log, *some), strict=True):
                    with lock:
                        handed_out.take(number, entry, log.keys)
                log.seal()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(first, range(420))),
        threading.Thread(target=work, args=(second, range(210, 630))),  # half of them asked for by both
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(handed_out.places) == list(range(630))
    for log in (first, second):
        log.follow()
        handed_out.check(log)
        assert log.latest.checkpoint.size == 630
        log.close()


def test_a_checkpoint_is_only_swapped_for_the_one_it_extends(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    signer = load_log_key(config.path(config.log_key))
    store = CheckpointStore(config.ledger_checkpoint_url, ORIGIN)
    empty = store.read()[0]
    first, other = signer.sign(1, bytes(32), NOW), signer.sign(1, bytes(31) + b"1", NOW)
    assert store.swap(empty, first)
    assert not store.swap(empty, other)
    assert store.read()[0] == first.encode()
    store.close()
    log.close()


def test_leaves_that_another_sequencer_placed_but_did_not_sign_are_taken_over(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    add(log, 0, 1)
    second = open_log(config)
    swap = second._checkpoints.swap

    def lost(old: bytes, new: SignedCheckpoint) -> bool:
        raise UnavailableError(Reason.STORAGE, "the connection is gone")

    second._checkpoints.swap = lost  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        second.add([request(2)])
    assert [entry.index for entry in add(log, 3)] == [3], "after the leaf that nobody signed for yet"
    second._checkpoints.swap = swap  # type: ignore[method-assign]
    assert [entry.index for entry in add(second, 2, 4)] == [2, 4]
    assert all_leaves(second) == [leaf(number) for number in (0, 1, 2, 3, 4)]
    second.close()
    log.close()


# -- cosignatures ------------------------------------------------------------------------------------------------------


async def test_cosignatures_are_kept_and_shown_and_survive(tmp_path: Path) -> None:
    config, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    a, b = (Cosigner.generate(f"demo/{name}") for name in "ab")
    first = (await sequencer.append(leaf(0), b"0")).checkpoint
    nobody = sequencer.witnessed
    assert nobody is None
    assert (await sequencer.published()).checkpoint.size == 1
    kept = await sequencer.add_cosignatures(first, a.cosign(first.checkpoint, NOW))
    assert len(kept.note.signatures) == 4
    kept = await sequencer.add_cosignatures(first, b.cosign(first.checkpoint, NOW))
    assert len(kept.note.signatures) == 6
    assert sequencer.latest == kept
    second = (await sequencer.append(leaf(1), b"1")).checkpoint
    assert (await sequencer.published()) == kept, "readers see what is cosigned"
    assert sequencer.latest.checkpoint == second.checkpoint
    newer = await sequencer.add_cosignatures(second, a.cosign(second.checkpoint, NOW))
    late = await sequencer.add_cosignatures(first, a.cosign(first.checkpoint, NOW + 1))
    assert late == newer == sequencer.witnessed
    await sequencer.close()
    sequencer = Sequencer(open_log(config))
    assert sequencer.witnessed == newer
    assert sequencer.latest == newer
    forged = load_log_key(config.path(config.log_key)).sign(2, bytes(32), NOW)
    with pytest.raises(RefusedError) as caught:
        await sequencer.add_cosignatures(forged, a.cosign(forged.checkpoint, NOW))
    assert caught.value.reason is Reason.LEDGER_FORK
    await sequencer.close()


async def test_a_sequencer_shows_what_another_coordinator_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, log = make_log(tmp_path)
    sequencer, other = Sequencer(log), open_log(config)
    add(other, *range(300))
    seal_all(other)
    monkeypatch.setattr("keyquorum_coordinator.sequencer._FOLLOW", -1.0)
    assert (await sequencer.published()).checkpoint.size == 300
    assert await sequencer.tile(Bundle(1, 44)) == other.tile(Bundle(1, 44))
    assert await sequencer.tile(Tile(0, 0)) == other.tile(Tile(0, 0))
    other.close()
    await sequencer.close()
