"""A vendor of TDX quotes for tests: everything that Intel signs, under a root of its own, in Intel's shape."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
DAY = 86400
PPID = bytes(range(1, 17))
FMSPC = bytes.fromhex("90c06f000000")
MRSIGNER_QE = b"\x51" * 32
SEPT_VE_DISABLE = 1 << 28
SGX_EXTENSION = "1.2.840.113741.1.13.1"

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def raw_signature(key: Key, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def point(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def name(common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common_name), x509.NameAttribute(NameOID.COUNTRY_NAME, "US")]
    )


def pem(*certificates: x509.Certificate) -> str:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates).decode()


def certificate(
    subject: str,
    key: Key,
    issuer: str,
    issuer_key: Key,
    *,
    ca: bool,
    not_before: int = NOW - 30 * DAY,
    not_after: int = NOW + 3000 * DAY,
    serial: int = 7,
    sgx_extension: bytes = b"",
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(moment(not_before))
        .not_valid_after(moment(not_after))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if sgx_extension:
        oid = x509.ObjectIdentifier(SGX_EXTENSION)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, sgx_extension), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def crl(issuer: str, key: Key, issued: int, next_update: int, revoked: tuple[int, ...] = ()) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name(issuer))
        .last_update(moment(issued))
        .next_update(moment(next_update))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment(issued)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def _encode_oid(dotted: str) -> bytes:
    arcs = [int(each) for each in dotted.split(".")]
    out = bytearray([arcs[0] * 40 + arcs[1]])
    for arc in arcs[2:]:
        chunk = [arc & 0x7F]
        while arc := arc >> 7:
            chunk.insert(0, 0x80 | arc & 0x7F)
        out += bytes(chunk)
    return _der(0x06, bytes(out))


def pck_extension(ppid: bytes, fmspc: bytes, cpu_svn: bytes, pce_svn: int) -> bytes:
    """The SGX extension of a PCK certificate (Intel, "SGX PCK Certificate and CRL Profile", §1.3.5)."""

    def entry(suffix: str, value: bytes) -> bytes:
        return _der(0x30, _encode_oid(f"{SGX_EXTENSION}.{suffix}") + value)

    components = b"".join(entry(f"2.{index + 1}", _der(0x02, bytes([svn]))) for index, svn in enumerate(cpu_svn))
    tcb = components + entry("2.17", _der(0x02, bytes([pce_svn]))) + entry("2.18", _der(0x04, cpu_svn))
    return _der(
        0x30,
        entry("1", _der(0x04, ppid))
        + entry("2", _der(0x30, tcb))
        + entry("3", _der(0x04, bytes(2)))
        + entry("4", _der(0x04, fmspc))
        + entry("5", _der(0x0A, b"\x00")),
    )


def timestamp(seconds: int) -> str:
    return moment(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class IntelVendor:
    """A root, a PCK CA, a TCB signing key, and one platform with its attestation key."""

    root_key: Key = field(default_factory=new_key)
    ca_key: Key = field(default_factory=new_key)
    pck_key: Key = field(default_factory=new_key)
    tcb_key: Key = field(default_factory=new_key)
    attestation_key: Key = field(default_factory=new_key)
    ppid: bytes = PPID
    root_not_after: int = NOW + 9000 * DAY
    pck_not_after: int = NOW + 2000 * DAY

    def __post_init__(self) -> None:
        extension = pck_extension(self.ppid, FMSPC, bytes([3] * 16), 11)
        self.root = certificate(
            "Test SGX Root CA", self.root_key, "Test SGX Root CA", self.root_key, ca=True, serial=1,
            not_after=self.root_not_after,
        )  # fmt: skip
        self.ca = certificate("Test PCK CA", self.ca_key, "Test SGX Root CA", self.root_key, ca=True, serial=2)
        self.pck = certificate(
            "Test PCK", self.pck_key, "Test PCK CA", self.ca_key, ca=False, serial=3, sgx_extension=extension,
            not_after=self.pck_not_after,
        )  # fmt: skip
        self.tcb = certificate("Test TCB Signing", self.tcb_key, "Test SGX Root CA", self.root_key, ca=False, serial=4)

    @property
    def fingerprint(self) -> str:
        spki = self.root_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).hexdigest()

    def pck_chain(self) -> bytes:
        return pem(self.pck, self.ca, self.root).encode()

    def members(
        self,
        *,
        issued: int = NOW - DAY,
        next_update: int = NOW + 29 * DAY,
        revoked_pck: tuple[int, ...] = (),
        revoked_root: tuple[int, ...] = (),
        crl_next_update: int | None = None,
        tcb_info: dict[str, Any] | None = None,
        qe_identity: dict[str, Any] | None = None,
        levels: list[dict[str, Any]] | None = None,
        qe_levels: list[dict[str, Any]] | None = None,
        number: int = 18,
    ) -> dict[str, str]:
        """Collateral as its members; ``tcb_info`` and ``qe_identity`` replace members of the signed documents."""
        dates = {"issueDate": timestamp(issued), "nextUpdate": timestamp(next_update)}
        info = json.dumps(
            {
                "id": "TDX", "version": 3, **dates, "fmspc": FMSPC.hex().upper(), "pceId": "0000", "tcbType": 0,
                "tcbEvaluationDataNumber": number,
                "tdxModule": {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8},
                "tdxModuleIdentities": [],
                "tcbLevels": levels if levels is not None else [tcb_level()],
                **(tcb_info or {}),
            }
        )  # fmt: skip
        identity = json.dumps(
            {
                "id": "TD_QE", "version": 2, **dates, "tcbEvaluationDataNumber": number,
                "miscselect": "00000000", "miscselectMask": "FFFFFFFF",
                "attributes": "11" + "00" * 15, "attributesMask": "FB" + "FF" * 7 + "00" * 8,
                "mrsigner": MRSIGNER_QE.hex().upper(), "isvprodid": 2,
                "tcbLevels": qe_levels if qe_levels is not None else [qe_level()],
                **(qe_identity or {}),
            }
        )  # fmt: skip
        end = next_update if crl_next_update is None else crl_next_update
        return {
            "pck_crl_issuer_chain": pem(self.ca, self.root),
            "root_ca_crl": crl("Test SGX Root CA", self.root_key, issued, end, revoked_root).hex(),
            "pck_crl": crl("Test PCK CA", self.ca_key, issued, end, revoked_pck).hex(),
            "tcb_info_issuer_chain": pem(self.tcb, self.root),
            "tcb_info": info,
            "tcb_info_signature": raw_signature(self.tcb_key, info.encode()).hex(),
            "qe_identity_issuer_chain": pem(self.tcb, self.root),
            "qe_identity": identity,
            "qe_identity_signature": raw_signature(self.tcb_key, identity.encode()).hex(),
        }

    def collateral(self, **options: Any) -> bytes:
        return json.dumps(self.members(**options)).encode()

    def quote(
        self,
        *,
        version: int = 4,
        body_type: int = 2,
        attributes: int = SEPT_VE_DISABLE,
        mrtd: bytes = b"\xa1" * 48,
        mrconfigid: bytes = b"\xc0" * 48,
        rtmrs: tuple[bytes, ...] = (b"\xb0" * 48, b"\xb1" * 48, b"\xb2" * 48, b"\xb3" * 48),
        report_data: bytes = bytes(range(64)),
        tee_tcb_svn: bytes = bytes([5] + 15 * [0]),
        current_tcb_svn: bytes = bytes([5] + 15 * [0]),
        mrservicetd: bytes = bytes(48),
        mrsignerseam: bytes = bytes(48),
        qe: dict[str, Any] | None = None,
        chain: bytes | None = None,
        header: bytes | None = None,
        key: Key | None = None,
    ) -> bytes:
        head = header or struct.pack(
            "<HHI4s16s20s", version, 2, 0x81, bytes(4), bytes.fromhex("939a7233f79c4ca9940a0db3957f0607"), bytes(20)
        )
        body = (
            tee_tcb_svn + b"\xee" * 48 + mrsignerseam + bytes(8) + attributes.to_bytes(8, "little")
            + bytes.fromhex("e702060000000000") + mrtd + mrconfigid + bytes(96) + b"".join(rtmrs) + report_data
        )  # fmt: skip
        if body_type >= 3:
            body += current_tcb_svn + mrservicetd
        if body_type == 4:
            body += bytes(237)
        if version == 5:
            body = struct.pack("<HI", body_type, len(body)) + body
        signed = head + body
        attestation_key = key or self.attestation_key
        authentication = b"\x0a" * 32
        report = qe_report(hashlib.sha256(point(self.attestation_key) + authentication).digest(), **(qe or {}))
        pck_chain = (self.pck_chain() if chain is None else chain) + b"\0"
        data = (
            report + raw_signature(self.pck_key, report) + struct.pack("<H", len(authentication)) + authentication
            + struct.pack("<HI", 5, len(pck_chain)) + pck_chain
        )  # fmt: skip
        signature = (
            raw_signature(attestation_key, signed) + point(self.attestation_key)
            + struct.pack("<HI", 6, len(data)) + data
        )  # fmt: skip
        return signed + struct.pack("<I", len(signature)) + signature


def qe_report(
    report_data: bytes, *, attributes: int = 0x15, mrsigner: bytes = MRSIGNER_QE, product: int = 2, svn: int = 6
) -> bytes:
    """An SGX enclave report of 384 bytes."""
    return struct.pack(
        "<16sI28sQQ32s32s32s96sHH60s64s",
        bytes(16), 0, bytes(28), attributes, 0xE7, b"\x5e" * 32, bytes(32), mrsigner, bytes(96),
        product, svn, bytes(60), report_data.ljust(64, b"\0"),
    )  # fmt: skip


def tcb_level(
    status: str = "UpToDate", *, tdx: int = 5, sgx: int = 2, pce: int = 11, advisories: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A level of TCB info; ``tdx`` is the lowest module SVN."""
    return {
        "tcb": {
            "sgxtcbcomponents": [{"svn": sgx}] * 16,
            "pcesvn": pce,
            "tdxtcbcomponents": [{"svn": tdx}] + [{"svn": 0}] * 15,
        },
        "tcbDate": "2024-03-13T00:00:00Z",
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


def qe_level(status: str = "UpToDate", *, svn: int = 4, advisories: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "tcb": {"isvsvn": svn},
        "tcbDate": "2024-03-13T00:00:00Z",
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


@cache
def intel_vendor() -> IntelVendor:
    return IntelVendor()


@cache
def good_collateral() -> bytes:
    return intel_vendor().collateral()
