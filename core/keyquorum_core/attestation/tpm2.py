"""TPM 2.0 quotes: verification (TCG TPM 2.0 Library, Part 3, §18.4; docs/spec/evidence-tpm2.md).

Is the quote genuine? :func:`verify` makes these checks, in this order, and refuses at the first that fails:

1. form: the JSON, ``TPMS_ATTEST`` to its last byte, made inside the TPM (magic)      ``MALFORMED``, ``TOO_LARGE``
2. it attests to PCRs: type ``TPM_ST_ATTEST_QUOTE``                                          ``EVIDENCE_TYPE``
3. the AK is RSA of 2048 … 4096 bits, or on P-256 or P-384                                   ``SIGNATURE``
4. the AK's signature over the quote: RSASSA, RSAPSS or ECDSA, SHA-256 or better  ``MALFORMED``, ``SIGNATURE``
5. the AK's public area, where given: of this AK, which may attest and nothing else          ``PROVENANCE``
6. ``extraData`` is not empty                                                                ``BINDING``
7. exactly one bank is selected, of SHA-256 or better, and at least one PCR of it            ``MEASUREMENT``
8. the PCR values given are of that bank, for exactly the selected PCRs                      ``MEASUREMENT``
9. the digest over them is the quote's                                                       ``MEASUREMENT``
10. the event log, where given, replays into them            ``MALFORMED``, ``MEASUREMENT``

What none of this says is whose the AK is: that is provenance, and a question of
:mod:`~keyquorum_core.attestation.tpm2_appraisal`, like all else that makes a genuine quote acceptable.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from keyquorum_core import jcs
from keyquorum_core.attestation.tpm2_events import MAX_EVENT_LOG_BYTES, Event, check_event_log, secure_boot
from keyquorum_core.attestation.tpm2_keys import PublicKey, check_ak, read_key, verify_signature
from keyquorum_core.attestation.tpm2_structures import (
    HashAlgorithm,
    Quote,
    hash_by_id,
    hash_by_name,
    parse_public,
    parse_quote,
)
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields, loads

__all__ = ["MAX_EVIDENCE_BYTES", "Tpm2Evidence", "VerifiedQuote", "qualifying_data", "verify", "verify_parsed"]

MAX_EVIDENCE_BYTES = 512 << 10

_WHAT = "TPM evidence"
_MAX_STRUCTURE = 1024
_PCR_INDEX = re.compile(r"0|[1-9]|[12][0-9]|3[01]", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)


def qualifying_data(report_data: bytes) -> bytes:
    """What a worker has its TPM put into ``extraData``: the first 32 of the 64 bytes of the binding (DESIGN §7).

    A TPM takes as much as its largest digest, and every TPM 2.0 has SHA-256.
    """
    return report_data[:32]


@dataclass(frozen=True, slots=True)
class Tpm2Evidence:
    """What travels: a quote, what it takes to check it, and perhaps the log that explains its PCRs."""

    ak_public: str
    """PEM, or base64 of SubjectPublicKeyInfo."""
    quote: bytes
    """``TPMS_ATTEST``."""
    signature: bytes
    """``TPMT_SIGNATURE``, or bare (:func:`~keyquorum_core.attestation.tpm2_keys.verify_signature`)."""
    bank: str
    pcrs: Mapping[int, bytes]
    event_log: bytes = b""
    """Empty: none. Which ones need a log is for appraisal to say."""
    ak_area: bytes = b""
    """The AK's ``TPM2B_PUBLIC``; empty: not given. It was required at enrolment."""

    @classmethod
    def parse(cls, data: bytes) -> Tpm2Evidence:
        """Read JSON of at most 512 KiB. Raises :class:`MalformedError`, and :class:`RefusedError` ``MEASUREMENT``
        where PCR values are not of exactly one bank that is acceptable."""
        fields = Fields(loads(data, _WHAT, max_bytes=MAX_EVIDENCE_BYTES, max_depth=3), _WHAT)
        ak_public = fields.raw("ak_public")  # read_key has a stricter grammar than any string
        if not isinstance(ak_public, str):
            raise MalformedError(
                Reason.MALFORMED, f"{_WHAT}: bad ak_public", expected="a string", actual=type(ak_public).__name__
            )
        quote = fields.base64("quote", max_bytes=_MAX_STRUCTURE)
        signature = fields.base64("signature", max_bytes=_MAX_STRUCTURE)
        banks = fields.object("pcrs")
        event_log = fields.base64("event_log", max_bytes=MAX_EVENT_LOG_BYTES) if "event_log" in fields else b""
        area = fields.base64("ak_tpm_public", max_bytes=_MAX_STRUCTURE) if "ak_tpm_public" in fields else b""
        fields.done()
        names = banks.names()
        bank = hash_by_name(names[0]) if len(names) == 1 else None
        if bank is None or not bank.strong:
            raise _bank("the PCR values are not of one acceptable bank", ", ".join(sorted(names))[:80])
        values = banks.object(bank.name)
        pcrs: dict[int, bytes] = {}
        for index in values.names():
            if not _PCR_INDEX.fullmatch(index):
                raise MalformedError(
                    Reason.MALFORMED, f"{_WHAT}: bad PCR", expected="0 … 31 in decimal", actual=index[:20]
                )
            pcrs[int(index)] = values.hex(index, bank.size)
        return cls(ak_public, quote, signature, bank.name, MappingProxyType(pcrs), event_log, area)

    def to_bytes(self) -> bytes:
        """The evidence as RFC 8785 JSON."""
        members: dict[str, Any] = {
            "ak_public": self.ak_public,
            "quote": _base64(self.quote),
            "signature": _base64(self.signature),
            "pcrs": {self.bank: {str(index): value.hex() for index, value in self.pcrs.items()}},
        }
        if self.event_log:
            members["event_log"] = _base64(self.event_log)
        if self.ak_area:
            members["ak_tpm_public"] = _base64(self.ak_area)
        return jcs.dumps(members)


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A genuine quote with what goes with it. Whose AK it is remains to be judged."""

    quote: Quote
    ak: PublicKey
    signature_hash: HashAlgorithm
    bank: HashAlgorithm
    pcrs: Mapping[int, bytes]
    """Exactly those that the quote selects."""
    events: tuple[Event, ...] | None
    """The events behind quoted PCRs; ``None`` without a log."""

    @property
    def secure_boot(self) -> bool | None:
        """``None`` where no log says, or PCR 7 is not quoted."""
        return None if self.events is None else secure_boot(self.events)

    def claims(self) -> dict[str, object]:
        """What the quote says, for people and ``--json``."""
        quote = self.quote
        return {
            "ak": self.ak.fingerprint,
            "ak_type": self.ak.kind,
            "signature_hash": self.signature_hash.name,
            "report_data": quote.extra_data.hex(),
            "qualified_signer": quote.qualified_signer.hex(),
            "clock": quote.clock,
            "reset_count": quote.reset_count,
            "restart_count": quote.restart_count,
            "clock_safe": quote.safe,
            "firmware_version": f"{quote.firmware_version:016x}",
            "bank": self.bank.name,
            "pcrs": {str(index): value.hex() for index, value in sorted(self.pcrs.items())},
            "event_log": self.events is not None,
            "events": len(self.events or ()),
            "secure_boot": self.secure_boot,
        }


def verify(evidence: bytes) -> VerifiedQuote:
    """Verify evidence in JSON.

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    return verify_parsed(Tpm2Evidence.parse(evidence))


