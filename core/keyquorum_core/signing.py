"""Hybrid signatures: every identity is an Ed25519 key and an ML-DSA-65 key, and both must sign (DESIGN §5).

Documents travel as DSSE v1 envelopes. The two signatures are taken over DSSE's pre-authentication encoding (PAE) of the
exact payload bytes: Ed25519 (RFC 8032) first, ML-DSA-65 (FIPS 204, pure, hedged, context ``keyquorum/v1``) second.
Their number and order say which is which; ``keyid`` is a hint for people and never decides anything. Readers get back
the very bytes that were verified. Exact formats: docs/spec/signatures.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import H

__all__ = [
    "MAX_ENVELOPE",
    "MAX_SIGNERS",
    "ML_DSA_CONTEXT",
    "PUBLIC_IDENTITY_SIZE",
    "Identity",
    "PublicIdentity",
    "Unverified",
    "ed25519_public",
    "merge",
    "open_envelope",
    "open_multi",
    "pae",
    "peek_payload",
    "peek_type",
    "sign",
    "sign_many",
]

ML_DSA_CONTEXT: Final = b"keyquorum/v1"
PUBLIC_IDENTITY_SIZE: Final = 32 + 1952
MAX_ENVELOPE: Final = 1 << 20
MAX_SIGNERS: Final = 64

_P25519: Final = 2**255 - 19
# The y-coordinates of the eight points of small order: under such a "key" one signature verifies for many messages.
_Y8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y: Final = frozenset({0, 1, _P25519 - 1, _Y8, _P25519 - _Y8})


@lru_cache(maxsize=4096)
def ed25519_public(raw: bytes) -> Ed25519PublicKey:
    """Parse 32 bytes (cached). Non-canonical and small-order encodings raise :class:`MalformedError`."""
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    if len(raw) != 32 or y >= _P25519 or y in _SMALL_ORDER_Y:
        raise MalformedError(
            Reason.MALFORMED,
            "not an acceptable Ed25519 public key",
            expected="32 bytes, canonical, of large order",
            actual=f"{len(raw)} bytes",
        )
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise MalformedError(Reason.MALFORMED, "not an Ed25519 public key") from None


class PublicIdentity:
    """The two public keys of an identity: Ed25519 (32 bytes) ‖ ML-DSA-65 (1952 bytes). Equal when the bytes are."""

    __slots__ = ("_ed25519", "_ml_dsa", "_raw", "fingerprint")

    fingerprint: str
    """Lower-case hex of H("keyquorum/v1/identity", ed25519, ml-dsa-65), 64 characters."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != PUBLIC_IDENTITY_SIZE:
            raise MalformedError(
                Reason.MALFORMED,
                "a public identity has the wrong size",
                expected=f"{PUBLIC_IDENTITY_SIZE} bytes",
                actual=f"{len(raw)} bytes",
            )
        self._raw = bytes(raw)
        self._ed25519 = ed25519_public(self._raw[:32])
        try:
            self._ml_dsa = MLDSA65PublicKey.from_public_bytes(self._raw[32:])
        except ValueError:
            raise MalformedError(Reason.MALFORMED, "not an ML-DSA-65 public key") from None
        self.fingerprint = H("keyquorum/v1/identity", self._raw[:32], self._raw[32:]).hex()

    @staticmethod
    def from_bytes(raw: bytes) -> PublicIdentity:
        """Parse 1984 bytes (cached: an identity is parsed once, not per message). Raises :class:`MalformedError`."""
        return _parse_identity(bytes(raw))

    def to_bytes(self) -> bytes:
        return self._raw

    @property
    def ed25519(self) -> bytes:
        return self._raw[:32]

    @property
    def ml_dsa_65(self) -> bytes:
        return self._raw[32:]

    def verifies(self, message: bytes, ed25519_signature: bytes, ml_dsa_signature: bytes) -> str:
        """Name of the first algorithm whose signature does not verify, or ``""`` when both do."""
        if not self._ed25519_verifies(message, ed25519_signature):
            return "Ed25519"
        return "" if self._ml_dsa_verifies(message, ml_dsa_signature) else "ML-DSA-65"

    def _ed25519_verifies(self, message: bytes, signature: bytes) -> bool:
        try:
            self._ed25519.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def _ml_dsa_verifies(self, message: bytes, signature: bytes) -> bool:
        try:
            self._ml_dsa.verify(signature, message, ML_DSA_CONTEXT)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicIdentity) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"PublicIdentity({self.fingerprint[:16]})"

    def __reduce__(self) -> tuple[object, ...]:
        return (PublicIdentity.from_bytes, (self._raw,))


