"""A coordinator's ceremonies wired straight to custodians in this process: the same services, the same messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from keyquorum_coordinator import migrations
from keyquorum_coordinator.ceremonies import Ceremonies, Progress
from keyquorum_coordinator.database import Database, make_engine
from keyquorum_coordinator.precedence import Precedence
from keyquorum_custodian.services import CeremoniesService
from tests.support.custodian import Committee
from tests.support.fuses import Fuse

__all__ = ["DirectFanout", "DirectLink", "MortalDatabase", "end_of", "open_database"]

T = TypeVar("T")
Interfere = Callable[[str, str, Any], Awaitable[Any]]


class _Calls:
    def __init__(self, link: DirectLink) -> None:
        self._link = link

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, timeout: float = 0) -> Any:
            return await self._link.call(method, request)

        return call


class DirectLink:
    """What a :class:`Link` is to the engine."""

    def __init__(self, committee: Committee, custodian: str) -> None:
        self.id = custodian
        self.connected = True
        self.keys: dict[tuple[str, int], str] = {}
        self.ceremonies = _Calls(self)
        self._committee = committee

    async def call(self, method: str, request: Any) -> Any:
        """One request and its answer, as they would be on the wire."""
        copy = type(request).FromString(request.SerializeToString())
        service = CeremoniesService(self._committee.open(self.id))
        answer = await getattr(service, method)(copy, None)
        return type(answer).FromString(answer.SerializeToString())


class DirectFanout:
    """What a :class:`Fanout` is to the engine."""

    def __init__(self, committee: Committee, link: type[DirectLink] = DirectLink) -> None:
        self.roster = committee.roster
        self.quorum = committee.quorum
        self.links = {name: link(committee, name) for name in committee.ids}
        self.precedence = Precedence()


class MortalDatabase(Database):
    """Dies at a write when ``fuse`` says so."""

    fuse: Fuse | None = None

    def run_write(self, work: Callable[[Session], T]) -> T:
        if self.fuse is None:
            return super().run_write(work)
        out: list[T] = []
        self.fuse.write(lambda: out.append(super(MortalDatabase, self).run_write(work)))
        return out[0]


def open_database(path: Path) -> MortalDatabase:
    engine = make_engine(f"sqlite:///{path}")
    migrations.upgrade(engine)
    return MortalDatabase(engine)


async def end_of(ceremonies: Ceremonies, plan: bytes) -> Progress:
    """See a ceremony through; its last report."""
    events = [event async for event in ceremonies.run(plan)]
    return events[-1]
