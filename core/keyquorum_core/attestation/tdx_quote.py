"""A TDX quote as bytes (Intel DCAP ECDSA quote library, API reference, appendix 3: "Quote Format", versions 4 and 5).

Little-endian throughout::

    header 48 ‖ [version 5: body type u16 ‖ body size u32] ‖ body 584, 648 or 885 ‖ u32 size ‖ signature data
    signature data = signature 64 ‖ attestation key 64 ‖ u16 6 ‖ u32 size ‖ QE data
    QE data        = QE report 384 ‖ signature 64 ‖ u16 32 ‖ authentication data 32 ‖ u16 5 ‖ u32 size ‖ PCK chain, PEM

Header and body are signed by the attestation key, which the QE report names by digest, and which the PCK signs. This
parser takes exactly one quote and gives each byte a meaning, so that nothing travels in it unseen. The library that
verifies quotes (:mod:`~keyquorum_core.attestation.tdx`) is laxer: it ignores what follows each part.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["MAX_QUOTE_BYTES", "MEASUREMENT_BYTES", "RTMR_COUNT", "TD_ATTRIBUTES", "Quote", "parse_quote"]

MAX_QUOTE_BYTES = 64 << 10
MEASUREMENT_BYTES = 48
RTMR_COUNT = 4

TD_ATTRIBUTES: dict[str, int] = {
    "DEBUG": 1 << 0,
    "HGS_PLUS_PROFILING": 1 << 4,
    "PERF_PROFILING": 1 << 5,
    "PMT_PROFILING": 1 << 6,
    "ICSSD": 1 << 16,
    "SERVTD_EXT": 1 << 17,
    "LASS": 1 << 27,
    "SEPT_VE_DISABLE": 1 << 28,
    "MIGRATABLE": 1 << 29,
    "PKS": 1 << 30,
    "KL": 1 << 31,
    "TPA": 1 << 62,
    "PERFMON": 1 << 63,
}
"""Bits of ``TDATTRIBUTES`` (TDX Module ABI, 348551, table 3.23)."""

_TEE_SGX = 0x00
_TEE_TDX = 0x81
_ECDSA_P256 = 2
_QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_QE_DATA = 6
_PCK_CHAIN = 5
_QE_AUTHENTICATION_BYTES = 32

_HEADER = struct.Struct("<HHI4s16s20s")  # version, key type, TEE type, reserved, QE vendor, user data
_BODY_PREFIX = struct.Struct("<HI")
# TCB SVN, MRSEAM, MRSIGNERSEAM, SEAMATTRIBUTES, TDATTRIBUTES, XFAM, MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG,
# RTMR0–3, report data
_BODY_10 = struct.Struct("<16s48s48s8sQ8s48s48s48s48s48s48s48s48s64s")
_BODY_15 = struct.Struct("<16s48s")  # current TCB SVN, MRSERVICETD
_BODY_15_EX = struct.Struct("<B32s48s48s8s16s16s12s48s8s")
_SIGNATURE = struct.Struct("<64s64sHI")  # signature, attestation key, certification data type and size
_QE = struct.Struct("<384s64sH")  # QE report, its signature, size of the authentication data
_CERTIFICATION = struct.Struct("<HI")
_BODY_BYTES = {2: _BODY_10.size, 3: _BODY_10.size + _BODY_15.size, 4: _BODY_10.size + _BODY_15.size + _BODY_15_EX.size}
_TD_15_PREFIXED = _BODY_PREFIX.size + _BODY_BYTES[3]


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote of version 4 or 5 as parsed. Measurements are 48 bytes (SHA-384)."""

    version: int
    body_type: int
    """2: TD 1.0; 3: TD 1.5; 4: TD 1.5 with service-TD extension."""
    tee_tcb_svn: bytes
    """16 bytes: the TCB at launch."""
    mrseam: bytes
    mrsignerseam: bytes
    seam_attributes: bytes
    attributes: int
    """``TDATTRIBUTES``, bits as in :data:`TD_ATTRIBUTES`."""
    xfam: bytes
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    """64 bytes."""
    current_tcb_svn: bytes
    """16 bytes: the TCB now; empty in a TD 1.0 body."""
    mrservicetd: bytes
    """Empty in a TD 1.0 body."""
    pck_chain: bytes
    """PEM, without the NUL that ends it in the quote."""
    raw: bytes
    """The quote without what fills its buffer."""

    def names_of_attributes(self) -> tuple[str, ...]:
        return tuple(name for name, bit in TD_ATTRIBUTES.items() if self.attributes & bit)


