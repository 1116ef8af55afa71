"""Brings a custodian that was restored from a backup back into service: carries its question to the others, and their
answers to it (docs/spec/backup.md).

Nothing is decided here. The custodian judges the testimonies, and says what is still missing: a checkpoint, which the
rounds of cosigning bring it, a document, its operator's approval.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import grpc.aio
import structlog

from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.link import Link
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_protos.v1 import restoration_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

if TYPE_CHECKING:
    from keyquorum_protos.v1.restoration_pb2_grpc import RestorationAsyncStub

__all__ = ["Vouching"]

T = TypeVar("T")
_TIMEOUT: Final = 20.0
_MAX_DOCUMENTS: Final = 40 << 20  # bytes carried at once
_WAITS: Final = frozenset({Reason.APPROVAL, Reason.RESTORED, Reason.STALE})
"""What passes by itself, or when somebody does something: asked again next round."""

_log = structlog.get_logger("restoration")


class Vouching:
    """One coordinator's part in it."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout
        self._said: dict[str, str] = {}

    def waiting(self) -> list[str]:
        """Custodians within reach that say that they were restored and have not proved themselves."""
        return [name for name, link in sorted(self._fanout.links.items()) if link.connected and link.restored]

    async def vouch(self, name: str) -> list[tuple[str, int]]:
        """One try for one custodian. The epochs, (key, number), that it lacks, once it serves. Raises what does not
        pass by itself."""
        link = self._fanout.links[name]
        try:
            asked = await _call(link, lambda stub: stub.Challenge(pb.ChallengeRequest(), timeout=_TIMEOUT))
            answers = await asyncio.gather(
                *(self._testimony(other, name, asked) for other in self._fanout.links.values() if other.id != name)
            )
            documents: dict[bytes, None] = {}
            for answer in answers:
                for document in answer.documents if answer is not None else ():
                    if sum(map(len, documents)) + len(document) <= _MAX_DOCUMENTS:
                        documents[document] = None
            request = pb.VouchRequest(
                nonce=asked.nonce,
                testimonies=[answer.testimony for answer in answers if answer is not None],
                documents=list(documents),
            )
            vouched = await _call(link, lambda stub: stub.Vouch(request, timeout=_TIMEOUT))
        except KeyquorumError as error:
            if error.reason not in _WAITS:
                raise
            self._say(name, error)
            return []
        self._said.pop(name, None)
        link.restored = False
        lacking = [(each.key_id, each.epoch) for each in vouched.lacking]
        _log.warning("custodian.proved", custodian=name, testified=list(vouched.testified), lacking=lacking)
        return lacking

    async def _testimony(self, link: Link, subject: str, asked: pb.ChallengeResponse) -> pb.TestifyResponse | None:
        request = pb.TestifyRequest(subject=subject, nonce=asked.nonce, documents=asked.documents)
        try:
            return await _call(link, lambda stub: stub.Testify(request, timeout=_TIMEOUT))
        except KeyquorumError as error:
            _log.info("custodian.silent", custodian=link.id, subject=subject, reason=str(error.reason))
            return None

    def _say(self, name: str, error: KeyquorumError) -> None:
        """Once, until it is something else."""
        if self._said.get(name) != str(error):
            self._said[name] = str(error)
            _log.warning("custodian.restored", custodian=name, waits_for=error.message, next_step=error.next_step)


async def _call(link: Link, ask: Callable[[RestorationAsyncStub], Awaitable[T]]) -> T:
    try:
        return await ask(link.restoration)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, link.id) from None
