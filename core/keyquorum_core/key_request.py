"""The key request: what an owner signs to have a key for data of its own, rather than for a job (DESIGN §4, §6).

The gate that releases a job's key releases these too, by the same checks and with a leaf in the ledger, to the owner
named in the request and to nobody else: there is no evidence that would let a worker have one. A request lives for
hours and can be signed again; the key it asks for is always the same one, since only its purpose, its owner and its
name enter the derivation:

    subject = H("keyquorum/v1/key-subject", owner, name)
    context = H("keyquorum/v1/context", key id, u64be(epoch), purpose, subject)

so that one owner's names are not another's, and no purpose's key is another purpose's or a job's. Exact bytes:
docs/spec/key-request.md.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core import manifest as manifests
from keyquorum_core.answers import JobBinding
from keyquorum_core.derivation import context
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.manifest import KEY_PURPOSES, Manifest
from keyquorum_core.names import KEY_ID, PRINCIPAL, check, within
from keyquorum_core.sealing import check_public, suite_of
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, peek_payload, peek_type, sign
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import H

__all__ = [
    "KEY_PURPOSES",
    "KEY_REQUEST_TYPE",
    "MAX_REQUEST_LIFETIME",
    "Asked",
    "KeyRequest",
    "key_subject",
    "open_asked",
    "open_key_request",
    "peek_asked",
    "sign_key_request",
]

KEY_REQUEST_TYPE: Final = "application/vnd.keyquorum.key-request.v1+json"
MAX_REQUEST_LIFETIME: Final = 24 * 3600
"""Seconds from ``not_before`` to ``not_after`` at most."""
_MAX_HPKE: Final = 320 << 10
_MAX_PAYLOAD: Final = 448 << 10
_NONCE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CLASSIFICATION: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_EXPORT_CONTROL: Final = re.compile(r"[A-Za-z0-9. -]{0,64}", re.ASCII)


def key_subject(owner: str, name: str) -> bytes:
    """What the key is derived for beside its purpose: 32 bytes."""
    check(PRINCIPAL, owner, "owner name")
    check(KEY_ID, name, "name of the key's use")
    return H("keyquorum/v1/key-subject", owner.encode(), name.encode())


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A key as its owner asks for it. ``name`` says which of the owner's keys of this purpose (a data set, a store);
    ``classification`` and ``export_control`` are those of the data it is for. Times are unix seconds.

    Raises :class:`MalformedError` when made with anything that a request can't say.
    """

    key_id: str
    epoch: int
    purpose: str
    name: str
    classification: str
    export_control: str
    owner: str
    owner_identity: PublicIdentity
    owner_hpke: bytes
    not_before: int
    not_after: int
    issued_at: int
    nonce: str
    """16 random bytes, hex: every request is a release of its own in the ledger."""

    def __post_init__(self) -> None:
        check(KEY_ID, self.key_id, "key id")
        within(self.epoch, "epoch")
        if self.purpose not in KEY_PURPOSES:
            raise MalformedError(
                Reason.MALFORMED,
                "no key of this purpose can be asked for",
                expected=" or ".join(sorted(KEY_PURPOSES)),
                actual=ascii(self.purpose[:40]),
            )
        key_subject(self.owner, self.name)
        check(_CLASSIFICATION, self.classification, "classification")
        check(_EXPORT_CONTROL, self.export_control, "export control class")
        check(_NONCE, self.nonce, "nonce")
        if len(self.owner_hpke) > _MAX_HPKE:
            raise MalformedError(
                Reason.MALFORMED,
                "the owner's HPKE key is too large",
                expected=f"at most {_MAX_HPKE} bytes",
                actual=len(self.owner_hpke),
            )
        if "+" not in suite_of(self.owner_hpke):  # whoever seals to a nested key checks it; a reader may lack liboqs
            check_public(self.owner_hpke)
        for value, what in (
            (self.not_before, "not_before"),
            (self.not_after, "not_after"),
            (self.issued_at, "issued_at"),
        ):
            within(value, what)
        latest = self.not_before + MAX_REQUEST_LIFETIME
        if not self.not_before < self.not_after <= latest or self.issued_at >= self.not_after:
            raise MalformedError(
                Reason.MALFORMED,
                "bad time window",
                expected=f"not_before < not_after ≤ not_before + {MAX_REQUEST_LIFETIME}, issued_at < not_after",
                actual=f"{self.not_before}…{self.not_after}, issued at {self.issued_at}",
            )

    def context(self) -> bytes:
        """The derivation context of the key, 32 bytes."""
        return context(self.key_id, self.epoch, self.purpose, key_subject(self.owner, self.name))

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "classification": self.classification,
                "epoch": self.epoch,
                "export_control": self.export_control,
                "issued_at": self.issued_at,
                "key_id": self.key_id,
                "name": self.name,
                "nonce": self.nonce,
                "not_after": self.not_after,
                "not_before": self.not_before,
                "owner": self.owner,
                "owner_hpke": base64.b64encode(self.owner_hpke).decode(),
                "owner_identity": base64.b64encode(self.owner_identity.to_bytes()).decode(),
                "purpose": self.purpose,
            }
        )

    @staticmethod
    def parse(data: bytes) -> KeyRequest:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = Fields(loads(data, "key request", max_bytes=_MAX_PAYLOAD, max_depth=1), "key request")
        request = KeyRequest(
            key_id=fields.text("key_id"),
            epoch=fields.integer("epoch"),
            purpose=fields.text("purpose"),
            name=fields.text("name"),
            classification=fields.text("classification"),
            export_control=fields.text("export_control", allow_empty=True),
            owner=fields.text("owner"),
            owner_identity=PublicIdentity.from_bytes(fields.base64("owner_identity", max_bytes=1984, min_bytes=1984)),
            owner_hpke=fields.base64("owner_hpke", max_bytes=_MAX_HPKE),
            not_before=fields.integer("not_before"),
            not_after=fields.integer("not_after"),
            issued_at=fields.integer("issued_at"),
            nonce=fields.text("nonce", max_length=32),
        )
        fields.done()
        if request.payload() != data:
            raise MalformedError(Reason.MALFORMED, "the key request is not canonical", expected="RFC 8785 JSON")
        return request


