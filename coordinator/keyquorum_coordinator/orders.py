"""Ceremonies that a key's own policy orders: the plans of rotations, repairs and destructions without an operator.

Custodians judge each by the policy that they certified: a plan that comes too soon, or changes anything, is refused.
"""

from __future__ import annotations

from typing import NamedTuple

from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy, new_ceremony_id
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.signing import peek_payload

__all__ = ["Certified", "policy_plan", "read_certificate"]


class Certified(NamedTuple):
    """What matters of a certificate, which may be large, from one look to the next."""

    plan: CeremonyPlan
    digest: str
    signers: tuple[str, ...]


def read_certificate(envelope: bytes) -> Certified:
    """What this coordinator verified when it stored it."""
    payload = peek_payload(envelope, CERTIFICATE_TYPE, "epoch certificate", MAX_CERTIFICATE)
    certificate = EpochCertificate.parse(payload)
    return Certified(certificate.plan, certificate.digest, certificate.signers)


def policy_plan(
    certified: Certified, kind: Kind, number: int, *, roster_digest: str, now: int, target: str = ""
) -> CeremonyPlan:
    """The plan of a ceremony that the policy of the certified epoch orders: of ``kind``, about epoch ``number``."""
    before = certified.plan
    return CeremonyPlan(
        ceremony_id=new_ceremony_id(),
        key_id=before.key_id,
        epoch=number,
        suite=before.suite,
        cluster=before.cluster,
        roster_digest=roster_digest,
        quorum=before.quorum,
        created_at=now,
        policy=before.policy,
        kind=kind,
        ordered_by=OrderedBy.POLICY,
        certificate=certified.digest,
        target=target,
    )
