"""What goes with a TDX quote: the PCK chain inside it, and the collateral, in the members that Intel's library names.

Collateral is one JSON object: ``tcb_info`` and ``qe_identity`` as the very strings that were signed, their signatures
and the two CRLs (DER) as lower-case hex, and three issuer chains as PEM, each of one certificate and the root.
``pck_certificate_chain`` may repeat the chain in the quote.

Intel's root certificate, and the chain of the PCK CRL, are not looked at by the library that verifies quotes. They are
here, so that no byte of the evidence is without effect: every chain must be canonical PEM, end in a certificate that
signed itself, and that root must have signed the certificate before it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import dcap_qvl  # type: ignore[import-untyped, unused-ignore]
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields, loads

__all__ = ["MAX_COLLATERAL_BYTES", "Chain", "Collateral", "parse_collateral", "parse_pck_chain"]

MAX_COLLATERAL_BYTES = 256 << 10

_WHAT = "TDX collateral"
_MAX_CHAIN = 16 << 10
_MAX_CRL = 128 << 10
_MAX_SIGNED = 64 << 10
_SIGNATURE_BYTES = 64
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Chain:
    """The root of a chain whose lower certificates the verifying library checks."""

    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    root_der: bytes
    root_key_id: bytes
    """SHA-384 of the root's public key as a point, which is how Intel's library names it."""


@dataclass(frozen=True, slots=True)
class Collateral:
    """Collateral as parsed; nothing in it but the issuer chains' upper ends is verified."""

    native: object
    """``dcap_qvl.QuoteCollateralV3``."""
    roots: frozenset[str]
    """The roots of the three issuer chains, as in :class:`Chain`."""
    issued_at: int
    """Unix seconds: when the oldest of TCB info, QE identity and PCK CRL was issued. The root's CRL is not counted: it
    is issued once a year, and its own next update is enforced."""
    pck_chain: bytes
    """The PCK chain, where collateral repeats it, as some tools have it; empty where not."""


# A fleet has few distinct PCK chains and collaterals, and parsing one costs as much as verifying a quote.
@lru_cache(maxsize=128)
def parse_pck_chain(pem: bytes) -> Chain:
    """The chain in a quote: PCK certificate, PCK CA, root. Raises :class:`MalformedError` ``MALFORMED`` and
    :class:`RefusedError` ``CHAIN``."""
    return _chain(pem, "PCK chain", 3)


@lru_cache(maxsize=32)
def parse_collateral(data: bytes) -> Collateral:
    """Parse collateral of at most 256 KiB. Raises :class:`MalformedError` and :class:`RefusedError` ``CHAIN``."""
    fields = Fields(loads(data, _WHAT, max_bytes=MAX_COLLATERAL_BYTES, max_depth=2), _WHAT)
    chains = {
        name: fields.text(name, max_length=_MAX_CHAIN)
        for name in ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")
    }
    root_ca_crl = _hex(fields, "root_ca_crl", _MAX_CRL)
    pck_crl = _hex(fields, "pck_crl", _MAX_CRL)
    tcb_info = fields.text("tcb_info", max_length=_MAX_SIGNED)
    tcb_info_signature = fields.hex("tcb_info_signature", _SIGNATURE_BYTES)
    qe_identity = fields.text("qe_identity", max_length=_MAX_SIGNED)
    qe_identity_signature = fields.hex("qe_identity_signature", _SIGNATURE_BYTES)
    # dcap-qvl's own fetcher adds this member, NUL and all. The quote's chain is what counts; they must be the same.
    pck_chain = fields.raw("pck_certificate_chain") if "pck_certificate_chain" in fields else ""
    if not isinstance(pck_chain, str) or len(pck_chain) > _MAX_CHAIN:
        raise _malformed("pck_certificate_chain", f"string of at most {_MAX_CHAIN} characters", "something else")
    fields.done()
    _crl_issued_at(root_ca_crl, "root_ca_crl")
    listed_at = _crl_issued_at(pck_crl, "pck_crl")
    issued_at = min(_issued_at(tcb_info, "tcb_info"), _issued_at(qe_identity, "qe_identity"), listed_at)
    roots = frozenset(_chain(pem.encode(), name, 2).root for name, pem in chains.items())
    native = dcap_qvl.QuoteCollateralV3(
        root_ca_crl=root_ca_crl,
        pck_crl=pck_crl,
        tcb_info=tcb_info,
        tcb_info_signature=tcb_info_signature,
        qe_identity=qe_identity,
        qe_identity_signature=qe_identity_signature,
        **chains,
    )
    return Collateral(native, roots, issued_at, pck_chain.encode().removesuffix(b"\0"))


