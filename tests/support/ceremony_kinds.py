"""One ceremony of each kind, about to be ordered: what there is before, the plan, and a coordinator to drive it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyquorum_coordinator.certificates import keep_roster
from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import Reason, StateError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.roster import ROSTER_TYPE, Roster
from keyquorum_core.signing import peek_payload
from tests.support.ceremonies import Destroy, Make, Rebuild
from tests.support.custodian import Committee, new_roster
from tests.support.direct import DirectLink, MortalDatabase, open_database

__all__ = ["LOST", "STAGES", "ApprovingLink", "Ordered", "Stage", "coordinator_database"]

LOST = "no-1"
"""Who is rebuilt."""
_FIRST_ROSTER = "first-roster.json"
_POLICY = KeyPolicy(retain_seconds=0)
Ordered = Make | Rebuild | Destroy


@dataclass(frozen=True)
class Stage:
    """``prepare`` a committee on disk once; ``order`` the ceremony as often as it is copied. ``epochs`` of key-1 derive
    before it, and as they did after it."""

    prepare: Callable[[Committee], None]
    order: Callable[[Committee], Ordered]
    epochs: tuple[int, ...]


def _generated(committee: Committee) -> None:
    committee.generate(policy=_POLICY)


def _stale(committee: Committee) -> None:
    _generated(committee)
    Make.rotate(committee, "key-1", present=[name for name in committee.ids if name != LOST]).activate()


def _rotated(committee: Committee) -> None:
    _generated(committee)
    Make.rotate(committee, "key-1").activate()


def _another_in_its_place(committee: Committee) -> None:
    _generated(committee)
    committee.close()
    (committee.folder / _FIRST_ROSTER).write_bytes(committee.roster_envelope)
    shutil.rmtree(committee.directory(LOST))
    new_roster(committee, replace=LOST)


STAGES = {
    Kind.GENERATE: Stage(_generated, lambda committee: Make(committee, committee.plan("key-2")), (1,)),
    Kind.ROTATE: Stage(_generated, lambda committee: Make.rotate(committee, "key-1"), (1,)),
    Kind.REPAIR: Stage(_stale, lambda committee: Rebuild(committee, "key-1", 2, LOST), (1, 2)),
    Kind.REPLACE: Stage(
        _another_in_its_place, lambda committee: Rebuild(committee, "key-1", 1, LOST, kind=Kind.REPLACE), (1,)
    ),
    Kind.DESTROY: Stage(_rotated, lambda committee: Destroy(committee, "key-1", 1, ordered_by=OrderedBy.POLICY), (2,)),
}


class ApprovingLink(DirectLink):
    """The operator of whoever waits for one approves, right after it was asked."""

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await super().call(method, request)
        except StateError as error:
            if error.reason is Reason.APPROVAL:
                approvals = self._committee.open(self.id).ceremonies.approvals
                for row in approvals.pending():
                    approvals.decide(row.request_id, row.subject, approve=True)
            raise


def coordinator_database(committee: Committee, file: Path) -> MortalDatabase:
    """The coordinator's database; it was there when the roster before this one was in force."""
    database = open_database(file)
    earlier = committee.folder / _FIRST_ROSTER
    if earlier.exists():
        envelope = earlier.read_bytes()
        roster = Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster"))
        database.run_write(lambda session: keep_roster(session, roster, envelope))
    return database
