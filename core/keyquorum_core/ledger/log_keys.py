"""The log's own two keys: how it signs checkpoints, and how readers open them.

A log signs each checkpoint twice, under its origin as key name: Ed25519 (0x01), which every tool for C2SP logs can
check, and ML-DSA-44 (0x06), which stands when Ed25519 falls. Here both must be there and verify.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import sign_ml_dsa_44, signing_keys, verify_signature
from keyquorum_core.ledger.notes import Note, NoteSignature, parse_note
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey

__all__ = ["LogKeys", "LogSigner", "SignedCheckpoint", "log_name", "open_checkpoint", "verify_log_lines"]


@dataclass(frozen=True, slots=True)
class LogKeys:
    """A log's verifier keys, types 0x01 and 0x06, both named after its origin. Raises :class:`MalformedError`."""

    ed25519: VerifierKey
    ml_dsa_44: VerifierKey

    def __post_init__(self) -> None:
        types = (self.ed25519.type, self.ml_dsa_44.type)
        if types != (SignatureType.ED25519, SignatureType.ML_DSA_44) or self.ed25519.name != self.ml_dsa_44.name:
            raise MalformedError(
                Reason.MALFORMED,
                "not the keys of one log",
                expected="types 0x01 and 0x06 under one name",
                actual=f"types {types[0]:#04x} and {types[1]:#04x}, {self.ed25519.name} and {self.ml_dsa_44.name}",
            )

    @property
    def origin(self) -> str:
        return self.ed25519.name

    def encode(self) -> str:
        """The two vkeys with a space between them: the ``log_key`` of a roster."""
        return f"{self.ed25519.encode()} {self.ml_dsa_44.encode()}"

    @staticmethod
    def parse(text: str) -> LogKeys:
        """The strict inverse of :meth:`encode`. Raises :class:`MalformedError`, as :meth:`VerifierKey.parse` does."""
        parts = text.split(" ") if len(text) <= 8192 else []
        if len(parts) != 2:
            raise MalformedError(
                Reason.MALFORMED,
                "not the keys of a log",
                expected="an Ed25519 and an ML-DSA-44 verifier key",
                actual=ascii(text[:80]),
            )
        return LogKeys(VerifierKey.parse(parts[0]), VerifierKey.parse(parts[1]))


def log_name(keys: LogKeys | None) -> str:
    """How keystores, backups and testimonies name a log: hex SHA-256 of its encoded keys; empty for none."""
    return "" if keys is None else hashlib.sha256(keys.encode().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    """A checkpoint whose log lines verified, with the note it came in; cosignatures in it are yet to be looked at.

    ``signed_at`` is the time in the log's ML-DSA-44 line, POSIX seconds: the log's word, not a witness's.
    """

    checkpoint: Checkpoint
    note: Note
    signed_at: int

    def with_signatures(self, *signatures: NoteSignature) -> SignedCheckpoint:
        """The same with further lines, unverified like those there already. Raises :class:`MalformedError`."""
        return SignedCheckpoint(self.checkpoint, self.note.with_signatures(*signatures), self.signed_at)

    def encode(self) -> bytes:
        """The signed note, as it is served and stored."""
        return self.note.encode()


def verify_log_lines(note: Note, checkpoint: Checkpoint, keys: Iterable[VerifierKey]) -> int:
    """Whether every one of a log's ``keys`` signed; the latest time in its lines, 0 where none has a time.

    Raises :class:`RefusedError`: ``SIGNATURE_MISSING``, ``SIGNATURE``.
    """
    latest = 0
    for key in keys:
        line = note.signature_of(key)
        if line is None:
            raise RefusedError(
                Reason.SIGNATURE_MISSING,
                f"the log did not sign with its key of type {key.type:#04x}",
                expected=f"a line of {key.name}, key id {key.key_id.hex()}",
                actual=", ".join(f"{s.name} {s.key_id.hex()}" for s in note.signatures)[:400],
            )
        latest = max(latest, verify_signature(key, checkpoint, line))
    return latest


def open_checkpoint(data: bytes, log: LogKeys) -> SignedCheckpoint:
    """A checkpoint of ``log`` under both its signatures. That it extends anything is for the caller to verify.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``LEDGER_ORIGIN`` for another log's checkpoint,
    ``SIGNATURE_MISSING``, ``SIGNATURE``.
    """
    note = parse_note(data, "a checkpoint")
    checkpoint = Checkpoint.parse(note.text)
    if checkpoint.origin != log.origin:
        raise RefusedError(
            Reason.LEDGER_ORIGIN, "a checkpoint of another log", expected=log.origin, actual=ascii(checkpoint.origin)
        )
    return SignedCheckpoint(checkpoint, note, verify_log_lines(note, checkpoint, (log.ed25519, log.ml_dsa_44)))


class LogSigner:
    """The log's private keys. It signs what it is given: that checkpoints only grow is the sequencer's to ensure."""

    def __init__(self, origin: str, ed25519: Ed25519PrivateKey, ml_dsa_44: MLDSA44PrivateKey) -> None:
        """Raises :class:`MalformedError` for an origin that no key can be named after."""
        self._ed25519, self._ml_dsa_44 = ed25519, ml_dsa_44
        self._keys = LogKeys(
            VerifierKey(origin, SignatureType.ED25519, ed25519.public_key().public_bytes_raw()),
            VerifierKey(origin, SignatureType.ML_DSA_44, ml_dsa_44.public_key().public_bytes_raw()),
        )

    @classmethod
    def generate(cls, origin: str) -> LogSigner:
        """New keys, from the system's randomness."""
        return cls(origin, Ed25519PrivateKey.generate(), MLDSA44PrivateKey.generate())

    @classmethod
    def from_seeds(cls, origin: str, ed25519: bytes, ml_dsa_44: bytes) -> LogSigner:
        """The inverse of :meth:`seeds`. Raises :class:`MalformedError` unless both are 32 bytes."""
        return cls(origin, *signing_keys(ed25519, ml_dsa_44))

    def seeds(self) -> tuple[bytes, bytes]:
        """Both private keys as 32 bytes each: Ed25519, then ML-DSA-44 (FIPS 204's ξ)."""
        return self._ed25519.private_bytes_raw(), self._ml_dsa_44.private_bytes_raw()

    @property
    def origin(self) -> str:
        return self._keys.origin

    @property
    def keys(self) -> LogKeys:
        return self._keys

    def sign(self, size: int, root: bytes, now: int) -> SignedCheckpoint:
        """The checkpoint of this log's first ``size`` leaves, signed at ``now`` (POSIX seconds, not 0).

        Raises :class:`MalformedError` for a size, root or time that a checkpoint can't have.
        """
        if now <= 0:
            raise MalformedError(Reason.MALFORMED, "a checkpoint needs a time", expected="POSIX seconds", actual=now)
        checkpoint = Checkpoint(self.origin, size, root)
        text, key = checkpoint.text(), self._keys.ed25519
        first = NoteSignature(key.name, key.key_id, self._ed25519.sign(text))
        second = sign_ml_dsa_44(self._keys.ml_dsa_44, self._ml_dsa_44, checkpoint, now)
        return SignedCheckpoint(checkpoint, Note(text, (first, second)), now)

    def __repr__(self) -> str:
        return f"LogSigner({self.origin})"