def _check_owner(request: KeyRequest, owner: PublicIdentity) -> None:
    if request.owner_identity != owner:
        raise RefusedError(
            Reason.UNKNOWN_OWNER,
            "the key request names another owner identity than the one that signs it",
            expected=request.owner_identity.fingerprint[:16],
            actual=owner.fingerprint[:16],
        )


def sign_key_request(request: KeyRequest, identity: Identity) -> bytes:
    """DSSE envelope. Raises :class:`RefusedError` (``UNKNOWN_OWNER``) unless ``identity`` is the request's own."""
    _check_owner(request, identity.public)
    return sign(identity, KEY_REQUEST_TYPE, request.payload())


def open_key_request(envelope: bytes, owner: PublicIdentity) -> KeyRequest:
    """The request, signed by ``owner``, whom it must name. Time is for :func:`~keyquorum_core.manifest.check_window`.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``, ``UNKNOWN_OWNER``.
    """
    request = KeyRequest.parse(open_envelope(envelope, KEY_REQUEST_TYPE, owner, "key request"))
    _check_owner(request, owner)
    return request


@dataclass(frozen=True, slots=True)
class Asked:
    """What a release is asked with, and what follows from its payload: a job's manifest, or a key request."""

    document: Manifest | KeyRequest
    payload: bytes

    @property
    def to_owner_only(self) -> bool:
        """Whether no evidence would let a worker have this key."""
        return isinstance(self.document, KeyRequest)

    def binding(self) -> JobBinding:
        """What the leaf and the answers must name: for either kind, id and digest of the payload."""
        document, digest = self.document, manifests.subject(self.payload)
        job = manifests.job_id(self.payload)
        if isinstance(document, KeyRequest):
            about = key_subject(document.owner, document.name)
            return JobBinding(job, digest, document.key_id, document.epoch, document.purpose, about)
        return JobBinding(job, digest, document.key_id, document.epoch)


def peek_asked(envelope: bytes) -> Asked:
    """What the envelope holds, UNVERIFIED: only to find out whose key to verify with. Raises
    :class:`MalformedError`."""
    if peek_type(envelope, "manifest") == KEY_REQUEST_TYPE:
        payload = peek_payload(envelope, KEY_REQUEST_TYPE, "key request")
        return Asked(KeyRequest.parse(payload), payload)
    payload = peek_payload(envelope, manifests.MANIFEST_TYPE, "manifest")
    return Asked(manifests.parse(payload), payload)


def open_asked(envelope: bytes, owner: PublicIdentity) -> Asked:
    """A manifest or a key request, signed by ``owner``, whom it must name. Raises :class:`MalformedError`, and
    :class:`RefusedError`: ``SIGNATURE…``, ``UNKNOWN_OWNER``."""
    if peek_type(envelope, "manifest") == KEY_REQUEST_TYPE:
        request = open_key_request(envelope, owner)
        return Asked(request, request.payload())
    return Asked(*manifests.open_manifest(envelope, owner))
