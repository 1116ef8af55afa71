"""Ask every custodian at once; hand over answers as they come; end as soon as nobody is left who could answer.

Nothing is verified here, and nobody's word is believed: a quorum of *answers* is counted to tell a caller early, and in
one error with everybody's reason, that there cannot be a key. Whether the answers are any good only their recipient
can find out. Usable as a library: ``async with Fanout(roster, tls) as fanout: async for event in fanout.release(r)``.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc.aio

from keyquorum_coordinator.circuit import CircuitState
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.precedence import Precedence
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster, RosterCustodian
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_status, to_status
from keyquorum_protos.wire.tls import TlsIdentity, dns_name, open_channel

__all__ = ["Again", "Arrival", "Fanout", "Release"]

Again = Callable[[str, int], Awaitable[bytes]]
"""(custodian, leaves of the ledger that it has seen) → the request anew, for it."""

_PATIENCE = 3.0  # seconds for a custodian to be reached when a caller waits for it


@dataclass(frozen=True, slots=True)
class Arrival:
    """One custodian's answer. A custodian that could not be asked, or gave none, has a refusal saying why.

    ``window_statement`` is the DSSE envelope of the share's window; empty for a refusal.
    """

    custodian: str
    answer: pb.ReleaseAnswer
    window_statement: bytes


class Release:
    """An asynchronous iterator over :class:`Arrival`, one per custodian. Close it when done (``async with`` does)."""

    def __init__(self, fanout: Fanout, request_id: str, deadline: float, again: Again | None, quorum: Quorum) -> None:
        self._again = again
        self._quorum = quorum
        self._fanout = fanout
        self._request_id = request_id
        self._arrived: deque[Arrival] = deque()
        self._outstanding: set[str] = set(fanout.links)
        self._wake: asyncio.Future[None] | None = None
        self._shares: set[str] = set()
        self._failures: dict[str, KeyquorumError] = {}
        self._refusals: dict[str, pb.ReleaseAnswer] = {}
        self._started = time.monotonic()
        self._quorum_after: float | None = None
        self._timer = asyncio.get_running_loop().call_later(deadline, self._expire, deadline)

    def __aiter__(self) -> Release:
        return self

    async def __anext__(self) -> Arrival:
        """The next answer; :class:`StopAsyncIteration` once nobody is left who could give one."""
        while not self._arrived:
            if not self._outstanding:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._arrived.popleft()

    async def __aenter__(self) -> Release:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Late answers are no longer waited for. Idempotent."""
        self._timer.cancel()
        if self._outstanding:
            for custodian in self._outstanding:
                self._fanout.links[custodian].release(self._request_id)
            self._outstanding = set()
            self._rouse()
        self._fanout.ended(self)

    @property
    def quorum_after(self) -> float | None:
        """Seconds from the request until a quorum of shares was there; None while there is none."""
        return self._quorum_after

    def conclude(self) -> None:
        """Raises unless a quorum gave shares: ``NO_QUORUM``, with each other custodian's reason in the details.

        :class:`UnavailableError` when a quorum could still come from those that failed, so that trying again may help;
        :class:`RefusedError` when too many have refused.
        """
        if self._quorum_after is not None:
            return
        reasons = {name: f"{error.reason}: {error.message}" for name, error in self._failures.items()}
        for name, answer in self._refusals.items():
            refusal = from_status(answer.refusal)
            reasons[name] = f"{refusal.reason}: {refusal.message}"
        quorum = self._quorum
        kind = UnavailableError if quorum.is_qualified(self._shares | set(self._failures)) else RefusedError
        named = ", ".join(f"{name} ({text.partition(':')[0]})" for name, text in sorted(reasons.items()))
        raise kind(
            Reason.NO_QUORUM,
            f"no quorum released its shares; without: {named}",
            expected=quorum.words(),
            actual=f"shares from {', '.join(sorted(self._shares)) or 'nobody'}",
            next_step=(
                "Bring the custodians named back, then try again"
                if kind is UnavailableError
                else "Each custodian named gives its reason; clear those first"
            ),
            details=dict(sorted(reasons.items())),
        )

    # -- called by links ----------------------------------------------------------------------------------------------

    def again(self, custodian: str, ledger_size: int) -> Awaitable[bytes] | None:
        return self._again(custodian, ledger_size) if self._again and custodian in self._outstanding else None

    def answered(self, custodian: str, answer: pb.ReleaseAnswer, window_statement: bytes) -> None:
        if custodian not in self._outstanding:
            return
        if window_statement:
            self._shares.add(custodian)
            if self._quorum_after is None and self._quorum.is_qualified(self._shares):
                self._quorum_after = time.monotonic() - self._started
        else:
            self._refusals[custodian] = answer
        self._arrive(Arrival(custodian, answer, window_statement))

    def failed(self, custodian: str, error: KeyquorumError) -> None:
        if custodian not in self._outstanding:
            return
        self._failures[custodian] = error
        answer = pb.ReleaseAnswer(request_id=self._request_id, custodian=custodian)
        answer.refusal.CopyFrom(to_status(error))
        self._arrive(Arrival(custodian, answer, b""))

    def _arrive(self, arrival: Arrival) -> None:
        self._outstanding.discard(arrival.custodian)
        self._arrived.append(arrival)
        if not self._outstanding:
            self._timer.cancel()
            self._fanout.ended(self)
        self._rouse()

    def _rouse(self) -> None:
        wake = self._wake
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _expire(self, deadline: float) -> None:
        for custodian in tuple(self._outstanding):
            self._fanout.links[custodian].release(self._request_id)
            self.failed(
                custodian, UnavailableError(Reason.TIMEOUT, f"{custodian} did not answer within {deadline:g} s")
            )


