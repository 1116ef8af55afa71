"""The SEV-SNP attestation report as bytes (AMD SEV-SNP firmware ABI, 56860, §7.3, table "ATTESTATION_REPORT").

1184 bytes, little-endian throughout: 0x2a0 bytes that are signed, then the signature. Version 2 came first; version 3
added the CPU's family, model and stepping, version 5 the mitigation vectors, in what was reserved before.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from keyquorum_core.attestation.snp_certificates import SigningKey
from keyquorum_core.errors import MalformedError, Reason

__all__ = [
    "CHIP_ID_BYTES",
    "MEASUREMENT_BYTES",
    "POLICY_DEBUG",
    "POLICY_MIGRATION_AGENT",
    "REPORT_BYTES",
    "SIGNED_BYTES",
    "Report",
    "parse_report",
    "read_report",
]

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
MEASUREMENT_BYTES = 48
CHIP_ID_BYTES = 64
VERSIONS = range(2, 6)

POLICY_MIGRATION_AGENT = 1 << 18
POLICY_DEBUG = 1 << 19
_POLICY_MUST_BE_ONE = 1 << 17
_POLICY_RESERVED_FROM = 26
_PLATFORM_INFO_RESERVED_FROM = 8
_ECDSA_P384_SHA384 = 1
_SIGNED_BY = {0: SigningKey.VCEK, 1: SigningKey.VLEK, 7: None}

# The structure in its order, each with its offset in parse_report; "reserved" fields are read and must be zero.
_HEAD = struct.Struct("<IIQ16s16s")  # version, guest SVN, policy, family id, image id
_STATE = struct.Struct("<II8sQI4s")  # VMPL, signature algorithm, current TCB, platform info, key flags, reserved
_GUEST = struct.Struct("<64s48s32s")  # report data, measurement, host data
_DIGESTS = struct.Struct("<48s48s32s32s")  # id key, author key, report id, report id of the migration agent
_CHIP = struct.Struct("<8s3s21s64s")  # reported TCB, CPUID family/model/stepping (from v3), reserved, chip id
_FIRMWARE = struct.Struct(
    "<8s3sB3sB8s"
)  # committed TCB, current and committed version (reserved after each), launch TCB
_TAIL = struct.Struct("<QQ152s")  # launch and current mitigation vectors (from v5), reserved
_SIGNATURE = struct.Struct("<72s72s368s")  # r, s, reserved


@dataclass(frozen=True, slots=True)
class Report:
    """An attestation report as parsed, of versions 2–5. TCBs are raw; :class:`Product` knows how to read them."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: int
    author_key_enabled: bool
    chip_key_masked: bool
    signing_key: SigningKey | None
    """``None``: the report is not signed."""
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_migration_agent: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int, int] | None
    """Combined family, combined model, stepping; ``None`` in version 2."""
    chip_id: bytes
    """64 bytes; all zero where the host masks it."""
    committed_tcb: bytes
    current_version: tuple[int, int, int]
    """Major, minor, build."""
    committed_version: tuple[int, int, int]
    launch_tcb: bytes
    launch_mitigations: int
    current_mitigations: int
    signed: bytes
    signature: tuple[int, int]
    """r and s."""

    @property
    def debug_allowed(self) -> bool:
        return bool(self.policy & POLICY_DEBUG)

    @property
    def migration_agent_allowed(self) -> bool:
        return bool(self.policy & POLICY_MIGRATION_AGENT)

    @property
    def chip_id_masked(self) -> bool:
        return self.chip_id == bytes(CHIP_ID_BYTES)


def read_report(data: bytes) -> bytes:
    """The raw report from a file that holds it raw or as hex text. Raises :class:`MalformedError`."""
    if len(data) == REPORT_BYTES:
        return data
    if len(data) <= 4 * REPORT_BYTES:
        try:
            return bytes.fromhex(data.decode("ascii"))
        except ValueError:
            pass
    raise _malformed("it is neither raw nor hex text", f"{REPORT_BYTES} bytes", f"{len(data)} bytes")


def parse_report(data: bytes) -> Report:
    """Parse exactly one report. Raises :class:`MalformedError` ``MALFORMED``; nothing is verified."""
    if len(data) != REPORT_BYTES:
        raise _malformed("wrong size", f"{REPORT_BYTES} bytes", f"{len(data)} bytes")
    (version, guest_svn, policy, family_id, image_id) = _HEAD.unpack_from(data, 0x000)
    (vmpl, algorithm, current_tcb, platform_info, flags, reserved_4c) = _STATE.unpack_from(data, 0x030)
    (report_data, measurement, host_data) = _GUEST.unpack_from(data, 0x050)
    (id_key_digest, author_key_digest, report_id, report_id_ma) = _DIGESTS.unpack_from(data, 0x0E0)
    (reported_tcb, cpuid, reserved_18b, chip_id) = _CHIP.unpack_from(data, 0x180)
    (committed_tcb, current, reserved_1eb, committed, reserved_1ef, launch_tcb) = _FIRMWARE.unpack_from(data, 0x1E0)
    (launch_mitigations, current_mitigations, reserved_208) = _TAIL.unpack_from(data, 0x1F8)
    r, s, reserved_330 = _SIGNATURE.unpack_from(data, SIGNED_BYTES)
    if version not in VERSIONS:
        raise _malformed("unknown version", "2 … 5", version)
    if algorithm != _ECDSA_P384_SHA384:
        raise _malformed("unknown signature algorithm", "1, ECDSA P-384 with SHA-384", algorithm)
    if not policy & _POLICY_MUST_BE_ONE or policy >> _POLICY_RESERVED_FROM:
        raise _malformed("policy", "bit 17 one and bits 26 … 63 zero", f"{policy:#x}")
    if platform_info >> _PLATFORM_INFO_RESERVED_FROM:
        raise _malformed("platform info", "bits 8 … 63 zero", f"{platform_info:#x}")
    if flags >> 5 or flags >> 2 not in _SIGNED_BY:
        raise _malformed("key flags", "bits 5 … 31 zero and signing key 0, 1 or 7", f"{flags:#x}")
    reserved = {
        "0x04c": reserved_4c,
        "0x188": b"" if version >= 3 else cpuid,
        "0x18b": reserved_18b,
        "0x1eb": bytes([reserved_1eb, reserved_1ef]),
        "0x1f8": b"" if version >= 5 else data[0x1F8:0x208],
        "0x208": reserved_208,
        "0x330": reserved_330,
    }
    for offset, field in reserved.items():
        if any(field):
            raise _malformed(f"reserved field at {offset} in version {version}", "zero", "not zero")
    return Report(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        current_tcb=current_tcb,
        platform_info=platform_info,
        author_key_enabled=bool(flags & 1),
        chip_key_masked=bool(flags & 2),
        signing_key=_SIGNED_BY[flags >> 2],
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_migration_agent=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid=(cpuid[0], cpuid[1], cpuid[2]) if version >= 3 else None,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current_version=(current[2], current[1], current[0]),
        committed_version=(committed[2], committed[1], committed[0]),
        launch_tcb=launch_tcb,
        launch_mitigations=launch_mitigations,
        current_mitigations=current_mitigations,
        signed=data[:SIGNED_BYTES],
        signature=(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
    )


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"SEV-SNP report: {what}", expected=expected, actual=actual)
