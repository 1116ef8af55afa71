"""The exact bytes of a release (DESIGN §6): the leaf that shows it, its window, the answers that carry it.

A custodian answers with its share sealed to the recipient, signed with a short-lived Ed25519 *answer key*. Every
30-second window the custodian's hybrid identity certifies the answer key in a :class:`Window` statement, off the
release path (docs/adr/0005-short-lived-answer-keys.md). Nothing here decides whether to release. Exact bytes:
docs/spec/release.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core import jcs
from keyquorum_core.derivation import decode_contributions, encode_contributions
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.key_policy import MAX_LEASE, MIN_LEASE
from keyquorum_core.names import CLUSTER, CUSTODIAN_ID, JOB_ID, KEY_ID, SHA256_HEX, check, within
from keyquorum_core.quorum import Quorum
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, PublicIdentity, ed25519_public, open_envelope, sign
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import H, transcript, u64be

__all__ = [
    "LEAF_TYPE",
    "NO_LEASE",
    "WINDOW_LIFETIME",
    "WINDOW_SECONDS",
    "WINDOW_TYPE",
    "Answer",
    "Leaf",
    "LeaseTerms",
    "Receipt",
    "Share",
    "Window",
    "answer_message",
    "challenge",
    "decode_share",
    "encode_share",
    "make_nonce",
    "make_window",
    "open_share",
    "open_window",
    "share_info",
    "sign_answer",
    "sign_window",
    "verify_answer",
    "verify_receipt",
    "window_of",
]

WINDOW_TYPE: Final = "application/vnd.keyquorum.window.v1+json"
LEAF_TYPE: Final = "release.intent"
WINDOW_SECONDS: Final = 30
WINDOW_LIFETIME: Final = 2 * WINDOW_SECONDS
"""A window's answer key and nonce stay good through the next window, for answers that straddle the boundary."""


