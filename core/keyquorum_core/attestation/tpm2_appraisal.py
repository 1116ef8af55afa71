"""TPM 2.0 quotes: appraisal, and the reference values for it (docs/spec/evidence-tpm2.md).

Do we accept a genuine quote? These are the checks, in this order; the first that fails refuses:

1. the AK is enrolled: proven to live in a genuine TPM (:mod:`.tpm2_enrolment`), or listed in the inventory by its
   fingerprint; :func:`check_enrolled`                                                ``PROVENANCE``
2. the bank and the set of quoted PCRs are exactly those of the reference values;
   :func:`check_reference` makes this check and those up to 6                         ``MEASUREMENT``
3. each PCR has one of its expected values                                            ``MEASUREMENT``
4. the firmware's version is an allowed one                                           ``TCB``
5. there is an event log where one is required                                        ``MEASUREMENT``
6. Secure Boot was on where that is required                                          ``MEASUREMENT``
7. ``extraData`` equals the binding of keys and challenge; :func:`check_binding`      ``BINDING``
8. counters and clock go on from where the AK's last quote left them;
   :func:`begin`, :func:`proceed`                                                     ``STALE``, ``PROVENANCE``

A TPM says in every quote how often it was reset (``resetCount``), how often resumed since (``restartCount``), and for
how long it has been powered (``clock``). :func:`begin` judges a worker's first quote, at which they may have grown;
:func:`proceed` judges those of its lease, at which the counters must not: a machine that restarted is not the one that
was appraised. Reference values are strict: each member is required, and none may be empty.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.tpm2 import VerifiedQuote
from keyquorum_core.attestation.tpm2_structures import HashAlgorithm, hash_by_name
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields

__all__ = [
    "TPM2",
    "QuoteState",
    "Tpm2ReferenceValues",
    "begin",
    "check_binding",
    "check_enrolled",
    "check_reference",
    "proceed",
]

TPM2 = "tpm2"

_WHAT = "TPM reference values"
_MAX_VALUES = 256
_MAX_VERSIONS = 256
_PCRS = 24
_PCR_INDEX = re.compile(r"0|[1-9]|1[0-9]|2[0-3]", re.ASCII)
_VERSION_BYTES = 8


@dataclass(frozen=True, slots=True)
class Tpm2ReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    bank: HashAlgorithm
    pcrs: Mapping[int, frozenset[bytes]]
    """The PCRs that must be quoted, these and no others, with the values that each may have."""
    firmware_versions: frozenset[int]
    event_log_required: bool
    secure_boot_required: bool

    @classmethod
    def parse(cls, value: object) -> Tpm2ReferenceValues:
        """Read the ``tpm2`` member of a reference values file, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty, and for a PCR value of
        all zeros or ones: nothing was measured into such a PCR.
        """
        fields = Fields(value, _WHAT)
        name = fields.text("bank", max_length=16)
        bank = hash_by_name(name)
        if bank is None or not bank.strong:
            raise _bad("bank", "sha256, sha384 or sha512", name)
        listed = fields.object("pcrs")
        pcrs: dict[int, frozenset[bytes]] = {}
        for index in listed.names():
            if not _PCR_INDEX.fullmatch(index):
                raise _bad("pcrs", f"PCRs 0 … {_PCRS - 1} in decimal", index[:20])
            pcrs[int(index)] = _values(listed, index, bank.size, _MAX_VALUES, no_filler=True)
        if not pcrs:
            raise _bad("pcrs", "at least one PCR", "none")
        versions = _values(fields, "firmware_versions", _VERSION_BYTES, _MAX_VERSIONS, no_filler=False)
        event_log = fields.boolean("event_log_required")
        secure_boot = fields.boolean("secure_boot_required")
        fields.done()
        if secure_boot and not (event_log and 7 in pcrs):
            raise _bad("secure_boot_required", "true only with event_log_required, and with PCR 7 in pcrs", "true")
        return cls(
            bank=bank,
            pcrs=MappingProxyType(pcrs),
            firmware_versions=frozenset(int.from_bytes(each, "big") for each in versions),
            event_log_required=event_log,
            secure_boot_required=secure_boot,
        )


@dataclass(frozen=True, slots=True)
class QuoteState:
    """Where an AK's last accepted quote left its TPM. A custodian keeps one for each AK."""

    ak: str
    """Fingerprint of the AK."""
    reset_count: int
    restart_count: int
    clock: int
    """Milliseconds."""
    firmware_version: int

    @classmethod
    def of(cls, verified: VerifiedQuote) -> QuoteState:
        quote = verified.quote
        return cls(verified.ak.fingerprint, quote.reset_count, quote.restart_count, quote.clock, quote.firmware_version)


def check_enrolled(verified: VerifiedQuote, enrolled_aks: Collection[str]) -> None:
    """Check 1; ``enrolled_aks`` are fingerprints in lower-case hex. Raises :class:`RefusedError` ``PROVENANCE``."""
    if verified.ak.fingerprint not in enrolled_aks:
        raise RefusedError(
            Reason.PROVENANCE,
            "the attestation key is not enrolled: anybody can make such a key and sign with it",
            expected=f"one of {len(enrolled_aks)} enrolled keys" if enrolled_aks else "no key is enrolled",
            actual=verified.ak.fingerprint,
            next_step="enrol the worker's TPM, or list its key in the inventory",
        )


