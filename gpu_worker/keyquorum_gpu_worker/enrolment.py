"""The worker's side of enrolling its TPM's attestation key (docs/spec/evidence-tpm2.md): make, show, answer.

The key is made below the endorsement key that the TPM's maker certified, and kept at a persistent handle. Enrolment
happens once, between the worker's operator and whoever keeps the inventory; nothing of it is secret but the answer,
which proves nothing to anybody but them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from keyquorum_core.attestation.tpm2_credential import Credential
from keyquorum_core.attestation.tpm2_enrolment import Candidate
from keyquorum_core.errors import Reason, StateError
from keyquorum_gpu_worker.evidence.source import unavailable
from keyquorum_gpu_worker.tss import Tss

__all__ = ["AKS", "EKS", "EndorsementKey", "activate", "candidate", "create_ak"]

_NV_PIECE = 512  # what every TPM gives at once
_MAX_CERTIFICATE = 8 << 10
_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """An endorsement key of the TCG EK Credential Profile 2.6 (§2.2.1.4, appendix B).

    It is made anew for each use from its template and the TPM's endorsement seed, which gives the same key each time.
    That takes seconds for RSA, is needed once in a machine's life, and asks nobody to have kept the key anywhere.
    """

    certificate_index: int
    """NV index at which the TPM's maker left the certificate."""
    template: str
    """As tpm2-pytss names it."""
    policy: bool
    """Its use needs a policy session, which the endorsement hierarchy's password satisfies."""


EKS: Mapping[str, EndorsementKey] = {
    "rsa2048": EndorsementKey(0x01C00002, "EK-RSA2048", policy=True),
    "ecc-p256": EndorsementKey(0x01C0000A, "EK-ECC256", policy=True),
    "ecc-p384": EndorsementKey(0x01C00016, "EK-HIGH-ECC384", policy=False),
}
AKS: Mapping[str, str] = {"rsa2048": "rsa2048:rsassa-sha256:null", "ecc-p256": "ecc_nist_p256:ecdsa-sha256:null"}


def create_ak(tss: Tss, handle: int, ek: EndorsementKey, template: str) -> None:
    """Make an attestation key by a template of :data:`AKS` below the EK, and keep it at ``handle``.

    Raises :class:`StateError` (``EXISTS``) where there is a key already, :class:`UnavailableError` as the TPM does.
    """
    library = tss.library
    with tss.session() as tpm:
        if _is_there(tss, tpm, handle):
            raise StateError(
                Reason.EXISTS,
                "the TPM holds a key at this handle already",
                expected=f"nothing at {handle:#010x}",
                actual="a key",
                next_step="Enrol that key, name another handle, or remove it with tpm2_evictcontrol.",
            )
        area = library.TPM2B_PUBLIC.parse(template, objectAttributes=_ATTRIBUTES)
        with _ek(tss, tpm, ek) as parent:
            with _authorised(tss, tpm, ek) as session:
                private, public, *_ = tpm.create(parent, library.TPM2B_SENSITIVE_CREATE(), area, session1=session)
            with _authorised(tss, tpm, ek) as session:
                loaded = tpm.load(parent, private, public, session1=session)
        try:
            tpm.evict_control(library.ESYS_TR.OWNER, loaded, handle)
        finally:
            tpm.flush_context(loaded)


def candidate(tss: Tss, handle: int, ek: EndorsementKey, certificate: bytes = b"") -> Candidate:
    """What this TPM shows of itself: the EK's certificate, as given or as its maker left it in the TPM, and both keys'
    public areas. Raises :class:`UnavailableError` naming what is missing."""
    with tss.session() as tpm:
        area, _, _ = tpm.read_public(tss.persistent(tpm, handle, "the attestation key"))
        certificate = certificate or _certificate(tss, tpm, ek.certificate_index)
        with _ek(tss, tpm, ek) as key:
            ek_area, _, _ = tpm.read_public(key)
    return Candidate((certificate,), ek_area.marshal(), area.marshal())


def activate(tss: Tss, handle: int, ek: EndorsementKey, credential: Credential) -> bytes:
    """The secret in a credential for this TPM and this attestation key.

    Raises :class:`UnavailableError` where the TPM refuses: the credential is for another TPM, or another key.
    """
    library = tss.library
    blob, _ = library.TPM2B_ID_OBJECT.unmarshal(credential.id_object)
    secret, _ = library.TPM2B_ENCRYPTED_SECRET.unmarshal(credential.encrypted_secret)
    with tss.session() as tpm:
        key = tss.persistent(tpm, handle, "the attestation key")
        with _ek(tss, tpm, ek) as parent, _authorised(tss, tpm, ek) as session:
            return bytes(tpm.activate_credential(key, parent, blob, secret, session2=session))


def _is_there(tss: Tss, tpm: Any, handle: int) -> bool:
    try:
        tpm.tr_from_tpmpublic(handle)
    except tss.library.TSS2_Exception:
        return False
    return True


@contextmanager
def _ek(tss: Tss, tpm: Any, ek: EndorsementKey) -> Iterator[Any]:
    """The endorsement key, made anew for the while."""
    library = tss.library
    utils = importlib.import_module(f"{library.__name__}.utils")
    _, template = utils.create_ek_template(ek.template, utils.NVReadEK(tpm))
    made, *_ = tpm.create_primary(library.TPM2B_SENSITIVE_CREATE(), template, library.ESYS_TR.ENDORSEMENT)
    try:
        yield made
    finally:
        tpm.flush_context(made)


@contextmanager
def _authorised(tss: Tss, tpm: Any, ek: EndorsementKey) -> Iterator[Any]:
    """A session that may use the EK once."""
    library = tss.library
    if not ek.policy:
        yield library.ESYS_TR.PASSWORD
        return
    none = library.ESYS_TR.NONE
    session = tpm.start_auth_session(none, none, library.TPM2_SE.POLICY, None, library.TPM2_ALG.SHA256)
    try:
        tpm.policy_secret(library.ESYS_TR.ENDORSEMENT, session)
        yield session
    finally:
        tpm.flush_context(session)


def _certificate(tss: Tss, tpm: Any, index: int) -> bytes:
    try:
        found = _nv(tpm, index)
    except tss.library.TSS2_Exception as error:
        raise unavailable(
            "the TPM holds no certificate of its endorsement key",
            expected=f"an NV index {index:#010x}",
            actual=str(error)[:120],
            next_step="Some makers hand it out over the network: fetch it, and give it to the command as a file.",
        ) from None
    if not 0 < len(found) <= _MAX_CERTIFICATE:
        raise unavailable(
            "the TPM's certificate of its endorsement key has an impossible size",
            expected=f"1 … {_MAX_CERTIFICATE} bytes",
            actual=f"{len(found)} bytes",
            next_step="Give the certificate to the command as a file.",
        )
    return found


def _nv(tpm: Any, index: int) -> bytes:
    handle = tpm.tr_from_tpmpublic(index)
    area, _ = tpm.nv_read_public(handle)
    size = min(int(area.nvPublic.dataSize), _MAX_CERTIFICATE + 1)
    data = b""
    while len(data) < size:
        data += bytes(tpm.nv_read(handle, min(_NV_PIECE, size - len(data)), len(data), handle))
    return data
