"""One drill under way, as its kinds see it: probes, faults, ceremonies of the canary, checks, the clock, the timeline.

A drill asks custodians over connections of its own, so that a custodian that is silent or slow for the canary is
neither left alone nor thought slow by anybody else's releases. Of other keys it sees what custodians say that they
hold, and only to assert that nothing about that changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio

from keyquorum_coordinator.ceremonies import Ceremonies, KeyEpoch
from keyquorum_coordinator.drills.probing import Derived, Probe, Prober
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.orders import policy_plan, read_certificate
from keyquorum_coordinator.releases import Releases
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.ceremony_plan import CeremonyPlan, unsigned_plan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.drill_report import FULL, KINDS, MAX_CHECKS, MAX_MOMENTS, Check, Moment, Outcome, Part, clip
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["FAULT_SECONDS", "LostError", "Order", "Rehearsal", "Tools", "lift_everywhere"]

FAULT_SECONDS = 120
"""After which a fault ends by itself, should nobody be there to lift it."""
_CALL_SECONDS = 10.0
_BACK_SECONDS = 40.0
_PAUSE = 0.25
_RETRIES = 3
_MOMENTS = MAX_MOMENTS - 2 * (len(KINDS) + 1)
"""So that the report has room for the start and the end of each part, and of the drill, however much happens."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be rehearsed. ``revoke`` and ``lift``: the operators' documents, empty where nobody signed any."""

    drill_id: str
    kind: str
    key_id: str
    revoke: bytes = b""
    lift: bytes = b""
    scheduled: bool = False


@dataclass(frozen=True, slots=True)
class Tools:
    """What a drill works with. ``fanout``, ``witnesses``, ``releases`` and ``prober`` are its own; the rest is the
    coordinator's. ``another``: makes what another coordinator over the same database drives ceremonies with, for
    *coordinator-loss*: its own links, and ceremonies over them. ``deadline``: of the drill's releases, seconds."""

    keys: LoadedKeys
    fanout: Fanout
    witnesses: Witnesses
    releases: Releases
    prober: Prober
    ceremonies: Ceremonies
    withdrawals: Withdrawals
    sequencer: Sequencer
    another: Callable[[], tuple[Fanout, Ceremonies]]
    classification: str
    deadline: float
    clock: Callable[[], float]


class LostError(Exception):
    """A check without which going on with this kind makes no sense did not pass; it is in the report."""


