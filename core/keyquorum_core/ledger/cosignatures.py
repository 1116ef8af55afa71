"""C2SP tlog-cosignature: what witnesses, and the log itself, sign about a checkpoint, byte for byte.

Type 0x01 signs the note's text. Type 0x04 signs ``cosignature/v1``, a time and the text. Type 0x06 signs the structure
``subtree/v1``, with ML-DSA-44 (FIPS 204, pure, empty context), and is the one that a quantum computer can't make up.
The latter two carry their time in front of the signature: u64, big-endian, POSIX seconds.

A cosigner here always signs with both 0x04 and 0x06, and its word counts when both verify.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.merkle import HASH_SIZE, MAX_SIZE
from keyquorum_core.ledger.notes import Note, NoteSignature
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey, check_key_name
from keyquorum_core.ledger.witness_keys import WitnessKeys
from keyquorum_core.transcript import u64be

__all__ = [
    "CLOCK_SKEW",
    "Cosigner",
    "Witnessed",
    "cosignature_message",
    "sign_ml_dsa_44",
    "signing_keys",
    "subtree_message",
    "verify_signature",
    "witnessed",
]

CLOCK_SKEW: Final = 60
"""Seconds that a cosignature's time may lie ahead of the reader's clock."""

_SUBTREE_LABEL: Final = b"subtree/v1\n\x00"


def _check_time(timestamp: int) -> None:
    if not 0 <= timestamp <= MAX_SIZE:
        raise MalformedError(Reason.MALFORMED, "bad time of a cosignature", expected=f"0…{MAX_SIZE}", actual=timestamp)


def cosignature_message(text: bytes, timestamp: int) -> bytes:
    """What 0x04 signs: ``cosignature/v1``, ``time <timestamp>``, then the checkpoint's text. Time in POSIX seconds."""
    _check_time(timestamp)
    return b"cosignature/v1\ntime %d\n" % timestamp + text


def subtree_message(cosigner: str, timestamp: int, origin: str, start: int, end: int, root: bytes) -> bytes:
    """What 0x06 signs about leaves [``start``, ``end``) of a log; a checkpoint is the subtree from 0 to its size.

    label "subtree/v1\\n\\0" (12) ‖ u8 length, cosigner name ‖ u64 timestamp ‖ u8 length, origin ‖ u64 start ‖ u64 end ‖
    root (32); integers big-endian. Raises :class:`MalformedError`, among others for a time where ``start`` is not 0.
    """
    check_key_name(cosigner, "cosigner name")
    check_key_name(origin, "origin")
    _check_time(timestamp)
    if not 0 <= start <= end <= MAX_SIZE or len(root) != HASH_SIZE or (start and timestamp):
        raise MalformedError(
            Reason.MALFORMED,
            "not a subtree that can be signed",
            expected="start ≤ end, a 32-byte root, and no time unless start is 0",
            actual=f"leaves {start}…{end}, {len(root)} bytes, time {timestamp}",
        )
    name, log = cosigner.encode(), origin.encode()
    return b"".join(
        (
            _SUBTREE_LABEL,
            bytes([len(name)]),
            name,
            u64be(timestamp),
            bytes([len(log)]),
            log,
            u64be(start),
            u64be(end),
            root,
        )
    )


def verify_signature(key: VerifierKey, checkpoint: Checkpoint, signature: NoteSignature) -> int:
    """Whether ``signature`` is by ``key`` over ``checkpoint``; its time in POSIX seconds, 0 for type 0x01.

    Raises :class:`RefusedError` (``SIGNATURE``): a line under a known key that does not verify spoils the whole note.
    """
    if (signature.name, signature.key_id) != (key.name, key.key_id):
        raise _unsigned(key, f"a line of {signature.name}, key id {signature.key_id.hex()}")
    if len(signature.signature) != key.type.signature_size:
        raise _unsigned(key, f"{len(signature.signature)} bytes")
    if key.type is SignatureType.ED25519:
        timestamp, message, raw = 0, checkpoint.text(), signature.signature
    else:
        timestamp, raw = int.from_bytes(signature.signature[:8], "big"), signature.signature[8:]
        if timestamp > MAX_SIZE:
            raise _unsigned(key, "a time past 2⁶³")
        if key.type is SignatureType.ED25519_COSIGNATURE:
            message = cosignature_message(checkpoint.text(), timestamp)
        else:
            message = subtree_message(key.name, timestamp, checkpoint.origin, 0, checkpoint.size, checkpoint.root)
    if not key.verifies(message, raw):
        raise _unsigned(key, "a signature by another key, or over something else")
    return timestamp


def _unsigned(key: VerifierKey, actual: str) -> RefusedError:
    return RefusedError(
        Reason.SIGNATURE,
        f"the line of {key.name} does not verify",
        expected=f"a signature of type {key.type:#04x} by key id {key.key_id.hex()} over this checkpoint",
        actual=actual,
        details={"key": key.name},
    )


def sign_ml_dsa_44(key: VerifierKey, private: MLDSA44PrivateKey, checkpoint: Checkpoint, now: int) -> NoteSignature:
    """The 0x06 line of ``key``, whose private half is ``private``, over a checkpoint; ``now`` is its time."""
    message = subtree_message(key.name, now, checkpoint.origin, 0, checkpoint.size, checkpoint.root)
    return NoteSignature(key.name, key.key_id, u64be(now) + private.sign(message))


