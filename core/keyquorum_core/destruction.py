"""What is said and checked while an epoch is destroyed (DESIGN §9).

1. *propose*: each custodian that agrees signs a :class:`Consent`.
2. *erase*: with the consents of all, and not before, each erases its seeds and signs a :class:`DestructionReceipt`.

So no custodian loses a seed while another still refuses. Exact bytes: docs/spec/ceremony.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.ceremony import refused
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.names import CUSTODIAN_ID, SHA256_HEX, check
from keyquorum_core.quorum import MAX_SEEDS_EACH
from keyquorum_core.strictjson import Fields, canonical

__all__ = [
    "CONSENT_TYPE",
    "DESTRUCTION_RECEIPT_TYPE",
    "Consent",
    "DestructionReceipt",
    "check_consents",
    "check_receipts",
]

CONSENT_TYPE: Final = "application/vnd.keyquorum.destruction-consent.v1+json"
DESTRUCTION_RECEIPT_TYPE: Final = "application/vnd.keyquorum.destruction-receipt.v1+json"

_MAX_STATEMENT = 4096


@dataclass(frozen=True, slots=True)
class Consent:
    """``custodian`` agrees that the epoch of the plan of that digest (hex) be destroyed, once all agree."""

    plan_digest: str
    custodian: str

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``CONSENT_TYPE``."""
        return jcs.dumps({"plan_digest": self.plan_digest, "custodian": self.custodian})

    @classmethod
    def parse(cls, payload: bytes) -> Consent:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "destruction consent", _MAX_STATEMENT)
        made = cls(*_author(fields))
        fields.done()
        return made


@dataclass(frozen=True, slots=True)
class DestructionReceipt:
    """``custodian`` holds no seed of the plan's epoch any more: it erased so many, at that time by its clock (unix
    seconds). None erased: it held none."""

    plan_digest: str
    custodian: str
    erased: int
    erased_at: int

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``DESTRUCTION_RECEIPT_TYPE``."""
        return jcs.dumps(
            {
                "plan_digest": self.plan_digest,
                "custodian": self.custodian,
                "erased": self.erased,
                "erased_at": self.erased_at,
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> DestructionReceipt:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "destruction receipt", _MAX_STATEMENT)
        plan_digest, custodian = _author(fields)
        made = cls(plan_digest, custodian, fields.integer("erased", 0, MAX_SEEDS_EACH), fields.integer("erased_at"))
        fields.done()
        return made


def _author(fields: Fields) -> tuple[str, str]:
    plan_digest, custodian = fields.text("plan_digest", max_length=64), fields.text("custodian", max_length=32)
    check(SHA256_HEX, plan_digest, "plan_digest")
    check(CUSTODIAN_ID, custodian, "custodian id")
    return plan_digest, custodian


def check_consents(plan: CeremonyPlan, everyone: Collection[str], consents: Mapping[str, Consent]) -> None:
    """``consents``, by the custodian whose signature was verified, are everyone's for this plan.

    Raises :class:`RefusedError` (``CEREMONY``) naming those that are missing or wrong.
    """
    _check_all(
        "consents", plan, everyone, {name: (each.plan_digest, each.custodian) for name, each in consents.items()}
    )


def check_receipts(plan: CeremonyPlan, everyone: Collection[str], receipts: Mapping[str, DestructionReceipt]) -> None:
    """As :func:`check_consents`, for what makes an epoch destroyed."""
    _check_all(
        "receipts", plan, everyone, {name: (each.plan_digest, each.custodian) for name, each in receipts.items()}
    )


def _check_all(what: str, plan: CeremonyPlan, everyone: Collection[str], stated: Mapping[str, tuple[str, str]]) -> None:
    if set(stated) != set(everyone):
        names = sorted(set(stated) ^ set(everyone))
        raise refused(
            f"the {what} are not those of all custodians",
            names,
            expected=", ".join(sorted(everyone)),
            actual=len(stated),
        )
    for name, (plan_digest, custodian) in sorted(stated.items()):
        if custodian != name:
            raise refused(f"{what} in another custodian's name", [name], expected=name, actual=custodian)
        if plan_digest != plan.digest:
            raise refused(f"{what} for another plan", [name], expected=plan.digest, actual=plan_digest)
