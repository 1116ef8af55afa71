"""The evidence document: what a worker shows every custodian, in one canonical JSON value (docs/spec/evidence.md).

It holds the nonces that the challenge is made of, the two public keys that the evidence is bound to, and one or more
items: what each piece of hardware signed, with its endorsements. Items of type ``nvidia-gpu`` may be several and stand
first, as they are collected first; every other type stands once. Canonical (RFC 8785) bytes are required on reading, so
that one document has one digest: the ledger leaf names the evidence by it, and appraisals are kept under it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from keyquorum_core import jcs
from keyquorum_core.attestation.binding import gpu_digest, gpu_nonce, report_data
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.release import challenge
from keyquorum_core.strictjson import Fields, loads

__all__ = ["MAX_DOCUMENT_BYTES", "NVIDIA_GPU", "EvidenceDocument", "EvidenceItem", "WindowNonce"]

MAX_DOCUMENT_BYTES = 4 << 20
NVIDIA_GPU = "nvidia-gpu"
"""The one type of which a document may hold several items."""

_WHAT = "evidence document"
_MAX_NONCES = 128
_MAX_ITEMS = 24
_MAX_ENDORSEMENTS = 64
_MAX_PART_BYTES = 512 << 10
_MAX_HPKE_KEY_BYTES = 512 << 10  # room for the largest second-layer KEM that still fits the document
_SIGNING_KEY_BYTES = 1984
_CUSTODIAN_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_TYPE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class WindowNonce:
    """One custodian's nonce (32 bytes) for one window."""

    custodian: str
    window: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class EvidenceItem:
    """What one piece of hardware signed, and the vendor's certificates, collateral or manifests that go with it; in
    which form and order, the type's own specification says."""

    type: str
    evidence: bytes
    endorsements: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EvidenceDocument:
    """Nonces sorted by custodian id, each custodian once; GPU items, then items of distinct other types.

    Raises :class:`MalformedError` where that does not hold.
    """

    nonces: tuple[WindowNonce, ...]
    hpke_key: bytes
    signing_key: bytes
    items: tuple[EvidenceItem, ...]

    def __post_init__(self) -> None:
        ids = [entry.custodian for entry in self.nonces]
        if not ids or ids != sorted(set(ids)) or not all(_CUSTODIAN_ID.fullmatch(each) for each in ids):
            raise MalformedError(
                Reason.MALFORMED,
                f"{_WHAT}: bad list of nonces",
                expected="at least one, sorted by custodian id, each custodian once",
            )
        if any(len(entry.nonce) != 32 or entry.window < 0 for entry in self.nonces):
            raise MalformedError(Reason.MALFORMED, f"{_WHAT}: bad nonce", expected="32 bytes and a window from 0")
        types = [item.type for item in self.items]
        others = types[types.count(NVIDIA_GPU) :]
        if (
            not types
            or NVIDIA_GPU in others
            or len(set(others)) != len(others)
            or not all(_TYPE.fullmatch(each) for each in types)
        ):
            raise MalformedError(
                Reason.MALFORMED,
                f"{_WHAT}: bad list of items",
                expected=f"at least one item, those of type {NVIDIA_GPU} first, every other type once",
                actual=", ".join(types)[:200],
            )
        if len(self.signing_key) != _SIGNING_KEY_BYTES or not 0 < len(self.hpke_key) <= _MAX_HPKE_KEY_BYTES:
            raise MalformedError(
                Reason.MALFORMED,
                f"{_WHAT}: keys of the wrong size",
                expected=f"a signing key of {_SIGNING_KEY_BYTES} bytes and an HPKE key",
                actual=f"{len(self.signing_key)} and {len(self.hpke_key)} bytes",
            )

    def to_bytes(self) -> bytes:
        """The document as RFC 8785 JSON."""
        return jcs.dumps(
            {
                "v": 1,
                "nonces": [
                    {"custodian": each.custodian, "window": each.window, "nonce": each.nonce.hex()}
                    for each in self.nonces
                ],
                "hpke_key": _base64(self.hpke_key),
                "signing_key": _base64(self.signing_key),
                "items": [
                    {
                        "type": item.type,
                        "evidence": _base64(item.evidence),
                        "endorsements": [_base64(each) for each in item.endorsements],
                    }
                    for item in self.items
                ],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> EvidenceDocument:
        """Read a document of at most 4 MiB. Raises :class:`MalformedError` for anything but canonical bytes of one."""
        fields = Fields(loads(data, _WHAT, max_bytes=MAX_DOCUMENT_BYTES), _WHAT)
        fields.integer("v", 1, 1)
        document = cls(
            nonces=tuple(_nonce(each) for each in fields.list("nonces", min_items=1, max_items=_MAX_NONCES)),
            hpke_key=fields.base64("hpke_key", max_bytes=_MAX_HPKE_KEY_BYTES),
            signing_key=fields.base64("signing_key", min_bytes=_SIGNING_KEY_BYTES, max_bytes=_SIGNING_KEY_BYTES),
            items=tuple(_item(each) for each in fields.list("items", min_items=1, max_items=_MAX_ITEMS)),
        )
        fields.done()
        if document.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, f"{_WHAT} is not canonical JSON", expected="RFC 8785 bytes")
        return document

    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: the evidence digest in leaves and caches."""
        return hashlib.sha256(self.to_bytes()).digest()

    def challenge(self) -> bytes:
        """``H("keyquorum/v1/challenge", id₁, nonce₁, …)`` over the list, 32 bytes."""
        return challenge({each.custodian: each.nonce for each in self.nonces})

    def gpu_nonce(self) -> bytes:
        """What each GPU must have been asked with, 32 bytes."""
        return gpu_nonce(self.challenge(), self.hpke_key)

    def report_data(self) -> bytes:
        """What every item but the GPUs' must be bound to, 64 bytes."""
        gpus = [item.evidence for item in self.items if item.type == NVIDIA_GPU]
        return report_data(self.hpke_key, self.signing_key, self.challenge(), gpu_digest(gpus))

    def nonce_of(self, custodian: str) -> WindowNonce | None:
        """The entry of one custodian, or ``None`` where it is not in the list."""
        return next((each for each in self.nonces if each.custodian == custodian), None)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _nonce(value: object) -> WindowNonce:
    fields = Fields(value, f"{_WHAT}.nonces")
    entry = WindowNonce(fields.text("custodian", max_length=32), fields.integer("window"), fields.hex("nonce", 32))
    fields.done()
    return entry


def _item(value: object) -> EvidenceItem:
    fields = Fields(value, f"{_WHAT}.items")
    item = EvidenceItem(
        type=fields.text("type", max_length=32),
        evidence=fields.base64("evidence", max_bytes=_MAX_PART_BYTES),
        endorsements=tuple(
            Fields({"endorsement": each}, f"{_WHAT}.items.endorsements").base64(
                "endorsement", max_bytes=_MAX_PART_BYTES
            )
            for each in fields.list("endorsements", max_items=_MAX_ENDORSEMENTS)
        ),
    )
    fields.done()
    return item
