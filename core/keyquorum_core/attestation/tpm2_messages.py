"""What passes between a worker and whoever enrols its TPM, as files (docs/spec/evidence-tpm2.md).

RFC 8785 JSON, all members required and no others. ``tpm2-candidate`` and ``tpm2-answer`` come from the worker,
``tpm2-credential`` goes to it; ``tpm2-pending`` stays with the one who asks and holds the secret that the answer must
be, so it is kept from others until then.
"""

from __future__ import annotations

import base64
from typing import Any

from keyquorum_core import jcs
from keyquorum_core.attestation.tpm2_credential import Credential
from keyquorum_core.attestation.tpm2_endorsement import EkCertificate
from keyquorum_core.attestation.tpm2_enrolment import Candidate, PendingEnrolment
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "MAX_MESSAGE",
    "answer_bytes",
    "candidate_bytes",
    "credential_bytes",
    "parse_answer",
    "parse_candidate",
    "parse_credential",
    "parse_pending",
    "pending_bytes",
]

MAX_MESSAGE = 128 << 10
_MAX_CERTIFICATES = 8
_MAX_CERTIFICATE = 16 << 10
_MAX_AREA = 1024
_MAX_BLOB = 2048
_SECRET_BYTES = 32
_VERSION = 1


def _dump(kind: str, **members: Any) -> bytes:
    return jcs.dumps({"v": _VERSION, "kind": kind, **members})


def _open(data: bytes, kind: str) -> Fields:
    """Raises :class:`MalformedError`, also for a message of another kind."""
    fields = Fields(loads(data, kind, max_bytes=MAX_MESSAGE, max_depth=3), kind)
    fields.integer("v", _VERSION, _VERSION)
    fields.literal("kind", kind)
    return fields


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def candidate_bytes(candidate: Candidate) -> bytes:
    return _dump(
        "tpm2-candidate",
        ek_certificates=[_b64(each) for each in candidate.ek_certificates],
        ek_public=_b64(candidate.ek_public),
        ak_public=_b64(candidate.ak_public),
    )


def parse_candidate(data: bytes) -> Candidate:
    """Raises :class:`MalformedError`. What it says is judged by :func:`~.tpm2_enrolment.challenge`."""
    fields = _open(data, "tpm2-candidate")
    certificates = tuple(
        Fields({"certificate": each}, "tpm2-candidate").base64("certificate", max_bytes=_MAX_CERTIFICATE)
        for each in fields.list("ek_certificates", min_items=1, max_items=_MAX_CERTIFICATES)
    )
    found = Candidate(
        certificates,
        fields.base64("ek_public", max_bytes=_MAX_AREA),
        fields.base64("ak_public", max_bytes=_MAX_AREA),
    )
    fields.done()
    return found


def credential_bytes(credential: Credential) -> bytes:
    return _dump(
        "tpm2-credential",
        id_object=_b64(credential.id_object),
        encrypted_secret=_b64(credential.encrypted_secret),
    )


def parse_credential(data: bytes) -> Credential:
    """Raises :class:`MalformedError`."""
    fields = _open(data, "tpm2-credential")
    found = Credential(
        fields.base64("id_object", max_bytes=_MAX_BLOB), fields.base64("encrypted_secret", max_bytes=_MAX_BLOB)
    )
    fields.done()
    return found


def answer_bytes(secret: bytes) -> bytes:
    return _dump("tpm2-answer", secret=secret.hex())


def parse_answer(data: bytes) -> bytes:
    """The secret, 32 bytes. Raises :class:`MalformedError`."""
    fields = _open(data, "tpm2-answer")
    secret = fields.hex("secret", _SECRET_BYTES)
    fields.done()
    return secret


def pending_bytes(pending: PendingEnrolment) -> bytes:
    """Holds the secret: for the eyes of whoever asks only."""
    ek: dict[str, Any] = {
        "spki": _b64(pending.ek.spki),
        "fingerprint": pending.ek.fingerprint,
        "root": pending.ek.root,
        "manufacturer": pending.ek.manufacturer,
        "model": pending.ek.model,
        "version": pending.ek.version,
        "not_before": pending.ek.not_before,
        "not_after": pending.ek.not_after,
    }
    return _dump(
        "tpm2-pending",
        ak=pending.ak_fingerprint,
        ak_name=_b64(pending.ak_name),
        ek=ek,
        secret=pending.secret.hex(),
        asked_at=pending.asked_at,
    )


def parse_pending(data: bytes) -> PendingEnrolment:
    """Raises :class:`MalformedError`."""
    fields = _open(data, "tpm2-pending")
    ek = fields.object("ek")
    found = PendingEnrolment(
        ak_fingerprint=fields.hex("ak", 32).hex(),
        ak_name=fields.base64("ak_name", max_bytes=66),
        ek=EkCertificate(
            spki=ek.base64("spki", max_bytes=_MAX_AREA),
            fingerprint=ek.hex("fingerprint", 32).hex(),
            root=ek.hex("root", 32).hex(),
            manufacturer=ek.text("manufacturer"),
            model=ek.text("model"),
            version=ek.text("version"),
            not_before=ek.integer("not_before"),
            not_after=ek.integer("not_after"),
        ),
        secret=fields.hex("secret", _SECRET_BYTES),
        asked_at=fields.integer("asked_at"),
    )
    ek.done()
    fields.done()
    return found
