"""Appraisal: does this custodian accept the evidence? (DESIGN §6 step 3, §7; docs/spec/evidence.md)

:func:`appraise` makes these checks, in this order, and refuses at the first that fails:

1. the document is canonical and within bounds                                     ``MALFORMED``, ``TOO_LARGE``
2. every item is of a known type, every required type is there, and GPUs do not stand alone   ``EVIDENCE_TYPE``
3. this custodian's own nonce is in the list, and is one of its current ones       ``STALE``
4. for each type: the reference values accept it (``EVIDENCE_TYPE``), the evidence is genuine, acceptable, and bound to
   challenge and keys; GPUs first                                                  the type's modules' reasons
5. all hardware belongs to one machine of the inventory, which is where region and provider come from
                                                                                   ``PROVENANCE``, ``REGION``

Check 3 asks whether the evidence is new *to this custodian*; it passes once. From then on the custodian keeps the
appraisal until the evidence is ``max_evidence_age`` old or a certificate or grace period ends, and does not ask again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from keyquorum_core.attestation.appraisers import APPRAISERS, AppraisedItem, Case, NoTpmRecords, TpmRecords
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.inventory import HardwareId, Inventory, Machine
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState, proceed
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.release import WINDOW_SECONDS

__all__ = ["SUPPORTED_TYPES", "Appraisal", "appraise", "check_continues"]

SUPPORTED_TYPES = frozenset(APPRAISERS)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """Evidence that was accepted, and what follows from it. Holds for ``not_before <= now <= not_after``."""

    hpke_key: bytes
    signing_key: bytes
    items: tuple[AppraisedItem, ...]
    """One for each type, in the document's order."""
    machine: Machine
    """From the inventory, by the attested hardware identities; never from the worker."""
    evidence_sha256: str
    """Digest of the document, hex."""
    reference_version: int
    reference_digest: str
    inventory_version: int
    inventory_digest: str
    attested_at: int
    """Unix seconds: the start of the window whose nonce the evidence answers, from which its age counts."""
    not_before: int
    not_after: int
    """Unix seconds: the first end of a certificate, collateral or grace period, and of ``max_evidence_age``."""
    tpm_states: tuple[QuoteState, ...] = ()
    """Where the quotes in it left their TPMs: for the custodian to remember."""

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(item.type for item in self.items)

    @property
    def hardware(self) -> tuple[HardwareId, ...]:
        """Every identity that hardware proved."""
        return tuple(each for item in self.items for each in item.hardware)

    @property
    def region(self) -> str:
        return self.machine.region

    @property
    def provider(self) -> str:
        return self.machine.provider

    @property
    def development(self) -> bool:
        """No hardware made some of this evidence: its root is a development root that the reference values name."""
        return any(item.development for item in self.items)

    def holds_at(self, now: int) -> bool:
        """Whether the appraisal may be used at ``now`` without appraising again."""
        return self.not_before <= now <= self.not_after

    def require_types(self, required: Collection[str]) -> None:
        """Raises :class:`RefusedError` ``EVIDENCE_TYPE`` where a required type was not appraised."""
        _require_types(self.types, required)

    def require_region(self, allowed: Collection[str]) -> None:
        """Raises :class:`RefusedError` ``REGION`` where the machine stands outside the allowed regions."""
        if self.region not in allowed:
            raise RefusedError(
                Reason.REGION,
                "the worker's hardware is not in an allowed region",
                expected=", ".join(sorted(allowed)) or "no region is allowed",
                actual=self.region,
            )


