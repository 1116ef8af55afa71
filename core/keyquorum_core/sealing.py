"""HPKE sealing to a recipient's public key (DESIGN §5): confidential now and against a quantum computer later.

Base mode of RFC 9180 with a hybrid KEM: X-Wing (ML-KEM-768 and X25519, draft-connolly-cfrg-xwing-kem) or, for keys that
ask for it, ML-KEM-1024 and P-384; HKDF-SHA-256 and AES-256-GCM in both. Suites are named. The name begins the encoded
public key, the encoded private key and every sealed blob, must be the same in all three, and callers bind the encoded
public key into ``info``. A nested suite, ``SUITE+OUTER``, wraps the HPKE ciphertext once more under a KEM of another
family through liboqs. Exact bytes: docs/spec/sealing.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.outer_kem import OuterKEM, OuterKEMs, liboqs_kem
from keyquorum_core.transcript import H, transcript

__all__ = [
    "MAX_PLAINTEXT",
    "MAX_PUBLIC",
    "RecipientKey",
    "Suite",
    "check_public",
    "seal",
    "suite_available",
    "suite_of",
]

MAX_PLAINTEXT: Final = 1 << 20
MAX_PUBLIC: Final = 2 << 20  # Classic McEliece public keys reach 1.3 MiB

_SUITE_NAME: Final = re.compile(r"[A-Z0-9_]{1,32}(\+[A-Za-z0-9-]{1,64})?", re.ASCII)


class Suite(StrEnum):
    """The HPKE suites; all with HKDF-SHA-256 and AES-256-GCM."""

    MLKEM768_X25519 = "MLKEM768_X25519"
    MLKEM1024_P384 = "MLKEM1024_P384"


_HPKE: Final = {
    suite: hpke.Suite(getattr(hpke.KEM, suite.name), hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM) for suite in Suite
}
_RAW_PUBLIC: Final = {Suite.MLKEM768_X25519: 1184 + 32, Suite.MLKEM1024_P384: 1568 + 97}
_RAW_PRIVATE: Final = {Suite.MLKEM768_X25519: 32, Suite.MLKEM1024_P384: 64 + 48}

_HybridPublic = hpke.MLKEM768X25519PublicKey | hpke.MLKEM1024P384PublicKey
_HybridPrivate = hpke.MLKEM768X25519PrivateKey | hpke.MLKEM1024P384PrivateKey


@dataclass(frozen=True, slots=True)
class _Public:
    """A parsed public key, ready to seal to."""

    suite: Suite
    name: str
    prefix: bytes  # u16be(len name) ‖ name: begins the key and everything sealed to it
    key: _HybridPublic
    digest: bytes  # SHA-256 of the whole encoding
    outer: OuterKEM | None
    outer_public: bytes


def _prefix(name: str) -> bytes:
    return len(name).to_bytes(2, "big") + name.encode()


def _split_name(encoded: bytes, what: str) -> tuple[str, bytes]:
    """``(suite name, rest)``. Raises :class:`MalformedError`; whether the suite is known is for :func:`_base`."""
    size = int.from_bytes(encoded[:2], "big")
    text = encoded[2 : 2 + size]
    if len(encoded) < 2 or len(text) != size or not text.isascii() or not _SUITE_NAME.fullmatch(text.decode("ascii")):
        raise MalformedError(
            Reason.MALFORMED, f"{what} does not begin with a suite name", expected="u16be length ‖ name"
        )
    return text.decode("ascii"), encoded[2 + size :]


def _base(name: str, kems: OuterKEMs) -> tuple[Suite, OuterKEM | None]:
    base, plus, outer = name.partition("+")
    try:
        suite = Suite(base)
    except ValueError:
        raise RefusedError(
            Reason.UNSUPPORTED,
            "unknown sealing suite",
            expected=" or ".join(Suite) + ", with an optional +OUTER-KEM",
            actual=name[:100],
        ) from None
    return suite, kems(outer) if plus else None


def _take(data: bytes, what: str) -> tuple[bytes, bytes]:
    """``(field, rest)`` of u32be(len) ‖ field ‖ rest. Raises :class:`MalformedError`."""
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 or len(data) - 4 < size:
        raise MalformedError(Reason.MALFORMED, f"{what} is truncated", expected="u32be length ‖ field")
    return data[4 : 4 + size], data[4 + size :]


def _sized(data: bytes, size: int, what: str) -> bytes:
    if len(data) != size:
        raise MalformedError(
            Reason.MALFORMED, f"{what} has the wrong size", expected=f"{size} bytes", actual=f"{len(data)} bytes"
        )
    return data


@lru_cache(maxsize=1024)
def _parse_public(encoded: bytes, kems: OuterKEMs) -> _Public:
    if len(encoded) > MAX_PUBLIC:
        raise MalformedError(Reason.TOO_LARGE, "public key is too large", expected=f"at most {MAX_PUBLIC} bytes")
    name, raw = _split_name(encoded, "public key")
    suite, outer = _base(name, kems)
    outer_public = b""
    if outer is not None:
        raw, outer_public = _take(raw, "nested public key")
        _sized(outer_public, outer.public_size, "outer public key")
    _sized(raw, _RAW_PUBLIC[suite], f"{suite} public key")
    key = _public_768(raw) if suite is Suite.MLKEM768_X25519 else _public_1024(raw)
    return _Public(suite, name, _prefix(name), key, hashlib.sha256(encoded).digest(), outer, outer_public)


def _public_768(raw: bytes) -> hpke.MLKEM768X25519PublicKey:
    try:
        x25519 = X25519PublicKey.from_public_bytes(raw[1184:])
        # A point of small order gives an all-zero secret, which this refuses (RFC 7748 §6.1).
        X25519PrivateKey.from_private_bytes(b"\x01" * 32).exchange(x25519)
        return hpke.MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(raw[:1184]), x25519)
    except ValueError:
        raise MalformedError(Reason.MALFORMED, "not an ML-KEM-768 and X25519 public key") from None


def _public_1024(raw: bytes) -> hpke.MLKEM1024P384PublicKey:
    try:
        if raw[1568] != 4:
            raise ValueError("not uncompressed")
        p384 = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), raw[1568:])
        return hpke.MLKEM1024P384PublicKey(MLKEM1024PublicKey.from_public_bytes(raw[:1568]), p384)
    except ValueError:
        raise MalformedError(Reason.MALFORMED, "not an ML-KEM-1024 and P-384 public key") from None


def suite_of(public: bytes) -> str:
    """The suite name that an encoded public key begins with. Raises :class:`MalformedError`."""
    return _split_name(public, "public key")[0]


def check_public(public: bytes, *, kems: OuterKEMs = liboqs_kem) -> None:
    """Raise :class:`MalformedError` (or :class:`RefusedError`: unknown suite) unless one can seal to ``public``."""
    _parse_public(bytes(public), kems)


def suite_available(name: str, *, kems: OuterKEMs = liboqs_kem) -> bool:
    """Whether this installation can make and use keys of suite ``name``."""
    try:
        _base(name, kems)
    except (RefusedError, UnavailableError):
        return False
    return bool(_SUITE_NAME.fullmatch(name))


def _outer_aead(secret: bytes, ciphertext: bytes, public: _Public, info: bytes) -> tuple[AESGCM, bytes]:
    """Key and nonce of the outer layer: used once each, since the KEM's secret is fresh."""
    binding = H("keyquorum/v1/nested", public.name.encode(), public.digest, ciphertext, info)
    okm = HKDF(hashes.SHA256(), 44, salt=None, info=transcript("keyquorum/v1/nested-key", binding)).derive(secret)
    return AESGCM(okm[:32]), okm[32:]


