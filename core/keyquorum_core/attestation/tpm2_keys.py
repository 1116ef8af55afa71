"""Keys of a TPM: the attestation key (AK) that signs quotes, and the endorsement key (EK) that vouches for the TPM.

An AK is known by the SHA-256 of its SubjectPublicKeyInfo (DER), its fingerprint. :func:`check_ak` and :func:`check_ek`
say what a public area must say about either, so that what the TPM holds under it is what its name promises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from keyquorum_core.attestation.tpm2_structures import (
    AES,
    CFB,
    ECC,
    HASHES,
    RSA,
    Attributes,
    HashAlgorithm,
    Public,
    Scheme,
    Signature,
    hash_by_id,
    parse_signature,
)
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["PublicKey", "check_ak", "check_ek", "key_of", "read_key", "read_spki", "verify_signature"]

_MAX_SPKI_BYTES = 1024
_MAX_KEY_TEXT = 4096
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\n([A-Za-z0-9+/=\n]+)\n-----END PUBLIC KEY-----\n?", re.ASCII)
_EXPONENT = 65537
_RSA_BITS = range(2048, 4097)
_CURVES: dict[int, ec.EllipticCurve] = {0x0003: ec.SECP256R1(), 0x0004: ec.SECP384R1()}  # TPM_ECC_CURVE
_STRONG = tuple(each for each in HASHES if each.strong)
_HASH_OBJECTS: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}

_AK_SET = (
    Attributes.FIXED_TPM
    | Attributes.FIXED_PARENT
    | Attributes.SENSITIVE_DATA_ORIGIN
    | Attributes.RESTRICTED
    | Attributes.SIGN
)
_AK_CLEAR = Attributes.DECRYPT | Attributes.ENCRYPTED_DUPLICATION | Attributes.X509_SIGN
_EK_SET = (
    Attributes.FIXED_TPM
    | Attributes.FIXED_PARENT
    | Attributes.SENSITIVE_DATA_ORIGIN
    | Attributes.RESTRICTED
    | Attributes.DECRYPT
)
_EK_CLEAR = Attributes.SIGN | Attributes.ENCRYPTED_DUPLICATION | Attributes.X509_SIGN


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An RSA key of 2048 … 4096 bits with exponent 65537, or one on P-256 or P-384."""

    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    spki: bytes
    fingerprint: str
    """SHA-256 of ``spki``, hex."""

    @property
    def kind(self) -> str:
        """For people: ``RSA-2048``, ``secp256r1``."""
        return f"RSA-{self.key.key_size}" if isinstance(self.key, rsa.RSAPublicKey) else self.key.curve.name


