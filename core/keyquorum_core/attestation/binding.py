"""What ties evidence to the keys that ask for a share, and a worker's pieces of evidence to one another (DESIGN §7).

In this order: the challenge comes from the custodians' nonces; GPUs are asked first, with :func:`gpu_nonce`; then all
other hardware, with :func:`report_data`, which commits to what the GPUs said (:func:`gpu_digest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from keyquorum_core.transcript import H, transcript

__all__ = ["gpu_digest", "gpu_nonce", "report_data"]


def gpu_nonce(challenge: bytes, hpke_key: bytes) -> bytes:
    """The 32 bytes put to each GPU: bound to the challenge and to the worker's encoded HPKE public key."""
    return H("keyquorum/v1/gpu-nonce", challenge, hpke_key)


def gpu_digest(evidence: Sequence[bytes]) -> bytes:
    """The digest of a document's GPU evidence: 32 bytes over its ``nvidia-gpu`` items' evidence in their order, as raw
    bytes, without endorsements; empty where there is none."""
    return H("keyquorum/v1/gpu-evidence", *evidence) if evidence else b""


def report_data(hpke_key: bytes, signing_key: bytes, challenge: bytes, gpu_evidence_sha256: bytes = b"") -> bytes:
    """The 64 bytes that all evidence but the GPUs' must carry: SHA-512 of the transcript.

    ``hpke_key`` is the encoded HPKE public key, ``signing_key`` the 1984-byte public identity, ``challenge`` the 32
    bytes of :meth:`~keyquorum_core.attestation.evidence.EvidenceDocument.challenge`, ``gpu_evidence_sha256`` what
    :func:`gpu_digest` gives. For fields of 32 bytes the first half is used.
    """
    return hashlib.sha512(
        transcript("keyquorum/v1/evidence", hpke_key, signing_key, challenge, gpu_evidence_sha256)
    ).digest()