def verify_parsed(parsed: Tpm2Evidence) -> VerifiedQuote:
    """The same from the structure and key on, for evidence that :meth:`Tpm2Evidence.parse` read."""
    quote = parse_quote(parsed.quote)
    ak = read_key(parsed.ak_public)
    signature_hash = verify_signature(ak, quote.signed, parsed.signature)
    if parsed.ak_area:
        _check_area(parsed.ak_area, ak)
    if not quote.extra_data:
        raise RefusedError(
            Reason.BINDING, "the quote is bound to nothing", expected="extraData that is not empty", actual=None
        )
    bank = _check_pcrs(quote, parsed)
    digest = signature_hash.digest(b"".join(value for _, value in sorted(parsed.pcrs.items())))
    if not hmac.compare_digest(digest, quote.pcr_digest):
        raise RefusedError(
            Reason.MEASUREMENT,
            "the PCR values are not those that the TPM quoted",
            expected=f"values with digest {quote.pcr_digest.hex()}",
            actual=digest.hex(),
        )
    events = check_event_log(parsed.event_log, bank, parsed.pcrs) if parsed.event_log else None
    return VerifiedQuote(quote, ak, signature_hash, bank, parsed.pcrs, events)


def _check_area(area: bytes, ak: PublicKey) -> None:
    """Check 5."""
    public = parse_public(area)
    key = check_ak(public)
    if not hmac.compare_digest(key.fingerprint, ak.fingerprint):
        raise RefusedError(
            Reason.PROVENANCE,
            "the public area is of another attestation key",
            expected=ak.fingerprint,
            actual=key.fingerprint,
        )


def _check_pcrs(quote: Quote, evidence: Tpm2Evidence) -> HashAlgorithm:
    """Checks 7 and 8. Returns the bank."""
    if len(quote.selections) != 1:
        raise _bank("the quote does not select PCRs of one bank", f"{len(quote.selections)} banks")
    selection = quote.selections[0]
    bank = hash_by_id(selection.bank)
    if bank is None or not bank.strong:
        raise _bank("the quote is of a bank that is not acceptable", bank.name if bank else f"{selection.bank:#06x}")
    if not selection.indices:
        raise RefusedError(
            Reason.MEASUREMENT, "the quote selects no PCR", expected="at least one", actual="an empty selection"
        )
    if bank.name != evidence.bank or set(selection.indices) != evidence.pcrs.keys():
        raise RefusedError(
            Reason.MEASUREMENT,
            "the PCR values are for another selection than the quote's",
            expected=f"{bank.name}: {', '.join(map(str, selection.indices))}",
            actual=f"{evidence.bank}: {', '.join(map(str, sorted(evidence.pcrs))) or 'none'}",
        )
    return bank


def _bank(message: str, actual: str) -> RefusedError:
    return RefusedError(Reason.MEASUREMENT, message, expected="one of sha256, sha384, sha512", actual=actual or "none")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
