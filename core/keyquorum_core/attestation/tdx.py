"""TDX quotes: verification, through ``dcap-qvl`` (Intel DCAP; quote versions 4 and 5; docs/spec/evidence-tdx.md).

Is the quote genuine? :func:`verify` makes these checks, in this order, and refuses at the first that fails:

1. form of the quote: one TDX quote, every byte of it accounted for            ``MALFORMED``, ``EVIDENCE_TYPE``
2. form of the PCK chain in the quote and of the collateral                              ``MALFORMED``, ``CHAIN``
3. the root of the PCK chain is pinned, and is the root of every issuer chain   ``ROOT_NOT_PINNED``, ``CHAIN``
4. by the library, against that root, with the CRLs, at ``now``:
   a. chains of TCB info, QE identity and PCK       ``CHAIN``, ``REVOKED``, ``EXPIRED``, ``NOT_YET_VALID``
   b. signatures of TCB info and QE identity, and their windows  ``SIGNATURE``, ``EXPIRED``, ``NOT_YET_VALID``
   c. the PCK signed the QE report, which names the attestation key, which signed the quote     ``SIGNATURE``
   d. the QE is the one of the QE identity, and not debuggable                        ``PROVENANCE``, ``TCB``
   e. collateral is for this platform (FMSPC) and for TDX                                           ``CHAIN``
   f. a TCB level matches, at launch and now, and is not revoked                          ``TCB``, ``REVOKED``
   g. the TDX module is Intel's, with the attributes that TCB info states                      ``PROVENANCE``
   h. attributes of the TD, as in appraisal       ``DEBUG_ENABLED``, ``MEASUREMENT``, ``PROVENANCE``, …
5. the library used the pinned root, and read the same quote as this module            ``CHAIN``, ``MALFORMED``
6. ``now`` is within the window common to all collateral and certificates     ``EXPIRED``, ``NOT_YET_VALID``

Checks 4f and 4h come after everything that makes a quote genuine. A refusal there says so in its details, ``verified``
= ``true``: genuine, and not acceptable. Whether a genuine quote is acceptable is otherwise the question of
:mod:`~keyquorum_core.attestation.tdx_appraisal`, which repeats 4h, so as not to depend on the library's defaults.

The certificate of Intel's root is inside the library. Another pinned root is a development root.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import dcap_qvl  # type: ignore[import-untyped, unused-ignore]

from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx_collateral import Chain, Collateral, parse_collateral, parse_pck_chain
from keyquorum_core.attestation.tdx_quote import TD_ATTRIBUTES, Quote, parse_quote
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.names import within

__all__ = ["PPID_BYTES", "Quote", "VerifiedQuote", "check_attributes", "parse_quote", "verify"]

PPID_BYTES = 16

_UNDER_DEBUG = 0xFF  # TUD, "TD under debug": a TD with any of these bits is untrusted
_KNOWN = sum(TD_ATTRIBUTES.values()) | 0x7F << 16  # 16 … 22 are defined, and the library accepts them all
_VERIFIED = {"verified": "true"}

# What the library says, and what that is called here; the first that matches. The order of its checks is in the list
# above. A text that none matches is refused as CHAIN.
_REASONS: tuple[tuple[str, Reason, bool], ...] = (
    ("TCB status is invalid: Revoked", Reason.REVOKED, True),
    ("No matching TCB level", Reason.TCB, True),
    ("No TDX module identity", Reason.TCB, True),
    ("below minimum required from TDX module", Reason.TCB, True),
    ("CertRevoked", Reason.REVOKED, False),
    ("CertExpired", Reason.EXPIRED, False),
    ("CrlExpired", Reason.EXPIRED, False),
    ("TCBInfo expired", Reason.EXPIRED, False),
    ("QE Identity expired", Reason.EXPIRED, False),
    ("CertNotValidYet", Reason.NOT_YET_VALID, False),
    ("issue date is in the future", Reason.NOT_YET_VALID, False),
    ("Signature is invalid for", Reason.SIGNATURE, False),
    ("QE report hash mismatch", Reason.SIGNATURE, False),
    ("ISV enclave report signature is invalid", Reason.SIGNATURE, False),
    ("QE ISVSVN", Reason.TCB, False),
    ("No TCB levels found in QE Identity", Reason.TCB, False),
    ("Unrecognized TCB status", Reason.TCB, False),
    ("QE report validation failed", Reason.PROVENANCE, False),
    ("QE MRSIGNER mismatch", Reason.PROVENANCE, False),
    ("QE ISVPRODID mismatch", Reason.PROVENANCE, False),
    ("QE MISCSELECT mismatch", Reason.PROVENANCE, False),
    ("QE ATTRIBUTES mismatch", Reason.PROVENANCE, False),
    ("TDX module identity check", Reason.PROVENANCE, False),
    ("Failed to verify certificate chain", Reason.CHAIN, False),
    ("Signature", Reason.CHAIN, False),
    ("Failed to decode", Reason.MALFORMED, False),
    ("Failed to parse", Reason.MALFORMED, False),
)
_ABOUT_ATTRIBUTES = (
    "Debug mode is enabled",
    "TD profiling is enabled",
    "Reserved bits in TD attributes",
    "TD migration is enabled",
    "SERVTD_EXT is enabled",
    "SEPT_VE_DISABLE is not enabled",
    "Invalid MR service TD",
)


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A genuine quote with what its endorsements add."""

    quote: Quote
    tcb_status: str
    """Intel's name for it: launch TCB, TDX module and QE converged; ``UpToDate`` is the best."""
    current_tcb_status: str
    """The same for the TCB now; empty in a TD 1.0 body."""
    qe_status: str
    advisory_ids: tuple[str, ...]
    """All advisories of the matched levels, launch, current and QE, sorted."""
    tcb_evaluation_data_number: int
    """The lower one of TCB info and QE identity."""
    ppid: bytes
    """16 bytes: the platform's identity in the PCK certificate."""
    fmspc: bytes
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    development: bool
    """The root is not Intel's."""
    collateral_issued_at: int
    """Unix seconds; see :attr:`~keyquorum_core.attestation.tdx_collateral.Collateral.issued_at`."""
    not_before: int
    not_after: int
    """Unix seconds: the window common to certificates, CRLs, TCB info and QE identity."""

    def claims(self) -> dict[str, object]:
        """What the quote says, for people and ``--json``."""
        return quote_claims(self.quote) | {
            "root": self.root,
            "development": self.development,
            "tcb_status": self.tcb_status,
            "current_tcb_status": self.current_tcb_status,
            "qe_status": self.qe_status,
            "advisory_ids": list(self.advisory_ids),
            "tcb_evaluation_data_number": self.tcb_evaluation_data_number,
            "ppid": self.ppid.hex(),
            "fmspc": self.fmspc.hex(),
            "collateral_issued_at": self.collateral_issued_at,
            "collateral_not_after": self.not_after,
        }


