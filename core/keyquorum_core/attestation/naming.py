"""What evidence claims: for whoever only has to *say* where it comes from, and verifies nothing.

A leaf says ``development`` where some piece of the evidence is vouched for by no vendor's root. Whoever makes leaves
(the coordinator) uses this; every custodian compares the leaf with its own appraisal, and refuses one that is wrong.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.attestation.evidence import NVIDIA_GPU, EvidenceDocument, EvidenceItem
from keyquorum_core.attestation.roots import (
    AMD_ROOTS,
    AWS_NITRO_ROOTS,
    INTEL_ROOTS,
    NVIDIA_DEVICE_ROOTS,
    NVIDIA_RIM_ROOTS,
)

__all__ = ["claims_development", "claims_hardware", "claims_measurement"]

_TELLING = 8
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_IN_XML = re.compile(rb"X509Certificate>([A-Za-z0-9+/=\s]+)</")


def claims_development(document: EvidenceDocument) -> bool:
    """Whether some evidence in the document names no root of its vendor. A TPM is known by its key, and never is.

    Raises :class:`MalformedError`.
    """
    return not all(_names_vendor(item) for item in document.items)


def claims_hardware(document: EvidenceDocument, kind: str, identity: str) -> bool:
    """Whether some evidence of ``kind`` holds this identity of a machine (as the inventory writes it) in its own bytes
    or in a certificate. One shorter than :data:`_TELLING` bytes is not looked for, and a TPM's, which is a digest
    of its key, not found: only an appraisal tells."""
    telling = identity.encode() if kind == "nitro" else bytes.fromhex(identity)
    return len(telling) >= _TELLING and _holds(document, kind, telling)


def claims_measurement(document: EvidenceDocument, kind: str, measurement: str) -> bool:
    """Whether some evidence of ``kind`` holds this measurement, in hex, in its own bytes."""
    return _holds(document, kind, bytes.fromhex(measurement))


def _holds(document: EvidenceDocument, kind: str, telling: bytes) -> bool:
    return any(
        telling in part
        for item in document.items
        if item.type == kind
        for whole in (item.evidence, *item.endorsements)
        for part in (whole, *_decoded(_PEM.findall(whole)))
    )


def _names_vendor(item: EvidenceItem) -> bool:
    if item.type == "sev-snp":
        return _any_root([der for each in item.endorsements for der in _certificates(each)], AMD_ROOTS)
    if item.type == "tdx":
        return _any_root(_certificates(item.evidence), INTEL_ROOTS)
    if item.type == "nitro":
        from keyquorum_core.attestation.nitro_document import parse_document

        return _any_root(parse_document(item.evidence).cabundle, AWS_NITRO_ROOTS)
    if item.type == NVIDIA_GPU:
        from keyquorum_core.attestation.nvidia_evidence import GpuEvidence

        devices = [gpu.chain for gpu in GpuEvidence.parse(item.evidence).gpus]
        manifests = [list(_decoded(_IN_XML.findall(each))) for each in item.endorsements if each.lstrip()[:1] == b"<"]
        return all(_any_root(each, NVIDIA_DEVICE_ROOTS) for each in devices) and all(
            _any_root(each, NVIDIA_RIM_ROOTS) for each in manifests
        )
    return True


def _certificates(data: bytes) -> list[bytes]:
    """The certificates in PEM within ``data``; where there are none, ``data`` itself, as DER."""
    return list(_decoded(_PEM.findall(data))) or [data]


def _decoded(texts: Iterable[bytes]) -> Iterator[bytes]:
    for text in texts:
        with suppress(binascii.Error):
            yield base64.b64decode(b"".join(text.split()), validate=True)


def _any_root(certificates: Iterable[bytes], roots: Collection[str]) -> bool:
    for der in certificates:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as where they are verified
                key = x509.load_der_x509_certificate(der).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            continue
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if hashlib.sha256(spki).hexdigest() in roots:
            return True
    return False
