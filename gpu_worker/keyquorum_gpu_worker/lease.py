"""How long the worker may hold a job's key, and the task that renews that (DESIGN §6; docs/spec/release.md, Leases).

The deadline is kept on CLOCK_BOOTTIME: nobody sets it, and it goes on while the machine is suspended. It counts from
before the challenge was asked for, so no time that an answer was kept back for is a gift. When it has passed, or the
custodians refused to renew for a reason that time does not cure, the lease is over, for good: :class:`Stop` ends the
job's processes by it, without waiting for the event loop, and :func:`keep` tells whoever wipes.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.release import LeaseTerms

__all__ = ["Grant", "Lease", "Stop", "boottime", "keep"]

_LOOK_SECONDS: Final = 0.25
"""How often the clock is looked at: timers of the event loop do not count a suspension."""
_MAY_PASS: Final = frozenset({Reason.STALE, Reason.QUOTA, Reason.BLAME, Reason.NO_QUORUM, Reason.LEDGER_UNWITNESSED})
"""Refusals that a later try may not meet; the lease ends at its deadline, not before."""


def boottime() -> float:
    """Seconds since the machine started, suspensions included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a quorum answered: terms that count from ``asked_at``, by the lease's clock."""

    asked_at: float
    terms: LeaseTerms

    @property
    def until(self) -> float:
        return self.asked_at + self.terms.seconds

    def renew_at(self, share: float) -> float:
        """When to attest anew; ``share`` (0 … 1) of what the policy allows, or of two thirds of the lease if that is
        less: the rest is for tries that fail."""
        return self.asked_at + share * min(self.terms.reattest_seconds, self.terms.seconds * 2 / 3)


class Lease:
    """One job's lease. Read from any thread."""

    def __init__(self, grant: Grant, clock: Callable[[], float] = boottime) -> None:
        self._grant = grant
        self._clock = clock
        self._ended: KeyquorumError | None = None
        self.renewals = 0

    @property
    def grant(self) -> Grant:
        return self._grant

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._grant.until - self._clock()

    @property
    def over(self) -> bool:
        """Whether the key must go. Once true it stays true."""
        if self._ended is None and self.left <= 0:
            self.end(
                RefusedError(
                    Reason.LEASE,
                    "the lease on the job's key lapsed before it was renewed",
                    expected=f"a quorum's answer within {self._grant.terms.seconds} seconds",
                    actual="none",
                    next_step="See why coordinator or custodians did not answer, then submit the job again.",
                )
            )
        return self._ended is not None

    @property
    def why(self) -> KeyquorumError | None:
        """Why it is over."""
        return self._ended

    def renew(self, grant: Grant) -> None:
        """A quorum answered anew. What comes too late changes nothing."""
        if not self.over and grant.until > self._grant.until:
            self._grant = grant
            self.renewals += 1

    def end(self, why: KeyquorumError) -> None:
        """It is over now."""
        if self._ended is None:
            self._ended = why


class Stop(threading.Event):
    """Set when the job has to end: told so, or because its lease is over by then."""

    def __init__(self) -> None:
        super().__init__()
        self.lease: Lease | None = None

    def is_set(self) -> bool:
        return super().is_set() or (self.lease is not None and self.lease.over)


async def keep(
    lease: Lease,
    renew: Callable[[], Awaitable[Grant]],
    said: Callable[[str, dict[str, object]], None],
    *,
    clock: Callable[[], float] = boottime,
    jitter: Callable[[], float] = lambda: random.uniform(0.75, 0.95),  # noqa: S311 - spreads callers
) -> KeyquorumError:
    """Renew the lease in time, for as long as it can be; returns why it is over. ``renew`` attests anew and asks the
    custodians."""
    at = lease.grant.renew_at(jitter())
    pause = 1.0
    trying: asyncio.Task[Grant] | None = None
    try:
        while not lease.over:
            if trying is None and clock() >= at:
                trying = asyncio.ensure_future(renew())
            if trying is not None and trying.done():
                try:
                    lease.renew(trying.result())
                except KeyquorumError as error:
                    said("the lease was not renewed", {**error.as_dict(), "seconds_left": round(lease.left, 1)})
                    if isinstance(error, RefusedError | MalformedError) and error.reason not in _MAY_PASS:
                        lease.end(_refused(error))
                    at = clock() + pause
                    pause = min(2 * pause, max(1.0, lease.left / 4))
                else:
                    said("lease renewed", {"seconds": lease.grant.terms.seconds, "renewals": lease.renewals})
                    at = lease.grant.renew_at(jitter())
                    pause = 1.0
                trying = None
            if trying is not None:
                await asyncio.wait([trying], timeout=_LOOK_SECONDS)
            else:
                await asyncio.sleep(min(_LOOK_SECONDS, max(0.0, min(at - clock(), lease.left))))
    finally:
        if trying is not None:
            trying.cancel()
            await asyncio.wait([trying])
    assert lease.why is not None  # noqa: S101 - over, so there is a reason
    return lease.why


def _refused(error: KeyquorumError) -> RefusedError:
    return RefusedError(
        Reason.LEASE,
        f"the custodians do not renew the lease on the job's key: {error.reason}: {error.message}",
        expected=error.expected,
        actual=error.actual,
        next_step=error.next_step,
        details={**error.details, "refused_with": str(error.reason)},
    )
