"""How everything is, at one moment: what custodians said of themselves, which epochs there are, what is under way.

It is this coordinator's word, and for people and alarms alone: nobody decides anything by it. Callers verify the
certificates that the digests name, and work out for themselves which losses each key survives.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

from keyquorum_coordinator import __version__
from keyquorum_coordinator.ceremonies import Ceremonies, KeyEpoch
from keyquorum_coordinator.certified import CertifiedEpochs
from keyquorum_coordinator.circuit import CircuitState
from keyquorum_coordinator.driving import ENDED
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.messages import ceremony_message, health_messages
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.survival import survival
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import drills_pb2

__all__ = ["Standing"]

_MAX_DESCRIPTION = 512 << 10  # what a custodian says of itself is passed on to callers, who have their limits
_FRESH_SECONDS = 25.0  # custodians are asked every 10 s

DrillKinds = Callable[[], Awaitable[Iterable[drills_pb2.DrillKind]]]


class Standing:
    """``drills`` gives the kinds of drills and when each passed, where there are any. ``clock`` gives unix seconds."""

    def __init__(
        self,
        fanout: Fanout,
        ceremonies: Ceremonies,
        certified: CertifiedEpochs,
        sequencer: Sequencer,
        roster_envelope: bytes,
        *,
        drills: DrillKinds | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._fanout = fanout
        self._ceremonies = ceremonies
        self._certified = certified
        self._sequencer = sequencer
        self._roster_envelope = roster_envelope
        self._drills = drills
        self._clock = clock

    async def status(self) -> pb.ClusterStatusResponse:
        """The whole of it. Raises :class:`UnavailableError` when the database is away."""
        epochs = await self._ceremonies.keys()
        await self._fanout.probe_some(self._unheard(epochs))
        running = [each for each in await self._ceremonies.records() if each.step not in ENDED]
        ceremonies = [ceremony_message(each) for each in running]
        for message in ceremonies:
            message.ClearField("receipts")
        return pb.ClusterStatusResponse(
            roster=self._roster_envelope,
            version=__version__,
            now=int(self._clock()),
            custodians=self._custodians(),
            epochs=await self._epochs(epochs),
            ceremonies=ceremonies,
            ledger=self._ledger(),
            drills=await self._drills() if self._drills is not None else (),
        )

    async def survivable(self) -> dict[str, int]:
        """By key id, how many more custodians may be lost, whichever they are, before its newest epoch has no quorum
        among those that serve it; -1 where it has none now."""
        out: dict[str, int] = {}
        epochs = await self._ceremonies.keys()
        await self._fanout.probe_some(self._unheard(epochs))
        for epoch in epochs:
            certified = await self._certified.of(epoch.key_id, epoch.epoch)
            if epoch.state == "active" and certified is not None:
                where = epoch.key_id, epoch.epoch
                serving = [link.id for link in self._fanout.links.values() if self._serves(link, where)]
                out.setdefault(epoch.key_id, survival(certified.quorum, serving).losses)
        return out

    def _unheard(self, epochs: Iterable[KeyEpoch]) -> list[str]:
        """Custodians that should hold an epoch which they were last asked before: what they said then is too old."""
        live = [each for each in epochs if each.state != "destroyed"]
        return [
            link.id
            for link in self._fanout.links.values()
            if link.connected
            and any((each.key_id, each.epoch) not in link.keys and link.id not in each.stale for each in live)
        ]

    def _serves(self, link: Link, epoch: tuple[str, int]) -> bool:
        described = link.described
        return (
            described is not None
            and link.connected
            and link.circuit_state() is not CircuitState.OPEN
            and self._clock() - link.described_at < _FRESH_SECONDS
            and not described.sealed
            and not described.ledger_alarms
            and not described.restored
            and epoch in link.keys
        )

    def _custodians(self) -> list[pb.CustodianStatus]:
        out = []
        for health in health_messages(self._fanout):
            message = pb.CustodianStatus(health=health)
            link = self._fanout.links[health.custodian]
            if link.described is not None:
                message.described_at = int(link.described_at)
                if link.described.ByteSize() <= _MAX_DESCRIPTION:
                    message.described.CopyFrom(link.described)
            out.append(message)
        return out

    async def _epochs(self, epochs: Iterable[KeyEpoch]) -> list[pb.EpochStatus]:
        out = []
        for epoch in epochs:
            certified = await self._certified.of(epoch.key_id, epoch.epoch)
            if epoch.state != "destroyed" and certified is not None:
                out.append(
                    pb.EpochStatus(
                        key_id=epoch.key_id,
                        epoch=epoch.epoch,
                        state=epoch.state,
                        certificate_digest=certified.digest,
                        retired_at=epoch.retired_at,
                        stale=epoch.stale,
                    )
                )
        return out

    def _ledger(self) -> pb.LedgerStatus:
        latest, witnessed = self._sequencer.latest, self._sequencer.witnessed
        message = pb.LedgerStatus(size=latest.checkpoint.size, signed_at=latest.signed_at)
        if witnessed is not None:
            message.witnessed_size = witnessed.checkpoint.size
        return message
