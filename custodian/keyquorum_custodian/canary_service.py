"""``CanaryFaults`` on the network: what a coordinator's drill asks a custodian to get wrong (docs/drills.md)."""

from __future__ import annotations

from typing import Any

from keyquorum_core.errors import KeyquorumError
from keyquorum_custodian.canary import Fault
from keyquorum_custodian.logs import logger
from keyquorum_custodian.node import Node
from keyquorum_custodian.witness import CheckpointUpdate
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.v1 import drills_pb2_grpc as rpc
from keyquorum_protos.wire.errors import to_status

__all__ = ["CanaryService"]

_Context = Any


class CanaryService(rpc.CanaryFaultsServicer):
    """Each call is logged: drills are rare, and an operator who looks for a fault should find that it was one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = logger()

    async def Inject(self, request: pb.InjectFaultRequest, context: _Context) -> pb.FaultState:
        fault = self._node.canary.inject(
            request.drill_id,
            request.key_id,
            request.fault,
            seconds=request.seconds,
            delay_ms=request.delay_ms,
            log_key=request.log_key,
        )
        self._log.warning(
            "drill: fault injected",
            drill=fault.drill_id,
            key=fault.key_id,
            fault=str(fault.kind),
            until=int(fault.until),
        )
        return _state(fault)

    async def Lift(self, request: pb.LiftFaultRequest, context: _Context) -> pb.FaultState:
        fault = self._node.canary.lift(request.drill_id, request.key_id)
        if fault is None:
            return pb.FaultState(key_id=request.key_id)
        self._log.warning("drill: fault lifted", drill=fault.drill_id, key=fault.key_id, fault=str(fault.kind))
        return _state(fault)

    async def Show(self, request: pb.ShowCheckpointRequest, context: _Context) -> pb.ShowCheckpointResponse:
        update = CheckpointUpdate(
            request.update.old_size, tuple(request.update.consistency_proof), request.update.checkpoint
        )
        try:
            alarm = self._node.canary.show(request.drill_id, request.key_id, update)
        except KeyquorumError as error:
            return pb.ShowCheckpointResponse(error=to_status(error))
        if alarm is None:
            return pb.ShowCheckpointResponse()
        return pb.ShowCheckpointResponse(known=alarm.known, shown=alarm.shown)


def _state(fault: Fault) -> pb.FaultState:
    return pb.FaultState(
        key_id=fault.key_id,
        fault=str(fault.kind),
        drill_id=fault.drill_id,
        until=int(fault.until),
        seeds=fault.seeds,
    )
