"""The custodians as this coordinator's ledger has them: what each has seen of it, and what they cosigned.

A release goes to each custodian with the checkpoint that shows its leaf, once per custodian and checkpoint: what a
custodian was sent before over the same stream is not sent again, and many releases share one. Everything that moves a
custodian on goes over its ordered release stream, under one lock here, so that proofs chain. Where they do not, since
another coordinator spoke to it or it was restarted, the custodian says where it is and is asked anew from there.

Cosigning happens beside: a while after leaves came, and every so often when none do, all custodians are asked to cosign
the newest checkpoint. Cosignatures that verify and make a quorum are stored with it, which is what readers are shown,
and told to the custodians, who release only while a quorum's word on the log is not too old.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from keyquorum_coordinator.fanout import Fanout, Release
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.sequencer import Entry, Sequencer
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.ledger.cosignatures import CLOCK_SKEW, witnessed
from keyquorum_core.ledger.leaves import Alarm, custodian_seat
from keyquorum_core.ledger.log_keys import SignedCheckpoint
from keyquorum_core.ledger.notes import Note, NoteSignature, parse_signature_lines
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import MAX_COSIGNERS
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_status

__all__ = ["Witnesses"]

_REMEMBERED = 256
_ROUND_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_START_SECONDS = 5.0
_BUSY = 8
_BUSY_SETTLE = 4
_PATIENCE_EACH = 0.001
_LONGEST_PATIENCE = 0.05
_ALARMS = frozenset({Reason.LEDGER_FORK, Reason.LEDGER_ROLLBACK})

_log = structlog.get_logger("witnesses")


@dataclass(slots=True)
class _Place:
    """What one custodian was sent over its present stream: the sizes, the newest of them, and the newest note with a
    quorum's cosignatures."""

    connection: int
    size: int
    sent: OrderedDict[int, None] = field(default_factory=OrderedDict)
    vouched: bytes = b""

    def reach(self, size: int) -> None:
        self.size = max(self.size, size)
        self.sent[size] = None
        if len(self.sent) > _REMEMBERED:
            self.sent.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Update:
    """What one custodian lacks: a serialised ``update`` member, empty when nothing; and what it will then have."""

    data: bytes
    size: int
    vouched: bytes


class _Round:
    """One request to all custodians to cosign; hears their answers."""

    def __init__(self, expected: Iterable[str], elsewhere: Callable[[str, int], None]) -> None:
        self._elsewhere = elsewhere
        self.lines: dict[str, bytes] = {}
        self.refusals: dict[str, KeyquorumError] = {}
        self._outstanding = set(expected)
        self.done = asyncio.Event()
        if not self._outstanding:
            self.done.set()

    def answered(self, custodian: str, answer: pb.ReleaseAnswer, window_statement: bytes) -> None:
        if answer.HasField("refusal"):
            self.failed(custodian, from_status(answer.refusal))
            return
        self.lines[custodian] = answer.cosignatures
        self._end(custodian)

    def failed(self, custodian: str, error: KeyquorumError) -> None:
        self.refusals[custodian] = error
        self._end(custodian)

    def again(self, custodian: str, ledger_size: int) -> None:
        """The next round will find it where it is."""
        self._elsewhere(custodian, ledger_size)

    def _end(self, custodian: str) -> None:
        self._outstanding.discard(custodian)
        if not self._outstanding:
            self.done.set()