def read_key(text: str) -> PublicKey:
    """A public key as PEM (``PUBLIC KEY``) or as base64 of its SubjectPublicKeyInfo.

    Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``SIGNATURE`` for a key too weak.
    """
    if len(text) > _MAX_KEY_TEXT:
        raise _malformed("size", f"at most {_MAX_KEY_TEXT} characters", len(text))
    pem = _PEM.fullmatch(text)
    encoded = pem[1].replace("\n", "") if pem else text
    try:
        spki = base64.b64decode(encoded.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        spki = b""
    if not spki or base64.b64encode(spki).decode() != encoded:
        raise _malformed("form", "PEM, or canonical base64 of SubjectPublicKeyInfo", "neither")
    return read_spki(spki)


# A fleet's AKs come again with every quote, and parsing a key costs as much as verifying with it.
@lru_cache(maxsize=1024)
def read_spki(spki: bytes) -> PublicKey:
    """A public key from its SubjectPublicKeyInfo in DER, in canonical form. Raises as :func:`read_key`."""
    if len(spki) > _MAX_SPKI_BYTES:
        raise _malformed("size", f"at most {_MAX_SPKI_BYTES} bytes", len(spki))
    try:
        key = load_der_public_key(spki)
        canonical = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == spki
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _malformed("form", "SubjectPublicKeyInfo in DER", type(error).__name__) from None
    if not canonical:
        raise _malformed("form", "DER in its one canonical form", "another encoding")
    return _checked(key)


def key_of(public: Public) -> PublicKey:
    """The key in a public area. Raises as :func:`read_key`."""
    try:
        if public.type == RSA:
            modulus = int.from_bytes(public.unique[0], "big")
            if public.key_bits != 8 * len(public.unique[0]) or modulus.bit_length() != public.key_bits:
                raise _malformed("RSA modulus", f"{public.key_bits} bits", f"{modulus.bit_length()} bits")
            return _checked(rsa.RSAPublicNumbers(public.exponent, modulus).public_key())
        curve = _CURVES.get(public.curve)
        if curve is None:
            raise _weak("P-256 or P-384", f"curve {public.curve:#06x}")
        size = (curve.key_size + 7) // 8
        if max(map(len, public.unique)) > size:
            raise _malformed("ECC point", f"coordinates of at most {size} bytes", "longer")
        x, y = (int.from_bytes(each, "big") for each in public.unique)
        return _checked(ec.EllipticCurvePublicNumbers(x, y, curve).public_key())
    except ValueError as error:
        raise _malformed("public area", "a key", type(error).__name__) from None


def check_ak(public: Public) -> PublicKey:
    """The AK of a public area that may attest: it signs only what the TPM itself made, and never leaves it.

    Raises :class:`RefusedError` ``PROVENANCE`` for its attributes, and as :func:`read_key`.
    """
    _check_attributes("attestation", public, _AK_SET, _AK_CLEAR)
    key = key_of(public)
    schemes = (Scheme.ECDSA,) if public.type == ECC else (Scheme.RSASSA, Scheme.RSAPSS)
    scheme_hash = hash_by_id(public.scheme_hash_id or 0)
    if public.scheme not in schemes or scheme_hash is None or not scheme_hash.strong:
        raise RefusedError(
            Reason.PROVENANCE,
            "the attestation key's scheme is not acceptable",
            expected=f"{' or '.join(each.name for each in schemes)} with SHA-256 or better",
            actual=f"scheme {public.scheme or 0:#06x} with {scheme_hash.name if scheme_hash else 'another hash'}",
        )
    return key


def check_ek(public: Public) -> PublicKey:
    """The EK of a public area that can receive a credential. Raises as :func:`check_ak`."""
    _check_attributes("endorsement", public, _EK_SET, _EK_CLEAR)
    symmetric = public.symmetric
    if symmetric is None or symmetric[0] != AES or symmetric[1] not in (128, 192, 256) or symmetric[2] != CFB:
        raise RefusedError(
            Reason.PROVENANCE,
            "the endorsement key does not protect credentials with AES in CFB mode",
            expected="AES-128, -192 or -256, CFB",
            actual=symmetric or "none",
        )
    return key_of(public)


def verify_signature(key: PublicKey, signed: bytes, signature: bytes) -> HashAlgorithm:
    """Verify a ``TPMT_SIGNATURE`` or a bare one, and return its hash.

    A bare signature is, by the key: as many bytes as the RSA modulus; or r ‖ s, each as long as the curve's field, or
    ``Ecdsa-Sig-Value`` in DER. It does not say with what scheme and hash it was made, and is tried with those that are
    acceptable. Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``SIGNATURE``.
    """
    size = (key.key.key_size + 7) // 8
    ecdsa = isinstance(key.key, ec.EllipticCurvePublicKey)
    parts: tuple[bytes, ...] | None = None
    if ecdsa and len(signature) == 2 * size:
        parts = (signature[:size], signature[size:])
    elif ecdsa and signature[:1] == b"\x30":
        parts = _from_der(signature, size)
    elif not ecdsa and len(signature) == size:
        parts = (signature,)
    if parts is None:
        parsed = parse_signature(signature)
        candidates = [(parsed, _strong_hash(parsed.hash_id))]
    else:
        schemes = (Scheme.ECDSA,) if ecdsa else (Scheme.RSASSA, Scheme.RSAPSS)
        candidates = [(Signature(scheme, each.id, parts), each) for scheme in schemes for each in _STRONG]
    for candidate, algorithm in candidates:
        if _verifies(key, signed, candidate, algorithm, size):
            return algorithm
    raise RefusedError(
        Reason.SIGNATURE,
        "the quote's signature does not verify with the attestation key",
        expected=f"a signature by the {key.kind} key {key.fingerprint}",
        actual="another",
    )


def _verifies(key: PublicKey, signed: bytes, signature: Signature, algorithm: HashAlgorithm, size: int) -> bool:
    chosen = _HASH_OBJECTS[algorithm.name]
    try:
        if isinstance(key.key, ec.EllipticCurvePublicKey):
            if signature.scheme is not Scheme.ECDSA or max(map(len, signature.parts)) > size:
                return False
            r, s = (int.from_bytes(each, "big") for each in signature.parts)
            key.key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(chosen))
        elif signature.scheme is Scheme.RSASSA:
            key.key.verify(signature.parts[0], signed, padding.PKCS1v15(), chosen)
        elif signature.scheme is Scheme.RSAPSS:
            # Part 1 §B.7 leaves the salt's length to the TPM: older ones take the longest, newer ones the digest's.
            pss = padding.PSS(mgf=padding.MGF1(chosen), salt_length=padding.PSS.AUTO)
            key.key.verify(signature.parts[0], signed, pss, chosen)
        else:
            return False
    except (InvalidSignature, ValueError):
        return False
    return True


