"""A vendor of Nitro documents for tests: AWS's chain of five certificates, under a root of its own, and the documents.

``cbor2`` writes the documents here, so that another implementation's encoding is what the reader is tested with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
HOUR = 3600
DAY = 86400
INSTANCE = "i-0827e799ec9232d44"
REPORT_DATA = bytes(range(64))
CHALLENGE = b"\xcc" * 32
PROTECTED = cbor2.dumps({1: -35})

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


@dataclass(frozen=True)
class Link:
    """One certificate to be made; the defaults are those of a certificate that is in its place."""

    subject: str
    key: Any = field(default_factory=new_key)
    ca: bool = True
    path_length: int | None = None
    may_sign_certificates: bool = True
    may_sign_data: bool = False
    not_before: int = NOW - DAY
    not_after: int = NOW + DAY
    algorithm: Any = field(default_factory=hashes.SHA384)
    critical_extension: bool = False
    issuer: str | None = None
    issuer_key: Any = None

    def certificate(self, issuer: Link) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(self.subject))
            .issuer_name(name(self.issuer or issuer.subject))
            .public_key(self.key.public_key())
            .serial_number(9)
            .not_valid_before(datetime.fromtimestamp(self.not_before, UTC))
            .not_valid_after(datetime.fromtimestamp(self.not_after, UTC))
            .add_extension(x509.BasicConstraints(self.ca, self.path_length if self.ca else None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    self.may_sign_data, False, False, False, False, self.may_sign_certificates, False, False, False
                ),
                critical=True,
            )
        )
        if self.critical_extension:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
            builder = builder.add_extension(unknown, critical=True)
        return builder.sign(self.issuer_key or issuer.key, self.algorithm).public_bytes(Encoding.DER)


def links() -> list[Link]:
    """Root, region, zone, instance, enclave."""
    return [
        Link("test.nitro-enclaves", not_before=NOW - 300 * DAY, not_after=NOW + 9000 * DAY),
        Link("us-east-1.test.nitro-enclaves", path_length=2),
        Link("zonal.us-east-1.test.nitro-enclaves", path_length=1),
        Link(f"{INSTANCE}.test.nitro-enclaves", path_length=0),
        Link(
            f"{INSTANCE}-enc0.test",
            ca=False,
            may_sign_certificates=False,
            may_sign_data=True,
            not_before=NOW - HOUR,
            not_after=NOW + 2 * HOUR,
        ),
    ]


@dataclass
class NitroVendor:
    chain: list[Link] = field(default_factory=links)

    def __post_init__(self) -> None:
        self.certificates = [each.certificate(self.chain[max(index - 1, 0)]) for index, each in enumerate(self.chain)]

    @property
    def fingerprint(self) -> str:
        spki = self.chain[0].key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).hexdigest()

    def members(self, **changes: Any) -> dict[str, Any]:
        return {
            "module_id": f"{INSTANCE}-enc019b55a68bd2ed4b",
            "digest": "SHA384",
            "timestamp": NOW * 1000 + 578,
            "pcrs": pcrs(),
            "certificate": self.certificates[-1],
            "cabundle": self.certificates[:-1],
            "public_key": REPORT_DATA,
            "user_data": None,
            "nonce": CHALLENGE,
            **changes,
        }

    def document(self, *, tagged: bool = False, key: Key | None = None, **changes: Any) -> bytes:
        """A signed document of these members."""
        return self.sign(payload_of(self.members(**changes)), tagged=tagged, key=key)

    def sign(self, payload: bytes, *, tagged: bool = False, key: Key | None = None) -> bytes:
        signed = cbor2.dumps(["Signature1", PROTECTED, b"", payload])
        r, s = decode_dss_signature((key or self.chain[-1].key).sign(signed, ec.ECDSA(hashes.SHA384())))
        cose = [PROTECTED, {}, payload, r.to_bytes(48, "big") + s.to_bytes(48, "big")]
        return cbor2.dumps(cbor2.CBORTag(18, cose) if tagged else cose)


def pcrs(**changes: bytes | None) -> dict[int, bytes]:
    """PCR0 … PCR15 as an enclave has them; ``PCR3=…`` changes one, and ``None`` takes it away."""
    values: dict[int, bytes | None] = {index: bytes(48) for index in range(16)}
    values |= {0: b"\xd0" * 48, 1: b"\xd1" * 48, 2: b"\xd2" * 48, 4: b"\xd4" * 48}
    values |= {int(name.removeprefix("PCR")): value for name, value in changes.items()}
    return {index: value for index, value in values.items() if value is not None}


def payload_of(members: dict[Any, Any]) -> bytes:
    """A map of indefinite length, as AWS's encoder writes it."""
    return b"\xbf" + b"".join(cbor2.dumps(key) + cbor2.dumps(value) for key, value in members.items()) + b"\xff"


@cache
def nitro_vendor() -> NitroVendor:
    return NitroVendor()
