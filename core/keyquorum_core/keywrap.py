"""Private keys at rest under a passphrase (DESIGN §5): Argon2id (RFC 9106, libsodium) and AES-256-GCM.

The wrapped form is JSON; its header (everything but the ciphertext) is authenticated, so that neither purpose nor cost
can be changed. Cost parameters are bounded on reading: a hostile file must not eat the machine. Exact bytes:
docs/spec/signatures.md, "Key files".
"""

from __future__ import annotations

import base64
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.pwhash import argon2id

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.names import PRINCIPAL, check
from keyquorum_core.outer_kem import OuterKEMs, liboqs_kem
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import transcript

__all__ = [
    "DEFAULT_MEMLIMIT",
    "DEFAULT_OPSLIMIT",
    "KEYS_PURPOSE",
    "MAX_MEMLIMIT",
    "MAX_OPSLIMIT",
    "MIN_MEMLIMIT",
    "LoadedKeys",
    "load_keys",
    "save_keys",
    "unwrap",
    "wrap",
]

DEFAULT_OPSLIMIT: Final = 3
DEFAULT_MEMLIMIT: Final = 64 << 20
"""RFC 9106 §4, second recommendation: 3 passes over 64 MiB (libsodium has one lane)."""
MAX_OPSLIMIT: Final = 10
MIN_MEMLIMIT: Final = 8 << 10
MAX_MEMLIMIT: Final = 1 << 30
KEYS_PURPOSE: Final = "keyquorum/v1/keys"

_MAX_SECRET: Final = 1 << 20
_MAX_PASSPHRASE: Final = 1024
_FORMAT: Final = "keyquorum/v1/keywrap"


def wrap(
    secret: bytes,
    passphrase: str,
    *,
    purpose: str,
    rng: Callable[[int], bytes] = secrets.token_bytes,
    opslimit: int = DEFAULT_OPSLIMIT,
    memlimit: int = DEFAULT_MEMLIMIT,
) -> bytes:
    """Encrypt up to 1 MiB. ``memlimit`` is in bytes; ``purpose`` must be given again to :func:`unwrap`.

    Raises :class:`MalformedError` for parameters out of bounds, :class:`RefusedError` (``PASSPHRASE``) for an empty or
    overlong passphrase.
    """
    if len(secret) > _MAX_SECRET:
        raise MalformedError(Reason.TOO_LARGE, "too much to wrap", expected=f"at most {_MAX_SECRET} bytes")
    header = _header(purpose, rng(16), rng(12), opslimit, memlimit)
    ciphertext = _cipher(header, passphrase).encrypt(_nonce(header), secret, _aad(header))
    return jcs.dumps({**header, "ciphertext": base64.b64encode(ciphertext).decode()})


def unwrap(blob: bytes, passphrase: str, purpose: str) -> bytes:
    """The secret. Raises :class:`MalformedError` for anything but a wrapped key of this ``purpose``, and
    :class:`RefusedError` (``PASSPHRASE``): a wrong passphrase and a changed file cannot be told apart."""
    fields = Fields(loads(blob, "wrapped key", max_bytes=2 * _MAX_SECRET, max_depth=1), "wrapped key")
    fields.literal("format", _FORMAT)
    fields.literal("kdf", "argon2id")
    fields.literal("aead", "aes-256-gcm")
    fields.literal("purpose", purpose)
    header = _header(
        purpose,
        fields.hex("salt", 16),
        fields.hex("nonce", 12),
        fields.integer("opslimit", 1, MAX_OPSLIMIT),
        fields.integer("memlimit", MIN_MEMLIMIT, MAX_MEMLIMIT),
    )
    ciphertext = fields.base64("ciphertext", max_bytes=_MAX_SECRET + 16, min_bytes=16)
    fields.done()
    try:
        return _cipher(header, passphrase).decrypt(_nonce(header), ciphertext, _aad(header))
    except InvalidTag:
        raise RefusedError(
            Reason.PASSPHRASE,
            "cannot open the wrapped key",
            expected="the passphrase it was wrapped with, and an unchanged file",
            actual="another passphrase, or changed bytes",
            next_step="Try the passphrase again; if it is right, restore the file from a backup.",
        ) from None


