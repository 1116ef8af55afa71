"""An AWS Nitro attestation document as bytes (AWS, "Verifying the root of trust", Nitro Enclaves NSM API).

A COSE_Sign1 structure (RFC 9052 §4.2), with or without its tag 18::

    [ protected = h'a1013822' ({1: -35}, ES384), {}, payload, signature 96 ]

The payload is a CBOR map of exactly nine members; AWS's encoder writes it with indefinite length. Nothing is outside
what is signed but the signature itself and the empty map of unprotected headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.cbor import Tagged, Value, loads
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["MAX_DOCUMENT_BYTES", "PCR_BYTES", "Document", "parse_document"]

MAX_DOCUMENT_BYTES = 32 << 10
PCR_BYTES = 48

_COSE_SIGN1 = 18
_PROTECTED_ES384 = bytes.fromhex("a1013822")
_SIGNATURE_BYTES = 96
_MAX_CERTIFICATE_BYTES = 1024
_MAX_CHAIN = 8
_MAX_PUBLIC_KEY_BYTES = 1024
_MAX_DATA_BYTES = 512
_PCR_INDEXES = range(32)
_FIRST_PCRS = (0, 1, 2)
_MAX_TIMESTAMP = 1 << 53
_MODULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_MEMBERS = frozenset(
    {
        "module_id",
        "digest",
        "timestamp",
        "pcrs",
        "certificate",
        "cabundle",
        "public_key",
        "user_data",
        "nonce",
    }
)


@dataclass(frozen=True, slots=True)
class Document:
    """A document as parsed; nothing is verified."""

    module_id: str
    """``i-<instance>-enc<enclave>``."""
    timestamp_ms: int
    """Milliseconds since the epoch, by the hypervisor's clock."""
    pcrs: Mapping[int, bytes]
    """48 bytes each (SHA-384); 0, 1 and 2 are among them."""
    certificate: bytes
    """DER: of the key that signed."""
    cabundle: tuple[bytes, ...]
    """DER, root first."""
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    payload: bytes
    signature: bytes
    """r ‖ s, 48 bytes each, big-endian."""

    @property
    def timestamp(self) -> int:
        """Unix seconds."""
        return self.timestamp_ms // 1000

    @property
    def instance_id(self) -> str:
        """The EC2 instance that the enclave runs on; empty where the module id does not say."""
        instance, separator, _ = self.module_id.partition("-enc")
        return instance if separator else ""

    def to_be_signed(self) -> bytes:
        """``Sig_structure`` (RFC 9052 §4.4): ["Signature1", protected, h'', payload]."""
        size = len(self.payload)
        header = bytes([0x59]) + size.to_bytes(2, "big") if size >= 256 else bytes([0x58, size])
        return b"\x84\x6aSignature1\x44" + _PROTECTED_ES384 + b"\x40" + header + self.payload


def parse_document(data: bytes) -> Document:
    """Parse exactly one document. Raises :class:`MalformedError` ``MALFORMED``."""
    cose = loads(data, "Nitro document", max_bytes=MAX_DOCUMENT_BYTES, max_depth=3)
    if isinstance(cose, Tagged) and cose.tag == _COSE_SIGN1:
        cose = cose.value
    if not isinstance(cose, list) or len(cose) != 4:
        raise _malformed("it is no COSE_Sign1", "an array of four", type(cose).__name__)
    protected, unprotected, payload, signature = cose
    if protected != _PROTECTED_ES384 or not isinstance(protected, bytes):
        raise _malformed("protected header", "{1: -35}, which is ES384", "another")
    if not isinstance(unprotected, dict) or unprotected:
        raise _malformed("unprotected header", "an empty map", "another")
    if not isinstance(payload, bytes) or not 64 <= len(payload) <= 0xFFFF:
        raise _malformed("payload", "a byte string of 64 … 65535 bytes", type(payload).__name__)
    if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
        raise _malformed("signature", f"{_SIGNATURE_BYTES} bytes", type(signature).__name__)
    members = loads(payload, "Nitro payload", max_bytes=MAX_DOCUMENT_BYTES, max_depth=2, indefinite_maps=True)
    if not isinstance(members, dict) or members.keys() != _MEMBERS:
        raise _malformed("payload", f"a map of {', '.join(sorted(_MEMBERS))}", "another")
    if members["digest"] != "SHA384":
        raise _malformed("digest", "SHA384", ascii(members["digest"])[:40])
    module_id = members["module_id"]
    if not isinstance(module_id, str) or not _MODULE_ID.fullmatch(module_id):
        raise _malformed("module_id", "a name of at most 128 characters", ascii(module_id)[:40])
    timestamp = members["timestamp"]
    if not isinstance(timestamp, int) or isinstance(timestamp, bool) or not 0 < timestamp < _MAX_TIMESTAMP:
        raise _malformed("timestamp", "milliseconds since the epoch", ascii(timestamp)[:40])
    bundle = members["cabundle"]
    if not isinstance(bundle, list) or not 1 <= len(bundle) <= _MAX_CHAIN:
        raise _malformed("cabundle", f"1 … {_MAX_CHAIN} certificates", type(bundle).__name__)
    return Document(
        module_id=module_id,
        timestamp_ms=timestamp,
        pcrs=_pcrs(members["pcrs"]),
        certificate=_bytes(members["certificate"], "certificate", 1, _MAX_CERTIFICATE_BYTES),
        cabundle=tuple(_bytes(each, "cabundle", 1, _MAX_CERTIFICATE_BYTES) for each in bundle),
        public_key=_optional(members["public_key"], "public_key", _MAX_PUBLIC_KEY_BYTES),
        user_data=_optional(members["user_data"], "user_data", _MAX_DATA_BYTES),
        nonce=_optional(members["nonce"], "nonce", _MAX_DATA_BYTES),
        payload=payload,
        signature=signature,
    )


def _pcrs(value: Value) -> Mapping[int, bytes]:
    if not isinstance(value, dict):
        raise _malformed("pcrs", "a map", type(value).__name__)
    pcrs: dict[int, bytes] = {}
    for index, digest in value.items():
        if not isinstance(index, int) or index not in _PCR_INDEXES:
            raise _malformed("pcrs", "indexes 0 … 31", ascii(index)[:40])
        pcrs[index] = _bytes(digest, f"PCR{index}", PCR_BYTES, PCR_BYTES)
    missing = [index for index in _FIRST_PCRS if index not in pcrs]
    if missing:
        raise _malformed("pcrs", "PCR0, PCR1 and PCR2", f"no PCR{missing[0]}")
    return MappingProxyType(pcrs)


def _bytes(value: Value, what: str, minimum: int, maximum: int) -> bytes:
    if not isinstance(value, bytes) or not minimum <= len(value) <= maximum:
        size = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise _malformed(what, f"{minimum} … {maximum} bytes", size)
    return value


def _optional(value: Value, what: str, maximum: int) -> bytes | None:
    return None if value is None else _bytes(value, what, 0, maximum)


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"Nitro document: {what}", expected=expected, actual=actual)
