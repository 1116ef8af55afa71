"""AMD's revocation lists (57230, §4.4: ``/vcek/v1/{product}/crl``), where one travels with the endorsements.

Nobody has to be asked: a list that is there is always verified, and whether one must be there the reference values say.
Checks of :func:`verify_crls`, in order; each one refuses:

1. each is one CRL in DER or PEM, of version 2, without a critical extension that is not known    ``MALFORMED``
2. its issuer is the ARK or the ASK of the chain, and no two have one issuer                      ``CHAIN``
3. RSASSA-PSS with SHA-384 by that issuer                                                         ``SIGNATURE``
4. ``now`` is between this update and next update                        ``NOT_YET_VALID``, ``EXPIRED``
5. no certificate of the chain that the issuer issued is in it                                    ``REVOKED``
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import SignatureAlgorithmOID

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["Issued", "SnpRevocation", "looks_like_crl", "verify_crls"]

_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
_MAX_CRL_BYTES = 64 << 10
_MAX_CRLS = 2
_PEM = b"-----BEGIN X509 CRL"
_KNOWN = (x509.CRLNumber, x509.AuthorityKeyIdentifier)


@dataclass(frozen=True, slots=True)
class Issued:
    """An authority of the chain with the serial numbers, by name of the certificate, that it issued in the chain."""

    name: str
    subject: bytes
    """DER of the name."""
    key: rsa.RSAPublicKey
    serials: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class SnpRevocation:
    """What the lists at hand covered. ``issued_at``: of the oldest; all zero where there is none (unix seconds)."""

    issuers: tuple[str, ...] = ()
    issued_at: int = 0
    not_after: int = 0


def looks_like_crl(data: bytes) -> bool:
    """Whether a file is a CRL and no certificate: for sorting, never a decision. In DER the first thing signed is a
    CRL's version, an INTEGER, where a certificate has its own in a tag [0]."""
    if data.lstrip().startswith(_PEM):
        return True
    at = 0
    for _ in range(2):  # the outer sequence, then the signed one
        if data[at : at + 1] != b"\x30":
            return False
        size = data[at + 1 : at + 2]
        at += 2 + (size[0] & 0x7F if size and size[0] & 0x80 else 0)
    return data[at : at + 3] == b"\x02\x01\x01"


def verify_crls(crls: Sequence[bytes], authorities: Sequence[Issued], now: int) -> SnpRevocation:
    """Verify revocation lists of the chain's ``authorities`` at ``now`` (unix seconds).

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    if len(crls) > _MAX_CRLS or any(len(each) > _MAX_CRL_BYTES for each in crls):
        raise _malformed(f"at most {_MAX_CRLS} lists of {_MAX_CRL_BYTES} bytes", "more")
    seen: list[str] = []
    lists = [_parse(each) for each in crls]
    for crl in lists:
        issuer = next((each for each in authorities if each.subject == crl.issuer), None)
        if issuer is None or issuer.name in seen:
            raise RefusedError(
                Reason.CHAIN,
                "a revocation list is not one of this chain's, or there are two of one issuer",
                expected=f"one list at most by each of {', '.join(each.name for each in authorities)}",
                actual="another issuer" if issuer is None else f"two by the {issuer.name}",
            )
        seen.append(issuer.name)
        _check_signature(crl, issuer)
        _check_time(crl, issuer.name, now)
        for name, serial in issuer.serials:
            if serial in crl.revoked:
                raise RefusedError(
                    Reason.REVOKED,
                    f"the {name} certificate is revoked",
                    expected=f"not in the list of the {issuer.name}",
                    actual=f"serial number {serial:x} is in it",
                )
    return SnpRevocation(
        tuple(sorted(seen)),
        min((each.issued_at for each in lists), default=0),
        min((each.not_after for each in lists), default=0),
    )


@dataclass(frozen=True, slots=True)
class _Crl:
    issuer: bytes
    revoked: frozenset[int]
    issued_at: int
    not_after: int
    pss_sha384: bool
    signed: bytes
    signature: bytes


def _parse(data: bytes) -> _Crl:
    """Check 1. The parser reads lazily, so everything is read here, where what it raises is caught."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pem = data.lstrip().startswith(_PEM)
            crl = x509.load_pem_x509_crl(data) if pem else x509.load_der_x509_crl(data)
            der = crl.public_bytes(Encoding.DER)
            strange = [
                each.oid.dotted_string for each in crl.extensions if each.critical or not isinstance(each.value, _KNOWN)
            ]
            after = crl.next_update_utc
            if strange or after is None:
                raise _malformed("a next update, and no extension but known ones", ", ".join(strange)[:200] or "none")
            if (not pem and der != data) or not der.endswith(b"\0" + crl.signature):
                raise _malformed("one CRL to its last byte, signed with whole bytes", "another encoding")
            return _Crl(
                issuer=crl.issuer.public_bytes(),
                revoked=frozenset(each.serial_number for each in crl),
                issued_at=int(crl.last_update_utc.timestamp()),
                not_after=int(after.timestamp()),
                pss_sha384=crl.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS
                and isinstance(crl.signature_hash_algorithm, hashes.SHA384),
                signed=crl.tbs_certlist_bytes,
                signature=crl.signature,
            )
    except (
        ValueError,
        TypeError,
        OverflowError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise _malformed("a CRL in DER or PEM", type(error).__name__) from None


def _check_signature(crl: _Crl, issuer: Issued) -> None:
    """Check 3."""
    try:
        if not crl.pss_sha384:
            raise InvalidSignature
        issuer.key.verify(crl.signature, crl.signed, _PSS, hashes.SHA384())
    except InvalidSignature:
        raise RefusedError(
            Reason.SIGNATURE,
            f"the revocation list of the {issuer.name} is not signed by it",
            expected="RSASSA-PSS with SHA-384",
            actual="another signature",
        ) from None


def _check_time(crl: _Crl, name: str, now: int) -> None:
    """Check 4."""
    if not crl.issued_at <= now <= crl.not_after:
        early = now < crl.issued_at
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            f"the revocation list of the {name} {'is not valid yet' if early else 'is out of date'}",
            expected=f"a time in {crl.issued_at} … {crl.not_after}",
            actual=now,
            next_step="" if early else "fetch it anew from AMD",
        )


def _malformed(expected: str, actual: str) -> MalformedError:
    return MalformedError(Reason.MALFORMED, "a revocation list cannot be read", expected=expected, actual=actual)
