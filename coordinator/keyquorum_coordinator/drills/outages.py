"""Drills of custodians that fail while the canary's key is asked for: silent, slow, lying."""

from __future__ import annotations

import asyncio
from collections import Counter

from keyquorum_coordinator.circuit import CircuitState
from keyquorum_coordinator.drills.probing import Probe
from keyquorum_coordinator.drills.rehearsal import Rehearsal
from keyquorum_coordinator.link import Link
from keyquorum_core.errors import KeyquorumError

__all__ = ["custodian_loss", "lying_custodian", "slow_custodian"]

_ASKED_AT_ONCE = 3
_CIRCUIT_SECONDS = 3.0
_LOOK = 0.05
_NEVER = 1 << 30


async def custodian_loss(drill: Rehearsal) -> None:
    """*detect*: until the coordinator leaves the silent custodian alone. *recover*: from the end of the fault until
    every custodian serves again."""
    victim = drill.someone()
    link = drill.tools.fanout.links[victim]
    await drill.inject(victim, "silent")
    found = await asyncio.gather(*(drill.probe() for _ in range(_ASKED_AT_ONCE)))
    drill.check(
        "while it is silent, releases reach the quorum with the same key, and do not wait for it",
        all(drill.right(each) and _before(each, drill.tools.deadline) for each in found),
        expected=f"the same key within {drill.tools.deadline:g} s, {_ASKED_AT_ONCE} times",
        actual=_quorum_times(found),
    )
    drill.check(
        "the answer that did not come is told to whoever asked",
        all(victim in each.failed and victim not in each.served for each in found),
        expected=f"{victim} named as failed each time",
        actual="; ".join(each.words() for each in found[:1]),
    )
    state = await _circuit_of(link)
    if state is not CircuitState.CLOSED:
        drill.detected(f"its circuit is {state}: {link.last_error.message if link.last_error else ''}", victim)
    drill.check(
        "the coordinator leaves the silent custodian alone, and no other",
        state is not CircuitState.CLOSED and _closed_but(drill, victim),
        expected=f"the circuit of {victim} open, all others closed",
        actual=", ".join(f"{name} {each.circuit_state()}" for name, each in sorted(drill.tools.fanout.links.items())),
    )
    await drill.lift()


async def slow_custodian(drill: Rehearsal) -> None:
    """*detect*: until the coordinator ranks the slow custodian last. *recover*: from the end of the fault until it
    answers in time."""
    victim = drill.someone()
    delay = round(drill.tools.deadline * 500)
    await drill.inject(victim, "slow", delay_ms=delay)
    found = await drill.probe()
    slowest = drill.tools.fanout.ranked()[-1].id
    if slowest == victim:
        drill.detected("it is asked last from now on", victim)
    drill.check(
        "a slow custodian does not slow releases down",
        drill.right(found) and _before(found, delay / 1000),
        expected=f"the same key in less than {delay} ms",
        actual=_quorum_times([found]),
    )
    drill.check(
        "its answer counts all the same when it comes",
        found.served.get(victim, 0) >= delay and not found.blamed,
        expected=f"a share of {victim} after {delay} ms, nobody blamed",
        actual=f"{found.words()}; {victim} after {found.served.get(victim, 0)} ms",
    )
    drill.check("who was slow is named", slowest == victim, expected=victim, actual=slowest)
    await drill.lift()
    back = await drill.until(lambda each: each.served.get(victim, _NEVER) < delay)
    if drill.check(
        "once the fault ends it answers in time",
        back.served.get(victim, _NEVER) < delay,
        expected=f"{victim} within {delay} ms",
        actual=f"{victim} after {back.served[victim]} ms" if victim in back.served else back.words(),
    ):
        drill.recovered(f"it answered after {back.served[victim]} ms", victim)


async def lying_custodian(drill: Rehearsal) -> None:
    """*detect*: until the liar is named. *recover*: from the end of the fault until a rotation that it had spoilt is
    through and every custodian serves."""
    victim = drill.someone()
    await drill.inject(victim, "lying")
    found = await drill.probe()
    if victim in found.blamed:
        drill.detected("it gave contributions that contradict the others'", victim)
    drill.check(
        "wrong contributions are found out, and their author named",
        found.blamed == (victim,),
        expected=victim,
        actual=", ".join(found.blamed) or "nobody blamed",
    )
    drill.check(
        "the others' answers give the right key all the same",
        drill.right(found),
        expected="the same key",
        actual="the same key" if drill.right(found) else "another key, or none",
    )
    await _spoilt_rotation(drill, victim)
    await drill.lift()
    number = await drill.rotate()
    drill.epoch = number
    drill.check("once the fault ends the rotation succeeds", True, expected="a new epoch", actual=f"epoch {number}")
    await drill.destroy_older()


async def _spoilt_rotation(drill: Rehearsal, victim: str) -> None:
    """The liar commits to other seeds than its co-holders: the rotation is void, and the epoch stays as it is."""
    stop: KeyquorumError | None = None
    try:
        await drill.rotate()
    except KeyquorumError as error:
        stop = error
    commitments = {
        name.removeprefix("commitment."): value
        for name, value in (stop.details if stop is not None else {}).items()
        if name.startswith("commitment.")
    }
    count = Counter(commitments.values())
    alone = sorted(name for name, value in commitments.items() if count[value] == 1)
    named = victim in alone if len(commitments) > 2 else victim in commitments
    drill.check(
        "a rotation with wrong commitments is given up, naming who stands against the others",
        stop is not None and named,
        expected=f"{victim} against its co-holders",
        actual="it went through" if stop is None else f"{', '.join(alone) or ', '.join(commitments)}: {stop.message}",
    )
    newest = await drill.newest()
    states = await drill.described(lambda held: set(held.values()) == {"active"}, 5.0)
    found = await drill.probe()
    drill.check(
        "the epoch before is intact",
        newest.epoch == drill.epoch and set(states.values()) == {"active"} and drill.right(found),
        expected=f"epoch {drill.epoch} active everywhere, with the same key",
        actual=f"epoch {newest.epoch}, "
        + ", ".join(f"{name} {state or 'lost'}" for name, state in sorted(states.items())),
    )


async def _circuit_of(link: Link) -> CircuitState:
    """Once it is not closed any more, or will not change."""
    for _ in range(round(_CIRCUIT_SECONDS / _LOOK)):
        if link.circuit_state() is not CircuitState.CLOSED:
            break
        await asyncio.sleep(_LOOK)
    return link.circuit_state()


def _before(probe: Probe, seconds: float) -> bool:
    return probe.quorum_ms is not None and probe.quorum_ms < seconds * 1000


def _closed_but(drill: Rehearsal, victim: str) -> bool:
    return all(
        each.circuit_state() is CircuitState.CLOSED for name, each in drill.tools.fanout.links.items() if name != victim
    )


def _quorum_times(probes: list[Probe]) -> str:
    return ", ".join("no key" if each.quorum_ms is None else f"{each.quorum_ms} ms" for each in probes)
