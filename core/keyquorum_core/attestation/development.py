"""A vendor of its own for machines without a TEE: it signs SEV-SNP-shaped evidence that no hardware made (DESIGN §7).

Everything has AMD's shape, so that the same code verifies it: an RSA-4096 root (ARK) and intermediate (ASK or ASVK)
signing with PSS and SHA-384, and a VCEK or VLEK on P-384 with AMD's extensions for each chip. What differs is the root
key, and that every common name begins ``keyquorum DEVELOPMENT``. Nothing trusts it unless reference values name its
fingerprint under ``development_roots``; appraisals then say ``development``.

Whoever holds these keys can make any evidence. Tests do: :meth:`DevelopmentChip.sign_report` takes every field.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from keyquorum_core.attestation.snp_certificates import (
    AMD_ARC,
    CHAIN_PADDING,
    DEVELOPMENT_PREFIX,
    SigningKey,
    verify_endorsements,
)
from keyquorum_core.attestation.snp_products import CPUID_MODELS, Product
from keyquorum_core.attestation.snp_report import CHIP_ID_BYTES, REPORT_BYTES, SIGNED_BYTES
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["DEVELOPMENT_TCB", "DevelopmentChip", "DevelopmentVendor"]

DEVELOPMENT_TCB: Mapping[str, int] = {"fmc": 1, "bootloader": 3, "tee": 1, "snp": 8, "microcode": 115}
_CA_SECONDS = 25 * 365 * 86400
_CHIP_SECONDS = 7 * 365 * 86400
_POLICY = 0x30000  # SMT allowed, and the bit that must be one


@dataclass(frozen=True, slots=True)
class DevelopmentChip:
    """One make-believe chip: the key that signs its reports, and its endorsements. It holds no key of the vendor's."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    endorsements: tuple[bytes, bytes, bytes]
    """VCEK (or VLEK), ASK (or ASVK), ARK, as DER."""
    signing_key: SigningKey
    product: Product
    chip_id: bytes
    """The 64 bytes of the report's field; zero for a VLEK, where the provider masks it."""
    tcb: bytes

    def sign_report(
        self,
        report_data: bytes,
        measurement: bytes,
        *,
        policy: int = _POLICY,
        vmpl: int = 0,
        version: int = 3,
        guest_svn: int = 0,
        host_data: bytes = bytes(32),
        platform_info: int = 1,
        chip_id: bytes | None = None,
        reported_tcb: Mapping[str, int] | bytes | None = None,
        committed_tcb: Mapping[str, int] | bytes | None = None,
        launch_tcb: Mapping[str, int] | bytes | None = None,
        current_tcb: Mapping[str, int] | bytes | None = None,
        cpuid: tuple[int, int, int] | None = None,
        flags: int | None = None,
        report_id: bytes = b"\x01" * 32,
        patch: Mapping[int, bytes] | None = None,
    ) -> bytes:
        """A signed report of 1184 bytes. TCBs are components, or 8 raw bytes, by default the chip's own;
        ``patch`` overwrites bytes at offsets last of all, before the signature."""
        report = bytearray(REPORT_BYTES)

        def put(offset: int, value: bytes) -> None:
            report[offset : offset + len(value)] = value

        def tcb(given: Mapping[str, int] | bytes | None) -> bytes:
            if given is None:
                return self.tcb
            return given if isinstance(given, bytes) else self.product.pack(given)

        put(0x000, version.to_bytes(4, "little") + guest_svn.to_bytes(4, "little") + policy.to_bytes(8, "little"))
        put(0x030, vmpl.to_bytes(4, "little") + (1).to_bytes(4, "little") + tcb(current_tcb))
        put(0x040, platform_info.to_bytes(8, "little"))
        put(0x048, ((self.signing_key is SigningKey.VLEK) << 2 if flags is None else flags).to_bytes(4, "little"))
        put(0x050, report_data)
        put(0x090, measurement)
        put(0x0C0, host_data)
        put(0x140, report_id)
        put(0x160, b"\xff" * 32)
        put(0x180, tcb(reported_tcb))
        if version >= 3:
            put(0x188, bytes(_cpuid(self.product) if cpuid is None else cpuid))
        put(0x1A0, self.chip_id if chip_id is None else chip_id)
        put(0x1E0, tcb(committed_tcb) + bytes([4, 52, 1, 0, 4, 52, 1, 0]) + tcb(launch_tcb))
        for offset, value in (patch or {}).items():
            put(offset, value)
        r, s = decode_dss_signature(self.key.sign(bytes(report[:SIGNED_BYTES]), ec.ECDSA(hashes.SHA384())))
        put(SIGNED_BYTES, r.to_bytes(72, "little") + s.to_bytes(72, "little"))
        return bytes(report)

    def to_files(self) -> dict[str, bytes]:
        """File name to PEM; ``vek-key.pem`` is secret."""
        vek, ask, ark = (_pem(each) for each in self.endorsements)
        return {"vek.pem": vek, "ask.pem": ask, "ark.pem": ark, "vek-key.pem": _private_pem(self.key)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> DevelopmentChip:
        """Read back what :meth:`to_files` gave; chip id and TCB come from the certificate. Raises
        :class:`KeyquorumError` where the files do not fit together."""
        endorsements = (_der(files, "vek.pem"), _der(files, "ask.pem"), _der(files, "ark.pem"))
        key = _private_key(files, "vek-key.pem")
        endorsement = verify_endorsements(endorsements, [_fingerprint(endorsements[2])])
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != endorsement.public_key:
            raise _unreadable("vek-key.pem", "the key of vek.pem")
        chip_id = endorsement.hardware_id.ljust(CHIP_ID_BYTES, b"\0")
        return cls(key, endorsements, endorsement.signing_key, endorsement.product, chip_id, endorsement.tcb)


@dataclass(frozen=True, slots=True)
class DevelopmentVendor:
    """The root and intermediate of one product line, and the making of chips."""

    product: Product
    ark_key: rsa.RSAPrivateKey = field(repr=False)
    ask_key: rsa.RSAPrivateKey = field(repr=False)
    ark: bytes
    """DER."""
    ask: bytes
    asvk: bytes

    @classmethod
    def create(
        cls,
        *,
        now: int,
        product: Product = Product.MILAN,
        ark_key: rsa.RSAPrivateKey | None = None,
        ask_key: rsa.RSAPrivateKey | None = None,
    ) -> DevelopmentVendor:
        """A new vendor, its certificates valid from ``now`` (unix seconds). An RSA-4096 key takes a second to make."""
        ark_key = ark_key or rsa.generate_private_key(public_exponent=65537, key_size=4096)
        ask_key = ask_key or rsa.generate_private_key(public_exponent=65537, key_size=4096)

        def authority(name: str, key: rsa.RSAPrivateKey, path_length: int | None) -> bytes:
            builder = _certificate(name, f"ARK-{product}", key.public_key(), now, _CA_SECONDS)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            return _sign(builder.add_extension(_CA_USAGE, critical=True), ark_key)

        return cls(
            product=product,
            ark_key=ark_key,
            ask_key=ask_key,
            ark=authority(f"ARK-{product}", ark_key, None),
            ask=authority(f"SEV-{product}", ask_key, 0),
            asvk=authority(f"SEV-VLEK-{product}", ask_key, 0),
        )

    @property
    def root(self) -> str:
        """The fingerprint for ``development_roots``: SHA-256 of the root's SubjectPublicKeyInfo, hex."""
        return _fingerprint(self.ark)

    def chip(
        self,
        *,
        now: int,
        tcb: Mapping[str, int] = DEVELOPMENT_TCB,
        hardware_id: bytes | None = None,
        rng: Callable[[int], bytes] = secrets.token_bytes,
        lifetime: int = _CHIP_SECONDS,
        replace_extensions: Mapping[str, bytes | None] | None = None,
    ) -> DevelopmentChip:
        """A chip with a VCEK valid from ``now`` for ``lifetime`` seconds; its hwID (64 bytes, 8 on Turin) from ``rng``.

        ``replace_extensions`` sets, or with ``None`` leaves out, certificate extensions by dotted OID.
        """
        hardware_id = rng(self.product.hardware_id_bytes) if hardware_id is None else hardware_id
        extensions = {f"{AMD_ARC}.4": hardware_id, **(replace_extensions or {})}
        return self._endorse(SigningKey.VCEK, hardware_id, extensions, tcb, now, lifetime)

    def provider_chip(
        self, csp_id: str, *, now: int, tcb: Mapping[str, int] = DEVELOPMENT_TCB, lifetime: int = 365 * 86400
    ) -> DevelopmentChip:
        """A chip of a provider that signs with a VLEK and masks the chip id."""
        extensions: dict[str, bytes | None] = {f"{AMD_ARC}.5": _ia5(csp_id)}
        return self._endorse(SigningKey.VLEK, b"", extensions, tcb, now, lifetime)

    def _endorse(
        self,
        signing_key: SigningKey,
        hardware_id: bytes,
        identity: Mapping[str, bytes | None],
        tcb: Mapping[str, int],
        now: int,
        lifetime: int,
    ) -> DevelopmentChip:
        key = ec.generate_private_key(ec.SECP384R1())
        packed = self.product.pack(tcb)
        issuer, intermediate = (
            (f"SEV-VLEK-{self.product}", self.asvk)
            if signing_key is SigningKey.VLEK
            else (f"SEV-{self.product}", self.ask)
        )
        extensions: dict[str, bytes | None] = {
            f"{AMD_ARC}.1": _integer(self.product.structure_version),
            f"{AMD_ARC}.2": _ia5(self.product.value if signing_key is SigningKey.VLEK else f"{self.product}-B0"),
            **{f"{AMD_ARC}.3.{arc}": _integer(packed[index]) for arc, index in self.product.patch_level_arcs.items()},
            **identity,
        }
        builder = _certificate(f"SEV-{signing_key}", issuer, key.public_key(), now, lifetime)
        for oid, value in extensions.items():
            if value is not None:
                builder = builder.add_extension(
                    x509.UnrecognizedExtension(ObjectIdentifier(oid), value), critical=False
                )
        return DevelopmentChip(
            key=key,
            endorsements=(_sign(builder, self.ask_key), intermediate, self.ark),
            signing_key=signing_key,
            product=self.product,
            chip_id=hardware_id.ljust(CHIP_ID_BYTES, b"\0"),
            tcb=packed,
        )

    def to_files(self) -> dict[str, bytes]:
        """File name to PEM; the two ``-key.pem`` are secret."""
        return {
            "ark.pem": _pem(self.ark),
            "ask.pem": _pem(self.ask),
            "asvk.pem": _pem(self.asvk),
            "ark-key.pem": _private_pem(self.ark_key),
            "ask-key.pem": _private_pem(self.ask_key),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> DevelopmentVendor:
        """Read back what :meth:`to_files` gave. Raises :class:`MalformedError`."""
        ark_key, ask_key = _private_key(files, "ark-key.pem"), _private_key(files, "ask-key.pem")
        if not isinstance(ark_key, rsa.RSAPrivateKey) or not isinstance(ask_key, rsa.RSAPrivateKey):
            raise _unreadable("ark-key.pem", "RSA keys")
        ark = _der(files, "ark.pem")
        subject = x509.load_der_x509_certificate(ark).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        line = str(subject[0].value).removeprefix(f"{DEVELOPMENT_PREFIX}ARK-") if subject else ""
        if line not in list(Product):
            raise _unreadable("ark.pem", "a development root")
        return cls(Product(line), ark_key, ask_key, ark, _der(files, "ask.pem"), _der(files, "asvk.pem"))


_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVELOPMENT_PREFIX + common_name)])


