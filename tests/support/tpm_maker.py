"""A maker of TPMs in software: a root, an issuing CA, and EK certificates that can be made wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from keyquorum_core.attestation.tpm2_enrolment import Candidate
from tests.support.soft_tpm import EK_ATTRIBUTES, SoftKey, soft_key

__all__ = ["DAY", "EK_KINDS", "EK_USAGE", "NOW", "TPM_NAMES", "Maker", "ek_area", "key_usage", "maker", "moment"]

NOW = 1_700_000_000
DAY = 86400
EK_KINDS = {
    "rsa": ("sha256", 128),
    "rsa3072": ("sha384", 256),
    "p256": ("sha256", 128),
    "p384": ("sha384", 256),
}


def ek_area(kind: str = "rsa", number: int = 0) -> bytes:
    name_hash, bits = EK_KINDS[kind]
    return soft_key(kind, number).area(
        EK_ATTRIBUTES, scheme=None, name_hash=name_hash, symmetric=(0x0006, bits, 0x0043)
    )


EK_USAGE = ObjectIdentifier("2.23.133.8.1")
TPM_NAMES = {"2.23.133.2.1": "id:4B510000", "2.23.133.2.2": "soft", "2.23.133.2.3": "id:00010001"}


def moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def key_usage(*granted: str) -> x509.KeyUsage:
    every = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{each: each in granted for each in every})


@dataclass(frozen=True)
class Maker:
    """A maker of TPMs with a root and an issuing CA; fields are what a test makes wrong."""

    root_key: SoftKey
    issuing_key: SoftKey
    ek_kind: str = "rsa"
    hash: type[hashes.SHA256 | hashes.SHA384] = hashes.SHA256
    path_length: int | None = None
    issuing_usage: Sequence[str] = ("key_cert_sign",)
    issuing_ca: bool = True
    ek_usage: Sequence[str] | None = ("key_encipherment",)
    ek_extended: ObjectIdentifier | None = EK_USAGE
    ek_names: tuple[tuple[str, str], ...] = tuple(TPM_NAMES.items())
    ek_extra: x509.ExtensionType | None = None
    window: tuple[int, int] = (NOW - DAY, NOW + DAY)

    @property
    def root(self) -> str:
        return self.root_key.fingerprint

    def _certificate(
        self,
        subject: str,
        issuer: str,
        key: SoftKey,
        issuer_key: SoftKey,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(common_name(subject))
            .issuer_name(common_name(issuer))
            .public_key(key.private.public_key())
            .serial_number(1 + len(subject))
            .not_valid_before(moment(self.window[0]))
            .not_valid_after(moment(self.window[1]))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key.private, self.hash()).public_bytes(Encoding.DER)

    def certificates(self) -> tuple[bytes, bytes, bytes]:
        """EK, issuing CA, root."""
        root = self._certificate(
            "root",
            "root",
            self.root_key,
            self.root_key,
            [(x509.BasicConstraints(True, self.path_length), True), (key_usage("key_cert_sign"), True)],
        )
        issuing = self._certificate(
            "issuing",
            "root",
            self.issuing_key,
            self.root_key,
            [(x509.BasicConstraints(self.issuing_ca, None), True), (key_usage(*self.issuing_usage), True)],
        )
        leaf: list[tuple[x509.ExtensionType, bool]] = [(x509.BasicConstraints(False, None), True)]
        if self.ek_usage is not None:
            leaf.append((key_usage(*self.ek_usage), True))
        if self.ek_extended is not None:
            leaf.append((x509.ExtendedKeyUsage([self.ek_extended]), False))
        if self.ek_names:
            names = [x509.NameAttribute(ObjectIdentifier(oid), value) for oid, value in self.ek_names]
            leaf.append((x509.SubjectAlternativeName([x509.DirectoryName(x509.Name(names))]), True))
        if self.ek_extra is not None:
            leaf.append((self.ek_extra, True))
        return self._certificate("ek", "issuing", soft_key(self.ek_kind), self.issuing_key, leaf), issuing, root

    def candidate(self) -> Candidate:
        return Candidate(self.certificates(), ek_area(self.ek_kind), soft_key("rsa", 7).area())


def maker(**changes: object) -> Maker:
    return replace(Maker(soft_key("p384", 9), soft_key("p256", 9)), **changes)  # type: ignore[arg-type]
