"""Real custodians, a coordinator with a drill identity, a canary key and a real one: what drills are run on."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from keyquorum_coordinator.drill_key import DRILL_PUBLIC, load_drill_key
from keyquorum_coordinator.drills.engine import Drills, Event
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_core.bulletin import Bulletin, sign_bulletin
from keyquorum_core.drill_report import DrillReport, open_report
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_custodian.trust import add_owner
from tests.support.ceremony_scene import CeremonyScene
from tests.support.custodian import Committee, build_committee

__all__ = ["CANARY", "FIVE", "REAL", "DrillScene", "drill_documents", "open_drills"]

FIVE = (("ch-1", "CH"), ("ch-2", "CH"), ("is-1", "IS"), ("jp-1", "JP"), ("no-1", "NO"))
CANARY, REAL = "canary", "real"


class DrillScene(CeremonyScene):
    """A committee of five, any three of which are a quorum."""

    @property
    def drills(self) -> Drills:
        return self.running.server.drills

    @property
    def keys(self) -> LoadedKeys:
        keys = load_drill_key(self.running.config.directory)
        assert keys is not None
        return keys

    async def equip(self) -> None:
        """The drill owner is known everywhere, for canaries only; there is one of each key."""
        public = (self.running.config.directory / DRILL_PUBLIC).read_bytes()
        for name in self.committee.ids:
            add_owner(self.committee.directory(name) / "owners", public, canary=True)
        await self.generate(REAL)
        await self.generate(CANARY, policy=KeyPolicy(canary=True, retain_seconds=0))
        self.approve()

    async def drill(self, kind: str, key_id: str = CANARY, documents: tuple[bytes, bytes] = (b"", b"")) -> DrillReport:
        """Run one to its end."""
        events = await self.follow(Order(secrets.token_hex(16), kind, key_id, *documents))
        return open_report(events[-1].report, self.keys.identity.public)

    async def follow(self, order: Order) -> list[Event]:
        async with aclosing(self.drills.run(order)) as events:
            return [event async for event in events]


def drill_documents(committee: Committee, keys: LoadedKeys, version: int = 1) -> tuple[bytes, bytes]:
    """What operators sign for a *revocation*: the drill's owner revoked, and lifted again."""
    now = int(time.time())
    entry = {"target": "owner", "subject": keys.identity.public.fingerprint, "reason": "a drill", "at": now}

    def signed(number: int, **body: object) -> bytes:
        members = {"revoked": [], "lifted": [], **body}
        bulletin = Bulletin(committee.cluster, REVOCATIONS.name, number, now - 5, now + 3600, members)
        return sign_bulletin(bulletin, [committee.operator.identity])

    return signed(version, revoked=[entry]), signed(version + 1, lifted=[entry])


@asynccontextmanager
async def open_drills(folder: Path) -> AsyncIterator[DrillScene]:
    committee = build_committee(folder / "committee", FIVE, {"at_least": 3})
    scene = DrillScene(committee, folder / "coordinator")
    await scene.start()
    try:
        await scene.equip()
        yield scene
    finally:
        await scene.stop()