def _certificate(
    subject: str, issuer: str, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, now: int, lifetime: int
) -> x509.CertificateBuilder:
    start = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(seconds=lifetime))
    )


def _sign(builder: x509.CertificateBuilder, key: rsa.RSAPrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384(), rsa_padding=CHAIN_PADDING).public_bytes(Encoding.DER)


def _cpuid(product: Product) -> tuple[int, int, int]:
    family, models = next(iter(CPUID_MODELS[product].items()))
    return family, models[1], 1


def _integer(value: int) -> bytes:
    """DER INTEGER of 0 … 255."""
    return bytes([2, 1, value]) if value < 0x80 else bytes([2, 2, 0, value])


def _ia5(text: str) -> bytes:
    """DER IA5String of at most 127 characters."""
    return bytes([0x16, len(text)]) + text.encode("ascii")


def _fingerprint(der: bytes) -> str:
    spki = (
        x509.load_der_x509_certificate(der).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    return hashlib.sha256(spki).hexdigest()


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def _der(files: Mapping[str, bytes], name: str) -> bytes:
    try:
        return x509.load_pem_x509_certificate(files[name]).public_bytes(Encoding.DER)
    except (KeyError, ValueError):
        raise _unreadable(name, "a PEM certificate") from None


def _private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private_key(files: Mapping[str, bytes], name: str) -> object:
    try:
        return serialization.load_pem_private_key(files[name], password=None)
    except (KeyError, ValueError, TypeError):
        raise _unreadable(name, "a PEM private key") from None


def _unreadable(name: str, expected: str) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"development vendor: {name} cannot be read", expected=expected)