@lru_cache(maxsize=4096)
def _parse_identity(raw: bytes) -> PublicIdentity:
    return PublicIdentity(raw)


class Identity:
    """A private identity: an Ed25519 and an ML-DSA-65 seed. Shows only its fingerprint; is never pickled."""

    __slots__ = ("_ed25519", "_ml_dsa", "public")

    public: PublicIdentity

    def __init__(self, ed25519: Ed25519PrivateKey, ml_dsa: MLDSA65PrivateKey) -> None:
        self._ed25519 = ed25519
        self._ml_dsa = ml_dsa
        self.public = PublicIdentity(ed25519.public_key().public_bytes_raw() + ml_dsa.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate(), MLDSA65PrivateKey.generate())

    @classmethod
    def from_seeds(cls, ed25519: bytes, ml_dsa: bytes) -> Identity:
        """From an RFC 8032 private key and a FIPS 204 seed ξ, 32 bytes each. Raises :class:`MalformedError`."""
        if len(ed25519) != 32 or len(ml_dsa) != 32:
            raise MalformedError(
                Reason.MALFORMED,
                "an identity's seeds have the wrong size",
                expected="32 and 32 bytes",
                actual=f"{len(ed25519)} and {len(ml_dsa)} bytes",
            )
        return cls(Ed25519PrivateKey.from_private_bytes(ed25519), MLDSA65PrivateKey.from_seed_bytes(ml_dsa))

    def seeds(self) -> tuple[bytes, bytes]:
        """``(ed25519, ml_dsa)``: secret; for :mod:`keyquorum_core.keywrap` and keystores only."""
        return self._ed25519.private_bytes_raw(), self._ml_dsa.private_bytes_raw()

    def sign_pair(self, message: bytes) -> tuple[bytes, bytes]:
        """Ed25519 (64 bytes) and ML-DSA-65 (3309 bytes) signatures of ``message``."""
        return self._ed25519.sign(message), self._ml_dsa.sign(message, ML_DSA_CONTEXT)

    def __repr__(self) -> str:
        return f"Identity({self.public.fingerprint[:16]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private identity is not pickled or copied")


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1 pre-authentication encoding: what is signed. Lengths are of bytes, in decimal ASCII."""
    name = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def sign(identity: Identity, payload_type: str, payload: bytes) -> bytes:
    """A DSSE envelope (RFC 8785 JSON, UTF-8) with the identity's two signatures."""
    return sign_many((identity,), payload_type, payload)


def sign_many(identities: Iterable[Identity], payload_type: str, payload: bytes) -> bytes:
    """One envelope signed by each identity in turn: two signatures each, Ed25519 then ML-DSA-65."""
    message = pae(payload_type, payload)
    signatures: list[tuple[str, bytes]] = []
    for identity in identities:
        ed25519, ml_dsa = identity.sign_pair(message)
        hint = identity.public.fingerprint[:16]
        signatures += [(f"{hint}/ed25519", ed25519), (f"{hint}/ml-dsa-65", ml_dsa)]
    return _envelope(payload_type, payload, signatures)


