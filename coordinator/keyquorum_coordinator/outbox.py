"""Leaves on their way into the ledger: stored in the transaction of the change that they tell of, entered after it.

A coordinator killed in between enters them when it is back: what is in its database comes to be in the ledger, once.
The release path does not go this way: there the leaf is in the ledger before anything happens.
"""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, OutboxRow
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.ledger.leaves import LedgerLeaf
from keyquorum_core.transcript import H

__all__ = ["Outbox", "enter", "request_id"]

_AT_ONCE = 256
_RETRY_SECONDS = 1.0

_log = structlog.get_logger("ledger")


def request_id(kind: str, *subject: str) -> bytes:
    """The request id of the one leaf of type ``kind`` about this subject, 32 bytes."""
    return H("keyquorum/v1/ledger-request", kind.encode(), *(part.encode() for part in subject))


def enter(session: Session, leaf: LedgerLeaf, *subject: str) -> bytes:
    """Inside a transaction: the leaf will be in the ledger, once for its type and subject. Returns its request id."""
    name = request_id(leaf.TYPE, *subject)
    if session.scalar(select(OutboxRow.number).where(OutboxRow.request_id == name)) is None:
        session.add(OutboxRow(request_id=name, leaf=leaf.to_bytes()))
    return name


class Outbox:
    """Empties the outbox in the background, in order; :meth:`settle` does not wait for that."""

    def __init__(self, database: Database, sequencer: Sequencer) -> None:
        self._database = database
        self._sequencer = sequencer
        self._waking = asyncio.Event()

    def wake(self) -> None:
        """Something was entered."""
        self._waking.set()

    async def write(self, leaf: LedgerLeaf, *subject: str) -> None:
        """Have the leaf in the outbox, and soon in the ledger. Raises ``STORAGE``."""
        await self._database.write(lambda session: enter(session, leaf, *subject))
        self.wake()

    async def settle(self, name: bytes) -> None:
        """The leaf with this request id is in the ledger when this returns, if it was in the outbox.

        Raises as :meth:`Sequencer.append`; it stays in the outbox then."""
        query = select(OutboxRow.leaf).where(OutboxRow.request_id == name)
        leaf = await self._database.read(lambda session: session.scalar(query))
        if leaf is not None:
            await self._append(name, leaf)
            await self._forget([name])

    async def run(self) -> None:
        """Enter what waits, for ever; what a killed coordinator left first."""
        while True:
            self._waking.clear()
            try:
                more = await self._some()
            except KeyquorumError as error:
                _log.error("ledger.outbox_waits", reason=str(error.reason), message=error.message)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if not more:
                await self._waking.wait()

    async def _some(self) -> bool:
        """Enter the oldest; whether there may be more."""
        query = select(OutboxRow.request_id, OutboxRow.leaf).order_by(OutboxRow.number).limit(_AT_ONCE)
        rows = await self._database.read(lambda session: session.execute(query).all())
        await asyncio.gather(*(self._append(bytes(name), bytes(leaf)) for name, leaf in rows))
        if rows:
            await self._forget([name for name, _ in rows])
        return len(rows) == _AT_ONCE

    async def _append(self, name: bytes, leaf: bytes) -> None:
        try:
            await self._sequencer.append(leaf, name)
        except StateError as error:
            if error.reason is not Reason.EXISTS:
                raise
            # It was entered before, with another time in it: a denial repeated, a roster in use again.

    async def _forget(self, names: list[bytes]) -> None:
        gone = delete(OutboxRow).where(OutboxRow.request_id.in_(names))
        await self._database.write(lambda session: session.execute(gone))