def parse_quote(data: bytes) -> Quote:
    """Parse exactly one TDX quote. Raises :class:`MalformedError` ``MALFORMED``, for a quote of another TEE
    :class:`RefusedError` ``EVIDENCE_TYPE``; nothing is verified.

    Intel's TDQE sizes its buffer for a version 5 quote with a TD 1.5 body, and leaves the end of it zero where the
    quote is shorter. That filler, of that one size, is accepted and dropped; any other byte after the quote is not.
    """
    if len(data) > MAX_QUOTE_BYTES:
        raise _malformed("too large", f"at most {MAX_QUOTE_BYTES} bytes", f"{len(data)} bytes")
    version, key_type, tee_type, _, vendor, _ = _HEADER.unpack(_take(data, 0, _HEADER.size, "header"))
    if version not in (3, 4, 5):
        raise _malformed("unknown version", "4 or 5", version)
    if tee_type == _TEE_SGX and vendor == _QE_VENDOR_INTEL:
        raise RefusedError(Reason.EVIDENCE_TYPE, "the quote is an SGX enclave's", expected="TDX", actual="SGX")
    if version == 3 or tee_type != _TEE_TDX:
        raise _malformed("unknown version or TEE", "version 4 or 5, TEE 0x81", f"version {version}, TEE {tee_type:#x}")
    if key_type != _ECDSA_P256 or vendor != _QE_VENDOR_INTEL:
        raise _malformed("key type or QE vendor", "ECDSA P-256 and Intel", f"{key_type} and {vendor.hex()}")
    at = _HEADER.size
    body_type, body_bytes = 2, _BODY_10.size
    if version == 5:
        body_type, body_bytes = _BODY_PREFIX.unpack(_take(data, at, _BODY_PREFIX.size, "body type"))
        at += _BODY_PREFIX.size
        if _BODY_BYTES.get(body_type) != body_bytes:
            raise _malformed("body", "type 2, 3 or 4 of its size", f"type {body_type} of {body_bytes} bytes")
    body = _take(data, at, body_bytes, "body")
    at += body_bytes
    size = int.from_bytes(_take(data, at, 4, "size of the signature data"), "little")
    at += 4
    pck_chain = _parse_signature(_take(data, at, size, "signature data"))
    end = at + size
    filler = data[end:]
    if filler and (end + len(filler) != _HEADER.size + _TD_15_PREFIXED + 4 + size or any(filler)):
        raise _malformed("bytes after its end", f"{end} bytes", f"{len(data)} bytes")
    return _quote(version, body_type, body, pck_chain, data[:end])


def _parse_signature(data: bytes) -> bytes:
    """Check the form of the signature data and return the PCK chain; the rest is for the verifying library."""
    _, _, kind, size = _SIGNATURE.unpack(_take(data, 0, _SIGNATURE.size, "signature"))
    if kind != _QE_DATA or size != len(data) - _SIGNATURE.size:
        raise _malformed("certification data", f"type {_QE_DATA}, to the end", f"type {kind}, {size} bytes")
    at = _SIGNATURE.size
    _, _, authentication = _QE.unpack(_take(data, at, _QE.size, "QE report"))
    at += _QE.size
    if authentication != _QE_AUTHENTICATION_BYTES:
        raise _malformed("QE authentication data", f"{_QE_AUTHENTICATION_BYTES} bytes", f"{authentication} bytes")
    at += authentication
    kind, size = _CERTIFICATION.unpack(_take(data, at, _CERTIFICATION.size, "PCK certification data"))
    at += _CERTIFICATION.size
    if kind != _PCK_CHAIN or size != len(data) - at:
        raise _malformed("PCK certification data", f"type {_PCK_CHAIN}, to the end", f"type {kind}, {size} bytes")
    return data[at:].removesuffix(b"\0")


def _quote(version: int, body_type: int, body: bytes, pck_chain: bytes, raw: bytes) -> Quote:
    (
        tee_tcb_svn,
        mrseam,
        mrsignerseam,
        seam_attributes,
        attributes,
        xfam,
        mrtd,
        mrconfigid,
        mrowner,
        mrownerconfig,
        rtmr0,
        rtmr1,
        rtmr2,
        rtmr3,
        report_data,
    ) = _BODY_10.unpack_from(body)
    current_tcb_svn, mrservicetd = _BODY_15.unpack_from(body, _BODY_10.size) if body_type > 2 else (b"", b"")
    return Quote(
        version=version,
        body_type=body_type,
        tee_tcb_svn=tee_tcb_svn,
        mrseam=mrseam,
        mrsignerseam=mrsignerseam,
        seam_attributes=seam_attributes,
        attributes=attributes,
        xfam=xfam,
        mrtd=mrtd,
        mrconfigid=mrconfigid,
        mrowner=mrowner,
        mrownerconfig=mrownerconfig,
        rtmrs=(rtmr0, rtmr1, rtmr2, rtmr3),
        report_data=report_data,
        current_tcb_svn=current_tcb_svn,
        mrservicetd=mrservicetd,
        pck_chain=pck_chain,
        raw=raw,
    )


def _take(data: bytes, at: int, size: int, what: str) -> bytes:
    part = data[at : at + size]
    if len(part) != size:
        raise _malformed(f"it ends in its {what}", f"{size} bytes from {at}", f"{len(part)} bytes")
    return part


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"TDX quote: {what}", expected=expected, actual=actual)