def _envelope(payload_type: str, payload: bytes, signatures: Iterable[tuple[str, bytes]]) -> bytes:
    # Members in RFC 8785 order and no character that it would escape, except what json escapes in payload_type alike.
    document = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": keyid, "sig": base64.b64encode(sig).decode()} for keyid, sig in signatures],
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _parse(envelope: bytes, payload_type: str, what: str, max_bytes: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    name = f"{what} envelope"
    fields = Fields(loads(envelope, name, max_bytes=max_bytes, max_depth=4), name)
    fields.literal("payloadType", payload_type)
    payload = fields.base64("payload", max_bytes=max_bytes, min_bytes=0)
    signatures = []
    for item in fields.list("signatures", max_items=2 * MAX_SIGNERS):
        entry = Fields(item, f"{name} signature")
        keyid = entry.text("keyid", max_length=128, allow_empty=True) if "keyid" in entry else ""
        signatures.append((keyid, entry.base64("sig", max_bytes=3309, min_bytes=0)))
        entry.done()
    fields.done()
    return payload, signatures


def peek_type(envelope: bytes, what: str, max_bytes: int = MAX_ENVELOPE) -> str:
    """The payload type, UNVERIFIED: only to find out which kind of document to read. Raises :class:`MalformedError`."""
    name = f"{what} envelope"
    return Fields(loads(envelope, name, max_bytes=max_bytes, max_depth=4), name).text("payloadType", max_length=128)


class Unverified:
    """A strict envelope that was read once, to find out from ``payload`` whose key to verify with."""

    __slots__ = ("_payload_type", "_signatures", "payload")

    payload: bytes
    """UNVERIFIED until :meth:`open` or :meth:`open_multi` returns it."""

    def __init__(self, envelope: bytes, payload_type: str, what: str, max_bytes: int = MAX_ENVELOPE) -> None:
        """Raises :class:`MalformedError` for anything but a strict envelope of ``payload_type``."""
        self.payload, self._signatures = _parse(envelope, payload_type, what, max_bytes)
        self._payload_type = payload_type

    def open(self, signer: PublicIdentity, what: str) -> bytes:
        """As :func:`open_envelope`."""
        signatures = self._signatures
        if len(signatures) != 2:
            raise RefusedError(
                Reason.SIGNATURE_MISSING if len(signatures) < 2 else Reason.SIGNATURE_EXTRA,
                f"{what} must carry exactly one Ed25519 and one ML-DSA-65 signature",
                expected="2 signatures",
                actual=f"{len(signatures)} signatures",
                next_step="Sign it again with the whole identity.",
            )
        failed = signer.verifies(pae(self._payload_type, self.payload), signatures[0][1], signatures[1][1])
        if failed:
            raise _bad_signature(what, failed, signer)
        return self.payload

    def open_multi(self, signers: Mapping[str, PublicIdentity], threshold: int, what: str) -> tuple[str, ...]:
        """The names that :func:`open_multi` returns beside the payload."""
        _check_trusted(signers, threshold, what)
        return _verify_pairs(pae(self._payload_type, self.payload), self._signatures, signers, threshold, what)


def peek_payload(envelope: bytes, payload_type: str, what: str, max_bytes: int = MAX_ENVELOPE) -> bytes:
    """The payload, UNVERIFIED: only to find out whose key to verify with. Raises :class:`MalformedError`."""
    return Unverified(envelope, payload_type, what, max_bytes).payload


def open_envelope(
    envelope: bytes, payload_type: str, signer: PublicIdentity, what: str, max_bytes: int = MAX_ENVELOPE
) -> bytes:
    """The exact payload bytes, once both of ``signer``'s signatures, and no others, are there and verify.

    Raises :class:`MalformedError` for anything but a strict envelope of ``payload_type``, :class:`RefusedError` with
    ``SIGNATURE_MISSING``, ``SIGNATURE_EXTRA`` or ``SIGNATURE`` (naming the algorithm).
    """
    return Unverified(envelope, payload_type, what, max_bytes).open(signer, what)


def _bad_signature(what: str, algorithm: str, signer: PublicIdentity) -> RefusedError:
    return RefusedError(
        Reason.SIGNATURE,
        f"the {algorithm} signature of {what} does not verify",
        expected=f"a signature by {signer.fingerprint[:16]} over exactly these bytes",
        actual="another signer, or other bytes",
        details={"algorithm": algorithm, "signer": signer.fingerprint},
    )


def merge(envelopes: Iterable[bytes], what: str = "document", max_bytes: int = MAX_ENVELOPE) -> bytes:
    """One envelope with the signature pairs of several over the same payload and type. Nothing is verified here.

    A pair whose Ed25519 half is already there is dropped: Ed25519 is deterministic, so it is the same signer again.
    """
    head: tuple[str, bytes] | None = None
    pairs: dict[bytes, list[tuple[str, bytes]]] = {}
    for envelope in envelopes:
        fields = Fields(loads(envelope, f"{what} envelope", max_bytes=max_bytes, max_depth=4), f"{what} envelope")
        payload_type = fields.text("payloadType", max_length=128)
        if not payload_type.isascii():
            raise MalformedError(Reason.MALFORMED, f"the payload type of {what} is not ASCII")
        payload, signatures = _parse(envelope, payload_type, what, max_bytes)
        if head is not None and head != (payload_type, payload):
            raise MalformedError(Reason.MALFORMED, f"the envelopes of {what} are not about the same payload")
        head = (payload_type, payload)
        if len(signatures) % 2:
            raise RefusedError(Reason.SIGNATURE_MISSING, f"{what} has half an identity's signatures")
        for first, second in zip(signatures[::2], signatures[1::2], strict=True):
            pairs.setdefault(first[1], [first, second])
    if head is None:
        raise MalformedError(Reason.MALFORMED, f"no envelope of {what} to merge", expected="at least 1", actual="0")
    return _envelope(head[0], head[1], [entry for pair in pairs.values() for entry in pair])


def open_multi(
    envelope: bytes,
    payload_type: str,
    signers: Mapping[str, PublicIdentity],
    threshold: int,
    what: str,
    max_bytes: int = MAX_ENVELOPE,
) -> tuple[bytes, tuple[str, ...]]:
    """The payload, and the sorted names of those in ``signers`` that signed it: at least ``threshold`` of them.

    Signatures come in pairs. Refused: half a pair or too few signers (``SIGNATURE_MISSING``), a pair of nobody in
    ``signers`` or with one bad half (``SIGNATURE``), a signer twice or more pairs than signers (``SIGNATURE_EXTRA``).
    """
    _check_trusted(signers, threshold, what)
    found = Unverified(envelope, payload_type, what, max_bytes)
    return found.payload, found.open_multi(signers, threshold, what)


def _check_trusted(signers: Mapping[str, PublicIdentity], threshold: int, what: str) -> None:
    if not 1 <= threshold <= len(signers) <= MAX_SIGNERS or not _disjoint(signers.values()):
        raise MalformedError(
            Reason.ROSTER,
            f"the signers trusted for {what} do not make sense",
            expected=f"1 ≤ threshold ≤ signers ≤ {MAX_SIGNERS}, no key shared",
            actual=f"threshold {threshold}, {len(signers)} signers",
        )


def _verify_pairs(
    message: bytes,
    signatures: Sequence[tuple[str, bytes]],
    signers: Mapping[str, PublicIdentity],
    threshold: int,
    what: str,
) -> tuple[str, ...]:
    if len(signatures) % 2:
        raise RefusedError(Reason.SIGNATURE_MISSING, f"{what} has half an identity's signatures")
    if len(signatures) > 2 * len(signers):
        raise RefusedError(
            Reason.SIGNATURE_EXTRA,
            f"{what} has more signatures than it has possible signers",
            expected=f"at most {2 * len(signers)}",
            actual=len(signatures),
        )
    signed: list[str] = []
    for (hint, ed25519), (_, ml_dsa) in zip(signatures[::2], signatures[1::2], strict=True):
        # The hint only decides whom to try first.
        order = sorted(signers, key=lambda name: (not hint.startswith(signers[name].fingerprint[:16]), name))
        name = next((name for name in order if signers[name]._ed25519_verifies(message, ed25519)), None)
        if name is None:
            raise RefusedError(
                Reason.SIGNATURE,
                f"{what} carries a signature of none of its possible signers",
                expected=", ".join(sorted(signers)),
                actual="another signer, or other bytes",
            )
        if not signers[name]._ml_dsa_verifies(message, ml_dsa):
            raise _bad_signature(what, "ML-DSA-65", signers[name])
        if name in signed:
            raise RefusedError(Reason.SIGNATURE_EXTRA, f"{name} signed {what} more than once")
        signed.append(name)
    if len(signed) < threshold:
        raise RefusedError(
            Reason.SIGNATURE_MISSING,
            f"{what} is not signed by enough of its signers",
            expected=f"{threshold} of {', '.join(sorted(signers))}",
            actual=", ".join(sorted(signed)),
        )
    return tuple(sorted(signed))


def _disjoint(identities: Iterable[PublicIdentity]) -> bool:
    """Whether no two identities share a key: else one signer would count twice."""
    halves = [half for identity in identities for half in (identity.ed25519, identity.ml_dsa_65)]
    return len(halves) == len(set(halves))