class Rehearsal:
    """``tell`` hears each entry of the timeline as it comes."""

    def __init__(self, tools: Tools, order: Order, tell: Callable[[Moment], None]) -> None:
        self.tools = tools
        self.order = order
        self.key_id = order.key_id
        self.quorum = tools.fanout.quorum
        self.ids = tuple(sorted(self.quorum.ids))
        self.timeline: list[Moment] = []
        self.parts: list[Part] = []
        self.keys: dict[int, Derived] = {}
        """The canary's key by epoch, as it was derived first."""
        self.epoch = 0
        self._tell = tell
        self._began = time.monotonic()
        self._kind = order.kind
        self._part_began = 0
        self._checks: list[Check] = []
        self._faulted: list[str] = []
        self._detect: int | None = None
        self._recover: int | None = None
        self._mark = 0
        self._missed: list[str] = []
        self._undos: list[Callable[[], Awaitable[str]]] = []

    # -- clock and timeline -------------------------------------------------------------------------------------------

    @property
    def now_ms(self) -> int:
        return round((time.monotonic() - self._began) * 1000)

    def say(self, step: str, text: str, custodian: str = "") -> None:
        """An entry in the timeline."""
        moment = Moment(self.now_ms, self._kind, step, custodian, clip(text))
        if len(self.timeline) < _MOMENTS or step in ("start", "done"):
            self.timeline.append(moment)
        self._tell(moment)

    def mark(self, at_ms: int | None = None) -> None:
        """What is detected, or has recovered, is measured from here on, or from a moment before."""
        self._mark = self.now_ms if at_ms is None else at_ms

    def detected(self, text: str, custodian: str = "") -> None:
        """Time to detect, unless it was taken already."""
        if self._detect is None:
            self._detect = self.now_ms - self._mark
        self.say("detect", text, custodian)

    def recovered(self, text: str, custodian: str = "") -> None:
        """Time to recover, unless it was taken already."""
        if self._recover is None:
            self._recover = self.now_ms - self._mark
        self.say("recover", text, custodian)

    def check(self, what: str, passed: bool, *, expected: object, actual: object) -> bool:
        """Assert. Going on after one that did not pass is for the caller to decide."""
        if len(self._checks) < MAX_CHECKS:
            self._checks.append(Check(clip(what), clip(str(expected)), clip(str(actual)), passed))
        elif not passed:
            self._checks[-1] = Check(clip(what), clip(str(expected)), clip(str(actual)), passed)
        self.say("check", f"{'passed' if passed else 'FAILED'}: {what}" + ("" if passed else f"; {actual}"))
        return passed

    def require(self, what: str, passed: bool, *, expected: object, actual: object) -> None:
        """Assert, and end this kind here if it did not pass."""
        if not self.check(what, passed, expected=expected, actual=actual):
            raise LostError(what)

    # -- a part -------------------------------------------------------------------------------------------------------

    async def rehearse(self, kind: str, play: Callable[[Rehearsal], Awaitable[None]]) -> Part:
        """Run one kind, undo what it injected, and see that all is as it was. Never raises but for cancellation, and
        then it has been undone all the same."""
        self._kind, self._part_began = kind, self.now_ms
        self._checks, self._faulted, self._detect, self._recover = [], [], None, None
        self.say("start", kind)
        error: KeyquorumError | None = None
        cut = False
        try:
            before = await self._before()
            await play(self)
            await self.undo()
            await self._after(before)
        except LostError:
            pass
        except KeyquorumError as caught:
            error = caught
        except asyncio.CancelledError:
            cut = True
        finally:
            await asyncio.shield(self.undo())
        part = self._part(kind, error, cut)
        self.parts.append(part)
        self.say("done", f"{kind}: {part.outcome}" + (f", {part.cause}" if part.cause else ""))
        self._kind = self.order.kind
        if cut:
            raise asyncio.CancelledError
        return part

    def skip(self, kind: str, why: str) -> None:
        """A part of a full drill that cannot be rehearsed this time."""
        self._kind = kind
        self.parts.append(Part(kind, self.now_ms, 0, Outcome.SKIPPED, cause=clip(why)))
        self.say("note", f"left out: {why}")
        self._kind = FULL

    def _part(self, kind: str, error: KeyquorumError | None, cut: bool) -> Part:
        passed = error is None and not cut and bool(self._checks) and all(each.passed for each in self._checks)
        outcome = Outcome.INTERRUPTED if cut else Outcome.PASSED if passed else Outcome.FAILED
        failed = next((each.what for each in self._checks if not each.passed), "")
        cause = ""
        if error is not None:
            cause = f"{error.reason}: {error.message}"
        elif cut:
            cause = "it was cancelled, or its coordinator was stopped"
        elif not passed:
            cause = f"not so: {failed}" if failed else "nothing was checked"
        return Part(
            kind=kind,
            at_ms=self._part_began,
            duration_ms=self.now_ms - self._part_began,
            outcome=outcome,
            custodians=tuple(dict.fromkeys(self._faulted)),
            detect_ms=self._detect,
            recover_ms=self._recover,
            reason=str(error.reason) if error is not None else "",
            cause=clip(cause),
            checks=tuple(self._checks),
        )

    async def _before(self) -> dict[str, dict[tuple[str, int], str]]:
        """All is well before the fault, or there is nothing to rehearse; what custodians hold of other keys."""
        self.epoch = (await self.newest()).epoch
        probe = await self.probe()
        self.require(
            "before: every custodian serves the canary, and its key is the one derived before",
            set(probe.served) == set(self.ids) and not probe.blamed and self.right(probe),
            expected=f"shares from {', '.join(self.ids)}, and the same key",
            actual=probe.words() + ("" if self.right(probe) else "; another key, or none"),
        )
        return await self.others()

    async def _after(self, before: dict[str, dict[tuple[str, int], str]]) -> None:
        """All is as it was."""
        self.epoch = (await self.newest()).epoch
        probe = await self.until(lambda found: set(found.served) == set(self.ids) and not found.blamed)
        whole = set(probe.served) == set(self.ids) and not probe.blamed and self.right(probe)
        if whole and self._recover is None and self._faulted:
            self.recovered("every custodian serves again")
        self.check(
            "after: every custodian serves the canary, and its key is right",
            whole,
            expected=f"shares from {', '.join(self.ids)}, and the same key",
            actual=probe.words(),
        )
        after = await self.others()
        self.check(
            "other keys: custodians hold of them what they held before",
            after == before,
            expected="no change",
            actual="no change" if after == before else self._change(before, after),
        )

    @property
    def undone(self) -> bool:
        """Whether all that was injected is known to be gone."""
        return not self._undos and not self._missed

    @staticmethod
    def _change(before: dict[str, dict[tuple[str, int], str]], after: dict[str, dict[tuple[str, int], str]]) -> str:
        lines = []
        for name in sorted(before | after):
            old, new = before.get(name, {}), after.get(name, {})
            lines += [f"{name}: {key} epoch {epoch}" for key, epoch in sorted({*old.items()} ^ {*new.items()})][:4]
        return "; ".join(lines)

    # -- the canary ---------------------------------------------------------------------------------------------------

    async def newest(self) -> KeyEpoch:
        """The canary's newest epoch, as the coordinator knows it."""
        return await self.tools.ceremonies.key(self.key_id)

    async def probe(self, epoch: int = 0) -> Probe:
        """Ask for the canary's key, of its newest epoch or another."""
        number = epoch or self.epoch
        found = await self.tools.prober.probe(self.key_id, number, self.keys.get(number))
        if found.key is not None and not found.blamed and number not in self.keys:
            self.keys[number] = found.key
        return found

    def right(self, probe: Probe) -> bool:
        """Whether the key came, and is the one that was derived first."""
        return probe.key is not None and probe.key.same(self.keys.get(probe.epoch))

    async def until(self, wanted: Callable[[Probe], bool], seconds: float = _BACK_SECONDS) -> Probe:
        """Probe until it is as wanted, or time is up; the last one."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = await self.probe()
            except KeyquorumError:
                if time.monotonic() > deadline:
                    raise
            else:
                if wanted(found) or time.monotonic() > deadline:
                    return found
            await asyncio.sleep(_PAUSE)

    def someone(self) -> str:
        """The custodian to fail: the first of :meth:`candidates`."""
        return self.candidates()[0]

    def candidates(self) -> list[str]:
        """Custodians to fail: those without which the rest is a quorum, another first from drill to drill."""
        spare = [name for name in self.ids if self.quorum.is_qualified(set(self.ids) - {name})]
        if not spare:
            raise StateError(
                Reason.QUORUM_RULE,
                "the quorum rule lets no custodian be missing, so that none can be failed",
                expected="a rule that some custodian need not be part of",
                actual=self.quorum.words(),
                next_step="This kind of drill passes with a committee that can lose one",
            )
        first = int(self.order.drill_id[:8], 16) % len(spare)
        return [*spare[first:], *spare[:first]]

    async def others(self) -> dict[str, dict[tuple[str, int], str]]:
        """By custodian: the state of each epoch that it says it holds of other keys."""
        await self.tools.fanout.probe_all()
        return {
            name: {where: state for where, state in link.keys.items() if where[0] != self.key_id}
            for name, link in self.tools.fanout.links.items()
        }

    # -- faults -------------------------------------------------------------------------------------------------------

    async def inject(
        self, custodian: str, fault: str, *, seconds: int = FAULT_SECONDS, delay_ms: int = 0, log_key: str = ""
    ) -> pb.FaultState:
        """Have a custodian fail for the canary. Raises what it refuses with."""
        self._faulted.append(custodian)
        request = pb.InjectFaultRequest(
            drill_id=self.order.drill_id,
            key_id=self.key_id,
            fault=fault,
            delay_ms=delay_ms,
            seconds=seconds,
            log_key=log_key,
        )
        link = self.tools.fanout.links[custodian]
        try:
            state = await link.canary.Inject(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            refused = from_rpc_error(error, custodian)
            if refused.reason is Reason.UNSUPPORTED:  # it cannot, and did not
                self._faulted.remove(custodian)
            raise refused from None
        self.say("inject", fault, custodian)
        self.mark()
        return state

    async def lift(self) -> None:
        """End all faults, and measure recovery from here."""
        await self.undo()
        self.mark()

    def undoing(self, step: Callable[[], Awaitable[str]]) -> None:
        """What else has to be done so that all is as it was; the text it returns goes into the timeline."""
        self._undos.append(step)

    async def undo(self) -> None:
        """End all faults, and do what :meth:`undoing` was told, once; what fails is tried at the next call."""
        for step in list(self._undos):
            try:
                self.say("undo", await step())
                self._undos.remove(step)
            except KeyquorumError as error:
                self.say("undo", f"not yet: {error.reason}: {error.message}")
        if self._faulted:
            missed = await lift_everywhere(self.tools.fanout, self.order.drill_id, self.key_id)
            self._missed = missed
            text = "faults lifted" if not missed else f"not reached: {', '.join(missed)}; there it ends by itself"
            self.say("undo", text)

    # -- ceremonies ---------------------------------------------------------------------------------------------------

    async def plan(self, kind: Kind, number: int) -> CeremonyPlan:
        """The plan of a ceremony of the canary, ordered by its policy."""
        subject = number if kind is Kind.DESTROY else (await self.newest()).epoch
        certificate = await self.tools.ceremonies.certificate(self.key_id, subject)
        return policy_plan(
            read_certificate(certificate),
            kind,
            number,
            roster_digest=self.tools.fanout.roster.digest,
            now=int(self.tools.clock()),
        )

    async def rotate(self, ceremonies: Ceremonies | None = None) -> int:
        """Make the canary's next epoch; returns its number. Raises what stops it."""
        before = await self.newest()
        plan = await self.plan(Kind.ROTATE, before.epoch + 1)
        await self.follow(plan, ceremonies)
        return before.epoch + 1

    async def follow(self, plan: CeremonyPlan, ceremonies: Ceremonies | None = None) -> None:
        """Run a ceremony to its end."""
        runs = ceremonies or self.tools.ceremonies
        async with aclosing(runs.run(unsigned_plan(plan))) as steps:
            last = ""
            async for progress in steps:
                if progress.step != last:
                    last = progress.step
                    self.say("note", f"{plan.kind} of epoch {plan.epoch}: {progress.step}")

    async def destroy_older(self) -> list[int]:
        """Destroy the canary's retired epochs, so that they don't pile up; returns which."""
        epochs = await self.tools.ceremonies.keys(self.key_id)
        gone = []
        for each in epochs:
            if each.state == "retired":
                await self.follow(await self.plan(Kind.DESTROY, each.epoch))
                self.keys.pop(each.epoch, None)
                gone.append(each.epoch)
        return gone

    async def described(
        self, wanted: Callable[[dict[str, str]], bool], seconds: float, epoch: int = 0
    ) -> dict[str, str]:
        """Ask custodians what they hold until the states of the canary's epoch, by custodian, are as wanted."""
        deadline = time.monotonic() + seconds
        where = (self.key_id, epoch or self.epoch)
        while True:
            await self.tools.fanout.probe_all()
            states = {name: link.keys.get(where, "") for name, link in self.tools.fanout.links.items()}
            if wanted(states) or time.monotonic() > deadline:
                return states
            await asyncio.sleep(_PAUSE)


async def lift_everywhere(fanout: Fanout, drill_id: str, key_id: str, names: Iterable[str] = ()) -> list[str]:
    """End a drill's faults at all custodians, or those named; who could not be reached. Idempotent."""
    request = pb.LiftFaultRequest(drill_id=drill_id, key_id=key_id)

    async def lift(name: str) -> str:
        for attempt in range(_RETRIES):
            try:
                await fanout.links[name].canary.Lift(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if isinstance(from_rpc_error(error, name), StateError):  # another drill's is there: this one's is over
                    return ""
                await asyncio.sleep(_PAUSE * attempt)
            except KeyquorumError:
                await asyncio.sleep(_PAUSE)
            else:
                return ""
        return name

    found = await asyncio.gather(*map(lift, names or fanout.links))
    return sorted(filter(None, found))
