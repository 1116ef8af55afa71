"""What a message on the release stream is answered with: one request, or a group of them, to as many answers.

Nothing is decided here; the gate does, and the witness. Releases that came side by side in one message are kept by one
commit (:meth:`~keyquorum_custodian.gate.Gate.release_together`), and fail one by one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Final

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.release import Answer
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.logs import logger
from keyquorum_custodian.metrics import Metrics
from keyquorum_custodian.node import Node
from keyquorum_custodian.witness import CheckpointUpdate, Inclusion
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import to_status

__all__ = ["MAX_GROUP", "Answering", "report"]

MAX_GROUP: Final = 16
"""Requests in one message. The first of them waits for the last."""


def report(method: str, reference: str, error: BaseException) -> None:
    """Log a failure nobody foresaw: where it happened, and not what it says, since it could say anything."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 2)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    logger().error(
        "unforeseen failure", method=method, reference=reference, type=type(error).__name__, where=places[-12:]
    )


class Answering:
    """One custodian's answers; used from one thread."""

    def __init__(self, node: Node, metrics: Metrics) -> None:
        self._node = node
        self._metrics = metrics
        self._log = logger()

    def answer(self, request: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        """Never raises: what fails is a refusal in the answer."""
        if not request.group:
            return self._answers([request])[0]
        if len(request.group) > MAX_GROUP:
            return self._refuse(request, _group_too_large(len(request.group)))
        return pb.ReleaseAnswer(group=self._answers(request.group))

    def _answers(self, requests: Sequence[pb.ReleaseRequest]) -> list[pb.ReleaseAnswer]:
        """One for each, in order. Releases side by side are kept by one commit."""
        answers: list[pb.ReleaseAnswer] = []
        side_by_side: list[pb.ReleaseRequest] = []
        for request in requests:
            if request.group:
                answers += self._releases(side_by_side)
                answers.append(self._refuse(request, _group_too_large(len(request.group))))
            elif request.HasField("update") and not request.leaf:
                answers += self._releases(side_by_side)
                answers.append(self._witness(request))
            else:
                side_by_side.append(request)
                continue
            side_by_side = []
        return answers + self._releases(side_by_side)

    def _releases(self, requests: Sequence[pb.ReleaseRequest]) -> list[pb.ReleaseAnswer]:
        if not requests:
            return []
        started = time.perf_counter()
        try:
            outcomes = self._node.gate.release_together([_request(each) for each in requests])
        except Exception as error:
            # One request must not take the stream, and with it the answers to others, down.
            outcomes = [error] * len(requests)
        answers = [self._released(*each) for each in zip(requests, outcomes, strict=True)]
        seconds = time.perf_counter() - started
        for answer in answers:
            if answer.HasField("share"):
                self._metrics.release_seconds.observe(seconds)
        return answers

    def _released(self, request: pb.ReleaseRequest, outcome: Answer | Exception) -> pb.ReleaseAnswer:
        if isinstance(outcome, Exception):
            return self._refuse(request, outcome)
        self._node.releases += 1
        self._metrics.releases.inc()
        return pb.ReleaseAnswer(
            request_id=request.request_id,
            custodian=outcome.custodian,
            share=pb.Share(
                key_id=outcome.key_id,
                epoch=outcome.epoch,
                window=outcome.window,
                sealed=outcome.sealed,
                signature=outcome.signature,
            ),
        )

    def _refuse(self, request: pb.ReleaseRequest, error: Exception, *, as_witness: bool = False) -> pb.ReleaseAnswer:
        if not isinstance(error, KeyquorumError):
            reference = secrets.token_hex(8)
            report("/keyquorum.v1.Custodian/Release", reference, error)
            error = KeyquorumError(Reason.INTERNAL, f"an unforeseen failure; the log entry is {reference}")
        if not as_witness:
            self._node.refusals += 1
            self._metrics.refusals.labels(str(error.reason)).inc()
        what = "checkpoint refused" if as_witness else "release refused"
        self._log.warning(what, request=request.request_id[:64], **error.as_dict())
        return pb.ReleaseAnswer(request_id=request.request_id, custodian=self._node.config.id, refusal=to_status(error))

    def _witness(self, request: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        try:
            return self._cosign(request)
        except Exception as error:
            return self._refuse(request, error, as_witness=True)

    def _cosign(self, request: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        lines = self._node.witness.serve(_update(request.update), cosign=request.update.cosign)
        return pb.ReleaseAnswer(
            request_id=request.request_id,
            custodian=self._node.config.id,
            cosignatures="".join(line.line() for line in lines).encode(),
        )


def _group_too_large(size: int) -> MalformedError:
    return MalformedError(
        Reason.TOO_LARGE,
        "too many release requests in one message, or a group within a group",
        expected=f"at most {MAX_GROUP}, none of them a group",
        actual=size,
    )


def _request(request: pb.ReleaseRequest) -> ReleaseRequest:
    return ReleaseRequest(
        request.manifest,
        request.evidence,
        request.leaf,
        Inclusion(request.leaf_index, request.tree_size, tuple(request.inclusion_proof)),
        _update(request.update) if request.HasField("update") else None,
        request.presentation,
    )


def _update(update: pb.CheckpointUpdate) -> CheckpointUpdate:
    return CheckpointUpdate(
        update.old_size,
        tuple(update.consistency_proof),
        update.checkpoint,
        update.cosigned,
        tuple(update.cosigned_proof),
    )
