"""A custodian's seat at ceremonies: who it is, what it remembers, and how it keeps to the table of moves.

Each step is persisted, with the digest of its request and its answer, in one transaction before the answer leaves: a
crash at any moment leaves either the step before or the step after, a repeated request gets the stored answer, and
another request under the same ceremony id is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from keyquorum_core.ceremony import EpochCertificate, Seed, refused
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import MOVES, State, Step
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, Unverified, open_envelope, sign
from keyquorum_core.transcript import transcript
from keyquorum_custodian.canary import CanaryFaults
from keyquorum_custodian.certificates import Certificates
from keyquorum_custodian.epochs import Epochs
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.pacing import Work, on_the_spot
from keyquorum_custodian.seed_records import CeremonyRow, EpochRow
from keyquorum_custodian.standing import Standing

__all__ = ["CeremonySeat", "another_request", "check_move", "check_senders", "wrong_state"]


class _Statement(Protocol):
    @property
    def custodian(self) -> str: ...


S = TypeVar("S", bound=_Statement)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class CeremonySeat:
    """Used from the keystore's thread; what opens and signs statements, from any. ``clock`` gives unix seconds."""

    me: str
    identity: Identity
    recipient: RecipientKey
    roster: Roster
    roster_digest: str
    quorum: Quorum
    keystore: Keystore
    epochs: Epochs
    certificates: Certificates
    clock: Callable[[], float]
    canary: CanaryFaults
    standing: Standing
    work: Work = on_the_spot

    def now(self) -> int:
        return int(self.clock())

    def row(self, ceremony_id: str) -> CeremonyRow:
        """Raises ``NOT_FOUND``."""
        row = self.keystore.ceremony(ceremony_id)
        if row is None:
            raise StateError(
                Reason.NOT_FOUND,
                "no such ceremony",
                expected="a ceremony that was proposed to this custodian",
                actual=ascii(ceremony_id[:40]),
            )
        return row

    def stored(self, row: CeremonyRow, step: Step, request: bytes, target: State) -> bytes | None:
        """The stored answer to a repeated request, None where the step is still to come.

        Raises ``STATE`` when the ceremony was cancelled, ``CEREMONY`` for another request than the one answered.
        """
        found = self.keystore.answer(row.ceremony_id, step)
        if found is None:
            return None
        if row.state is State.CANCELLED:
            raise wrong_state(row, target)
        if found[0] != request:
            raise another_request(row, step, found[0], request)
        return found[1]

    def plan(self, row: CeremonyRow, target: State) -> CeremonyPlan:
        """The plan of a ceremony that may move to ``target``, and was made under the roster in force."""
        check_move(row, target)
        plan = CeremonyPlan.parse(row.plan)
        if plan.roster_digest != self.roster_digest:
            raise RefusedError(
                Reason.CEREMONY,
                "ceremony plan is for another roster",
                expected=self.roster_digest,
                actual=plan.roster_digest,
                next_step="Cancel the ceremony and propose a new one.",
            )
        return plan

    async def certificate_of(self, row: EpochRow) -> EpochCertificate:
        """The certificate of an epoch in the keystore, verified."""
        return await self.certificates.open(row.certificate, self.work)

    async def seeds(self, row: EpochRow | CeremonyRow) -> dict[int, Seed]:
        """The seeds of an epoch, or that a ceremony made; others get their turns between two pieces."""
        found: dict[int, Seed] = {}
        for piece in self.keystore.seeds_in_pieces(row):
            if found:
                await self.work(_nothing)
            found |= piece
        return found

    def open_from(self, envelope: bytes, payload_type: str, custodian: str, what: str) -> bytes:
        """The payload of a statement that ``custodian``, by the roster in force, signed."""
        return open_envelope(
            envelope, payload_type, self.roster.custodian(custodian).identity, f"the {what} of {custodian}"
        )

    def open_said(self, envelope: bytes, payload_type: str, parse: Callable[[bytes], S], what: str) -> S:
        """A statement by the custodian that it says it is of, who signed it by the roster in force."""
        unverified = Unverified(envelope, payload_type, what)
        statement = parse(unverified.payload)
        name = statement.custodian
        unverified.open(self.roster.custodian(name).identity, f"the {what} of {name}")
        return statement

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        return sign(self.identity, payload_type, payload)

    @staticmethod
    def digest(step: Step, items: Iterable[bytes]) -> bytes:
        """Of a request whose items may come in any order."""
        return hashlib.sha256(transcript(f"keyquorum/v1/{step}", *sorted(items))).digest()


def check_move(row: CeremonyRow, target: State) -> None:
    """Raise ``STATE`` unless the table has the move."""
    if target not in MOVES[row.kind][row.state]:
        raise wrong_state(row, target)


def wrong_state(row: CeremonyRow, target: State) -> StateError:
    allowed = sorted(state for state, targets in MOVES[row.kind].items() if target in targets)
    ended = f" ({row.cause})" if row.cause else ""
    return StateError(
        Reason.STATE,
        f"ceremony {row.ceremony_id} cannot become {target} now",
        expected=" or ".join(allowed),
        actual=f"{row.state}{ended}",
        next_step="Propose a new ceremony." if row.state is State.CANCELLED else "",
    )


def another_request(row: CeremonyRow, step: Step, expected: bytes, actual: bytes) -> RefusedError:
    return RefusedError(
        Reason.CEREMONY,
        f"ceremony {row.ceremony_id} had another {step} request before",
        expected=expected.hex(),
        actual=actual.hex(),
        next_step="Repeat the first request, or cancel the ceremony and propose a new one.",
    )


def check_senders(what: str, expected: set[str], actual: set[str]) -> None:
    """Raise ``CEREMONY`` naming those missing or surplus."""
    if expected != actual:
        raise refused(
            f"the {what} are not those of all custodians concerned",
            sorted(expected ^ actual),
            expected=", ".join(sorted(expected)),
            actual=", ".join(sorted(actual)),
        )