def _from_der(signature: bytes, size: int) -> tuple[bytes, bytes]:
    try:
        r, s = decode_dss_signature(signature)
        if encode_dss_signature(r, s) == signature:
            return r.to_bytes(size, "big"), s.to_bytes(size, "big")
    except (ValueError, OverflowError):
        pass
    raise MalformedError(
        Reason.MALFORMED, "the bare ECDSA signature", expected=f"DER of two integers of {size} bytes", actual="others"
    )


def _strong_hash(algorithm: int) -> HashAlgorithm:
    found = hash_by_id(algorithm)
    if found is None or not found.strong:
        raise RefusedError(
            Reason.SIGNATURE,
            "the quote is signed with a hash that is not acceptable",
            expected="SHA-256, SHA-384 or SHA-512",
            actual=found.name if found else f"{algorithm:#06x}",
        )
    return found


def _check_attributes(what: str, public: Public, required: Attributes, forbidden: Attributes) -> None:
    weak = not public.name_hash.strong
    if weak or public.attributes & required != required or public.attributes & forbidden:
        raise RefusedError(
            Reason.PROVENANCE,
            f"the public area is not that of {'an' if what[0] in 'ae' else 'a'} {what} key",
            expected=f"a Name of SHA-256 or better, {required.names()}; and none of {forbidden.names()}",
            actual=f"a Name of {public.name_hash.name}, {public.attributes.names()}",
        )


def _checked(key: object) -> PublicKey:
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in _RSA_BITS or key.public_numbers().e != _EXPONENT:
            raise _weak(
                f"RSA of {_RSA_BITS[0]} … {_RSA_BITS[-1]} bits and exponent {_EXPONENT}",
                f"{key.key_size} bits, exponent {key.public_numbers().e}"[:80],
            )
    elif not isinstance(key, ec.EllipticCurvePublicKey):
        raise _weak("an RSA or ECC key", type(key).__name__)
    elif not any(isinstance(key.curve, type(each)) for each in _CURVES.values()):
        raise _weak("P-256 or P-384", key.curve.name)
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(key, spki, hashlib.sha256(spki).hexdigest())


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"TPM key: {what}", expected=expected, actual=actual)


def _weak(expected: str, actual: str) -> RefusedError:
    return RefusedError(Reason.SIGNATURE, "the TPM's key is not acceptable", expected=expected, actual=actual)