def quote_claims(quote: Quote) -> dict[str, object]:
    """What stands in the quote itself."""
    return {
        "quote_version": quote.version,
        "body_type": quote.body_type,
        "debug": bool(quote.attributes & _UNDER_DEBUG),
        "td_attributes": f"{quote.attributes:#x}",
        "td_attribute_names": list(quote.names_of_attributes()),
        "xfam": quote.xfam.hex(),
        "tee_tcb_svn": quote.tee_tcb_svn.hex(),
        "mrseam": quote.mrseam.hex(),
        "measurement": quote.mrtd.hex(),
        "mrconfigid": quote.mrconfigid.hex(),
        "mrowner": quote.mrowner.hex(),
        "mrownerconfig": quote.mrownerconfig.hex(),
        **{f"rtmr{index}": value.hex() for index, value in enumerate(quote.rtmrs)},
        "report_data": quote.report_data.hex(),
    }


def verify(quote: bytes, collateral: bytes, *, pinned_roots: Collection[str], now: int) -> VerifiedQuote:
    """Verify a raw quote with its collateral (JSON) at ``now`` (unix seconds).

    ``pinned_roots`` are SHA-256 digests of SubjectPublicKeyInfo in lower-case hex.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    within(now, "moment of verification")
    parsed = parse_quote(quote)
    chain = parse_pck_chain(parsed.pck_chain)
    if chain.root not in pinned_roots:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the quote chains to a root that is not pinned",
            expected=", ".join(sorted(pinned_roots)) or "no root is pinned",
            actual=chain.root,
        )
    endorsed = parse_collateral(collateral)
    if endorsed.roots != {chain.root}:
        raise RefusedError(
            Reason.CHAIN,
            "the collateral chains to another root than the quote",
            expected=chain.root,
            actual=", ".join(sorted(endorsed.roots)),
        )
    if endorsed.pck_chain not in (b"", parsed.pck_chain):
        raise RefusedError(Reason.CHAIN, "the collateral holds another PCK chain than the quote")
    claims = _verify_natively(parsed, endorsed, chain, now)
    verified = _verified(parsed, endorsed, chain, claims)
    if now > verified.not_after or now < verified.not_before:
        early = now < verified.not_before
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            f"collateral or a certificate is {'not valid yet' if early else 'out of date'}",
            expected=f"a time in {verified.not_before} … {verified.not_after}",
            actual=now,
            next_step="" if early else "fetch the collateral anew",
        )
    return verified


def check_attributes(quote: Quote) -> None:
    """Check 4h by this module: which ``TDATTRIBUTES`` a TD may have. Raises :class:`RefusedError`."""
    attributes = quote.attributes
    shown = f"{attributes:#x}"
    if attributes & _UNDER_DEBUG:
        raise RefusedError(
            Reason.DEBUG_ENABLED,
            "the host may debug or profile the TD",
            expected="TDATTRIBUTES bits 0 … 7 zero",
            actual=shown,
            details=_VERIFIED,
        )
    if attributes & ~_KNOWN:
        raise RefusedError(
            Reason.UNSUPPORTED,
            "the TD has attributes whose meaning is not known",
            expected="reserved bits zero",
            actual=shown,
            details=_VERIFIED,
        )
    if not attributes & TD_ATTRIBUTES["SEPT_VE_DISABLE"]:
        raise RefusedError(
            Reason.MEASUREMENT,
            "SEPT_VE_DISABLE is off: the host may take pages from the TD and have it fault on them",
            expected="TDATTRIBUTES bit 28 one",
            actual=shown,
            details=_VERIFIED,
        )
    if attributes & (TD_ATTRIBUTES["MIGRATABLE"] | TD_ATTRIBUTES["SERVTD_EXT"]) or any(quote.mrservicetd):
        raise RefusedError(
            Reason.PROVENANCE,
            "a service TD is bound to the TD, or it may migrate: it may leave the platform that it names",
            expected="TDATTRIBUTES bits 17 and 29, and MRSERVICETD, zero",
            actual=shown,
            details=_VERIFIED,
        )


def _verify_natively(quote: Quote, collateral: Collateral, chain: Chain, now: int) -> Mapping[str, Any]:
    """Checks 4. Returns the library's claims."""
    own = () if chain.root in INTEL_ROOTS else (chain.root_der,)
    verifier = _native(lambda: dcap_qvl.QuoteVerifier(*own))
    policy = _native(lambda: dcap_qvl.QuotePolicy.claims_only(now))
    try:
        claims: Mapping[str, Any] = json.loads(
            _native(lambda: verifier.verify_with_policy(quote.raw, collateral.native, now, policy)).to_json()
        )
        return claims
    except ValueError:
        pass
    # The refusal above names only the outermost failure; this function, of the same checks, names the causes too.
    try:
        if own:
            _native(lambda: dcap_qvl.verify_with_root_ca(quote.raw, collateral.native, own[0], now))
        else:
            _native(lambda: dcap_qvl.verify(quote.raw, collateral.native, now))
    except ValueError as error:
        raise _refusal(str(error), quote) from None
    raise _refusal("the two verdicts of the library differ", quote)