def _header(purpose: str, salt: bytes, nonce: bytes, opslimit: int, memlimit: int) -> dict[str, str | int]:
    if not 1 <= opslimit <= MAX_OPSLIMIT or not MIN_MEMLIMIT <= memlimit <= MAX_MEMLIMIT:
        raise MalformedError(
            Reason.MALFORMED,
            "Argon2id parameters out of bounds",
            expected=f"opslimit 1…{MAX_OPSLIMIT}, memlimit {MIN_MEMLIMIT}…{MAX_MEMLIMIT} bytes",
            actual=f"{opslimit}, {memlimit}",
        )
    return {
        "aead": "aes-256-gcm",
        "format": _FORMAT,
        "kdf": "argon2id",
        "memlimit": memlimit,
        "nonce": nonce.hex(),
        "opslimit": opslimit,
        "purpose": purpose,
        "salt": salt.hex(),
    }


def _aad(header: dict[str, str | int]) -> bytes:
    return transcript(_FORMAT, jcs.dumps({**header}))


def _nonce(header: dict[str, str | int]) -> bytes:
    return bytes.fromhex(str(header["nonce"]))


def _cipher(header: dict[str, str | int], passphrase: str) -> AESGCM:
    try:
        password = unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        password = b""
    if not 0 < len(password) <= _MAX_PASSPHRASE:
        raise RefusedError(
            Reason.PASSPHRASE, "unusable passphrase", expected=f"1…{_MAX_PASSPHRASE} bytes of text", actual="not that"
        )
    salt = bytes.fromhex(str(header["salt"]))
    try:
        key = argon2id.kdf(32, password, salt, opslimit=int(header["opslimit"]), memlimit=int(header["memlimit"]))
    except (nacl.exceptions.CryptoError, MemoryError):
        raise UnavailableError(
            Reason.UNAVAILABLE,
            "Argon2id could not run",
            expected=f"{int(header['memlimit']) >> 10} KiB of free memory",
            next_step="Free some memory and try again.",
        ) from None
    return AESGCM(key)


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """A principal's private keys: ``role`` is ``owner``, ``operator`` and so on."""

    name: str
    role: str
    identity: Identity = field(repr=False)
    recipient: RecipientKey = field(repr=False)


def save_keys(
    identity: Identity,
    recipient: RecipientKey,
    passphrase: str,
    role: str,
    name: str,
    *,
    rng: Callable[[int], bytes] = secrets.token_bytes,
    opslimit: int = DEFAULT_OPSLIMIT,
    memlimit: int = DEFAULT_MEMLIMIT,
) -> bytes:
    """A key file: the identity's two seeds and the recipient key, wrapped. Raises as :func:`wrap`."""
    check(PRINCIPAL, role, "role")
    check(PRINCIPAL, name, "name")
    ed25519, ml_dsa = identity.seeds()
    secret = jcs.dumps(
        {
            "ed25519": ed25519.hex(),
            "ml_dsa_65": ml_dsa.hex(),
            "name": name,
            "recipient": base64.b64encode(recipient.to_seed_bytes()).decode(),
            "role": role,
        }
    )
    return wrap(secret, passphrase, purpose=KEYS_PURPOSE, rng=rng, opslimit=opslimit, memlimit=memlimit)


def load_keys(blob: bytes, passphrase: str, *, kems: OuterKEMs = liboqs_kem) -> LoadedKeys:
    """The keys in a key file. Raises as :func:`unwrap`; ``kems`` as for :class:`RecipientKey`."""
    fields = Fields(loads(unwrap(blob, passphrase, KEYS_PURPOSE), "key file", max_depth=1), "key file")
    keys = LoadedKeys(
        name=fields.text("name"),
        role=fields.text("role"),
        identity=Identity.from_seeds(fields.hex("ed25519", 32), fields.hex("ml_dsa_65", 32)),
        recipient=RecipientKey.from_seed_bytes(fields.base64("recipient", max_bytes=_MAX_SECRET), kems=kems),
    )
    fields.done()
    return keys
