"""``Drills`` on the network: protobuf to domain values and back. It decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from keyquorum_coordinator.drills.engine import Drills, Event
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_coordinator.drills.store import KindRecord
from keyquorum_core.drill_report import ABOUT, FULL
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.v1 import drills_pb2_grpc as rpc

__all__ = ["ROLES", "DrillsService", "kind_messages"]

ROLES = {"/keyquorum.v1.Drills/": frozenset({"operator"})}

Context = Any


class DrillsService(rpc.DrillsServicer):
    def __init__(self, drills: Drills) -> None:
        self._drills = drills

    async def List(self, request: pb.ListDrillsRequest, context: Context) -> pb.ListDrillsResponse:
        return pb.ListDrillsResponse(
            kinds=await kind_messages(self._drills),
            running=self._drills.running,
            runs=[
                pb.DrillSummary(
                    drill_id=each.drill_id,
                    kind=each.kind,
                    key_id=each.key_id,
                    started_at=each.started_at,
                    duration_ms=each.duration_ms,
                    state=each.state,
                    report_sha256=each.report_sha256,
                )
                for each in await self._drills.runs()
            ],
        )

    async def Run(self, request: pb.RunDrillRequest, context: Context) -> AsyncIterator[pb.DrillEvent]:
        order = Order(request.drill_id, request.kind, request.key_id, request.revoke, request.lift)
        async with aclosing(self._drills.run(order)) as events:
            async for event in events:
                yield _event(event)

    async def Cancel(self, request: pb.CancelDrillRequest, context: Context) -> pb.CancelDrillResponse:
        return pb.CancelDrillResponse(running=await self._drills.cancel(request.drill_id))

    async def GetReport(self, request: pb.GetDrillReportRequest, context: Context) -> pb.DrillReport:
        return pb.DrillReport(report=await self._drills.report(request.drill_id))


async def kind_messages(drills: Drills) -> list[pb.DrillKind]:
    """Each kind: when it passed last, and when it is due."""
    records = await drills.kinds()
    about = {**ABOUT, FULL: "all of them, one after the other"}
    return [_kind(drills, kind, text, records.get(kind, KindRecord())) for kind, text in about.items()]


def _kind(drills: Drills, kind: str, about: str, record: KindRecord) -> pb.DrillKind:
    every = drills.settings.schedule.get(kind, 0)
    return pb.DrillKind(
        kind=kind,
        about=about,
        last_passed=record.last_passed,
        last_run=record.last_run,
        every_seconds=every,
        next_run=record.last_run + every if every else 0,
    )


def _event(event: Event) -> pb.DrillEvent:
    moment = event.moment
    return pb.DrillEvent(
        drill_id=event.drill_id,
        kind=moment.kind,
        at_ms=moment.at_ms,
        step=moment.step,
        custodian=moment.custodian,
        text=moment.text,
        done=event.done,
        total=event.total,
        report=event.report,
    )
