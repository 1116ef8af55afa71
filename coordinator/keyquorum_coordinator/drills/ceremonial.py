"""Drills of the canary's seeds: rotated, lost and repaired, erased and restored, rotated by two coordinators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial

from keyquorum_coordinator.drills.probing import Probe
from keyquorum_coordinator.drills.rehearsal import Rehearsal
from keyquorum_core.ceremony_plan import CeremonyPlan, unsigned_plan
from keyquorum_core.ceremony_states import Kind, Step
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.ledger.log_keys import open_checkpoint
from keyquorum_protos.v1 import drills_pb2 as pb

__all__ = ["coordinator_loss", "repair", "restore", "rotation"]

_TOLD_SECONDS = 20.0
_NOTICED_SECONDS = 60.0
_REPAIRED_SECONDS = 60.0
_BETWEEN_PROBES = 0.1


async def rotation(drill: Rehearsal) -> None:
    """*detect*: from the order until every custodian says that the new epoch is in use. *recover*: until the new epoch
    serves."""
    old = drill.epoch
    found: list[Probe] = []
    refused: list[KeyquorumError] = []
    drill.mark()
    with _asking(drill, old, found, refused):
        new = await drill.rotate()
        states = await drill.described(lambda held: set(held.values()) == {"active"}, _TOLD_SECONDS, new)
    if set(states.values()) == {"active"}:
        drill.detected(f"every custodian has epoch {new}")
    drill.check(
        "every custodian has the new epoch",
        set(states.values()) == {"active"},
        expected=f"epoch {new} active at {', '.join(drill.ids)}",
        actual=", ".join(f"{name} {state or 'without'}" for name, state in sorted(states.items())),
    )
    wrong = [each for each in found if not drill.right(each)]
    drill.check(
        "releases went on while it rotated, with the same key",
        bool(found) and not wrong and not refused,
        expected="each of them a key, and the same",
        actual=f"{len(found) - len(wrong)} of {len(found) + len(refused)}"
        + (f"; {refused[0].reason}" if refused else ""),
    )
    drill.epoch = new
    fresh = await drill.probe()
    if fresh.key is not None:
        drill.recovered(f"epoch {new} serves")
    before = await drill.probe(old)
    drill.check(
        "both epochs serve, each with its own key",
        drill.right(before) and drill.right(fresh) and not drill.keys[new].same(drill.keys.get(old)),
        expected="the same key as before under the old epoch, another under the new",
        actual=f"old: {before.words()}; new: {fresh.words()}",
    )
    await _retire(drill, old)


async def _retire(drill: Rehearsal, old: int) -> None:
    gone = await drill.destroy_older()
    states = await drill.described(lambda held: not {"active", "retired"} & set(held.values()), _TOLD_SECONDS, old)
    after = await drill.probe(old)
    drill.check(
        "the old epoch is destroyed everywhere, and serves nobody any more",
        old in gone and not {"active", "retired"} & set(states.values()) and after.key is None and not after.served,
        expected="no seeds, and refusals",
        actual=f"destroyed: {', '.join(map(str, gone)) or 'none'}; {after.words()}",
    )


@contextlib.contextmanager
def _asking(drill: Rehearsal, epoch: int, found: list[Probe], refused: list[KeyquorumError]) -> Iterator[None]:
    """Ask for the key of ``epoch`` again and again meanwhile."""

    async def ask() -> None:
        while True:
            try:
                found.append(await drill.probe(epoch))
            except KeyquorumError as error:
                refused.append(error)
            await asyncio.sleep(_BETWEEN_PROBES)

    task = asyncio.create_task(ask())
    try:
        yield
    finally:
        task.cancel()


async def repair(drill: Rehearsal) -> None:
    """*detect*: from the loss until the coordinator has noticed, by itself, that the custodian lacks the epoch.
    *recover*: until it serves again."""
    victim = drill.someone()
    held = len(drill.quorum.indices_of(victim))
    before = await _repairs(drill)
    state = await drill.inject(victim, "lost")
    drill.check("the custodian lost all its seeds", state.seeds == held, expected=held, actual=state.seeds)
    found = await drill.probe()
    drill.check(
        "without them the others serve, and it does not",
        drill.right(found) and victim not in found.served,
        expected=f"the same key, without {victim}",
        actual=found.words(),
    )
    noticed = await _wait(_NOTICED_SECONDS, partial(_is_noticed, drill, victim, before))
    if noticed:
        drill.detected("it is stale, to be repaired", victim)
    drill.require("the coordinator notices what it lost", noticed, expected=f"{victim} stale", actual="nobody noticed")
    whole = await _wait(_REPAIRED_SECONDS, partial(_is_whole, drill, victim))
    states = await drill.described(lambda each: each.get(victim) == "active", _TOLD_SECONDS)
    drill.check(
        "its co-holders give its seeds back",
        whole and states.get(victim) == "active",
        expected=f"epoch {drill.epoch} active at {victim}",
        actual=f"{states.get(victim) or 'nothing'}{'' if whole else ', still stale'}",
    )
    back = await drill.probe()
    if victim in back.served and not back.blamed:
        drill.recovered("it serves again", victim)
    drill.check(
        "what it got back is right",
        victim in back.served and not back.blamed and drill.right(back),
        expected=f"a share of {victim} that agrees with the others'",
        actual=back.words(),
    )


async def _repairs(drill: Rehearsal) -> set[str]:
    records = await drill.tools.ceremonies.records(drill.key_id)
    return {each.ceremony_id for each in records if each.kind == Kind.REPAIR}


async def _is_noticed(drill: Rehearsal, victim: str, before: set[str]) -> bool:
    """It is known to be stale, or is being repaired already."""
    return victim in (await drill.newest()).stale or bool(await _repairs(drill) - before)


async def _is_whole(drill: Rehearsal, victim: str) -> bool:
    return victim not in (await drill.newest()).stale


async def _wait(seconds: float, wanted: Callable[[], Awaitable[bool]]) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await wanted():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.2)
    return True


async def restore(drill: Rehearsal) -> None:
    """*detect*: until the custodian says that it erased its seeds and has them back, proven by the epoch's certificate.
    *recover*: until a share made from them agrees with the others'."""
    victim, state, began = await _restored(drill)
    held = len(drill.quorum.indices_of(victim))
    took = drill.now_ms - began
    drill.mark(began)
    if state.seeds:
        drill.detected(f"{state.seeds} seeds erased, restored and proven in {took} ms", victim)
    drill.check("all its seeds came back", state.seeds == held, expected=held, actual=state.seeds)
    found = await drill.probe()
    if victim in found.served and not found.blamed:
        drill.recovered("it serves from what was restored", victim)
    drill.check(
        "what was restored is right",
        victim in found.served and not found.blamed and drill.right(found),
        expected=f"a share of {victim} that agrees with the others'",
        actual=found.words(),
    )


