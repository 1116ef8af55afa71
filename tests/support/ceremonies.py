"""Whole ceremonies among custodians in this process, step by step, as an honest coordinator would drive them.

Every step is a method of its own, so that a test can stop, repeat, twist or restart between any two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from keyquorum_core import ceremony
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan, OrderedBy, unsigned_plan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.derivation import root
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.parts import SealedPart, co_holders
from keyquorum_core.signing import merge, peek_payload, sign_many
from keyquorum_custodian.making import Proposal

if TYPE_CHECKING:
    from tests.support.custodian import Committee

__all__ = [
    "Destroy",
    "Make",
    "Rebuild",
    "addressed",
    "certificate_of",
    "derived",
    "derived_by_holders",
    "order",
    "refused",
]

CONTEXT = b"c" * 32


def order(committee: Committee, plan: CeremonyPlan) -> bytes:
    """The plan's envelope: signed by as many operators as there are, or by nobody when the policy orders it."""
    if plan.ordered_by is OrderedBy.POLICY:
        return unsigned_plan(plan)
    return sign_many([each.identity for each in committee.operators], PLAN_TYPE, plan.to_payload())


def addressed(proposals: Iterable[Proposal], to: str) -> list[SealedPart]:
    """The sealed parts in ``proposals`` that go to one custodian."""
    return [part for proposal in proposals for part in proposal.parts if part.to == to]


def certificate_of(committee: Committee, key_id: str, epoch: int) -> tuple[bytes, EpochCertificate]:
    """An epoch's certificate, from whoever of the open custodians has it."""
    for node in committee.nodes.values():
        row = node.keystore.epoch(key_id, epoch)
        if row is not None:
            payload = peek_payload(row.certificate, ceremony.CERTIFICATE_TYPE, "it", ceremony.MAX_CERTIFICATE)
            return row.certificate, EpochCertificate.parse(payload)
    raise LookupError(f"{key_id} epoch {epoch}")


class Make:
    """*generate*, or *rotate* for a later epoch. ``present``: who takes part; by default all that are open."""

    def __init__(
        self, committee: Committee, plan: CeremonyPlan | None = None, *, present: Sequence[str] | None = None
    ) -> None:
        self.committee = committee
        self.plan = plan or committee.plan()
        self.envelope = order(committee, self.plan)
        self.id = self.plan.ceremony_id
        self.present = tuple(committee.open_all() if present is None else present)
        self.proposals: dict[str, Proposal] = {}
        self.commitments: dict[str, bytes] = {}
        self.signed: dict[str, bytes] = {}
        self.certificate = b""

    @classmethod
    def rotate(
        cls, committee: Committee, key_id: str, *, present: Sequence[str] | None = None, **changes: object
    ) -> Make:
        """The next epoch of a key."""
        newest = max(row.epoch for node in committee.nodes.values() for row in node.keystore.epochs(key_id))
        _, before = certificate_of(committee, key_id, newest)
        plan = committee.plan(
            key_id,
            newest + 1,
            before.plan.suite,
            **{"kind": Kind.ROTATE, "certificate": before.digest, "policy": before.plan.policy, **changes},
        )
        return cls(committee, plan, present=present)

    def propose(self) -> Make:
        for name in self.present:
            if name not in self.proposals:
                self.propose_one(name)
        return self

    def propose_one(self, name: str) -> Proposal:
        proposed = self.committee.open(name).ceremonies.propose(self.envelope).proposal
        assert proposed is not None
        self.proposals[name] = proposed
        return proposed

    @property
    def headers(self) -> list[bytes]:
        return [self.proposals[name].header for name in self.present]

    def parts(self, to: str) -> list[SealedPart]:
        return addressed((self.proposals[name] for name in self.present), to)

    def deliver(self) -> Make:
        self.propose()
        for name in self.present:
            if name not in self.commitments:
                self.deliver_one(name)
        return self

    def deliver_one(self, name: str) -> bytes:
        node = self.committee.open(name)
        self.commitments[name] = node.ceremonies.deliver(self.id, self.headers, self.parts(name))
        return self.commitments[name]

    def confirm(self) -> Make:
        self.deliver()
        for name in self.present:
            if name not in self.signed:
                self.confirm_one(name)
        self.certificate = merge([self.signed[name] for name in self.present], max_bytes=ceremony.MAX_CERTIFICATE)
        return self

    def confirm_one(self, name: str) -> bytes:
        node = self.committee.open(name)
        self.signed[name] = node.ceremonies.confirm(self.id, [self.commitments[each] for each in self.present])
        return self.signed[name]

    def activate(self) -> bytes:
        """To the end; returns the certificate."""
        self.confirm()
        for name in self.present:
            self.activate_one(name)
        return self.certificate

    def activate_one(self, name: str) -> None:
        self.committee.open(name).ceremonies.activate(self.id, self.certificate)

    def cancel(self) -> None:
        for node in self.committee.nodes.values():
            node.ceremonies.cancel(self.id)


