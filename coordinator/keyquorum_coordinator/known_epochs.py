"""Which epochs of keys there are, as far as this coordinator has heard: what every new job is held against.

Asked for each job and each key request, so it reads one row and not the certificates; the rest only to say what is
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select

from keyquorum_coordinator.database import Database, KeyRow
from keyquorum_coordinator.link import Link

__all__ = ["KnownEpochs"]


class KnownEpochs:
    """What ceremonies here ended with, and what custodians describe. Used from any thread but the event loop's."""

    def __init__(self, database: Database, links: Mapping[str, Link]) -> None:
        self._database = database
        self._links = links

    def state(self, key_id: str, epoch: int) -> str | None:
        """None for an epoch that nobody knows."""
        query = select(KeyRow.state).where(KeyRow.key_id == key_id, KeyRow.epoch == epoch)
        state = self._database.run_read(lambda session: session.scalar(query))
        for link in self._links.values():
            if state != "active":  # a minority that lags behind does not make an epoch unknown
                state = link.keys.get((key_id, epoch), state)
        return state

    def all(self) -> list[tuple[str, int]]:
        """Key ids and epochs, in order."""
        query = select(KeyRow.key_id, KeyRow.epoch)
        stored = self._database.run_read(lambda session: {(key_id, epoch) for key_id, epoch in session.execute(query)})
        return sorted(stored.union(*(link.keys for link in self._links.values())))
