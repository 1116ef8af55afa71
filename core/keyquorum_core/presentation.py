"""A worker's own word that it hands in this evidence for this job (docs/spec/release.md, Leases).

Evidence names the keys it is bound to, and anybody can have genuine hardware bind its evidence to keys that are
public. So evidence alone proves nothing against the worker whose keys it names; with a presentation under that worker's
attested signing key it does.
"""

from __future__ import annotations

import hmac
from typing import Final

import rfc8785

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.names import JOB_ID, SHA256_HEX, check
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign

__all__ = ["MAX_PRESENTATION", "PRESENTATION_TYPE", "check_presentation", "sign_presentation"]

PRESENTATION_TYPE: Final = "application/vnd.keyquorum.presentation.v1+json"
MAX_PRESENTATION: Final = 16 << 10
"""Bytes of the envelope; one with both signatures takes some 5 KB."""


def sign_presentation(worker: Identity, job_id: str, evidence_sha256: str) -> bytes:
    """The envelope that goes along with an evidence document. Raises :class:`MalformedError` for what is no job id or
    no digest (hex)."""
    return sign(worker, PRESENTATION_TYPE, _payload(job_id, evidence_sha256))


def check_presentation(envelope: bytes, worker: PublicIdentity, job_id: str, evidence_sha256: str) -> None:
    """Raises ``TOO_LARGE``, ``MALFORMED``, ``SIGNATURE…``, or ``WRONG_JOB`` where it is for another job or evidence."""
    payload = open_envelope(envelope, PRESENTATION_TYPE, worker, "presentation", MAX_PRESENTATION)
    wanted = _payload(job_id, evidence_sha256)
    if not hmac.compare_digest(payload, wanted):
        raise RefusedError(
            Reason.WRONG_JOB,
            "the worker signed for other evidence, or for another job",
            expected=wanted.decode("ascii"),
            actual=payload[:200].decode("ascii", "backslashreplace"),
        )


def _payload(job_id: str, evidence_sha256: str) -> bytes:
    check(JOB_ID, job_id, "job id")
    check(SHA256_HEX, evidence_sha256, "evidence digest")
    return rfc8785.dumps({"evidence_sha256": evidence_sha256, "job_id": job_id})
