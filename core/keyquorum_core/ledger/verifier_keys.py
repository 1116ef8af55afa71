"""Verifier keys of C2SP signed-note: a name, a signature type and a public key, written as one line of text.

``<name>+<key id, 8 hex digits>+<base64(type ‖ public key)>``. The key id is the first four bytes of
SHA-256(name ‖ "\\n" ‖ type ‖ public key): a hint that is always recomputed here, and refused where it differs.

| type | what it signs | public key |
|---|---|---|
| 0x01 | Ed25519 over the note's text | 32 bytes, RFC 8032 |
| 0x04 | Ed25519, timestamped ``cosignature/v1`` | 32 bytes, RFC 8032 |
| 0x06 | ML-DSA-44, timestamped ``subtree/v1`` | 1312 bytes, FIPS 204 |
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.signing import ed25519_public

__all__ = ["MAX_NAME", "MAX_VKEY", "SignatureType", "VerifierKey", "check_key_name", "decode_base64", "key_id"]

MAX_NAME: Final = 255
"""Bytes of UTF-8 in a key name or origin: what ``subtree/v1`` can hold."""
MAX_VKEY: Final = 2400
_VKEY: Final = re.compile(r"(?P<name>[^+]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/]+={0,2})", re.ASCII)


class SignatureType(IntEnum):
    """The byte in a key id that says how a key signs."""

    ED25519 = 0x01
    ED25519_COSIGNATURE = 0x04
    ML_DSA_44 = 0x06

    @property
    def public_size(self) -> int:
        return 1312 if self is SignatureType.ML_DSA_44 else 32

    @property
    def signature_size(self) -> int:
        """Bytes after the key id in a signature line: 8 of timestamp but for 0x01, then the signature."""
        return {SignatureType.ED25519: 64, SignatureType.ED25519_COSIGNATURE: 72, SignatureType.ML_DSA_44: 2428}[self]


def check_key_name(name: str, what: str) -> None:
    """Raise :class:`MalformedError` unless ``name`` is 1 … 255 bytes of UTF-8 with no space of any alphabet, no plus
    and no control character."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_NAME or any(c.isspace() or c == "+" or ord(c) < 32 for c in name):
        raise MalformedError(
            Reason.MALFORMED,
            f"bad {what}",
            expected=f"1…{MAX_NAME} bytes of UTF-8 without spaces, plus signs and control characters",
            actual=ascii(name[:80]),
        )


def decode_base64(text: str, what: str) -> bytes:
    """Standard, padded, canonical base64 (RFC 4648 §4). Raises :class:`MalformedError`."""
    try:
        out = binascii.a2b_base64(text)
    except ValueError:
        out = b""
    if not out or base64.b64encode(out).decode() != text:
        raise MalformedError(
            Reason.MALFORMED, f"{what} is not base64", expected="canonical, padded base64", actual=ascii(text[:40])
        )
    return out


def key_id(name: str, signature_type: int, public: bytes) -> bytes:
    """The four bytes that stand for a key in signature lines."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([signature_type]) + public).digest()[:4]


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """Whose signature, of which type, under which key. Raises :class:`MalformedError` when made with anything else."""

    name: str
    type: SignatureType
    public: bytes = field(repr=False)
    key_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        check_key_name(self.name, "key name")
        if len(self.public) != self.type.public_size:
            raise MalformedError(
                Reason.MALFORMED,
                f"a verifier key of type {self.type:#04x} has the wrong size",
                expected=f"{self.type.public_size} bytes",
                actual=f"{len(self.public)} bytes",
            )
        if self.type is SignatureType.ML_DSA_44:
            _ml_dsa_44(self.public)
        else:
            ed25519_public(self.public)
        object.__setattr__(self, "key_id", key_id(self.name, self.type, self.public))

    @staticmethod
    def parse(text: str) -> VerifierKey:
        """Read a vkey. Raises :class:`MalformedError`: ``UNSUPPORTED`` for another signature type, ``DIGEST`` for a key
        id that is not the key's, otherwise ``MALFORMED`` or ``TOO_LARGE``."""
        if len(text) > MAX_VKEY:
            raise MalformedError(
                Reason.TOO_LARGE,
                "a verifier key is too long",
                expected=f"at most {MAX_VKEY} characters",
                actual=f"{len(text)} characters",
            )
        match = _VKEY.fullmatch(text)
        if not match:
            raise MalformedError(
                Reason.MALFORMED, "not a verifier key", expected="<name>+<key id>+<base64>", actual=ascii(text[:80])
            )
        data = decode_base64(match["key"], "a verifier key")
        try:
            signature_type = SignatureType(data[0])
        except ValueError:
            raise MalformedError(
                Reason.UNSUPPORTED,
                "a verifier key of an unknown signature type",
                expected=", ".join(f"{known:#04x}" for known in SignatureType),
                actual=f"{data[0]:#04x}",
            ) from None
        key = VerifierKey(match["name"], signature_type, data[1:])
        if key.key_id.hex() != match["id"]:
            raise MalformedError(
                Reason.DIGEST, "a verifier key names another key id", expected=key.key_id.hex(), actual=match["id"]
            )
        return key

    def encode(self) -> str:
        """The vkey."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(bytes([self.type]) + self.public).decode()}"

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Whether ``signature`` (64 or 2420 bytes, no timestamp) over exactly ``message`` is this key's."""
        try:
            if self.type is SignatureType.ML_DSA_44:
                _ml_dsa_44(self.public).verify(signature, message)
            else:
                ed25519_public(self.public).verify(signature, message)
        except InvalidSignature:
            return False
        return True


@lru_cache(maxsize=1024)
def _ml_dsa_44(raw: bytes) -> MLDSA44PublicKey:
    try:
        return MLDSA44PublicKey.from_public_bytes(raw)
    except ValueError:
        raise MalformedError(Reason.MALFORMED, "not an ML-DSA-44 public key") from None
