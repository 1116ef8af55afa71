"""``Restoration`` and ``Backups`` on the network: what coordinators carry to and from a restored custodian, and the
backup that its operator asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from keyquorum_core.backup import BackupWriter
from keyquorum_core.backup_body import Record
from keyquorum_core.errors import Reason, StateError
from keyquorum_custodian.backing_up import Snapshot, next_sequence
from keyquorum_custodian.logs import logger
from keyquorum_custodian.node import Node
from keyquorum_custodian.pacing import Work
from keyquorum_protos.v1 import restoration_pb2 as pb
from keyquorum_protos.v1 import restoration_pb2_grpc as rpc

__all__ = ["BackupsService", "RestorationService"]

_Context = Any
_BATCH_BYTES = 256 << 10
_BATCH_RECORDS = 64


class RestorationService(rpc.RestorationServicer):
    """What coordinators call."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def Challenge(self, request: pb.ChallengeRequest, context: _Context) -> pb.ChallengeResponse:
        nonce, versions = self._node.restoration.challenge()
        return pb.ChallengeResponse(
            custodian=self._node.config.id,
            nonce=nonce,
            documents=[pb.DocumentVersion(kind=kind, version=version) for kind, version in versions.items()],
        )

    async def Testify(self, request: pb.TestifyRequest, context: _Context) -> pb.TestifyResponse:
        held = {each.kind: each.version for each in request.documents}
        testimony, documents = self._node.restoration.testify(request.subject, request.nonce, held)
        return pb.TestifyResponse(testimony=testimony, documents=documents)

    async def Vouch(self, request: pb.VouchRequest, context: _Context) -> pb.VouchResponse:
        proof = self._node.restoration.vouch(request.nonce, list(request.testimonies), list(request.documents))
        return pb.VouchResponse(
            testified=proof.testified,
            lacking=[pb.EpochName(key_id=key_id, epoch=epoch) for key_id, epoch in proof.lacking],
            withheld=[pb.EpochName(key_id=key_id, epoch=epoch) for key_id, epoch in proof.withhold],
        )


class BackupsService(rpc.BackupsServicer):
    """What the custodian's operator calls. One backup at a time; ``work`` encrypts beside the thread that serves."""

    def __init__(self, node: Node, work: Work) -> None:
        self._node = node
        self._work = work
        self._busy = False

    async def Make(self, request: pb.BackupRequest, context: _Context) -> AsyncIterator[pb.BackupPiece]:
        if self._busy:
            raise StateError(
                Reason.STATE, "another backup is being made", expected="one at a time", next_step="Wait for it to end."
            )
        self._busy = True
        try:
            async for data in self._pieces(list(request.recipients)):
                yield pb.BackupPiece(data=data)
        finally:
            self._busy = False

    async def _pieces(self, recipients: list[bytes]) -> AsyncIterator[bytes]:
        node, sink = self._node, _Pieces()
        snapshot = Snapshot(node.keystore, node.config, int(node.clock()))
        writer = await self._work(BackupWriter, sink, recipients, cluster=node.config.cluster, custodian=node.config.id)
        batch: list[Record] = []
        for record in snapshot.records():  # reads the keystore, in its own thread
            batch.append(record)
            if len(batch) >= _BATCH_RECORDS or sum(len(each.data) for each in batch) >= _BATCH_BYTES:
                await self._work(_add, writer, batch)
                batch = []
                for data in sink.take():
                    yield data
                await asyncio.sleep(0)
        await self._work(_add, writer, batch)
        statement = snapshot.statement(writer, next_sequence(node.keystore))
        await self._work(writer.finish, statement, node.keystore.identity())
        for data in sink.take():
            yield data
        logger().warning(
            "backup made", backup=statement.backup_id, sequence=statement.sequence, recipients=len(recipients)
        )


def _add(writer: BackupWriter, records: list[Record]) -> None:
    for record in records:
        writer.add(record)


class _Pieces:
    """What a backup's writer wrote, until it was sent."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: memoryview, /) -> int:
        self._written += data
        return len(data)

    def take(self) -> list[bytes]:
        data, self._written = bytes(self._written), bytearray()
        return [data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20)]