def signing_keys(ed25519: bytes, ml_dsa_44: bytes) -> tuple[Ed25519PrivateKey, MLDSA44PrivateKey]:
    """A signer's private keys from their seeds. Raises :class:`MalformedError` unless both are 32 bytes."""
    if (len(ed25519), len(ml_dsa_44)) != (32, 32):
        raise MalformedError(
            Reason.MALFORMED,
            "not the seeds of a signer",
            expected="32 bytes for each key",
            actual=f"{len(ed25519)} and {len(ml_dsa_44)} bytes",
        )
    return Ed25519PrivateKey.from_private_bytes(ed25519), MLDSA44PrivateKey.from_seed_bytes(ml_dsa_44)


class Cosigner:
    """A witness's two keys under one name. They must be its own: 0x04 does not say who signed."""

    def __init__(self, name: str, ed25519: Ed25519PrivateKey, ml_dsa_44: MLDSA44PrivateKey) -> None:
        """Raises :class:`MalformedError` for a name that no key can have."""
        self._ed25519, self._ml_dsa_44 = ed25519, ml_dsa_44
        self._keys = (
            VerifierKey(name, SignatureType.ED25519_COSIGNATURE, ed25519.public_key().public_bytes_raw()),
            VerifierKey(name, SignatureType.ML_DSA_44, ml_dsa_44.public_key().public_bytes_raw()),
        )

    @classmethod
    def generate(cls, name: str) -> Cosigner:
        """New keys, from the system's randomness."""
        return cls(name, Ed25519PrivateKey.generate(), MLDSA44PrivateKey.generate())

    @classmethod
    def from_seeds(cls, name: str, ed25519: bytes, ml_dsa_44: bytes) -> Cosigner:
        """The inverse of :meth:`seeds`. Raises :class:`MalformedError` unless both are 32 bytes."""
        return cls(name, *signing_keys(ed25519, ml_dsa_44))

    def seeds(self) -> tuple[bytes, bytes]:
        """Both private keys as 32 bytes each, to be stored encrypted: Ed25519, then ML-DSA-44 (FIPS 204's ξ)."""
        return self._ed25519.private_bytes_raw(), self._ml_dsa_44.private_bytes_raw()

    @property
    def name(self) -> str:
        return self._keys[0].name

    @property
    def keys(self) -> tuple[VerifierKey, VerifierKey]:
        """Type 0x04, then 0x06."""
        return self._keys

    @property
    def witness_key(self) -> WitnessKeys:
        """The same as one value: what a roster names."""
        return WitnessKeys(*self._keys)

    def cosign(self, checkpoint: Checkpoint, now: int) -> tuple[NoteSignature, NoteSignature]:
        """Both lines. Only for a checkpoint that extends the last one cosigned, and after that one is on disk.

        Raises :class:`MalformedError` for a time of 0, which would say nothing about the tree being the latest.
        """
        if now <= 0:
            raise MalformedError(Reason.MALFORMED, "a cosignature needs a time", expected="POSIX seconds", actual=now)
        first, second = self._keys
        timestamped = u64be(now) + self._ed25519.sign(cosignature_message(checkpoint.text(), now))
        return (
            NoteSignature(first.name, first.key_id, timestamped),
            sign_ml_dsa_44(second, self._ml_dsa_44, checkpoint, now),
        )

    def __repr__(self) -> str:
        return f"Cosigner({self.name})"


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Who cosigned a checkpoint, by witness, with the time of each one's older line in POSIX seconds.

    Only ``current`` counts. ``stale`` cosigned before the time asked for, or without a time; ``early`` at a time that
    the reader's clock has not reached. A witness that signed with some of its keys only is in none of them.
    """

    current: Mapping[str, int]
    stale: Mapping[str, int]
    early: Mapping[str, int]


def witnessed(
    note: Note,
    checkpoint: Checkpoint,
    witnesses: Mapping[str, Sequence[VerifierKey]],
    *,
    now: int,
    oldest: int,
    skew: int = CLOCK_SKEW,
) -> Witnessed:
    """Which witnesses cosigned ``checkpoint`` under *all* their keys, between ``oldest`` and ``now`` + ``skew``.

    ``checkpoint`` is the parsed text of ``note``. With ``oldest`` 0 any age will do. Raises :class:`RefusedError`
    (``SIGNATURE``) for any line under a known key that does not verify, and :class:`MalformedError` for a witness
    without keys or a key that stands for two.
    """
    publics = [key.public for keys in witnesses.values() for key in keys]
    if len(set(publics)) != len(publics):
        raise MalformedError(Reason.MALFORMED, "witnesses share a key", expected="each key once")
    groups: tuple[dict[str, int], dict[str, int], dict[str, int]] = ({}, {}, {})
    for witness, keys in witnesses.items():
        if not keys:
            raise MalformedError(Reason.MALFORMED, "a witness without keys", actual=ascii(witness[:64]))
        lines = [(key, note.signature_of(key)) for key in keys]
        times = [verify_signature(key, checkpoint, line) for key, line in lines if line is not None]
        if len(times) < len(keys):
            continue
        current, stale, early = groups
        if max(times) > now + skew:
            early[witness] = min(times)
        elif min(times) < max(oldest, 1):
            stale[witness] = min(times)
        else:
            current[witness] = min(times)
    return Witnessed(*groups)
