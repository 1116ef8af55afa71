"""An auditor before a coordinator's own read side: verified, followed while it grows, copied."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keyquorum.audit.events import Event
from keyquorum.audit.watch import Monitor, Watching
from keyquorum.audit.watch_state import WatchState
from keyquorum.ledger.export import export
from keyquorum.ledger.http import HttpSource
from keyquorum.ledger.proving import LoggedLeaf, prove
from keyquorum.ledger.source import DirectorySource
from keyquorum.ledger.verification import verify_log
from keyquorum_coordinator.ledger.http import LedgerReader
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.quorum import Custodian, Quorum
from tests.support.ledger_log import add, leaf, make_log, request

COSIGNERS = {name: Cosigner.generate(f"demo/{name}") for name in ("ch-1", "de-1", "fr-1")}
QUORUM = Quorum({"at_least": 2}, [Custodian(name, name[:2].upper()) for name in COSIGNERS])


@dataclass
class Running:
    sequencer: Sequencer
    source: HttpSource
    trust: LogTrust

    async def grow(self, first: int, end: int) -> None:
        await asyncio.gather(*(self.sequencer.append(leaf(n), request(n)[0]) for n in range(first, end)))

    async def cosign(self) -> None:
        latest, now = self.sequencer.latest, int(time.time())
        lines = [line for name in ("ch-1", "fr-1") for line in COSIGNERS[name].cosign(latest.checkpoint, now)]
        await self.sequencer.add_cosignatures(latest, lines)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    _, log = make_log(tmp_path / "coordinator")
    add(log, *range(300))
    sequencer = Sequencer(log)
    reader = LedgerReader(sequencer)
    source = HttpSource(await reader.start("127.0.0.1:0"))
    yield Running(sequencer, source, LogTrust(log.keys, {n: c.keys for n, c in COSIGNERS.items()}, QUORUM))
    await source.close()
    await reader.stop()
    await sequencer.close()


async def test_a_log_is_read_only_as_far_as_it_was_cosigned(running: Running) -> None:
    with pytest.raises(KeyquorumError) as caught:
        await verify_log(running.source, running.trust, patience=0)
    assert caught.value.reason is Reason.NO_QUORUM
    await running.cosign()
    await running.grow(300, 310)
    seen: list[bytes] = []
    done = await verify_log(running.source, running.trust, leaves=lambda first, leaves: seen.extend(leaves))
    assert (done.size, seen) == (300, [leaf(number) for number in range(300)])


async def test_a_monitor_follows_a_log_that_grows_under_it(running: Running, tmp_path: Path) -> None:
    await running.cosign()
    state = WatchState(tmp_path / "state", tmp_path / "evidence")
    events: list[Event] = []
    for first in range(300, 900, 60):
        monitor = Monitor(running.source, lambda: running.trust, state, Watching())
        await asyncio.gather(monitor.round(events.append), running.grow(first, first + 60))
        await running.cosign()
    await monitor.round(events.append)
    assert {str(event.kind) for event in events} == {"verified"}
    assert sum(int(str(event.details["added"])) for event in events) == events[-1].details["size"] == 900


async def test_a_copy_of_it_verifies_and_proves_offline(running: Running, tmp_path: Path) -> None:
    await running.grow(300, 700)
    await running.cosign()
    await export(running.source, running.trust, tmp_path / "copy")
    copy = DirectorySource(tmp_path / "copy")
    places: dict[bytes, int] = {}

    def note(first: int, leaves: tuple[bytes, ...]) -> None:
        places.update({each: first + number for number, each in enumerate(leaves)})

    done = await verify_log(copy, running.trust, leaves=note)
    assert len(places) == done.size == 700
    wanted = [LoggedLeaf(places[leaf(n)], leaf(n)) for n in (0, 299, 300, 699)]
    proven = [each async for each, _ in prove(copy, done.latest.checkpoint, wanted)]
    assert proven == wanted
