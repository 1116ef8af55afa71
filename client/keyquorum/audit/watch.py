"""A monitor of the ledger: it follows the log, and says what must not be.

Each round reads the latest checkpoint, shows that it extends the last one verified, reads the leaves added since, says
what they hold, and remembers. What can't be reached is tried again in the next round; what was refused stays refused,
with both checkpoints kept, until the log shows something that extends what was verified before.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

from keyquorum.audit.events import Event, Kind
from keyquorum.audit.watch_state import Remembered, WatchState
from keyquorum.ledger.source import LogSource, read_checkpoint
from keyquorum.ledger.verification import QUORUM_SECONDS, verify_since
from keyquorum.progress import ProgressCallback, silent
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.leaves import Alarm, parse_leaf
from keyquorum_core.ledger.log_keys import SignedCheckpoint
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.ledger.replay import check_growth
from keyquorum_core.release import LEAF_TYPE, Leaf

__all__ = ["Monitor", "Watching"]

_SHOWN: Final = 1000
"""Releases and alarms that one round says one by one; more are counted, so that no log fills a monitor's memory."""
_KINDS: Final = {
    Reason.LEDGER_FORK: Kind.FORK,
    Reason.LEDGER_ROLLBACK: Kind.ROLLBACK,
    Reason.NO_QUORUM: Kind.NO_QUORUM,
}
# Custodians cosign after the log signed, and one of several coordinators may lag behind another for a second.
_PASSING: Final = (Reason.NO_QUORUM, Reason.LEDGER_ROLLBACK)
# Leaves are canonical, so that one which is of a type has these bytes in it.
_INTERESTING: Final = tuple(f'"type":"{name}"'.encode() for name in (LEAF_TYPE, Alarm.TYPE))


@dataclass(frozen=True, slots=True)
class Watching:
    """``keys`` whose releases are said; ``max_age`` seconds that may pass without a quorum's cosignatures, 0 for any;
    ``patience`` seconds that the log may show a new checkpoint without them, or an older one than before."""

    keys: Set[str] = frozenset()
    max_age: int = 0
    patience: float = QUORUM_SECONDS


class _Added:
    """What a round's new leaves hold that is worth saying, once all of them are verified."""

    def __init__(self, watching: Watching) -> None:
        self._watching = watching
        self.found: list[tuple[int, Leaf | Alarm]] = []
        self.releases: Counter[str] = Counter()
        self.alarms = 0

    def __call__(self, first: int, leaves: tuple[bytes, ...]) -> None:
        for number, data in enumerate(leaves):
            if not any(each in data for each in _INTERESTING):
                continue
            try:
                leaf = parse_leaf(data)
            except KeyquorumError:
                continue  # no custodian releases on a leaf that does not parse
            if isinstance(leaf, Alarm):
                self.alarms += 1
            elif isinstance(leaf, Leaf) and leaf.key_id in self._watching.keys:
                self.releases[leaf.key_id] += 1
            else:
                continue
            if len(self.found) < _SHOWN:
                self.found.append((first + number, leaf))


class _Round:
    """One look at the log. ``served`` is what it showed, under its own two signatures, however far the look got."""

    def __init__(self, source: LogSource, trust: LogTrust, past: Remembered | None, watching: Watching) -> None:
        self._source, self._trust, self._past, self._watching = source, trust, past, watching
        self.served: SignedCheckpoint | None = None
        self.added = _Added(watching)

    async def look(self, progress: ProgressCallback) -> QuorumCheckpoint:
        past = None if self._past is None else self._past.signed.checkpoint
        deadline = time.monotonic() + self._watching.patience
        while True:
            self.served = None
            self.served = self._trust.open(await read_checkpoint(self._source))
            try:
                if past is not None:  # a fork is one whether or not custodians have cosigned it
                    check_growth(past, self.served.checkpoint)
                latest = self._trust.check(self.served, now=int(time.time()))
                break
            except RefusedError as error:
                if error.reason not in _PASSING or time.monotonic() + 0.5 > deadline:
                    raise
            await asyncio.sleep(0.5)
        await verify_since(self._source, latest.checkpoint, past, leaves=self.added, progress=progress)
        return latest


