"""The sealing record: how a keystore's key-encryption key is wrapped, and by what (docs/spec/keystore-sealing.md).

Canonical JSON (RFC 8785). Everything but the ciphertext is its header, and the header's transcript is the associated
data of AES-256-GCM, so that scheme, parameters and custodian cannot be changed without the record failing to open.
A keystore under a passphrase holds a wrapped key as key files do (docs/spec/signatures.md, "Key files") instead.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.quorum import Custodian
from keyquorum_core.strictjson import Fields, canonical, loads
from keyquorum_core.transcript import transcript

__all__ = [
    "FORMAT",
    "MAX_SHARES",
    "MIN_THRESHOLD",
    "Scheme",
    "SealingRecord",
    "ShareSet",
    "TokenKey",
    "scheme_of",
    "token_key_of",
]

FORMAT: Final = "keyquorum/v1/keystore-sealing"
MIN_THRESHOLD: Final = 2
MAX_SHARES: Final = 16
"""SLIP-39 has four bits for a share's number."""
KEY_ID_SIZE: Final = 16
SALT_SIZE: Final = 16
_NONCE_SIZE: Final = 12
_WRAPPED: Final = 32 + 16
_MAX_RECORD: Final = 8 << 10
_KEY_FILE_FORMAT: Final = "keyquorum/v1/keywrap"
_WHAT: Final = "sealing record"


class Scheme(StrEnum):
    """What opens a keystore. ``PKCS11_SEEDS``: as ``PKCS11``, and the seeds are the module's own keys too."""

    PASSPHRASE = "passphrase"  # noqa: S105 - a scheme's name
    SLIP39 = "slip39"
    PKCS11 = "pkcs11"
    PKCS11_SEEDS = "pkcs11-seeds"


@dataclass(frozen=True, slots=True)
class ShareSet:
    """Which SLIP-39 shares open it: their common ``identifier`` (15 bits), ``threshold`` of ``count``; ``salt`` goes
    into the key that their secret becomes. Raises :class:`MalformedError`."""

    identifier: int
    threshold: int
    count: int
    salt: bytes

    def __post_init__(self) -> None:
        if not (
            0 <= self.identifier < 1 << 15
            and MIN_THRESHOLD <= self.threshold <= self.count <= MAX_SHARES
            and len(self.salt) == SALT_SIZE
        ):
            raise MalformedError(
                Reason.MALFORMED,
                "bad set of shares",
                expected=f"k of n with {MIN_THRESHOLD} ≤ k ≤ n ≤ {MAX_SHARES}",
                actual=f"{self.threshold} of {self.count}",
            )


@dataclass(frozen=True, slots=True)
class TokenKey:
    """Which AES-256 key in which PKCS#11 token opens it: the token's label and serial number, the key's CKA_ID."""

    label: str
    serial: str
    key_id: bytes


@dataclass(frozen=True, slots=True)
class SealingRecord:
    """One record. ``custodian`` is whose keystore it is, ``ciphertext`` the wrapped key with its tag: 48 bytes."""

    scheme: Scheme
    custodian: str
    by: ShareSet | TokenKey
    nonce: bytes
    ciphertext: bytes = b""

    def associated_data(self) -> bytes:
        """What the ciphertext is bound to: ``transcript(FORMAT, RFC 8785 of every other member)``."""
        return transcript(FORMAT, jcs.dumps(self._header()))

    def to_bytes(self) -> bytes:
        return jcs.dumps({**self._header(), "ciphertext": base64.b64encode(self.ciphertext).decode()})

    def _header(self) -> dict[str, str | int]:
        out: dict[str, str | int] = {
            "custodian": self.custodian,
            "format": FORMAT,
            "nonce": self.nonce.hex(),
            "scheme": str(self.scheme),
        }
        if isinstance(self.by, ShareSet):
            by = self.by
            return {
                **out,
                "identifier": by.identifier,
                "salt": by.salt.hex(),
                "shares": by.count,
                "threshold": by.threshold,
            }
        return {**out, "key": self.by.key_id.hex(), "token_label": self.by.label, "token_serial": self.by.serial}

    @classmethod
    def parse(cls, data: bytes) -> SealingRecord:
        """Raises :class:`MalformedError` for anything but what :meth:`to_bytes` writes."""
        fields = canonical(data, _WHAT, _MAX_RECORD)
        fields.literal("format", FORMAT)
        custodian = check_custodian(fields.text("custodian", max_length=64))
        scheme = _scheme(fields)
        by: ShareSet | TokenKey
        if scheme is Scheme.SLIP39:
            by = ShareSet(
                fields.integer("identifier", 0, (1 << 15) - 1),
                fields.integer("threshold", MIN_THRESHOLD, MAX_SHARES),
                fields.integer("shares", MIN_THRESHOLD, MAX_SHARES),
                fields.hex("salt", SALT_SIZE),
            )
        else:
            by = TokenKey(
                fields.text("token_label", max_length=32),
                fields.text("token_serial", max_length=32, allow_empty=True),
                fields.hex("key", KEY_ID_SIZE),
            )
        nonce = fields.hex("nonce", _NONCE_SIZE)
        ciphertext = fields.base64("ciphertext", max_bytes=_WRAPPED, min_bytes=_WRAPPED)
        fields.done()
        return cls(scheme, custodian, by, nonce, ciphertext)


def check_custodian(name: str) -> str:
    """Raises :class:`MalformedError` for what no custodian is called."""
    return Custodian(name, "CH").id


def scheme_of(record: bytes) -> Scheme:
    """What a keystore's record says opens it. Raises :class:`MalformedError`."""
    fields = Fields(loads(record, _WHAT, max_bytes=4 << 20, max_depth=1), _WHAT)
    if fields.text("format") == _KEY_FILE_FORMAT:
        return Scheme.PASSPHRASE
    return SealingRecord.parse(record).scheme


def token_key_of(record: bytes) -> TokenKey | None:
    """The token's key that opens a keystore with this record; None where its scheme has none. Raises
    :class:`MalformedError`."""
    by = None if scheme_of(record) is Scheme.PASSPHRASE else SealingRecord.parse(record).by
    return by if isinstance(by, TokenKey) else None


def _scheme(fields: Fields) -> Scheme:
    name = fields.text("scheme")
    known = [str(each) for each in Scheme if each is not Scheme.PASSPHRASE]
    if name not in known:
        raise MalformedError(
            Reason.UNSUPPORTED, "unknown sealing scheme", expected=" or ".join(known), actual=ascii(name)
        )
    return Scheme(name)
