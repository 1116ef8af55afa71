"""TPM 2.0 quotes: appraisal (docs/spec/evidence-tpm2.md).

Do we accept a genuine quote? These are the checks, in this order; the first that fails refuses:

1. the AK is enrolled: proven to live in a genuine TPM (:mod:`.tpm2_enrolment`), or listed in the inventory by its
   fingerprint; :func:`check_enrolled`                                                ``PROVENANCE``
2. the bank and the set of quoted PCRs are exactly those of the reference values;
   :func:`evaluate` makes this check and those up to 6                                ``MEASUREMENT``
3. each PCR has one of its expected values, whose grace period, if it has one, has not ended
                                                                                      ``MEASUREMENT``
4. the firmware's version is an allowed one, in the same way                          ``TCB``
5. there is an event log where one is required                                        ``MEASUREMENT``
6. Secure Boot was on where that is required                                          ``MEASUREMENT``
7. ``extraData`` equals the binding of keys and challenge; :func:`check_binding`      ``BINDING``
8. counters and clock go on from where the AK's last quote left them; :func:`begin`
   (:mod:`~keyquorum_core.attestation.tpm2_state`)                                    ``STALE``, ``PROVENANCE``

Reference values are strict: each member is required, and none may be empty.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from keyquorum_core.attestation.findings import Finding, finding
from keyquorum_core.attestation.tpm2 import VerifiedQuote
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState, check_later
from keyquorum_core.errors import Reason

__all__ = [
    "TPM2",
    "AppraisedTpm",
    "begin",
    "check_binding",
    "check_enrolled",
    "evaluate",
]

TPM2 = "tpm2"

Value = TypeVar("Value", bytes, int)


@dataclass(frozen=True, slots=True)
class AppraisedTpm:
    """What follows from a quote, if every finding about it is met."""

    ak: str
    """Fingerprint of the attestation key: the key into the inventory."""
    not_after: int | None
    """Unix seconds: the first end of a grace period that was needed."""


def check_enrolled(verified: VerifiedQuote, enrolled_aks: Collection[str]) -> Finding:
    """Check 1; ``enrolled_aks`` are fingerprints in lower-case hex."""
    return finding(
        verified.ak.fingerprint in enrolled_aks,
        "ak",
        Reason.PROVENANCE,
        "the attestation key is not enrolled: anybody can make such a key and sign with it",
        expected=f"one of {len(enrolled_aks)} enrolled keys" if enrolled_aks else "an enrolled key; none is",
        actual=verified.ak.fingerprint,
        next_step="enrol the worker's TPM, or list its key in the inventory",
    )


def evaluate(
    verified: VerifiedQuote, reference: Tpm2ReferenceValues, *, now: int
) -> tuple[list[Finding], AppraisedTpm]:
    """Checks 2 to 6 at ``now`` (unix seconds)."""
    ends: list[int] = []
    version = verified.quote.firmware_version
    findings = [
        finding(
            verified.bank == reference.bank and verified.pcrs.keys() == reference.pcrs.keys(),
            "pcr_selection",
            Reason.MEASUREMENT,
            "the quote selects other PCRs than are asked for",
            expected=f"{reference.bank.name}: {', '.join(map(str, sorted(reference.pcrs)))}",
            actual=f"{verified.bank.name}: {', '.join(map(str, sorted(verified.pcrs)))}",
        )
    ]
    for index, allowed in sorted(reference.pcrs.items()):
        value = verified.pcrs.get(index, b"")
        findings.append(
            finding(
                _open(allowed, value, now, ends),
                f"pcr.{index}",
                Reason.MEASUREMENT,
                f"PCR {index} has another value than is expected",
                expected=" or ".join(
                    sorted(each.hex() + ("" if end is None else f" until {end}") for each, end in allowed.items())[:4]
                ),
                actual=value.hex() or "not quoted",
            )
        )
    versions = reference.firmware_versions
    findings += [
        finding(
            _open(versions, version, now, ends),
            "firmware_version",
            Reason.TCB,
            "the TPM's firmware is of a version that is not allowed",
            expected=" or ".join(
                sorted(f"{each:016x}" + ("" if end is None else f" until {end}") for each, end in versions.items())[:4]
            ),
            actual=f"{version:016x}",
        ),
        finding(
            not reference.event_log_required or verified.events is not None,
            "event_log",
            Reason.MEASUREMENT,
            "there is no event log",
            expected="one" if reference.event_log_required else "one, or none",
            actual="none" if verified.events is None else f"{len(verified.events)} events",
        ),
        finding(
            not reference.secure_boot_required or verified.secure_boot is True,
            "secure_boot",
            Reason.MEASUREMENT,
            "UEFI Secure Boot was not on",
            expected="on" if reference.secure_boot_required else "on or off",
            actual={True: "on", False: "off", None: "not said"}[verified.secure_boot],
        ),
    ]
    return findings, AppraisedTpm(verified.ak.fingerprint, min(ends, default=None))


def _open(allowed: Mapping[Value, int | None], value: Value, now: int, ends: list[int]) -> bool:
    """Whether a value is allowed at ``now``; the end of its grace period, if it has one, goes to ``ends``."""
    if value not in allowed:
        return False
    end = allowed[value]
    if end is not None and now <= end:
        ends.append(end)
    return end is None or now <= end


def check_binding(verified: VerifiedQuote, expected: bytes) -> Finding:
    """Check 7: ``extraData`` is exactly ``expected``, which is not empty.

    For a worker's evidence that is :func:`~keyquorum_core.attestation.tpm2.qualifying_data` of the binding.
    """
    return finding(
        bool(expected) and hmac.compare_digest(verified.quote.extra_data, expected),
        "extra_data",
        Reason.BINDING,
        "the quote is not bound to these keys and this challenge",
        expected=expected.hex() or "something to be bound to",
        actual=verified.quote.extra_data.hex(),
    )


def begin(previous: QuoteState | None, verified: VerifiedQuote) -> QuoteState:
    """Check 8 for a worker's first quote; ``previous`` is ``None`` only for an AK never seen. Returns the new state.

    Raises as :func:`~keyquorum_core.attestation.tpm2_state.check_later`.
    """
    quote = verified.quote
    state = QuoteState(
        verified.ak.fingerprint, quote.reset_count, quote.restart_count, quote.clock, quote.firmware_version
    )
    if previous is not None:
        check_later(previous, state, clock_is_safe=quote.safe)
    return state
