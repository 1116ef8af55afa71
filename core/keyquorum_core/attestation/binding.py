"""What ties evidence to the keys that ask for a share (DESIGN §7)."""

from __future__ import annotations

import hashlib

from keyquorum_core.transcript import transcript

__all__ = ["report_data"]


def report_data(hpke_key: bytes, signing_key: bytes, challenge: bytes, gpu_evidence_sha256: bytes = b"") -> bytes:
    """The 64 bytes that the CPU evidence must carry: SHA-512 of the transcript.

    ``hpke_key`` is the encoded HPKE public key, ``signing_key`` the 1984-byte public identity, ``challenge`` the 32
    bytes of :meth:`~keyquorum_core.attestation.evidence.EvidenceDocument.challenge`, ``gpu_evidence_sha256`` 32 bytes,
    or empty where there is no GPU evidence. For fields of 32 bytes the first half is used.
    """
    return hashlib.sha512(
        transcript("keyquorum/v1/evidence", hpke_key, signing_key, challenge, gpu_evidence_sha256)
    ).digest()