class Fanout:
    """``tls`` is the coordinator's identity towards custodians. ``deadline``: seconds a release may take at most;
    ``hedge_at_least``: seconds without an answer after which a request may be sent once more."""

    def __init__(
        self,
        roster: Roster,
        tls: TlsIdentity,
        *,
        deadline: float = 10.0,
        hedge_at_least: float = 0.1,
        max_releases: int = 256,
        clock: Callable[[], float] = time.time,
        on_latency: Callable[[str, float], None] = lambda custodian, seconds: None,
    ) -> None:
        self.roster = roster
        self.quorum: Quorum = roster.quorum_of()
        self._deadline = deadline
        self._max_releases = max_releases
        self._running: set[Release] = set()
        self.precedence = Precedence()

        def connect(custodian: RosterCustodian) -> grpc.aio.Channel:
            return open_channel(
                custodian.address,
                tls,
                [custodian.tls_certificate.encode()],
                dns_name(roster.cluster, "custodian", custodian.id),
            )

        self.links = {
            custodian.id: Link(
                custodian,
                roster.cluster,
                connect,
                deadline=deadline,
                hedge_at_least=hedge_at_least,
                clock=clock,
                on_latency=on_latency,
            )
            for custodian in roster.custodians
        }
        # Request ids are ours alone: one that a caller chose could be another caller's.
        self._prefix = secrets.token_hex(8)
        self._count = 0

    async def start(self) -> None:
        for link in self.links.values():
            link.start()

    async def close(self) -> None:
        """Releases that run end with a refusal for each custodian that had not answered yet."""
        await asyncio.gather(*(link.close() for link in self.links.values()))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def ready(self, timeout: float = 5.0) -> None:
        """Wait until every custodian was reached, or failed to be, once."""
        async with asyncio.timeout(timeout):
            for link in self.links.values():
                await link.first_probe.wait()

    def require_room(self) -> None:
        """Raises :class:`RefusedError` (``QUOTA``) when too many releases run."""
        if len(self._running) >= self._max_releases:
            raise RefusedError(
                Reason.QUOTA,
                "too many releases at once",
                expected=f"at most {self._max_releases}",
                actual=len(self._running),
                next_step="Try again in a moment",
            )

    def release(
        self,
        request: pb.ReleaseRequest,
        updates: Mapping[str, bytes] | None = None,
        again: Again | None = None,
        quorum: Quorum | None = None,
    ) -> Release:
        """Ask all custodians, fastest first. The request id is set here; answers carry the one sent.

        ``updates``: what else a custodian is told, as further serialised members of the request. ``again``: makes the
        request anew for a custodian that is at another size of the ledger. ``quorum``: the epoch's own rule, where it
        is not the roster's. Raises as :meth:`require_room`.
        """
        self.require_room()
        self._count += 1
        request.request_id = request_id = f"{self._prefix}-{self._count}"
        data = request.SerializeToString()
        release = Release(self, request_id, self._deadline, again, quorum or self.quorum)
        self._running.add(release)
        for link in self.ranked():
            link.ask(request_id, data + (updates or {}).get(link.id, b""), release)
        return release

    def ended(self, release: Release) -> None:
        self._running.discard(release)

    @property
    def running(self) -> int:
        return len(self._running)

    def ranked(self) -> list[Link]:
        """Custodians by recent latency; those whose circuit is not closed last."""
        now = time.monotonic()
        return sorted(
            self.links.values(),
            key=lambda link: (link.circuit.state(now) is not CircuitState.CLOSED, link.latency.mean),
        )

    async def probe_all(self) -> set[str]:
        """Ask every custodian for its window and description now; returns those that answered."""
        return await self._probe(self.links.values())

    async def probe_some(self, names: Iterable[str]) -> set[str]:
        """As :meth:`probe_all`, of these."""
        return await self._probe([self.links[name] for name in names])

    async def _probe(self, links: Iterable[Link]) -> set[str]:
        async def probe(link: Link) -> str:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await link.probe()
            except (KeyquorumError, TimeoutError):
                return ""
            return link.id

        return set(await asyncio.gather(*(probe(link) for link in links))) - {""}

    async def windows(self) -> list[bytes]:
        """Current window statements, by custodian id; those that cannot be had are left out."""
        stale = [link for link in self.links.values() if link.window_statement() is None]
        await self._probe(stale)
        statements = (self.links[name].window_statement() for name in sorted(self.links))
        return [statement for statement in statements if statement is not None]
