"""Policies and lists as signed bulletins: what stands in them, and whom a bundle is for (docs/spec/policy.md).

Body of kind ``policy``: ``{"seat", "custodians", "policies"}``. ``seat`` is ``coordinator``, and then ``custodians`` is
empty, or ``custodian``, and then it names those whose bundle this is. Nobody acts on a bundle for another seat: what is
lenient enough to take jobs in is not what keys are released by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core.bulletin import Bulletin, Kind
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CUSTODIAN_ID, check
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import Seat
from keyquorum_core.policy.lists import EXPORT_LIST, SANCTIONS_LIST, ControlledList
from keyquorum_core.policy.policies import MAX_TEXT, PolicySet, load_policies
from keyquorum_core.strictjson import Fields

__all__ = ["EXPORT", "POLICY_KIND", "SANCTIONS", "PolicyBundle", "policy_kind"]

POLICY_KIND: Final = "policy"
_SEATS: Final = ("coordinator", "custodian")
_MAX_CUSTODIANS: Final = 64


@dataclass(frozen=True, slots=True)
class PolicyBundle:
    """Validated: ``policies`` are those of ``files``. Raises :class:`MalformedError` when made with anything else."""

    seat: str
    custodians: tuple[str, ...]
    files: Mapping[str, str]
    policies: PolicySet

    @staticmethod
    def make(seat: str, custodians: tuple[str, ...], files: Mapping[str, str]) -> PolicyBundle:
        """Load ``files`` (:func:`load_policies`) for a seat."""
        custodians = tuple(sorted(custodians))
        for each in custodians:
            check(CUSTODIAN_ID, each, "custodian id")
        named = bool(custodians) if seat == "custodian" else not custodians
        if seat not in _SEATS or not named or len(set(custodians)) != len(custodians):
            raise MalformedError(
                Reason.MALFORMED,
                "a policy bundle for no seat there is",
                expected="coordinator without custodians, or custodian with different ids",
                actual=f"{seat[:20]!a} with {len(custodians)} custodians",
            )
        return PolicyBundle(seat, custodians, dict(sorted(files.items())), load_policies(files))

    def body(self) -> dict[str, object]:
        """The bulletin's body."""
        return {"custodians": list(self.custodians), "policies": dict(self.files), "seat": self.seat}

    @staticmethod
    def read(body: Mapping[str, object]) -> PolicyBundle:
        """Raises :class:`MalformedError`: the form, or (``POLICY``) what :func:`load_policies` refuses."""
        fields = Fields(dict(body), "policy bundle")
        seat = fields.text("seat", max_length=16)
        custodians = fields.texts("custodians", max_items=_MAX_CUSTODIANS, max_length=32)
        members = fields.raw("policies")
        fields.done()
        if list(custodians) != sorted(custodians):
            raise MalformedError(Reason.MALFORMED, "policy bundle: custodians out of order", expected="sorted by id")
        if not isinstance(members, Mapping) or not all(isinstance(each, str) for each in members.values()):
            raise MalformedError(
                Reason.MALFORMED, "policy bundle: bad member 'policies'", expected=f"text by file, {MAX_TEXT} bytes"
            )
        return PolicyBundle.make(seat, custodians, {str(name): str(text) for name, text in members.items()})

    def check_seat(self, seat: Seat) -> None:
        """Raises :class:`RefusedError` (``POLICY``) for a bundle that is meant for others."""
        ours = self.seat == seat.kind and (seat.kind == "coordinator" or seat.id in self.custodians)
        if not ours:
            raise RefusedError(
                Reason.POLICY,
                f"this policy bundle is not for {seat}",
                expected=str(seat),
                actual=f"{self.seat} {', '.join(self.custodians)}".strip(),
                next_step="Have the policy's signers sign a bundle for this seat.",
            )


def policy_kind(seat: Seat) -> Kind[PolicyEngine]:
    """How ``seat`` reads bulletins of kind ``policy``: only its own, parsed and validated once."""

    def read(bulletin: Bulletin) -> PolicyEngine:
        bundle = PolicyBundle.read(bulletin.body)
        bundle.check_seat(seat)
        return PolicyEngine(bundle.policies, bundle_digest=bulletin.digest, bundle_version=bulletin.version)

    return Kind(POLICY_KIND, read)


def _read_list(bulletin: Bulletin) -> ControlledList:
    return ControlledList.read(bulletin.body, bulletin.version)


EXPORT: Final = Kind(EXPORT_LIST, _read_list)
SANCTIONS: Final = Kind(SANCTIONS_LIST, _read_list)