class Witnesses:
    """``interval``: seconds between cosignings of a log that stands still; ``settle``: seconds after a leaf in which
    others may come before all are cosigned together. ``clock`` gives unix seconds."""

    def __init__(
        self,
        sequencer: Sequencer,
        fanout: Fanout,
        *,
        clock: Callable[[], float] = time.time,
        interval: float = 60.0,
        settle: float = 0.5,
    ) -> None:
        self._sequencer = sequencer
        self._fanout = fanout
        self._clock = clock
        self._interval = interval
        self._settle = settle
        self._keys = fanout.roster.witnesses()
        self._places: dict[str, _Place] = {}
        self._order = asyncio.Lock()
        self._newest = 0
        self._new = asyncio.Event()
        self._ready = asyncio.Event()
        self._started = time.monotonic()
        self._alarms: set[tuple[str, str]] = set()
        self._prefix = secrets.token_hex(8)
        self._rounds = 0
        self._encoded: tuple[SignedCheckpoint | None, bytes] = (None, b"")

    def beside(self, fanout: Fanout) -> Witnesses:
        """The same log over other links, a drill's: for releases only, since cosigning goes on here."""
        other = Witnesses(self._sequencer, fanout, clock=self._clock, interval=self._interval, settle=self._settle)
        other._ready = self._ready
        other._started = self._started
        return other

    # -- releases -----------------------------------------------------------------------------------------------------

    async def release(self, entry: Entry, request: pb.ReleaseRequest, quorum: Quorum | None = None) -> Release:
        """Ask all custodians for ``request``, whose leaf is ``entry``, each with what it has not seen of the ledger.
        ``quorum``: as for :meth:`Fanout.release`.

        Raises as :meth:`Fanout.release`, and :class:`UnavailableError` when the ledger's stores fail.
        """
        if not self._ready.is_set():
            await self._first_quorum()
        async with self._order:
            target = await self._target(entry)
            await self._show(entry, target, request)
            updates = {link.id: await self._update(link, target) for link in self._fanout.links.values()}
            data = {custodian: update.data for custodian, update in updates.items() if update.data}

            async def again(custodian: str, ledger_size: int) -> bytes:
                return await self._anew(self._fanout.links[custodian], ledger_size, entry, request)

            release = self._fanout.release(request, data, again, quorum)
            for link in self._fanout.links.values():
                self._sent(link, updates[link.id])
            return release

    async def _first_quorum(self) -> None:
        """A coordinator that just started has its log cosigned before anything is released; but not for ever."""
        left = self._started + _START_SECONDS - time.monotonic()
        with contextlib.suppress(TimeoutError):  # the custodians will say why they refuse
            async with asyncio.timeout(max(0.0, left)):
                await self._ready.wait()

    async def _target(self, entry: Entry) -> SignedCheckpoint:
        """The checkpoint to show: the leaf's own, unless some custodian was shown a later one and not that."""
        size = entry.checkpoint.checkpoint.size
        if size >= self._newest or all(size in self._place(link).sent for link in self._fanout.links.values()):
            return entry.checkpoint
        return await self._sequencer.reach(self._newest)

    async def _show(self, entry: Entry, target: SignedCheckpoint, request: pb.ReleaseRequest) -> None:
        size = target.checkpoint.size
        same = size == entry.checkpoint.checkpoint.size
        proof = entry.proof if same else await self._sequencer.inclusion(entry.index, size)
        request.leaf_index, request.tree_size = entry.index, size
        del request.inclusion_proof[:]
        request.inclusion_proof.extend(proof)

    def _place(self, link: Link) -> _Place:
        place = self._places.get(link.id)
        if place is None or place.connection != link.connections:
            place = self._places[link.id] = _Place(link.connections, link.ledger_size)
        return place

    async def _update(self, link: Link, target: SignedCheckpoint, *, cosign: bool = False) -> _Update:
        """What this custodian lacks of ``target``. Cosignatures do not go with a request for some: a custodian that
        finds them too old is to cosign nevertheless."""
        place, size = self._place(link), target.checkpoint.size
        vouched, note = (None, b"") if cosign else self._vouched()
        if vouched is None or vouched.checkpoint.size > size:
            note = place.vouched
        news = note != place.vouched
        if not (cosign or news) and (size in place.sent or size < place.size):
            return _Update(b"", size, note)
        old = min(place.size, size)
        update = pb.CheckpointUpdate(
            checkpoint=_bare(target).encode(),
            old_size=old,
            consistency_proof=await self._sequencer.consistency(old, size),
            cosign=cosign,
        )
        if news and vouched is not None:
            update.cosigned = note
            update.cosigned_proof.extend(await self._sequencer.consistency(vouched.checkpoint.size, size))
        return _Update(pb.ReleaseRequest(update=update).SerializeToString(), size, note)

    def _sent(self, link: Link, update: _Update) -> None:
        place = self._place(link)
        if update.data:
            place.reach(update.size)
        place.vouched = update.vouched
        self._newest = max(self._newest, update.size)

    async def _anew(self, link: Link, ledger_size: int, entry: Entry, request: pb.ReleaseRequest) -> bytes:
        """The request again for a custodian that is at ``ledger_size``. Raises ``LEDGER_CONFLICT`` when this log is
        behind it."""
        async with self._order:
            target = await self._sequencer.reach(max(ledger_size, entry.checkpoint.checkpoint.size))
            self._check_ahead(link, ledger_size, target)
            self._places[link.id] = _Place(link.connections, ledger_size)
            copy = pb.ReleaseRequest()
            copy.CopyFrom(request)
            await self._show(entry, target, copy)
            update = await self._update(link, target)
            self._sent(link, update)
            return copy.SerializeToString() + update.data

    def _check_ahead(self, link: Link, ledger_size: int, target: SignedCheckpoint) -> None:
        if ledger_size > target.checkpoint.size:
            _log.error("ledger.behind", custodian=link.id, seen=ledger_size, size=target.checkpoint.size)
            raise StateError(
                Reason.LEDGER_CONFLICT,
                f"{link.id} has seen more of the ledger than there is: the log was rolled back",
                expected=f"at least {ledger_size} leaves",
                actual=f"{target.checkpoint.size} leaves",
                next_step="Restore the newest backup of the ledger before anything is written to it",
                details={"size": str(ledger_size)},
            )

    def patience(self) -> float:
        """Seconds that a leaf may wait for others to share its checkpoint: none, unless so many releases are under way
        that it would wait for custodians as long. Each new checkpoint costs every custodian a durable commit and two
        signatures to verify."""
        running = self._fanout.running
        return min(_LONGEST_PATIENCE, running * _PATIENCE_EACH) if running >= _BUSY else 0.0

    def _vouched(self) -> tuple[SignedCheckpoint | None, bytes]:
        """The newest checkpoint that a quorum cosigned, and its note, which is long."""
        vouched = self._sequencer.witnessed
        if vouched is not self._encoded[0]:
            self._encoded = (vouched, vouched.encode() if vouched is not None else b"")
        return self._encoded

    # -- cosigning ----------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """The log grew: have it cosigned soon."""
        self._new.set()

    async def run(self) -> None:
        """Have the log cosigned, for as long as the coordinator runs."""
        self._started = time.monotonic()
        await self._quorum_connected()
        while True:
            self._new.clear()
            done = False
            try:
                done = await self._round()
            except KeyquorumError as error:
                _log.error("ledger.not_cosigned", reason=str(error.reason), message=error.message)
            except Exception as error:  # without cosignatures releases end: it is tried again
                _log.error("ledger.unforeseen", error=type(error).__name__)
            if not done:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._ready.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._new.wait()
                    await asyncio.sleep(self._settle * (_BUSY_SETTLE if self._fanout.running >= _BUSY else 1))

    async def _quorum_connected(self) -> None:
        """Wait for the first streams of a quorum; not for long when there is none."""
        links = self._fanout.links
        waiting = {asyncio.create_task(link.first_stream.wait()) for link in links.values()}
        until = self._started + _START_SECONDS
        try:
            while not self._fanout.quorum.is_qualified(name for name in links if links[name].connected):
                left = until - time.monotonic()
                if left <= 0 or not waiting:
                    return
                _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def _round(self) -> bool:
        """Ask all custodians for cosignatures of the newest checkpoint; whether a quorum gave them."""
        target, asked = await self._tell(cosign=True)
        with contextlib.suppress(TimeoutError):  # those that answered may be enough
            async with asyncio.timeout(_ROUND_SECONDS):
                await asked.done.wait()
        await self._look_at(asked.refusals)
        lines = self._verified(target, asked.lines)
        if not self._fanout.quorum.is_qualified(lines):
            refusals = {name: f"{error.reason}: {error.message}" for name, error in asked.refusals.items()}
            _log.warning("ledger.no_quorum", size=target.checkpoint.size, cosigned=sorted(lines), refused=refusals)
            return False
        await self._sequencer.add_cosignatures(target, [line for name in self._chosen(lines) for line in lines[name]])
        await self._tell(cosign=False)
        return True

    async def _tell(self, *, cosign: bool) -> tuple[SignedCheckpoint, _Round]:
        """Send the newest checkpoint, and what a quorum cosigned or a request to do so, to all who can be reached."""
        async with self._order:
            links = [link for link in self._fanout.links.values() if link.connected]
            ahead = max((link.ledger_size for link in links), default=0)
            target = _bare(await self._sequencer.reach(ahead))
            asked = _Round((link.id for link in links), self._is_at)
            for link in links:
                update = await self._update(link, target, cosign=cosign)
                self._sent(link, update)
                self._rounds += 1
                request_id = f"{self._prefix}-w{self._rounds}"
                head = pb.ReleaseRequest(request_id=request_id).SerializeToString()
                if update.data:
                    link.ask(request_id, head + update.data, asked)
                else:
                    asked.answered(link.id, pb.ReleaseAnswer(), b"")
            return target, asked

    def _is_at(self, custodian: str, ledger_size: int) -> None:
        """Another coordinator, or a drill's links, took the custodian further."""
        if ledger_size <= self._sequencer.latest.checkpoint.size:
            self._places[custodian] = _Place(self._fanout.links[custodian].connections, ledger_size)

    def _verified(self, target: SignedCheckpoint, answers: dict[str, bytes]) -> dict[str, tuple[NoteSignature, ...]]:
        """Both lines of each custodian whose cosignatures are good: one bad line would spoil the note for everybody."""
        now = int(self._clock())
        out: dict[str, tuple[NoteSignature, ...]] = {}
        for custodian, data in answers.items():
            keys = self._keys[custodian]
            try:
                note = Note(target.note.text, parse_signature_lines(data, f"the cosignatures of {custodian}"))
                seen = witnessed(note, target.checkpoint, {custodian: keys}, now=now, oldest=now - CLOCK_SKEW)
            except KeyquorumError as error:
                _log.warning("ledger.bad_cosignature", custodian=custodian, reason=str(error.reason))
                continue
            if custodian not in seen.current:
                _log.warning("ledger.bad_cosignature", custodian=custodian, reason="missing, or of another time")
                continue
            out[custodian] = tuple(line for key in keys if (line := note.signature_of(key)) is not None)
        return out

    def _chosen(self, cosigned: Iterable[str]) -> list[str]:
        """As many as a note has room for, and still a quorum; the same ones from round to round where they can be."""
        chosen = sorted(cosigned)
        for name in reversed(list(chosen)):
            if len(chosen) <= MAX_COSIGNERS:
                break
            rest = [each for each in chosen if each != name]
            if self._fanout.quorum.is_qualified(rest):
                chosen = rest
        return chosen

    async def _look_at(self, refusals: dict[str, KeyquorumError]) -> None:
        """A custodian's alarm, once each, into the log and the ledger itself, if that takes it."""
        for custodian, error in refusals.items():
            evidence = error.details.get("evidence", "")
            if error.reason not in _ALARMS or (custodian, evidence) in self._alarms:
                continue
            self._alarms.add((custodian, evidence))
            _log.error("ledger.alarm", custodian=custodian, **error.as_dict())
            leaf = _alarm_leaf(custodian, error, int(self._clock()))
            if leaf:
                await self._sequencer.append(leaf, b"alarm:" + hashlib.sha256(leaf).digest())


def _alarm_leaf(custodian: str, error: KeyquorumError, now: int) -> bytes:
    try:
        return Alarm(
            alarm=error.details.get("alarm", ""),
            seat=custodian_seat(custodian),
            evidence_sha256=error.details.get("evidence", ""),
            time=now,
        ).to_bytes()
    except KeyquorumError:  # not something that a custodian of ours says
        return b""


def _bare(signed: SignedCheckpoint) -> SignedCheckpoint:
    """With the log's own two lines only."""
    return SignedCheckpoint(signed.checkpoint, Note(signed.note.text, signed.note.signatures[:2]), signed.signed_at)