def check_reference(verified: VerifiedQuote, reference: Tpm2ReferenceValues) -> None:
    """Checks 2 to 6. Raises :class:`RefusedError`."""
    if verified.bank != reference.bank or verified.pcrs.keys() != reference.pcrs.keys():
        raise _measurement(
            "the quote selects other PCRs than are asked for",
            f"{reference.bank.name}: {', '.join(map(str, sorted(reference.pcrs)))}",
            f"{verified.bank.name}: {', '.join(map(str, sorted(verified.pcrs)))}",
        )
    for index, allowed in sorted(reference.pcrs.items()):
        if verified.pcrs[index] not in allowed:
            raise _measurement(
                f"PCR {index} has another value than is expected",
                ", ".join(sorted(each.hex() for each in allowed)[:4]),
                verified.pcrs[index].hex(),
            )
    version = verified.quote.firmware_version
    if version not in reference.firmware_versions:
        raise RefusedError(
            Reason.TCB,
            "the TPM's firmware is of a version that is not allowed",
            expected=", ".join(f"{each:016x}" for each in sorted(reference.firmware_versions)[:4]),
            actual=f"{version:016x}",
        )
    if reference.event_log_required and verified.events is None:
        raise _measurement("there is no event log", "one", "none")
    if reference.secure_boot_required and verified.secure_boot is not True:
        shown = "off" if verified.secure_boot is False else "not said"
        raise _measurement("UEFI Secure Boot was not on", "on", shown)


def check_binding(verified: VerifiedQuote, expected: bytes) -> None:
    """Check 7: ``extraData`` is exactly ``expected``, which is not empty. Raises :class:`RefusedError` ``BINDING``.

    For a worker's evidence that is :func:`~keyquorum_core.attestation.tpm2.qualifying_data` of the binding.
    """
    if not expected or not hmac.compare_digest(verified.quote.extra_data, expected):
        raise RefusedError(
            Reason.BINDING,
            "the quote is not bound to these keys and this challenge",
            expected=f"extraData {expected.hex()}" if expected else "something to be bound to",
            actual=verified.quote.extra_data.hex(),
        )


def begin(previous: QuoteState | None, verified: VerifiedQuote) -> QuoteState:
    """Check 8 for a worker's first quote; ``previous`` is ``None`` only for an AK never seen. Returns the new state.

    The reset counter must not go back, nor, without a reset, the restart counter and the clock. After a reset the clock
    may go back where the TPM says that it may have: power was cut before it was saved.
    Raises :class:`RefusedError` ``STALE``, and ``PROVENANCE`` where ``previous`` is another AK's.
    """
    state = QuoteState.of(verified)
    if previous is None:
        return state
    _check_same_ak(previous, state)
    if state.reset_count < previous.reset_count:
        raise _stale("the TPM's reset counter went back", f"at least {previous.reset_count}", state.reset_count)
    was_reset = state.reset_count > previous.reset_count
    if not was_reset and state.restart_count < previous.restart_count:
        raise _stale("the TPM's restart counter went back", f"at least {previous.restart_count}", state.restart_count)
    if state.clock <= previous.clock and not (was_reset and not verified.quote.safe):
        raise _stale("the TPM's clock did not go on", f"more than {previous.clock} ms", f"{state.clock} ms")
    return state


def proceed(previous: QuoteState, verified: VerifiedQuote) -> QuoteState:
    """Check 8 for a further quote of the same worker: nothing restarted, and time went on. Returns the new state.

    Raises :class:`RefusedError` ``STALE``, and ``PROVENANCE`` where ``previous`` is another AK's.
    """
    state = QuoteState.of(verified)
    _check_same_ak(previous, state)
    for what, before, after in (
        ("was reset", previous.reset_count, state.reset_count),
        ("was restarted or resumed", previous.restart_count, state.restart_count),
        ("got other firmware", previous.firmware_version, state.firmware_version),
    ):
        if before != after:
            raise _stale(f"the TPM {what} since the worker was appraised", before, after)
    if state.clock <= previous.clock:
        raise _stale("the TPM's clock did not go on", f"more than {previous.clock} ms", f"{state.clock} ms")
    return state


def _check_same_ak(previous: QuoteState, state: QuoteState) -> None:
    if not hmac.compare_digest(previous.ak, state.ak):
        raise RefusedError(
            Reason.PROVENANCE, "the quote is by another TPM's key than before", expected=previous.ak, actual=state.ak
        )


def _values(fields: Fields, name: str, size: int, maximum: int, *, no_filler: bool) -> frozenset[bytes]:
    values = fields.texts(name, min_items=1, max_items=maximum, max_length=2 * size)
    for value in values:
        if len(value) != 2 * size or any(c not in "0123456789abcdef" for c in value):
            raise _bad(name, f"{size} bytes each as lower-case hex", value)
        if no_filler and value.strip(value[0]) == "" and value[0] in "0f":
            raise _bad(name, "no value of all zeros or ones", value)
    if len(set(values)) != len(values):
        raise _bad(name, "each value once", "a repetition")
    return frozenset(bytes.fromhex(each) for each in values)


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: bad member {member!r}", expected=expected, actual=actual)


def _measurement(message: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(Reason.MEASUREMENT, message, expected=expected, actual=actual)


def _stale(message: str, expected: object, actual: object) -> RefusedError:
    return RefusedError(Reason.STALE, message, expected=expected, actual=actual, next_step="appraise the worker anew")
