"""One custodian as the coordinator sees it: a connection kept up, one ordered release stream, a second one for hedging.

Requests go out as bytes serialised once for all custodians, through one writer task per stream; one reader task hands
each answer, by request id, to the release that waits for it. No task and no timer is made per release and custodian.
What a custodian says is passed on, not believed: only its window statements are verified, because a statement that
does not verify would make every recipient drop this custodian's answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
import structlog

from keyquorum_coordinator.circuit import Circuit, CircuitState
from keyquorum_coordinator.lane import Lane
from keyquorum_coordinator.latency import Latency
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.release import WINDOW_SECONDS, Window, open_window
from keyquorum_core.roster import RosterCustodian
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1.custodian_pb2_grpc import CeremoniesStub, CustodianStub
from keyquorum_protos.v1.drills_pb2_grpc import CanaryFaultsStub
from keyquorum_protos.v1.restoration_pb2_grpc import RestorationStub
from keyquorum_protos.wire.errors import from_rpc_error, from_status

if TYPE_CHECKING:
    from keyquorum_protos.v1.custodian_pb2_grpc import CeremoniesAsyncStub, CustodianAsyncStub
    from keyquorum_protos.v1.drills_pb2_grpc import CanaryFaultsAsyncStub
    from keyquorum_protos.v1.restoration_pb2_grpc import RestorationAsyncStub

__all__ = ["Link", "Waiting"]

_MAX_PENDING = 1024
_HEDGE_FACTOR = 3
_PROBE_TIMEOUT = 5.0
_POLL = 10.0
_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 2.0
_KEPT_WINDOWS = 4
_MAX_CONFLICTS = 3
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)

_log = structlog.get_logger("link")


class Waiting(Protocol):
    """Who waits for the answer to a request; ``answered`` or ``failed`` is called once per custodian."""

    def answered(self, custodian: str, answer: pb.ReleaseAnswer, window_statement: bytes) -> None: ...
    def failed(self, custodian: str, error: KeyquorumError) -> None: ...
    def again(self, custodian: str, ledger_size: int) -> Awaitable[bytes] | None:
        """The request anew, for a custodian that turned out to be at another size of the ledger; None to give up."""


class _Pending:
    __slots__ = ("conflicts", "data", "hedged", "lane", "sent_at", "waiting")

    def __init__(self, waiting: Waiting, data: bytes, sent_at: float) -> None:
        self.waiting: Waiting | None = waiting
        self.data = data
        self.sent_at = sent_at
        self.lane: Lane | None = None
        self.hedged = False
        self.conflicts = 0


class Link:
    """``connect`` makes a channel to the custodian. :meth:`start` and :meth:`close` belong to the event loop.

    A request without an answer for ``hedge_at_least`` seconds, or three times the 95th percentile of this custodian's
    recent latency where that is longer, is sent once more over a second stream.
    """

    def __init__(
        self,
        custodian: RosterCustodian,
        cluster: str,
        connect: Callable[[RosterCustodian], grpc.aio.Channel],
        *,
        deadline: float,
        hedge_at_least: float,
        clock: Callable[[], float] = time.time,
        on_latency: Callable[[str, float], None] = lambda custodian, seconds: None,
    ) -> None:
        self.id = custodian.id
        self.jurisdiction = custodian.jurisdiction
        self.latency = Latency()
        self.circuit = Circuit()
        self.last_error: KeyquorumError | None = None
        self.clock_skew = 0.0
        self.keys: dict[tuple[str, int], str] = {}
        self.described: pb.DescribeResponse | None = None
        """What the custodian said of itself when it was asked last; a sealed one says that much."""
        self.described_at = 0.0
        self.ledger_size = 0
        """What the custodian had seen of the ledger when it was asked last."""
        self.restored = False
        """From a backup, and not proved yet."""
        self.held_at = 0.0
        """Unix seconds when it said what it holds; 0: never."""
        self.revocations: tuple[int, str] = (0, "")
        """Version and digest of the revocations that it says it has."""
        self.connections = 0
        """How often a stream was begun: what was sent over earlier ones may be lost."""
        self._group = 1
        self._custodian = custodian
        self._cluster = cluster
        self._connect = connect
        self._deadline = deadline
        self._hedge_at_least = hedge_at_least
        self._clock = clock
        self._on_latency = on_latency
        self._pending: dict[str, _Pending] = {}
        self._windows: dict[int, bytes] = {}
        self._latest: Window | None = None
        self._primary: Lane | None = None
        self._second: Lane | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._channel: grpc.aio.Channel | None = None
        self._probing: asyncio.Task[None] | None = None
        self.first_probe = asyncio.Event()
        self.first_stream = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._channel = self._connect(self._custodian)
        self._spawn(self._keep())
        self._spawn(self._poll())

    async def close(self) -> None:
        """Fail what is pending and hang up."""
        self._fail_all(UnavailableError(Reason.UNAVAILABLE, "the coordinator is stopping"), keep_circuit=True)
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, KeyquorumError):
            _log.error("link.unforeseen", custodian=self.id, error=type(error).__name__)

    @property
    def connected(self) -> bool:
        return self._primary is not None

    def circuit_state(self) -> CircuitState:
        return self.circuit.state(time.monotonic())

    @property
    def stub(self) -> CustodianAsyncStub:
        if self._channel is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.id} is not connected")
        return CustodianStub(self._channel)

    @property
    def ceremonies(self) -> CeremoniesAsyncStub:
        if self._channel is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.id} is not connected")
        return CeremoniesStub(self._channel)

    @property
    def canary(self) -> CanaryFaultsAsyncStub:
        if self._channel is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.id} is not connected")
        return CanaryFaultsStub(self._channel)

    @property
    def restoration(self) -> RestorationAsyncStub:
        if self._channel is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.id} is not connected")
        return RestorationStub(self._channel)

    # -- releases -----------------------------------------------------------------------------------------------------

    def ask(self, request_id: str, data: bytes, waiting: Waiting) -> None:
        """Send a serialised ReleaseRequest; ``waiting`` hears once of the answer or the failure, perhaps at once."""
        now = time.monotonic()
        if not self.circuit.admit(now):
            waiting.failed(self.id, self._resting())
            return
        if len(self._pending) >= _MAX_PENDING:
            waiting.failed(
                self.id,
                UnavailableError(Reason.QUOTA, f"{self.id} has too many requests pending", expected=_MAX_PENDING),
            )
            return
        pending = _Pending(waiting, data, now)
        self._pending[request_id] = pending
        lane = self._primary
        if lane is not None:
            pending.lane = lane
            lane.send(data)
        # Otherwise the connection is being made: it is sent, or failed, as soon as that is decided.
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._hedge_after(), self._overdue)

    def release(self, request_id: str) -> None:
        """The caller went away. Its answer is still awaited, for the statistics alone."""
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.waiting = None

    def _answer(self, answer: pb.ReleaseAnswer) -> None:
        pending = self._pending.pop(answer.request_id, None)
        if pending is None:
            return  # the second answer to a hedged request, or one that came too late
        elapsed = time.monotonic() - pending.sent_at
        self.latency.add(elapsed)
        self._on_latency(self.id, elapsed)
        self.circuit.succeeded()
        waiting = pending.waiting
        if waiting is None:
            return
        if answer.custodian != self.id or not answer.WhichOneof("outcome"):
            waiting.failed(
                self.id,
                RefusedError(
                    Reason.UNKNOWN_CUSTODIAN,
                    f"{self.id} answered in another name or without an outcome",
                    expected=self.id,
                    actual=answer.custodian[:64],
                ),
            )
            return
        if not answer.HasField("share"):
            if not (answer.HasField("refusal") and self._conflicts(answer, pending, waiting)):
                waiting.answered(self.id, answer, b"")
            return
        statement = self._windows.get(answer.share.window)
        if statement is not None:
            waiting.answered(self.id, answer, statement)
        else:
            self._spawn(self._answer_of_new_window(answer, waiting))

    def _conflicts(self, answer: pb.ReleaseAnswer, pending: _Pending, waiting: Waiting) -> bool:
        """Whether it was refused for the custodian's place in the ledger alone, and goes out again from there."""
        size = _place_of(answer.refusal)
        anew = waiting.again(self.id, size) if size is not None and pending.conflicts < _MAX_CONFLICTS else None
        if anew is None:
            return False
        self._spawn(self._ask_again(answer, pending, anew))
        return True

    async def _ask_again(self, answer: pb.ReleaseAnswer, pending: _Pending, anew: Awaitable[bytes]) -> None:
        try:
            data = await anew
        except KeyquorumError as error:
            if pending.waiting is not None:
                pending.waiting.failed(self.id, error)
            return
        if pending.waiting is None:
            return
        again = _Pending(pending.waiting, data, time.monotonic())
        again.conflicts = pending.conflicts + 1
        self._pending[answer.request_id] = again
        if self._primary is not None:
            again.lane = self._primary
            self._primary.send(data)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._hedge_after(), self._overdue)

    async def _answer_of_new_window(self, answer: pb.ReleaseAnswer, waiting: Waiting) -> None:
        """The first answers of a window may come before its statement was polled: nobody could verify them yet."""
        statement = None
        for _ in range(2):  # the first may join a probe that was under way before the window began
            with contextlib.suppress(KeyquorumError):
                await self.probe()
            statement = self._windows.get(answer.share.window)
            if statement is not None:
                break
        if statement is None:
            waiting.failed(
                self.id,
                RefusedError(
                    Reason.STALE,
                    f"{self.id} answered in a window that it gives no statement for",
                    expected=f"window {self._latest.window if self._latest else 'unknown'}",
                    actual=f"window {answer.share.window}",
                ),
            )
        else:
            waiting.answered(self.id, answer, statement)

    def _hedge_after(self) -> float:
        return min(max(self._hedge_at_least, _HEDGE_FACTOR * self.latency.p95), self._deadline)

    def _overdue(self) -> None:
        """Send overdue requests once more over the second stream; give up those past the deadline."""
        self._timer = None
        now = time.monotonic()
        hedge_after = self._hedge_after()
        next_due = hedge_after
        late: list[str] = []
        for request_id, pending in self._pending.items():  # oldest first
            age = now - pending.sent_at
            if age < hedge_after:
                next_due = hedge_after - age
                break
            if age >= self._deadline:
                late.append(request_id)
            elif not pending.hedged and pending.lane is not None:
                pending.hedged = True
                self._second_lane().send(pending.data)
        for request_id in late:
            pending = self._pending.pop(request_id)
            self.circuit.failed(now)
            self.last_error = UnavailableError(Reason.TIMEOUT, f"{self.id} did not answer within {self._deadline:g} s")
            if pending.waiting is not None:
                pending.waiting.failed(self.id, self.last_error)
        if self._pending:
            self._timer = asyncio.get_running_loop().call_later(next_due, self._overdue)

    def _second_lane(self) -> Lane:
        if self._second is None and self._channel is not None:
            self._second = Lane(self._channel, self._answer, self._group)
            self._spawn(self._run_second(self._second))
        if self._second is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.id} is not connected")
        return self._second

    async def _run_second(self, lane: Lane) -> None:
        # When it breaks, the first stream's answer or the deadline still settles the requests sent over it.
        await lane.run(self.id)
        if self._second is lane:
            self._second = None

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Probe, then run the stream until it breaks; again and again."""
        backoff = _FIRST_BACKOFF
        while True:
            try:
                await self.probe()
            except Exception as caught:
                error = caught if isinstance(caught, KeyquorumError) else _unforeseen(self.id, caught)
                self.last_error = error
                self._fail_all(error)
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF)
                continue
            if self._channel is None:
                return
            self.connections += 1
            lane = self._primary = Lane(self._channel, self._answer, self._group)
            self.first_stream.set()
            now = time.monotonic()
            for pending in self._pending.values():
                pending.sent_at = now  # neither hedging nor latency counts the wait for a connection
                pending.lane = lane
                lane.send(pending.data)
            error = await lane.run(self.id)
            self._primary = None
            self.last_error = error
            self._broken(lane, error)
            if time.monotonic() - lane.started < 1.0:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF)
            else:
                backoff = _FIRST_BACKOFF

    def _broken(self, lane: Lane, error: KeyquorumError) -> None:
        """Requests whose answers the broken stream owed: sent once more if the custodian is there, else failed."""
        for request_id, pending in list(self._pending.items()):
            if pending.lane is lane:
                pending.lane = None
                if pending.hedged:
                    self._fail(request_id, error)
                else:
                    pending.hedged = True

    async def probe(self) -> None:
        """Fetch window and description now; concurrent callers share one probe. Raises :class:`KeyquorumError`."""
        if self._probing is None or self._probing.done():
            self._probing = self._spawn(self._probe())
        await asyncio.shield(self._probing)

    async def _probe(self) -> None:
        stub = self.stub
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                asked = self._clock()
                described = await stub.Describe(pb.DescribeRequest(), timeout=_PROBE_TIMEOUT)
                now = self._clock()
                self.described, self.described_at = described, now
                # Last: a custodian that is sealed describes itself, and has no windows.
                window = await stub.GetWindow(pb.GetWindowRequest(), timeout=_PROBE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.id) from None
        except TimeoutError:
            raise UnavailableError(Reason.TIMEOUT, f"{self.id} did not answer in time") from None
        finally:
            self.first_probe.set()
        # The custodian's clock is told in whole seconds: their middle is the best guess, and less than one is no skew.
        skew = described.now + 0.5 - (asked + now) / 2
        self.clock_skew = skew if abs(skew) >= 1 else 0.0
        self.ledger_size = described.ledger_size
        self._group = described.release_group
        if not described.sealed:  # a sealed custodian does not know what it holds
            self.held_at = now
        self.restored = described.restored
        self.revocations = described.revocations_version, described.revocations_digest[:64]
        self.keys = {(key.key_id, key.epoch): key.state for key in described.keys[:4096]}
        self._remember(window.statement, int(now))
        self.circuit.recovered(time.monotonic())

    def _remember(self, statement: bytes, now: int) -> None:
        if self._latest is not None and self._windows.get(self._latest.window) == statement:
            return
        window = open_window(
            statement, self._custodian.identity, custodian=self.id, cluster=self._cluster, now=now, skew=60
        )
        self._latest = window
        self._windows[window.window] = statement
        while len(self._windows) > _KEPT_WINDOWS:
            del self._windows[min(self._windows)]

    def window_statement(self) -> bytes | None:
        """The latest verified statement, while its window is the present or the previous one."""
        if self._latest is None or self._clock() >= self._latest.not_after + self.clock_skew:
            return None
        return self._windows.get(self._latest.window)

    async def _poll(self) -> None:
        """A new window's statement is fetched as the window begins, by the custodian's clock, and every 10 s."""
        await self.first_probe.wait()
        while True:
            until_next = WINDOW_SECONDS - (self._clock() + self.clock_skew) % WINDOW_SECONDS
            await asyncio.sleep(min(_POLL, until_next + 0.05))
            if self._primary is not None:
                try:
                    await self.probe()
                except KeyquorumError as error:
                    self.last_error = error

    # -- failures -----------------------------------------------------------------------------------------------------

    def _resting(self) -> UnavailableError:
        last = self.last_error
        return UnavailableError(
            Reason.UNAVAILABLE,
            f"{self.id} failed repeatedly and is left alone for a while",
            expected="a closed circuit",
            actual=f"{self.circuit_state()}; last: {last.reason}: {last.message}" if last else self.circuit_state(),
        )

    def _fail(self, request_id: str, error: KeyquorumError) -> None:
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            self.circuit.failed(time.monotonic())
            if pending.waiting is not None:
                pending.waiting.failed(self.id, error)

    def _fail_all(self, error: KeyquorumError, *, keep_circuit: bool = False) -> None:
        if not keep_circuit:
            self.circuit.failed(time.monotonic())
        for pending in list(self._pending.values()):
            if pending.waiting is not None:
                pending.waiting.failed(self.id, error)
        self._pending.clear()


def _place_of(refusal: Any) -> int | None:
    """How much of the ledger a custodian says it has seen, where that is why it refused."""
    error = from_status(refusal)
    size = error.details.get("size", "")
    return int(size) if error.reason is Reason.LEDGER_CONFLICT and _SIZE.fullmatch(size) else None


def _unforeseen(custodian: str, error: Exception) -> KeyquorumError:
    _log.error("link.unforeseen", custodian=custodian, error=type(error).__name__)
    return KeyquorumError(Reason.INTERNAL, f"the connection to {custodian} failed in a way nobody foresaw")