class Monitor:
    """One log, followed over rounds and restarts. ``trust`` is asked each round, so that a new roster counts."""

    def __init__(self, source: LogSource, trust: Callable[[], LogTrust], state: WatchState, watching: Watching) -> None:
        self._source, self._trust, self._state, self._watching = source, trust, state, watching

    async def round(self, say: Callable[[Event], None], progress: ProgressCallback = silent) -> None:
        """Look once; ``say`` is called with each event before anything is remembered.

        What is wrong with the log becomes an event. Raises :class:`KeyquorumError` for what is wrong here: a state file
        that can't be read or written, a roster that is not trusted.
        """
        trust = self._trust()
        past = self._state.load(trust)
        this = _Round(self._source, trust, past, self._watching)
        try:
            latest = await this.look(progress)
        except KeyquorumError as error:
            say(self._failure(error, past, this.served))
            if past is not None:
                self._say_if_stalled(past.quorum_time, say)
            return
        self._say_what_was_added(latest, past, this.added, say)
        self._say_if_stalled(latest.quorum_time, say)
        if past is None or latest.signed.encode() != past.signed.encode():
            self._state.save(Remembered(latest.signed, latest.quorum_time))

    def _failure(self, error: KeyquorumError, past: Remembered | None, served: SignedCheckpoint | None) -> Event:
        now = int(time.time())
        details: dict[str, object] = {"error": error.as_dict()}
        message = f"{error.reason}: {error.message}"  # the same in each round, unlike what was expected and came
        if isinstance(error, UnavailableError):
            return Event(Kind.UNREACHABLE, now, message, details, standing=True)
        if past is not None and served is not None and served.encode() != past.signed.encode():
            kind = _KINDS.get(error.reason, Kind.REFUSED)
            kept = self._state.keep_evidence(kind, past.signed.encode(), served.encode(), error.as_dict())
            details["evidence"] = str(kept)
        return Event(_KINDS.get(error.reason, Kind.REFUSED), now, message, details, standing=True)

    def _say_if_stalled(self, quorum_time: int, say: Callable[[Event], None]) -> None:
        now, limit = int(time.time()), self._watching.max_age
        if limit and now - quorum_time > limit:
            message = f"the log stands still: no quorum has cosigned it for more than {limit} s"
            say(Event(Kind.STALLED, now, message, {"quorum_time": quorum_time, "max_age": limit}, standing=True))

    def _say_what_was_added(
        self, latest: QuorumCheckpoint, past: Remembered | None, added: _Added, say: Callable[[Event], None]
    ) -> None:
        now, size = int(time.time()), latest.checkpoint.size
        begin = 0 if past is None else past.signed.checkpoint.size
        details: dict[str, object] = {
            "size": size,
            "root": latest.checkpoint.root.hex(),
            "added": size - begin,
            "quorum_time": latest.quorum_time,
            "cosigned": dict(sorted(latest.times.items())),
        }
        if past is None:  # what was there before the watch began is counted, not alarmed about
            details |= {"earlier_releases": dict(added.releases), "earlier_alarms": added.alarms}
            say(Event(Kind.VERIFIED, now, f"watching from {size} leaves on, all of them verified", details))
            return
        say(Event(Kind.VERIFIED, now, f"{size} leaves, {size - begin} of them new, verified", details))
        for index, leaf in added.found:
            say(_released(leaf, index, now) if isinstance(leaf, Leaf) else _logged(leaf, index, now))
        further = added.alarms + added.releases.total() - len(added.found)
        if further:
            message = f"{further} more releases and alarms between leaves {begin} and {size}"
            say(Event(Kind.RELEASE, now, message, {"further": further, "first": begin, "size": size}))


def _released(leaf: Leaf, index: int, now: int) -> Event:
    message = f"release of key {leaf.key_id} to the {leaf.recipient} of job {leaf.job_id}"
    return Event(
        Kind.RELEASE,
        now,
        message + (", on DEVELOPMENT HARDWARE" if leaf.development else ""),
        {
            "index": index,
            "key_id": leaf.key_id,
            "epoch": leaf.epoch,
            "job_id": leaf.job_id,
            "recipient": leaf.recipient,
            "evidence_sha256": leaf.evidence_sha256,
            "development": leaf.development,
            "logged_at": leaf.time,
        },
    )


def _logged(leaf: Alarm, index: int, now: int) -> Event:
    return Event(
        Kind.LOGGED_ALARM,
        now,
        f"{leaf.seat} raised the alarm {leaf.alarm}",
        {
            "index": index,
            "alarm_word": leaf.alarm,
            "seat": leaf.seat,
            "evidence_sha256": leaf.evidence_sha256,
            "logged_at": leaf.time,
        },
    )
