"""Real custodians behind real gRPC servers in this process, and a coordinator, for ceremonies from end to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_core.ceremony import CERTIFICATE_TYPE, EpochCertificate
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.derivation import root
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.signing import peek_payload
from keyquorum_custodian.server import CustodianServer
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.ceremonies import order
from tests.support.coordinator import Caller, Running
from tests.support.custodian import Committee

__all__ = ["CeremonyScene", "open_scene", "refusal"]


class CeremonyScene:
    """``clock`` is everybody's."""

    def __init__(self, committee: Committee, folder: Path) -> None:
        self.committee = committee
        self.folder = folder
        self.servers: dict[str, CustodianServer] = {}
        self.running: Running
        self.operator: Caller

    async def start(self) -> None:
        for name in self.committee.ids:
            await self.up(name)
        self.running = await Running.start(self.folder, self.committee, clock=self.committee.clock)
        self.operator = self.running.caller("operator", "olga")

    async def up(self, name: str) -> None:
        """Serve a custodian, where the roster says it is."""
        server = CustodianServer(self.committee.open(name))
        await server.start()
        self.servers[name] = server

    async def down(self, name: str) -> None:
        await self.servers.pop(name).stop(0)
        self.committee.nodes.pop(name).close()

    async def another_coordinator(self) -> None:
        """The first one is gone, with everything it stored."""
        await self.running.stop()
        folder = self.folder.with_name(f"{self.folder.name}-b")
        self.running = await Running.start(folder, self.committee, clock=self.committee.clock)
        self.operator = self.running.caller("operator", "olga")

    async def stop(self) -> None:
        await self.running.stop()
        for name in list(self.servers):
            await self.down(name)
        self.committee.close()

    # -- ordering -----------------------------------------------------------------------------------------------------

    async def run(self, plan: CeremonyPlan) -> list[pb.CeremonyEvent]:
        """Order a ceremony and follow it to its end."""
        request = pb.RunCeremonyRequest(plan=order(self.committee, plan))
        return [event async for event in self.operator.keys.RunCeremony(request)]

    async def generate(self, key_id: str = "key-1", **changes: Any) -> list[pb.CeremonyEvent]:
        return await self.run(self.committee.plan(key_id, **changes))

    async def epochs(self, key_id: str = "key-1") -> list[pb.Key]:
        return list((await self.operator.keys.ListEpochs(pb.GetKeyRequest(key_id=key_id))).keys)

    async def ceremonies(self, key_id: str = "") -> list[pb.Ceremony]:
        return list((await self.operator.keys.ListCeremonies(pb.ListCeremoniesRequest(key_id=key_id))).ceremonies)

    async def plan(self, kind: Kind, key_id: str = "key-1", epoch: int = 0, **changes: Any) -> CeremonyPlan:
        """A plan about an epoch of the key, by its certificate; the newest by default."""
        found = next(each for each in await self.epochs(key_id) if epoch in (0, each.epoch))
        certificate = EpochCertificate.parse(peek_payload(found.certificate, CERTIFICATE_TYPE, "certificate"))
        before = certificate.plan
        number = found.epoch + 1 if kind in (Kind.GENERATE, Kind.ROTATE) else found.epoch
        members = {
            "kind": kind,
            "certificate": certificate.digest,
            "policy": before.policy,
            "quorum": before.quorum if kind not in (Kind.GENERATE, Kind.ROTATE) else self.committee.quorum,
        }
        return self.committee.plan(key_id, number, before.suite, **{**members, **changes})

    def approve(self, *names: str) -> None:
        """The operators of these custodians, or of all, approve whatever waits."""
        for name in names or self.committee.ids:
            approvals = self.committee.nodes[name].ceremonies.approvals
            for row in approvals.pending():
                approvals.decide(row.request_id, row.subject, approve=True)

    def root(self, epoch: int, *names: str, key_id: str = "key-1") -> bytes:
        """What these custodians, or all, derive together; they agree on every seed."""
        together: dict[int, bytes] = {}
        for name in names or self.committee.ids:
            held = self.committee.nodes[name].epochs.active(key_id, epoch)
            for index, value in held.contributions(b"c" * 32).items():
                assert together.setdefault(index, value) == value
        return root(together, b"c" * 32)


@asynccontextmanager
async def open_scene(committee: Committee, folder: Path) -> AsyncIterator[CeremonyScene]:
    scene = CeremonyScene(committee, folder)
    await scene.start()
    try:
        yield scene
    finally:
        await scene.stop()


async def refusal(call: Any) -> KeyquorumError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, "coordinator")