def seal(public: bytes, plaintext: bytes, info: bytes, *, kems: OuterKEMs = liboqs_kem) -> bytes:
    """Seal up to 1 MiB to an encoded public key: suite prefix ‖ HPKE enc ‖ ciphertext. ``info`` must be known to open.

    Raises as :func:`check_public`, and :class:`MalformedError` (``TOO_LARGE``).
    """
    if len(plaintext) > MAX_PLAINTEXT:
        raise MalformedError(Reason.TOO_LARGE, "too much to seal", expected=f"at most {MAX_PLAINTEXT} bytes")
    parsed = _parse_public(public, kems)
    inner = _HPKE[parsed.suite].encrypt(plaintext, parsed.key, info)
    if parsed.outer is None:
        return parsed.prefix + inner
    secret, ciphertext = parsed.outer.encapsulate(parsed.outer_public)
    aead, nonce = _outer_aead(secret, ciphertext, parsed, info)
    return parsed.prefix + ciphertext + aead.encrypt(nonce, inner, None)


@dataclass(frozen=True, slots=True)
class RecipientKey:
    """A private key to open what was sealed to :attr:`public`. Shows its suite and fingerprint only; never pickled."""

    public: bytes
    _parsed: _Public = field(repr=False, compare=False)
    _key: _HybridPrivate = field(repr=False, compare=False)
    _raw: bytes = field(repr=False, compare=False)
    _outer_private: bytes = field(repr=False, compare=False)

    @classmethod
    def generate(cls, suite: str = Suite.MLKEM768_X25519, *, kems: OuterKEMs = liboqs_kem) -> RecipientKey:
        """A fresh key. Raises :class:`RefusedError` or :class:`UnavailableError` (``UNSUPPORTED``)."""
        base, outer = _base(suite, kems)
        if base is Suite.MLKEM768_X25519:
            raw = secrets.token_bytes(32)
        else:
            scalar = ec.generate_private_key(ec.SECP384R1()).private_numbers().private_value
            raw = secrets.token_bytes(64) + scalar.to_bytes(48, "big")
        outer_public, outer_private = outer.generate() if outer is not None else (b"", b"")
        return cls._assemble(str(suite), raw, outer_public, outer_private, kems)

    @classmethod
    def from_seed_bytes(cls, encoded: bytes, *, kems: OuterKEMs = liboqs_kem) -> RecipientKey:
        """From :meth:`to_seed_bytes`. Raises :class:`MalformedError`, or as :meth:`generate`."""
        name, raw = _split_name(encoded, "private key")
        base, outer = _base(name, kems)
        outer_public = outer_private = b""
        if outer is not None:
            raw, rest = _take(raw, "nested private key")
            outer_private, outer_public = _take(rest, "nested private key")
            _sized(outer_private, outer.private_size, "outer private key")
            _sized(outer_public, outer.public_size, "outer public key")
            secret, ciphertext = outer.encapsulate(outer_public)
            if not hmac.compare_digest(outer.decapsulate(outer_private, ciphertext), secret):
                raise MalformedError(Reason.MALFORMED, "the halves of the outer key do not belong together")
        _sized(raw, _RAW_PRIVATE[base], f"{base} private key")
        return cls._assemble(name, raw, outer_public, outer_private, kems)

    @classmethod
    def _assemble(
        cls, name: str, raw: bytes, outer_public: bytes, outer_private: bytes, kems: OuterKEMs
    ) -> RecipientKey:
        key: _HybridPrivate
        if Suite(name.partition("+")[0]) is Suite.MLKEM768_X25519:
            # X-Wing's expandDecapsulationKey: the 32-byte seed is the whole private key.
            expanded = hashlib.shake_256(raw).digest(96)
            mlkem768 = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
            x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
            key = hpke.MLKEM768X25519PrivateKey(mlkem768, x25519)
            hpke_public = mlkem768.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        else:
            mlkem1024 = MLKEM1024PrivateKey.from_seed_bytes(raw[:64])
            try:
                p384 = ec.derive_private_key(int.from_bytes(raw[64:], "big"), ec.SECP384R1())
            except ValueError:
                raise MalformedError(Reason.MALFORMED, "not a P-384 private key") from None
            key = hpke.MLKEM1024P384PrivateKey(mlkem1024, p384)
            point = p384.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            hpke_public = mlkem1024.public_key().public_bytes_raw() + point
        if "+" in name:
            hpke_public = len(hpke_public).to_bytes(4, "big") + hpke_public + outer_public
        public = _prefix(name) + hpke_public
        return cls(public, _parse_public(public, kems), key, raw, outer_private)

    @property
    def suite(self) -> str:
        return self._parsed.name

    def to_seed_bytes(self) -> bytes:
        """The private key, SECRET: suite prefix ‖ seed; a nested suite adds its outer pair (docs/spec/sealing.md)."""
        if self._parsed.outer is None:
            return self._parsed.prefix + self._raw
        halves = (self._raw, self._outer_private)
        fields = b"".join(len(half).to_bytes(4, "big") + half for half in halves)
        return self._parsed.prefix + fields + self._parsed.outer_public

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """The plaintext. Raises :class:`RefusedError` (``UNSEAL``): key, ``info`` or bytes are wrong, all one."""
        prefix = self._parsed.prefix
        if not sealed.startswith(prefix):
            raise RefusedError(
                Reason.UNSEAL,
                "this was not sealed for this key",
                expected=f"suite {self.suite}",
                actual="another suite, or not a sealed blob",
            )
        body = sealed[len(prefix) :]
        try:
            outer = self._parsed.outer
            if outer is not None:
                ciphertext, body = body[: outer.ciphertext_size], body[outer.ciphertext_size :]
                if len(ciphertext) != outer.ciphertext_size:
                    raise InvalidTag
                secret = outer.decapsulate(self._outer_private, ciphertext)
                aead, nonce = _outer_aead(secret, ciphertext, self._parsed, info)
                body = aead.decrypt(nonce, body, None)
            return _HPKE[self._parsed.suite].decrypt(body, self._key, info)
        except (InvalidTag, ValueError):
            raise RefusedError(
                Reason.UNSEAL,
                "cannot open the sealed blob",
                expected="sealed to this key, for this purpose, and unchanged",
                actual="another key, other bound values, or changed bytes",
            ) from None

    def __repr__(self) -> str:
        return f"RecipientKey({self.suite}, {self._parsed.digest.hex()[:16]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled or copied")
