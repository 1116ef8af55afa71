"""A sequencer killed at every durable write there is, one after the other, and started again.

Whatever the moment: the log extends every checkpoint that was ever handed out, has no hole and no leaf twice, and gives
the same requests the same places."""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.setup import create_ledger, open_log
from keyquorum_coordinator.log_key import load_log_key
from keyquorum_core.errors import Reason, StateError
from keyquorum_core.ledger.log_keys import open_checkpoint
from tests.support.dying_sequencer import BATCHES, LEAVES
from tests.support.ledger_log import NOW, HandedOut, add

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def graves() -> Iterator[Path]:
    # What a killed process wrote is the kernel's, on whatever file system: one in memory lets more of them die.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        _bury(folder)
        yield folder


def _bury(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.dying_sequencer", str(folder)],
        cwd=ROOT,
        timeout=110,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()


def _resurrect(folder: Path) -> HandedOut:
    """Start again where a process was killed, check everything, ask for the same leaves again, and check once more."""
    config = CoordinatorConfig(folder, "main", "demo", "127.0.0.1:7000", "")
    signer = load_log_key(config.path(config.log_key))
    handed_out = HandedOut()
    records = folder / "handed-out"
    for line in records.read_text().splitlines() if records.exists() else ():
        first, count, note = line.split()
        signed = open_checkpoint(base64.b64decode(note), signer.keys)
        handed_out.roots[signed.checkpoint.size] = signed.checkpoint.root
        handed_out.places.update({number: number for number in range(int(first), int(first) + int(count))})
    checkpoints = CheckpointStore(config.ledger_checkpoint_url, signer.origin)
    if not checkpoints.exists():  # killed before there was a log: nothing makes one by itself
        with pytest.raises(StateError) as caught:
            open_log(config)
        assert caught.value.reason is Reason.NOT_FOUND
        assert not handed_out.places
        create_ledger(config, signer, now=NOW)
    checkpoints.close()
    with pytest.raises(StateError) as caught:
        create_ledger(config, signer, now=NOW)
    assert caught.value.reason is Reason.EXISTS
    log = open_log(config)
    handed_out.check(log)
    for start in range(0, LEAVES, 150):
        numbers = range(start, min(start + 150, LEAVES))
        for number, entry in zip(numbers, add(log, *numbers), strict=True):
            handed_out.take(number, entry, signer.keys)
        while log.seal():
            pass
    assert log.latest.checkpoint.size == LEAVES, "lost, or twice"
    handed_out.check(log)
    log.close()
    return handed_out


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_write_the_log_goes_on_from_what_it_handed_out(graves: Path, when: str) -> None:
    places = sorted(graves.glob(f"{when}-*"), key=lambda place: int(place.name.rpartition("-")[2]))
    # At least: the two stores made; leaves, checkpoint and cosignatures of each batch; two tiles and two bundles; what
    # they replace.
    assert len(places) >= 2 + 3 * len(BATCHES) + 4 + 1
    known = [len(_resurrect(place).places) for place in places]
    assert known == [LEAVES] * len(places)


def test_killed_processes_had_handed_out_nothing_some_and_all(graves: Path) -> None:
    counts = {len(place.read_text().splitlines()) for place in graves.glob("*/handed-out")}
    assert counts == {0, 1, 2, 3, 4, len(BATCHES)}