_LEAF: Final = re.compile(
    rb'\{"development":(true|false),"epoch":(0|[1-9][0-9]{0,15}),"evidence_sha256":"([0-9a-f]{64})","job_id":"([a-z2-7]{26})",'
    rb'"key_id":"([a-z0-9._-]{1,64})","manifest_sha256":"([0-9a-f]{64})","recipient":"(owner|worker)",'
    rb'"recipient_sha256":"([0-9a-f]{64})","time":(0|[1-9][0-9]{0,15}),"type":"release\.intent"\}'
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """The ledger leaf that announces a release: digests only. Digests are lower-case hex of 32 bytes; ``time`` is unix
    seconds; ``recipient`` is ``owner`` or ``worker``; an owner's ``evidence_sha256`` is the SHA-256 of nothing.

    Raises :class:`MalformedError` (``LEAF``, ``MALFORMED``) when made with anything else.
    """

    job_id: str
    manifest_sha256: str
    recipient_sha256: str
    evidence_sha256: str
    key_id: str
    epoch: int
    time: int
    recipient: str
    development: bool = False
    """The evidence is of development hardware, which proves nothing; custodians refuse a leaf that says otherwise."""
    type: str = LEAF_TYPE

    NO_EVIDENCE = hashlib.sha256(b"").hexdigest()

    def __post_init__(self) -> None:
        check(JOB_ID, self.job_id, "job id")
        for name in ("manifest_sha256", "recipient_sha256", "evidence_sha256"):
            check(SHA256_HEX, getattr(self, name), name)
        check(KEY_ID, self.key_id, "key id")
        within(self.epoch, "epoch")
        within(self.time, "time")
        if self.type != LEAF_TYPE or self.recipient not in ("owner", "worker"):
            raise MalformedError(
                Reason.LEAF,
                "not a release leaf",
                expected=f"type {LEAF_TYPE}, recipient owner or worker",
                actual=ascii(f"type {self.type[:40]}, recipient {self.recipient[:40]}"),
            )
        if (self.recipient == "owner") != (self.evidence_sha256 == Leaf.NO_EVIDENCE):
            raise MalformedError(
                Reason.LEAF,
                "evidence does not fit the recipient",
                expected="no evidence for an owner, some for a worker",
                actual=f"{self.recipient} with evidence digest {self.evidence_sha256[:16]}…",
            )

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON. Written out: nothing in it needs escaping, and this is on the release path."""
        return (
            f'{{"development":{"true" if self.development else "false"},"epoch":{self.epoch},'
            f'"evidence_sha256":"{self.evidence_sha256}","job_id":"{self.job_id}",'
            f'"key_id":"{self.key_id}","manifest_sha256":"{self.manifest_sha256}","recipient":"{self.recipient}",'
            f'"recipient_sha256":"{self.recipient_sha256}","time":{self.time},"type":"{self.type}"}}'
        ).encode()

    def hash(self) -> bytes:
        """RFC 6962 §2.1 leaf hash: SHA-256(0x00 ‖ bytes)."""
        return hashlib.sha256(b"\x00" + self.to_bytes()).digest()

    @staticmethod
    def parse(data: bytes) -> Leaf:
        """Strict: exactly the bytes that :meth:`to_bytes` makes. Raises :class:`MalformedError`."""
        if match := _LEAF.fullmatch(data):
            development, epoch, evidence, job, key, manifest, recipient, recipient_key, time = (
                group.decode() for group in match.groups()
            )
            return Leaf(
                job, manifest, recipient_key, evidence, key, int(epoch), int(time), recipient, development == "true"
            )
        # Written otherwise: read it as JSON, to say what is wrong with it.
        fields = Fields(loads(data, "leaf", max_bytes=2048, max_depth=1), "leaf")
        leaf = Leaf(
            development=fields.boolean("development"),
            job_id=fields.text("job_id"),
            manifest_sha256=fields.text("manifest_sha256"),
            recipient_sha256=fields.text("recipient_sha256"),
            evidence_sha256=fields.text("evidence_sha256"),
            key_id=fields.text("key_id"),
            epoch=fields.integer("epoch"),
            time=fields.integer("time"),
            recipient=fields.text("recipient"),
            type=fields.text("type"),
        )
        fields.done()
        if leaf.to_bytes() != data:
            raise MalformedError(Reason.LEAF, "leaf is not canonical", expected="RFC 8785 JSON", actual="other JSON")
        return leaf


def share_info(leaf_hash: bytes, custodian_id: str, recipient_public: bytes) -> bytes:
    """HPKE ``info`` of a share: H("keyquorum/v1/share", leaf hash, custodian id, encoded recipient public key)."""
    return H("keyquorum/v1/share", leaf_hash, custodian_id.encode(), recipient_public)


def answer_message(
    subject: bytes, leaf_hash: bytes, custodian_id: str, key_id: str, epoch: int, window: int, sealed: bytes
) -> bytes:
    """What an answer key signs; ``subject`` is the SHA-256 of the manifest payload, ``window`` the window's number."""
    return _message(subject, leaf_hash, custodian_id, key_id, epoch, window, hashlib.sha256(sealed).digest())


def _message(
    subject: bytes, leaf_hash: bytes, custodian_id: str, key_id: str, epoch: int, window: int, sealed_sha256: bytes
) -> bytes:
    return transcript(
        "keyquorum/v1/answer",
        subject,
        leaf_hash,
        custodian_id.encode(),
        key_id.encode(),
        u64be(epoch),
        u64be(window),
        sealed_sha256,
    )


def window_of(now: int) -> int:
    """The number of the window that contains ``now`` (unix seconds)."""
    return now // WINDOW_SECONDS


def make_nonce(boot_secret: bytes, window: int) -> bytes:
    """The custodian's 32-byte nonce for a window: HMAC-SHA-256 under a secret that a restart replaces."""
    return hmac.digest(boot_secret, transcript("keyquorum/v1/nonce", u64be(window)), "sha256")


def challenge(nonces: Mapping[str, bytes]) -> bytes:
    """H("keyquorum/v1/challenge", id₁, nonce₁, …) by sorted custodian id, 32 bytes. Raises :class:`MalformedError`."""
    if not nonces or any(len(nonce) != 32 for nonce in nonces.values()):
        raise MalformedError(Reason.MALFORMED, "bad nonces for a challenge", expected="one or more of 32 bytes each")
    parts = [part for name in sorted(nonces) for part in (name.encode(), nonces[name])]
    return H("keyquorum/v1/challenge", *parts)


@dataclass(frozen=True, slots=True)
class Window:
    """A custodian's statement for one 30-second window. ``nonce`` and ``answer_key`` (Ed25519 public) are lower-case
    hex of 32 bytes, ``not_before`` = 30·``window`` and ``not_after`` = ``not_before`` + 60, unix seconds.

    Raises :class:`MalformedError` when made with anything else.
    """

    cluster: str
    custodian: str
    window: int
    nonce: str
    answer_key: str
    not_before: int
    not_after: int

    def __post_init__(self) -> None:
        check(CLUSTER, self.cluster, "cluster name")
        check(CUSTODIAN_ID, self.custodian, "custodian id")
        check(SHA256_HEX, self.nonce, "nonce")
        check(SHA256_HEX, self.answer_key, "answer key")
        within(self.window, "window number")
        if self.not_before != self.window * WINDOW_SECONDS or self.not_after != self.not_before + WINDOW_LIFETIME:
            raise MalformedError(
                Reason.MALFORMED,
                "a window's times do not follow from its number",
                expected=f"{self.window * WINDOW_SECONDS}…{self.window * WINDOW_SECONDS + WINDOW_LIFETIME}",
                actual=f"{self.not_before}…{self.not_after}",
            )
        ed25519_public(bytes.fromhex(self.answer_key))

    @property
    def nonce_bytes(self) -> bytes:
        return bytes.fromhex(self.nonce)

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "answer_key": self.answer_key,
                "cluster": self.cluster,
                "custodian": self.custodian,
                "nonce": self.nonce,
                "not_after": self.not_after,
                "not_before": self.not_before,
                "window": self.window,
            }
        )

    @staticmethod
    def parse(payload: bytes) -> Window:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`. Not verified: see :func:`open_window`."""
        fields = Fields(loads(payload, "window", max_bytes=4096, max_depth=1), "window")
        window = Window(
            cluster=fields.text("cluster"),
            custodian=fields.text("custodian"),
            window=fields.integer("window"),
            nonce=fields.text("nonce"),
            answer_key=fields.text("answer_key"),
            not_before=fields.integer("not_before"),
            not_after=fields.integer("not_after"),
        )
        fields.done()
        if window.payload() != payload:
            raise MalformedError(Reason.MALFORMED, "window is not canonical", expected="RFC 8785 JSON")
        return window


def make_window(cluster: str, custodian: str, window: int, boot_secret: bytes, answer_key: bytes) -> Window:
    """The statement for window number ``window``; ``answer_key`` is the 32-byte Ed25519 public key."""
    start = window * WINDOW_SECONDS
    nonce = make_nonce(boot_secret, window).hex()
    return Window(cluster, custodian, window, nonce, answer_key.hex(), start, start + WINDOW_LIFETIME)


def sign_window(window: Window, identity: Identity) -> bytes:
    """DSSE envelope by the custodian's hybrid identity."""
    return sign(identity, WINDOW_TYPE, window.payload())


def open_window(
    envelope: bytes, identity: PublicIdentity, *, custodian: str, cluster: str, now: int, skew: int = 30
) -> Window:
    """A verified, current window of ``custodian``. For a receipt kept from before, ``now`` is the time of its leaf.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``; ``UNKNOWN_CUSTODIAN`` (a statement of
    another custodian or cluster); ``STALE`` (``now`` outside ``not_before`` - skew … ``not_after`` + skew).
    """
    what = f"the window of {custodian}"
    window = Window.parse(open_envelope(envelope, WINDOW_TYPE, identity, what, max_bytes=16384))
    if (window.custodian, window.cluster) != (custodian, cluster):
        raise RefusedError(
            Reason.UNKNOWN_CUSTODIAN,
            "a window statement of another custodian or cluster",
            expected=f"{custodian} in {cluster}",
            actual=f"{window.custodian} in {window.cluster}",
        )
    if not window.not_before - skew <= now < window.not_after + skew:
        raise RefusedError(
            Reason.STALE,
            f"{what} is not current",
            expected=f"{window.not_before - skew}…{window.not_after + skew}",
            actual=now,
            next_step="Fetch the custodian's present window; if this goes on, compare clocks.",
        )
    return window


@dataclass(frozen=True, slots=True)
class Receipt:
    """An answer without its ciphertext, kept to show later who released what. ``sealed_sha256`` is 32 bytes."""

    custodian: str
    key_id: str
    epoch: int
    window: int
    sealed_sha256: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """One custodian's share: ``sealed`` to the recipient, with the 64-byte Ed25519 ``signature`` of its answer key."""

    custodian: str
    key_id: str
    epoch: int
    window: int
    sealed: bytes
    signature: bytes

    def receipt(self) -> Receipt:
        digest = hashlib.sha256(self.sealed).digest()
        return Receipt(self.custodian, self.key_id, self.epoch, self.window, digest, self.signature)


def sign_answer(
    answer_private: Ed25519PrivateKey,
    subject: bytes,
    leaf_hash: bytes,
    custodian_id: str,
    key_id: str,
    epoch: int,
    window: int,
    sealed: bytes,
) -> Answer:
    """Sign with the answer key of window number ``window``."""
    message = answer_message(subject, leaf_hash, custodian_id, key_id, epoch, window, sealed)
    return Answer(custodian_id, key_id, epoch, window, sealed, answer_private.sign(message))


def verify_answer(answer: Answer, window: Window, subject: bytes, leaf_hash: bytes, *, key_id: str, epoch: int) -> None:
    """Whether ``answer`` is this custodian's, in this (verified) window, for this leaf, key and epoch.

    Raises :class:`RefusedError`: ``UNKNOWN_CUSTODIAN``, ``STALE`` (another window), ``UNKNOWN_KEY``, ``EPOCH``,
    ``SIGNATURE``.
    """
    verify_receipt(answer.receipt(), window, subject, leaf_hash, key_id=key_id, epoch=epoch)


def verify_receipt(
    receipt: Receipt, window: Window, subject: bytes, leaf_hash: bytes, *, key_id: str, epoch: int
) -> None:
    """:func:`verify_answer` for the receipt of an answer."""
    for reason, what, expected, actual in (
        (Reason.UNKNOWN_CUSTODIAN, "custodian", window.custodian, receipt.custodian),
        (Reason.STALE, "window", window.window, receipt.window),
        (Reason.UNKNOWN_KEY, "key", key_id, receipt.key_id),
        (Reason.EPOCH, "epoch", epoch, receipt.epoch),
    ):
        if expected != actual:
            raise RefusedError(
                reason, f"{window.custodian} answered for another {what}", expected=expected, actual=ascii(actual)[:80]
            )
    message = _message(subject, leaf_hash, window.custodian, key_id, epoch, window.window, receipt.sealed_sha256)
    try:
        ed25519_public(bytes.fromhex(window.answer_key)).verify(receipt.signature, message)
    except InvalidSignature:
        raise RefusedError(
            Reason.SIGNATURE,
            f"the answer of {window.custodian} is not signed by its answer key",
            expected=f"an Ed25519 signature by {window.answer_key[:16]}… over this job, leaf and ciphertext",
            actual="another signer, or other bytes",
            details={"custodian": window.custodian},
        ) from None


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How long a worker may hold the key that a share is for, in seconds counted from before it asked for the challenge
    that its evidence answers; and how old the evidence may become before it attests anew. From the key's policy.

    Raises :class:`MalformedError` for terms that no key policy can have.
    """

    seconds: int
    reattest_seconds: int

    def __post_init__(self) -> None:
        if self.seconds or self.reattest_seconds:
            within(self.seconds, "lease of a share", MIN_LEASE, MAX_LEASE)
            within(self.reattest_seconds, "reattest_seconds of a share", 1, self.seconds)

    def shortest(self, other: LeaseTerms) -> LeaseTerms:
        """What satisfies both."""
        seconds = min(self.seconds, other.seconds)
        return LeaseTerms(seconds, min(self.reattest_seconds, other.reattest_seconds, seconds))


NO_LEASE: Final = LeaseTerms(0, 0)
"""An owner's share: the owner keeps the key."""
_TERMS: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Share:
    """What a sealed share holds: contributions by seed index, and the terms the recipient may use them on."""

    contributions: dict[int, bytes] = field(repr=False)
    lease: LeaseTerms


def encode_share(contributions: Mapping[int, bytes], lease: LeaseTerms) -> bytes:
    """u32be lease seconds ‖ u32be reattest seconds ‖ the contributions: the plaintext that is sealed."""
    return _TERMS.pack(lease.seconds, lease.reattest_seconds) + encode_contributions(contributions)


def decode_share(plaintext: bytes, expected_indices: tuple[int, ...]) -> Share:
    """Read :func:`encode_share` with exactly ``expected_indices`` (ascending). Raises :class:`MalformedError`."""
    if len(plaintext) < _TERMS.size:
        raise MalformedError(
            Reason.MALFORMED, "a share without terms", expected=f"{_TERMS.size} bytes or more", actual=len(plaintext)
        )
    terms = LeaseTerms(*_TERMS.unpack_from(plaintext))
    return Share(decode_contributions(plaintext[_TERMS.size :], expected_indices), terms)


def open_share(answer: Answer, recipient: RecipientKey, leaf_hash: bytes, quorum: Quorum) -> Share:
    """What a verified answer holds. Raises :class:`RefusedError` (``UNSEAL``, ``UNKNOWN_CUSTODIAN``) and
    :class:`MalformedError` for anything but exactly this custodian's contributions and terms that can be."""
    if answer.custodian not in quorum.ids:
        raise RefusedError(
            Reason.UNKNOWN_CUSTODIAN,
            "an answer from outside the committee",
            expected=", ".join(quorum.ids),
            actual=ascii(answer.custodian[:64]),
        )
    plaintext = recipient.open(answer.sealed, share_info(leaf_hash, answer.custodian, recipient.public))
    return decode_share(plaintext, quorum.indices_of(answer.custodian))
