"""A coordinator's drills without custodians: what it says while one runs and what it signs are the test's to choose."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from keyquorum_core.drill_report import ABOUT, FULL, KINDS, Check, DrillReport, Moment, Outcome, Part, sign_report
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import coordinator_pb2 as coordinator_pb
from keyquorum_protos.v1 import coordinator_pb2_grpc as coordinator_rpc
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.v1 import drills_pb2_grpc as rpc
from tests.support.client_world import CLUSTER, COORDINATOR

AT = 1_800_000_000
RAN = "ab" * 16


def report_of(drill_id: str, kind: str, *, failed: str = "", cluster: str = CLUSTER) -> DrillReport:
    """A drill of a second for each part, in which the part ``failed`` did."""
    kinds = KINDS if kind == FULL else (kind,)
    parts, timeline = [], []
    for number, each in enumerate(kinds):
        held = each != failed
        checks = (Check("the key derives as before", "the same key", "the same" if held else "another", held),)
        outcome = Outcome.PASSED if held else Outcome.FAILED
        parts.append(Part(each, 1000 * number, 1000, outcome, ("is-1",), 300, 500, checks=checks))
        timeline.append(Moment(1000 * number + 10, each, "inject", "is-1", "it gives <no> answer"))
    return DrillReport(
        drill_id=drill_id,
        kind=kind,
        cluster=cluster,
        coordinator=COORDINATOR,
        key_id="canary",
        roster_sha256="0" * 64,
        started_at=AT,
        duration_ms=1000 * len(kinds),
        outcome=DrillReport.outcome_of(tuple(parts)),
        parts=tuple(parts),
        timeline=tuple(timeline),
    )


class FakeDrills(rpc.DrillsServicer):
    """``failed``: the part that fails; ``signer``: who signs; ``cluster``, ``other_id``, ``other_kind``: whose
    report it gives, of what; ``breaks``: how often the connection breaks in the middle."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.signer = self.identity
        self.failed = ""
        self.cluster = CLUSTER
        self.other_id = ""
        self.other_kind = ""
        self.breaks = 0
        self.requests: list[pb.RunDrillRequest] = []
        self.cancelled: list[str] = []
        self.document = b""

    def pin(self, profile: Path) -> None:
        """The profile believes this identity's reports."""
        public = {
            "name": "drill",
            "role": "owner",
            "identity": base64.b64encode(self.identity.public.to_bytes()).decode(),
            "hpke": base64.b64encode(RecipientKey.generate().public).decode(),
        }
        (profile.parent / "drill.pub.json").write_text(json.dumps(public))
        text = profile.read_text()
        profile.write_text('drill = "drill.pub.json"\n' + text)

    def report(self, drill_id: str, kind: str) -> bytes:
        made = report_of(self.other_id or drill_id, self.other_kind or kind, failed=self.failed, cluster=self.cluster)
        return sign_report(made, self.signer)

    async def List(self, request: pb.ListDrillsRequest, context: Any) -> pb.ListDrillsResponse:
        kinds = [pb.DrillKind(kind=kind, about=ABOUT[kind]) for kind in KINDS]
        kinds[0].last_passed, kinds[0].last_run, kinds[0].every_seconds = AT, AT, 7 * 86400
        run = pb.DrillSummary(
            drill_id=RAN, kind="rotation", key_id="canary", started_at=AT, duration_ms=4200, state="passed"
        )
        return pb.ListDrillsResponse(kinds=kinds, runs=[run])

    async def Run(self, request: pb.RunDrillRequest, context: Any) -> AsyncIterator[pb.DrillEvent]:
        self.requests.append(request)
        if request.key_id != "canary":
            raise RefusedError(Reason.CANARY, f"key {request.key_id} is not for drills")
        for at, step, text in ((0, "start", "begins"), (10, "inject", "no answer\x1b[2J"), (20, "NONSENSE", "?")):
            yield pb.DrillEvent(drill_id=request.drill_id, kind=request.kind, at_ms=at, step=step, text=text)
        if self.breaks:
            self.breaks -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield pb.DrillEvent(
            drill_id=request.drill_id,
            kind=request.kind,
            step="done",
            report=self.report(request.drill_id, request.kind),
        )

    async def Cancel(self, request: pb.CancelDrillRequest, context: Any) -> pb.CancelDrillResponse:
        self.cancelled.append(request.drill_id)
        return pb.CancelDrillResponse(running=request.drill_id == RAN)

    async def GetReport(self, request: pb.GetDrillReportRequest, context: Any) -> pb.DrillReport:
        if request.drill_id != RAN:
            raise StateError(Reason.NOT_FOUND, "no such drill")
        return pb.DrillReport(report=self.report(RAN, "rotation"))

    def serve(self, server: grpc.aio.Server) -> None:
        """For :func:`tests.support.fake_coordinator.serving`."""
        rpc.add_DrillsServicer_to_server(self, server)
        coordinator_rpc.add_RevocationsServicer_to_server(_Revocations(self), server)


class _Revocations(coordinator_rpc.RevocationsServicer):
    def __init__(self, drills: FakeDrills) -> None:
        self._drills = drills

    async def Get(self, request: coordinator_pb.GetRevocationsRequest, context: Any) -> coordinator_pb.RevocationsState:
        return coordinator_pb.RevocationsState(document=self._drills.document)

    async def Accept(
        self, request: coordinator_pb.AcceptRevocationsRequest, context: Any
    ) -> coordinator_pb.RevocationsState:
        raise AssertionError("a drill's documents go to the coordinator with the drill")
