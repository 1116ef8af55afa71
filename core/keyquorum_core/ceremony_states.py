"""The one state machine of ceremonies: phases, states and legal moves of every kind (DESIGN §9).

:data:`PHASES` says which steps a ceremony has, in order, and what it leaves a custodian in. :data:`MOVES` is the same
as a custodian keeps to it, state by state; :data:`POSITIONS` as a coordinator does, step by step. Both sides persist
where they are before they say anything, refuse every move that is not in the table, and take a move made before as
made.

::

    generate, rotate   propose → deliver → confirm → activate          forward only once the certificate is whole
    repair, replace    propose → give → restore                        nothing changes before the last step
    destroy            propose → erase                                 forward only once everyone agreed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "APPROVAL_PATIENCE",
    "FINAL",
    "MAKING",
    "MOVES",
    "PHASES",
    "PLAN_LIFETIME",
    "PLAN_SKEW",
    "POSITIONS",
    "REBUILDING",
    "Kind",
    "Phase",
    "State",
    "Step",
    "phase",
]


class Kind(StrEnum):
    """What a ceremony is for."""

    GENERATE = "generate"
    """An epoch from nothing: a key's first, or one for a new committee or quorum rule."""
    ROTATE = "rotate"
    """The next epoch from the present one."""
    REPAIR = "repair"
    """A custodian that lacks an epoch's seeds gets them from those who hold them."""
    REPLACE = "replace"
    """As repair, for a custodian that is another than the one the epoch was certified with."""
    DESTROY = "destroy"
    """An epoch's seeds are erased everywhere."""


MAKING: Final = frozenset({Kind.GENERATE, Kind.ROTATE})
REBUILDING: Final = frozenset({Kind.REPAIR, Kind.REPLACE})


class Step(StrEnum):
    """Where a ceremony is, as a coordinator keeps it: what is being asked of custodians, or how it ended."""

    PROPOSE = "propose"
    DELIVER = "deliver"
    CONFIRM = "confirm"
    ACTIVATE = "activate"
    GIVE = "give"
    RESTORE = "restore"
    ERASE = "erase"
    DONE = "done"
    CANCELLED = "cancelled"


class State(StrEnum):
    """Where a custodian is in a ceremony."""

    NEW = "new"
    PENDING = "pending"
    """Waits for this custodian's own operator."""
    PROPOSED = "proposed"
    DELIVERED = "delivered"
    CONFIRMED = "confirmed"
    ACTIVE = "active"
    GIVEN = "given"
    RESTORED = "restored"
    ERASED = "erased"
    """The seeds are gone from the tables; whether from the disk too is not sure before the receipt."""
    DESTROYED = "destroyed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Phase:
    """One step and what it does to a custodian.

    ``attempt``: seconds for one call. ``patience``: seconds until a coordinator stops asking. ``binding``: once the
    step began somewhere, the ceremony can only go forward.
    """

    step: Step
    reaches: frozenset[State]
    attempt: float
    patience: float
    binding: bool = False


def _phase(step: Step, *reaches: State, binding: bool = False, patience: float = 300.0) -> Phase:
    return Phase(step, frozenset(reaches), attempt=60.0, patience=patience, binding=binding)


_MAKE: Final = (
    _phase(Step.PROPOSE, State.PROPOSED),
    _phase(Step.DELIVER, State.DELIVERED),
    _phase(Step.CONFIRM, State.CONFIRMED),
    _phase(Step.ACTIVATE, State.ACTIVE, binding=True),
)
_REBUILD: Final = (
    _phase(Step.PROPOSE, State.PROPOSED),
    _phase(Step.GIVE, State.GIVEN),
    _phase(Step.RESTORE, State.RESTORED),
)

PHASES: Final[Mapping[Kind, tuple[Phase, ...]]] = {
    Kind.GENERATE: _MAKE,
    Kind.ROTATE: _MAKE,
    Kind.REPAIR: _REBUILD,
    Kind.REPLACE: _REBUILD,
    Kind.DESTROY: (
        _phase(Step.PROPOSE, State.PROPOSED),
        _phase(Step.ERASE, State.DESTROYED, binding=True),
    ),
}
APPROVAL_PATIENCE: Final = 7 * 86400
"""Seconds that a ceremony waits for custodians' operators before it is given up."""
PLAN_LIFETIME: Final = 8 * 86400
"""Seconds after its date that a plan may still begin, or erase: an order that everyone forgot is no order any more."""
PLAN_SKEW: Final = 300
"""Seconds that a plan's date may be ahead of a custodian's clock."""

FINAL: Final = frozenset({State.ACTIVE, State.GIVEN, State.RESTORED, State.DESTROYED})
"""States in which a custodian's part is done."""

_STATES_MAKING: Final[Mapping[State, frozenset[State]]] = {
    State.NEW: frozenset({State.PENDING, State.PROPOSED}),
    State.PENDING: frozenset({State.PROPOSED, State.CANCELLED}),
    State.PROPOSED: frozenset({State.DELIVERED, State.CANCELLED}),
    State.DELIVERED: frozenset({State.CONFIRMED, State.CANCELLED}),
    State.CONFIRMED: frozenset({State.ACTIVE, State.CANCELLED}),
    State.ACTIVE: frozenset(),
    State.CANCELLED: frozenset({State.ACTIVE}),  # from confirmed only, and only on a complete certificate
}
_STATES_REBUILDING: Final[Mapping[State, frozenset[State]]] = {
    State.NEW: frozenset({State.PENDING, State.PROPOSED}),
    State.PENDING: frozenset({State.PROPOSED, State.CANCELLED}),
    State.PROPOSED: frozenset({State.GIVEN, State.RESTORED, State.CANCELLED}),  # a co-holder's end, the target's end
    State.GIVEN: frozenset(),
    State.RESTORED: frozenset(),
    State.CANCELLED: frozenset(),
}
_STATES_DESTROYING: Final[Mapping[State, frozenset[State]]] = {
    State.NEW: frozenset({State.PENDING, State.PROPOSED}),
    State.PENDING: frozenset({State.PROPOSED, State.CANCELLED}),
    State.PROPOSED: frozenset({State.ERASED, State.CANCELLED}),
    State.ERASED: frozenset({State.DESTROYED}),
    State.DESTROYED: frozenset(),
    State.CANCELLED: frozenset(),
}

MOVES: Final[Mapping[Kind, Mapping[State, frozenset[State]]]] = {
    Kind.GENERATE: _STATES_MAKING,
    Kind.ROTATE: _STATES_MAKING,
    Kind.REPAIR: _STATES_REBUILDING,
    Kind.REPLACE: _STATES_REBUILDING,
    Kind.DESTROY: _STATES_DESTROYING,
}
"""Kind → a custodian's state → the states it may move to."""


def _positions(kind: Kind) -> Mapping[Step, frozenset[Step]]:
    phases = PHASES[kind]
    following = [*(each.step for each in phases[1:]), Step.DONE]
    return {
        each.step: frozenset({after} if each.binding else {after, Step.CANCELLED})
        for each, after in zip(phases, following, strict=True)
    }


POSITIONS: Final[Mapping[Kind, Mapping[Step, frozenset[Step]]]] = {kind: _positions(kind) for kind in Kind}
"""Kind → a coordinator's step → the steps it may go on to."""


def phase(kind: Kind, step: Step) -> Phase:
    """The phase of ``kind`` with that step. Raises :class:`KeyError` for a step that the kind does not have."""
    return {each.step: each for each in PHASES[kind]}[step]