def _chain(pem: bytes, what: str, size: int) -> Chain:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser only warns of is judged by signature and fingerprint
            certificates = x509.load_pem_x509_certificates(pem)
            canonical = b"".join(each.public_bytes(Encoding.PEM) for each in certificates) == pem and all(
                _whole(each.public_bytes(Encoding.DER), each.signature) for each in certificates
            )
            if len(certificates) != size or not canonical:
                raise _malformed(
                    what, f"canonical PEM of {size} certificates", f"{len(certificates)}, canonical: {canonical}"
                )
            root = certificates[-1]
            key = root.public_key()
            _check_issued(root, root)
            _check_issued(certificates[-2], root)
    except InvalidSignature:
        raise RefusedError(
            Reason.CHAIN, f"{_WHAT}: {what} does not hold together", expected="signatures by its root", actual="others"
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise _malformed(what, "X.509 certificates in PEM, each issued by the next", type(error).__name__) from None
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    except ValueError:
        raise _malformed(what, "a root key on P-256", "another key") from None
    return Chain(
        root=hashlib.sha256(spki).hexdigest(),
        root_der=root.public_bytes(Encoding.DER),
        root_key_id=hashlib.sha384(point).digest(),
    )


@lru_cache(maxsize=64)
def _check_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Certificates compare by their bytes; the few above a PCK certificate come up in every chain and collateral."""
    certificate.verify_directly_issued_by(issuer)


def _hex(fields: Fields, name: str, max_bytes: int) -> bytes:
    text = fields.text(name, max_length=2 * max_bytes)
    if len(text) % 2 or any(c not in "0123456789abcdef" for c in text):
        raise _malformed(name, "lower-case hex", "something else")
    return bytes.fromhex(text)


def _issued_at(signed: str, name: str) -> int:
    what = f"{_WHAT}: {name}"
    document = loads(signed.encode(), what, max_bytes=_MAX_SIGNED, max_depth=12)
    issued = document.get("issueDate") if isinstance(document, dict) else None
    if not isinstance(issued, str) or not _TIME.fullmatch(issued):
        raise _malformed(name, "issueDate as YYYY-MM-DDThh:mm:ssZ", "something else")
    try:
        return int(datetime.fromisoformat(issued).astimezone(UTC).timestamp())
    except (ValueError, OverflowError):
        raise _malformed(name, "issueDate as a moment", issued) from None


def _crl_issued_at(der: bytes, name: str) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            crl = x509.load_der_x509_crl(der)
            if not _whole(der, crl.signature):
                raise _malformed(name, "a signature of whole bytes", "unused bits")
            return int(crl.last_update_utc.timestamp())
    except (ValueError, TypeError, OverflowError, x509.InvalidVersion) as error:
        raise _malformed(name, "a CRL in DER", type(error).__name__) from None


def _whole(der: bytes, signature: bytes) -> bool:
    """Whether the BIT STRING that ends a certificate or CRL leaves no bits unused. Nobody signs how many it leaves, and
    where its last bits are zero, parsers take several numbers."""
    return der.endswith(b"\0" + signature)


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: {what}", expected=expected, actual=actual)