class Rebuild:
    """*repair* of ``target``, or *replace* with that kind in the plan."""

    def __init__(self, committee: Committee, key_id: str, epoch: int, target: str, **changes: object) -> None:
        self.committee = committee
        self.certificate, found = certificate_of(committee, key_id, epoch)
        members = {
            "kind": Kind.REPAIR,
            "certificate": found.digest,
            "target": target,
            "policy": found.plan.policy,
            "quorum": found.plan.quorum,
        }
        self.plan = committee.plan(key_id, epoch, found.plan.suite, **{**members, **changes})
        self.envelope = order(committee, self.plan)
        self.id = self.plan.ceremony_id
        self.target = target
        self.givers = tuple(
            name
            for name in co_holders(found.plan.quorum, target)
            if name in committee.nodes and committee.nodes[name].keystore.epoch(key_id, epoch) is not None
        )
        self.rosters: list[bytes] = []
        self.request = b""
        self.gifts: list[tuple[bytes, SealedPart]] = []

    def propose(self) -> Rebuild:
        for name in (self.target, *self.givers):
            self.propose_one(name)
        return self

    def propose_one(self, name: str) -> None:
        node = self.committee.open(name)
        proposed = node.ceremonies.propose(self.envelope, self.certificate, self.rosters)
        if name == self.target:
            self.request = proposed.statement

    def give(self) -> Rebuild:
        self.propose()
        self.gifts = [self.give_one(name) for name in self.givers]
        return self

    def give_one(self, name: str) -> tuple[bytes, SealedPart]:
        statement, sealed = self.committee.open(name).ceremonies.give(self.id, self.request)
        return statement, SealedPart(name, self.target, sealed)

    def restore(self) -> bytes:
        """To the end; returns the receipt."""
        self.give()
        return self.restore_one()

    def restore_one(self) -> bytes:
        return self.committee.open(self.target).ceremonies.restore(self.id, self.certificate, self.gifts)


class Destroy:
    """*destroy* of one epoch at every custodian."""

    def __init__(self, committee: Committee, key_id: str, epoch: int, **changes: object) -> None:
        self.committee = committee
        _, found = certificate_of(committee, key_id, epoch)
        members = {
            "kind": Kind.DESTROY,
            "certificate": found.digest,
            "policy": found.plan.policy,
            "quorum": found.plan.quorum,
        }
        self.plan = committee.plan(key_id, epoch, found.plan.suite, **{**members, **changes})
        self.envelope = order(committee, self.plan)
        self.id = self.plan.ceremony_id
        self.consents: dict[str, bytes] = {}

    def approve(self) -> Destroy:
        """Every custodian is asked, and its operator agrees."""
        for name in self.committee.ids:
            approve(self.committee, name, self.envelope)
        return self

    def propose(self) -> Destroy:
        for name in self.committee.ids:
            self.propose_one(name)
        return self

    def propose_one(self, name: str) -> None:
        self.consents[name] = self.committee.open(name).ceremonies.propose(self.envelope).statement

    def erase(self) -> dict[str, bytes]:
        """To the end; returns the receipts."""
        self.propose()
        return {name: self.erase_one(name) for name in self.committee.ids}

    def erase_one(self, name: str) -> bytes:
        return self.committee.open(name).ceremonies.erase(self.id, list(self.consents.values()))


def approve(committee: Committee, name: str, envelope: bytes, certificate: bytes = b"") -> None:
    """Have a custodian asked for something, and its operator agree to it."""
    from keyquorum_core.errors import Reason, StateError

    ceremonies = committee.open(name).ceremonies
    try:
        ceremonies.propose(envelope, certificate)
    except StateError as error:
        if error.reason is not Reason.APPROVAL:
            raise
        request = error.details["request"]
        (row,) = [each for each in ceremonies.approvals.pending() if each.request_id == request]
        ceremonies.approvals.decide(request, row.subject, approve=True)


def twisted(proposal: Proposal, **changes: object) -> Proposal:
    """A proposal with some of it replaced."""
    return replace(proposal, **changes)  # type: ignore[arg-type]


def derived(committee: Committee, epoch: int, key_id: str = "key-1") -> bytes:
    """The key that everyone derives together; holders of a seed have to agree."""
    together: dict[int, bytes] = {}
    for name in committee.ids:
        for index, value in committee.open(name).epochs.active(key_id, epoch).contributions(CONTEXT).items():
            assert together.setdefault(index, value) == value, (name, index)
    return root(together, CONTEXT)


def derived_by_holders(committee: Committee, epoch: int, key_id: str = "key-1") -> bytes:
    """As :func:`derived`, of those that have the epoch in use."""
    together: dict[int, bytes] = {}
    for name in committee.ids:
        try:
            held = committee.open(name).epochs.active(key_id, epoch)
        except KeyquorumError:
            continue
        for index, value in held.contributions(CONTEXT).items():
            assert together.setdefault(index, value) == value, (name, index)
    assert together, "nobody has it in use"
    return root(together, CONTEXT)


def refused(reason: Reason, call: Callable[..., Any], *arguments: Any) -> KeyquorumError:
    """The error by which a call was refused, which has to be for this reason."""
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)
    assert caught.value.reason is reason, caught.value
    return caught.value