def appraise(
    document: bytes,
    reference: ReferenceValues,
    inventory: Inventory,
    *,
    required_types: Collection[str],
    now: int,
    own_id: str,
    current_nonces: Mapping[int, bytes],
    tpm: TpmRecords | None = None,
) -> Appraisal:
    """Appraise an evidence document as custodian ``own_id`` at ``now`` (unix seconds).

    ``current_nonces`` maps the windows that are current to this custodian's nonces (32 bytes) for them.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    parsed = EvidenceDocument.parse(document)
    types = tuple(dict.fromkeys(item.type for item in parsed.items))
    unknown = set(types) - SUPPORTED_TYPES
    if unknown:
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            "the document holds evidence of an unknown type",
            expected=", ".join(sorted(SUPPORTED_TYPES)),
            actual=", ".join(sorted(unknown)),
        )
    _require_types(types, required_types)
    attested_at = _check_fresh(parsed, now, own_id, current_nonces)
    fresh_until = attested_at + reference.max_evidence_age
    if now > fresh_until:
        raise _stale("the evidence is older than is accepted", f"at most {reference.max_evidence_age} s", "older")
    case = Case(parsed, reference, inventory, tpm or NoTpmRecords(), now, [])
    items = tuple(APPRAISERS[each](case, [item for item in parsed.items if item.type == each]) for each in types)
    machine = inventory.machine_of(each for item in items for each in item.hardware)
    return Appraisal(
        hpke_key=parsed.hpke_key,
        signing_key=parsed.signing_key,
        items=items,
        machine=machine,
        evidence_sha256=hashlib.sha256(document).hexdigest(),
        reference_version=reference.version,
        reference_digest=reference.digest,
        inventory_version=inventory.version,
        inventory_digest=inventory.digest,
        attested_at=attested_at,
        not_before=max(item.not_before for item in items),
        not_after=min(fresh_until, *(item.not_after for item in items)),
        tpm_states=tuple(case.tpm_states),
    )


def check_continues(previous: Appraisal, current: Appraisal) -> None:
    """A worker that attested anew is still the one that was appraised before: same keys, same hardware, same types, and
    no TPM of it was reset or restarted since.

    Raises :class:`RefusedError` ``BINDING``, ``PROVENANCE``, ``STALE``.
    """
    if not hmac.compare_digest(previous.hpke_key, current.hpke_key) or not hmac.compare_digest(
        previous.signing_key, current.signing_key
    ):
        raise RefusedError(
            Reason.BINDING,
            "the evidence is bound to other keys than this worker's",
            expected=f"the keys of evidence {previous.evidence_sha256}",
            actual="others",
        )
    if previous.hardware != current.hardware:
        raise RefusedError(
            Reason.PROVENANCE,
            "the evidence comes from other hardware than this worker's",
            expected=", ".join(map(str, previous.hardware))[:400],
            actual=", ".join(map(str, current.hardware))[:400],
        )
    for before, after in zip(previous.tpm_states, current.tpm_states, strict=True):  # of the same hardware
        proceed(before, after)


def _require_types(types: Collection[str], required: Collection[str]) -> None:
    missing = set(required) - set(types)
    if missing or not required:
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            "a required type of evidence is missing" if missing else "no type of evidence is required",
            expected=", ".join(sorted(required)) or "at least one required type",
            actual=", ".join(sorted(types)),
        )


def _check_fresh(document: EvidenceDocument, now: int, own_id: str, current_nonces: Mapping[int, bytes]) -> int:
    """Check 3. Returns the moment from which the evidence's age counts: the start of the nonce's window."""
    own = document.nonce_of(own_id)
    if own is None:
        raise _stale(
            f"the challenge holds no nonce of custodian {own_id}",
            f"a nonce of {own_id}",
            f"nonces of {', '.join(each.custodian for each in document.nonces)}"[:200],
        )
    windows = ", ".join(str(window) for window in sorted(current_nonces)) or "no window is current"
    current = current_nonces.get(own.window)
    if current is None:
        raise _stale(f"the nonce of custodian {own_id} is not current", f"window {windows}", f"window {own.window}")
    if not hmac.compare_digest(current, own.nonce):
        raise _stale(f"custodian {own_id} did not publish this nonce", f"its nonce of window {own.window}", "another")
    return min(now, own.window * WINDOW_SECONDS)


def _stale(message: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(
        Reason.STALE, message, expected=expected, actual=actual, next_step="attest again with current nonces"
    )