async def _restored(drill: Rehearsal) -> tuple[str, pb.FaultState, int]:
    """The first custodian that can be restored, what it says, and when it was asked. Raises what they refuse with."""
    *_, last = names = drill.candidates()
    for name in names:
        began = drill.now_ms
        try:
            return name, await drill.inject(name, "restored"), began
        except UnavailableError as error:
            if error.reason is not Reason.UNSUPPORTED or name == last:
                raise
            drill.say("note", "a hardware module holds its seeds, and no backup: another one", name)
    raise AssertionError("the last one returns or raises")


async def coordinator_loss(drill: Rehearsal) -> None:
    """What drives a ceremony is gone, in the middle of a step, with what it knew; what a coordinator does when it
    starts goes on from what is stored, over connections of its own. All in this process, which does not die.

    *detect*: from the death until the ceremony is found where it was left. *recover*: until it is ended and the new
    epoch serves."""
    drill.say("note", "in this process: the ceremony is dropped, and what a coordinator does at its start goes on")
    old = drill.epoch
    plan = await drill.plan(Kind.ROTATE, old + 1)
    reached = await _begin_and_die(drill, plan)
    drill.say("inject", f"the ceremony's driver was dropped at {reached}")
    drill.mark()
    record = await _record(drill, plan)
    if record not in ("", Step.DONE, Step.CANCELLED):
        drill.detected(f"the rotation stands at {record}, and nobody drives it")
    drill.require(
        "the rotation stays where it was left",
        record not in ("", Step.DONE, Step.CANCELLED) and (await drill.newest()).epoch == old,
        expected=f"between two steps, epoch {old} in use",
        actual=record or "nothing is known of it",
    )
    found = await drill.probe()
    drill.check(
        "meanwhile the epoch before serves",
        drill.right(found) and set(found.served) == set(drill.ids),
        expected="the same key from every custodian",
        actual=found.words(),
    )
    fanout, ceremonies = drill.tools.another()
    async with fanout:
        with contextlib.suppress(TimeoutError):
            await fanout.ready()
        try:
            count = await ceremonies.resume(drill.key_id)
            drill.check("what a coordinator does at its start takes it up", count == 1, expected=1, actual=count)
            await drill.follow(plan, ceremonies)
        finally:
            await ceremonies.close()
    ended = await _record(drill, plan)
    drill.require("another coordinator ends it", ended == Step.DONE, expected=Step.DONE, actual=ended)
    drill.epoch = old + 1
    fresh = await drill.until(lambda each: set(each.served) == set(drill.ids))
    if fresh.key is not None:
        drill.recovered(f"epoch {old + 1} serves")
    drill.check(
        "the epoch that both made serves at every custodian",
        drill.right(fresh) and set(fresh.served) == set(drill.ids) and not fresh.blamed,
        expected="one key from every custodian",
        actual=fresh.words(),
    )
    await _ledger_is_sound(drill)
    await drill.destroy_older()


async def _begin_and_die(drill: Rehearsal, plan: CeremonyPlan) -> str:
    """Drive it until the first custodian has delivered; then stop as a kill would: nobody is told, nothing is
    cancelled."""
    fanout, ceremonies = drill.tools.another()
    async with fanout:
        with contextlib.suppress(TimeoutError):
            await fanout.ready()
        async with aclosing(ceremonies.run(unsigned_plan(plan))) as steps:
            async for progress in steps:
                if progress.step == Step.DELIVER and progress.custodian:
                    break
        await ceremonies.close()
    return await _record(drill, plan)


async def _record(drill: Rehearsal, plan: CeremonyPlan) -> str:
    records = await drill.tools.ceremonies.records(drill.key_id)
    return next((each.step for each in records if each.ceremony_id == plan.ceremony_id), "")


async def _ledger_is_sound(drill: Rehearsal) -> None:
    """The log that all coordinators share has all that any custodian has seen of it, under the roster's keys."""
    tools = drill.tools
    seen = {name: link.ledger_size for name, link in tools.fanout.links.items()}
    published = await tools.sequencer.reach(max(seen.values()))
    size, problem = published.checkpoint.size, ""
    try:
        log = tools.fanout.roster.log_key
        if log is None:
            problem = "the roster names no log"
        else:
            open_checkpoint(published.encode(), log)
    except KeyquorumError as error:
        problem = f"{error.reason}: {error.message}"
    drill.check(
        "the ledger lost nothing: its checkpoint is signed, and no custodian has seen more",
        not problem and size >= max(seen.values()),
        expected=f"at least {max(seen.values())} leaves",
        actual=problem or f"{size} leaves",
    )
