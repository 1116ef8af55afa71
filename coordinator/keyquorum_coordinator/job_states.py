"""The states of a job and the moves between them: one table, no storage, no clock.

A job waits (submitted, opened, ready), is held by a worker (claimed … uploading), or has ended. A worker that falls
silent loses the job: it is ready again, at most :data:`MAX_ATTEMPTS` times.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from types import MappingProxyType

from keyquorum_core.errors import Reason, StateError

__all__ = ["FINAL", "HELD", "MAX_ATTEMPTS", "MOVES", "WAITING", "JobState", "after_silence", "check_move", "is_legal"]

MAX_ATTEMPTS = 3
"""How often a job is handed to a worker before it counts as failed."""


class JobState(StrEnum):
    SUBMITTED = "submitted"  # the manifest is stored
    OPENED = "opened"  # a quorum answered the owner, who can encrypt the bundle
    READY = "ready"  # the bundle is here and the owner signed the opening
    CLAIMED = "claimed"
    ATTESTING = "attesting"
    RUNNING = "running"
    UPLOADING = "uploading"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


WAITING = (JobState.SUBMITTED, JobState.OPENED, JobState.READY)
HELD = (JobState.CLAIMED, JobState.ATTESTING, JobState.RUNNING, JobState.UPLOADING)
FINAL = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)

# A held job may lose its worker (ready, or expired when its time is over by then), end, or be claimed again by the
# same worker after that one was restarted. A statement ends a job from wherever its worker was last heard of: reports
# are news, and a lost one must not lose the result.
_LEAVE_HELD = frozenset(
    {
        JobState.CLAIMED,
        JobState.READY,
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.EXPIRED,
    }
)

MOVES: MappingProxyType[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.SUBMITTED: frozenset({JobState.OPENED, JobState.CANCELLED, JobState.EXPIRED}),
        JobState.OPENED: frozenset({JobState.READY, JobState.CANCELLED, JobState.EXPIRED}),
        JobState.READY: frozenset({JobState.CLAIMED, JobState.CANCELLED, JobState.EXPIRED}),
        JobState.CLAIMED: (_LEAVE_HELD - {JobState.CLAIMED})
        | {JobState.ATTESTING, JobState.RUNNING, JobState.UPLOADING},
        JobState.ATTESTING: _LEAVE_HELD | {JobState.RUNNING, JobState.UPLOADING},
        JobState.RUNNING: _LEAVE_HELD | {JobState.UPLOADING},
        JobState.UPLOADING: _LEAVE_HELD,
        **dict.fromkeys(FINAL, frozenset[JobState]()),
    }
)


def is_legal(current: JobState, wanted: JobState) -> bool:
    return wanted in MOVES[current]


def check_move(job_id: str, current: JobState, wanted: JobState) -> None:
    """Raises :class:`StateError` (``STATE``) for a move that the table does not have."""
    if not is_legal(current, wanted):
        raise illegal(job_id, current, MOVES[current], f"become {wanted}")


def illegal(job_id: str, current: JobState, expected: Iterable[JobState], what: str) -> StateError:
    """The error for doing ``what`` in a state that does not allow it."""
    return StateError(
        Reason.STATE,
        f"job {job_id} is {current} and cannot {what}",
        expected=" or ".join(sorted(expected)) or "nothing: the job has ended",
        actual=current,
    )


def after_silence(attempts: int, over: bool) -> JobState:
    """Where a held job goes whose worker fell silent. ``attempts`` counts this one; ``over``: its time window ended."""
    if over:
        return JobState.EXPIRED
    return JobState.READY if attempts < MAX_ATTEMPTS else JobState.FAILED