def _native(call: Callable[[], Any]) -> Any:
    """Call into the library. A panic in it is no :class:`Exception`, and would otherwise end the process."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise MalformedError(
            Reason.MALFORMED, "the quote or its collateral cannot be read", actual="the verifying library gave up"
        ) from None


def _refusal(text: str, quote: Quote) -> KeyquorumError:
    if any(each in text for each in _ABOUT_ATTRIBUTES) and "QE report validation failed" not in text:
        try:
            check_attributes(quote)
        except RefusedError as error:
            return error
        return RefusedError(Reason.UNSUPPORTED, "the TD's attributes are refused", actual=f"{quote.attributes:#x}")
    _, reason, verified = next((each for each in _REASONS if each[0] in text), ("", Reason.CHAIN, False))
    said = " ".join(text.removeprefix("Verification failed: ").split("Stack backtrace")[0].split())[:300]
    kind = MalformedError if reason is Reason.MALFORMED else RefusedError
    return kind(
        reason,
        "the quote is genuine, and refused for its TCB" if verified else "the quote does not verify",
        expected="a quote and collateral that verify",
        actual=said,
        details=_VERIFIED if verified else {},
    )


def _verified(quote: Quote, collateral: Collateral, chain: Chain, claims: Mapping[str, Any]) -> VerifiedQuote:
    """Check 5, and the claims that matter."""
    try:
        body = claims["report"][{2: "TD10", 3: "TD15", 4: "TD15Ex"}[quote.body_type]]
        platform, qe = claims["platform"], claims["qe"]
        current = platform["current_tcb_level"]
        verified = VerifiedQuote(
            quote=quote,
            tcb_status=str(claims["tcb"]["status"]),
            current_tcb_status=str(current["tcbStatus"]) if current is not None else "",
            qe_status=str(qe["tcb_level"]["tcbStatus"]),
            advisory_ids=tuple(
                sorted({*claims["tcb"]["advisory_ids"], *(current["advisoryIDs"] if current is not None else ())})
            ),
            tcb_evaluation_data_number=int(claims["tcb"]["eval_data_number"]),
            ppid=bytes(platform["pck"]["ppid"]),
            fmspc=bytes(platform["pck"]["fmspc"]),
            root=chain.root,
            development=chain.root not in INTEL_ROOTS,
            collateral_issued_at=collateral.issued_at,
            not_before=int(claims["latest_issue_date"]),
            not_after=int(claims["earliest_expiration_date"]),
        )
        used_root = bytes(platform["root_key_id"])
        same = _same_quote(quote, body)
    except (KeyError, TypeError, ValueError) as error:
        raise UnavailableError(
            Reason.INTERNAL, "dcap-qvl answers in a form that is not known", actual=type(error).__name__
        ) from None
    if not hmac.compare_digest(used_root, chain.root_key_id):
        raise RefusedError(
            Reason.CHAIN, "the quote was verified against another root", expected=chain.root_key_id.hex()
        )
    if not same or (len(verified.current_tcb_status) > 0) != (quote.body_type > 2):
        raise MalformedError(Reason.MALFORMED, "TDX quote: the verifying library reads it differently")
    return verified


def _same_quote(quote: Quote, body: Mapping[str, Any]) -> bool:
    """Whether the library read what the parser read, in all that appraisal looks at."""
    for _ in range(quote.body_type - 2):  # a later body holds the earlier one
        body = body["base"]
    expected = {
        "td_attributes": quote.attributes.to_bytes(8, "little"),
        "mr_td": quote.mrtd,
        "mr_config_id": quote.mrconfigid,
        "report_data": quote.report_data,
        **{f"rt_mr{index}": value for index, value in enumerate(quote.rtmrs)},
    }
    return all(body[name] == value.hex() for name, value in expected.items())
