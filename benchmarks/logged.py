"""The ledger of a local cluster in this process, in place of its coordinator's, which must not run meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from keyquorum_coordinator.config import load_config
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.ledger.setup import open_log
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_local.layout import Layout

__all__ = ["Logged", "open_logged"]


class Logged:
    """``sequencer`` takes leaves; ``witnesses`` releases what it took."""

    def __init__(self, sequencer: Sequencer, witnesses: Witnesses) -> None:
        self.sequencer = sequencer
        self.witnesses = witnesses


@contextlib.asynccontextmanager
async def open_logged(layout: Layout, fanout: Fanout) -> AsyncIterator[Logged]:
    """As the coordinator does it, cosigning in the background included."""
    log = await asyncio.to_thread(open_log, load_config(layout.coordinator))
    poke: Callable[[int, float], None] = lambda count, seconds: witnesses.poke()  # noqa: E731
    sequencer = Sequencer(log, batch_window=lambda: witnesses.patience(), on_batch=poke)
    witnesses = Witnesses(sequencer, fanout)
    cosigning = asyncio.create_task(witnesses.run())
    try:
        yield Logged(sequencer, witnesses)
    finally:
        cosigning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cosigning
        await sequencer.close()
