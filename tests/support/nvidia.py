"""A GPU vendor of NVIDIA's shape for tests: chains, reports, RIMs and OCSP responses, each of which can be made wrong.

The certificates, the SPDM exchange and the XML are laid out as real ones are, so that the code under test needs no
other path for them. Only the roots are other ones, and tests pin those.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from lxml import etree

from keyquorum_core.attestation.nvidia_certificates import verify_device
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence, NvidiaSettings, ShownGpu
from keyquorum_core.attestation.nvidia_report import Field

__all__ = [
    "CREATED_AT",
    "FWID",
    "GOLDEN",
    "NONCE",
    "SETTINGS",
    "Authority",
    "Chain",
    "Gpu",
    "Link",
    "Opaque",
    "RimMaker",
    "composite_fwid",
    "device_chain",
    "evidence",
    "exchange",
    "gpu",
    "links",
    "ocsp_response",
    "opaque_fields",
    "reference_json",
    "rim_maker",
    "tcb_info_fwid",
]

CREATED_AT = 1_750_000_000
YEAR = 365 * 86400
NONCE = hashlib.sha256(b"a challenge to a GPU").digest()
FWID = hashlib.sha384(b"the firmware").digest()
GOLDEN = {index: hashlib.sha384(b"measurement %d" % index).digest() for index in range(64)}
"""What the GPU measures, by index in RIMs."""
SETTINGS = NvidiaSettings("production", cc_feature=True, developer_tools=False, multi_gpu="none")

DRIVER, VBIOS = "580.95.05", "96.00.D9.00.02"
DRIVER_INDICES = range(21, 42)
VBIOS_INDICES = (*range(7), *range(8, 13))


@dataclass(frozen=True)
class Link:
    """One certificate to be made: its subject, and what a test may want otherwise."""

    common_name: str
    subject_serial: str = ""
    serial: int | None = None
    ca: bool | None = True
    path_length: int | None = None
    signs_certificates: bool = True
    signs_data: bool = False
    start: int = CREATED_AT
    end: int = CREATED_AT + 10 * YEAR
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    hash_algorithm: hashes.SHA384 | hashes.SHA256 = field(default_factory=hashes.SHA384)
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    key_ids: bool = True
    issuer_name: str | None = None
    """Instead of the issuer's real name."""
    signed_by: ec.EllipticCurvePrivateKey | None = None
    """Instead of the issuer's key."""


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


@dataclass(frozen=True)
class Chain:
    """Leaf first, root last."""

    links: tuple[Authority, ...]

    @property
    def ders(self) -> tuple[bytes, ...]:
        return tuple(each.der for each in self.links)

    @property
    def pem(self) -> bytes:
        return b"".join(each.certificate.public_bytes(Encoding.PEM) for each in self.links)

    @property
    def root(self) -> str:
        key = self.links[-1].certificate.public_key()
        return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _name(link: Link) -> x509.Name:
    attributes = [
        x509.NameAttribute(NameOID.COMMON_NAME, link.common_name),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test Corporation"),
    ]
    if link.subject_serial:
        attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, link.subject_serial))
    return x509.Name(attributes)


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def certify(link: Link, issuer: Authority | None, key: ec.EllipticCurvePrivateKey | None = None) -> Authority:
    """A certificate by ``issuer``, or by itself."""
    key = key or ec.generate_private_key(link.curve)
    issuer_key = issuer.key if issuer else key
    subject = _name(link)
    issuer_name = issuer.certificate.subject if issuer else subject
    if link.issuer_name is not None:
        issuer_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, link.issuer_name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(link.serial or x509.random_serial_number())
        .not_valid_before(_moment(link.start))
        .not_valid_after(_moment(link.end))
        .add_extension(
            x509.KeyUsage(
                digital_signature=link.signs_data,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=link.signs_certificates,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if link.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(link.ca, link.path_length), critical=True)
    if link.key_ids:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        issuer_public = issuer.key.public_key() if issuer else key.public_key()
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False
        )
    for extension, critical in link.extensions:
        builder = builder.add_extension(extension, critical=critical)
    return Authority(builder.sign(link.signed_by or issuer_key, link.hash_algorithm), key)


def build(made: Sequence[Link], device_extensions: Callable[[Authority], Link] | None = None) -> Chain:
    """A chain from links given root first; ``device_extensions`` makes the last link out of its issuer."""
    authorities: list[Authority] = []
    for each in made:
        authorities.append(certify(each, authorities[-1] if authorities else None))
    if device_extensions is not None:
        authorities.append(certify(device_extensions(authorities[-1]), authorities[-1]))
    return Chain(tuple(reversed(authorities)))


# Device chains


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    head = bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + head + content


def _digest(value: bytes) -> bytes:
    return _der(0x30, bytes.fromhex("0609608648016503040202") + _der(0x04, value))


def composite_fwid(device: Authority, value: bytes = FWID) -> x509.UnrecognizedExtension:
    """Hopper's form."""
    spki = device.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    content = _der(0x30, b"\x02\x01\x01" + spki + _digest(value))
    return x509.UnrecognizedExtension(ObjectIdentifier("2.23.133.5.4.1"), content)


def tcb_info_fwid(value: bytes = FWID, flags: bytes = b"\0\x80\0\0\x01") -> x509.UnrecognizedExtension:
    """Blackwell's form: vendor, model, version, SVN, layer, index, two FWIDs, flags, vendor info, type."""
    content = (
        _der(0x80, b"NVIDIA")
        + _der(0x81, b"GB100 A01 GSP")
        + b"\x82\x0203\x83\x01\x01\x84\x01\0\x85\x01\0"
        + _der(0xA6, _digest(value) + _digest(bytes(48)))
        + _der(0x87, flags)
        + b"\x88\x01\xc0\x89\x01\0"
    )
    return x509.UnrecognizedExtension(ObjectIdentifier("2.23.133.5.4.1.1"), _der(0x30, content))


def device_info(text: str) -> x509.SubjectAlternativeName:
    value = _der(0x0C, text.encode())
    return x509.SubjectAlternativeName([x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.412.274.1"), value)])


def links(chip: str = "GH100", serial: int = 0x41_6A5F_AFCB_D9FA_5CA3) -> list[Link]:
    """Root, identity, provisioner, device: to be changed, and given to :func:`device_chain`."""
    return [
        Link("Test Device Identity CA"),
        Link(f"Test {chip} Identity"),
        Link(f"Test {chip} Provisioner ICA 1"),
        Link(f"{chip} A01 GSP BROM", subject_serial=f"{serial:018X}", serial=serial),
    ]


def firmware_link(chip: str = "GH100", identifier: str = "48B02D7A7CD27FC3") -> Link:
    return Link(
        f"{chip} A01 GSP FMC LF",
        ca=None,
        signs_certificates=False,
        signs_data=True,
        extensions=((device_info(f"NVIDIA:{chip}:{identifier}"), False),),
    )


def device_chain(
    upper: Sequence[Link] | None = None,
    firmware: Link | None = None,
    fwid: Callable[[Authority], Iterable[x509.UnrecognizedExtension]] = lambda device: [composite_fwid(device)],
) -> Chain:
    """Five certificates; ``fwid`` makes the extensions that hold the FWID out of the device certificate."""
    leaf = firmware or firmware_link()
    return build(
        upper or links(),
        lambda device: replace(leaf, extensions=(*leaf.extensions, *((each, False) for each in fwid(device)))),
    )


# Reports

Opaque = Mapping[int, bytes | None]


def opaque_fields(changes: Opaque | None = None) -> bytes:
    """The opaque data of a Hopper board; a change to ``None`` leaves a field out."""
    fields: dict[int, bytes | None] = {
        Field.VBIOS_VERSION: bytes.fromhex("00d90096") + b"\x02\0\0\0",
        Field.BOARD_ID: bytes.fromhex("b1030000"),
        Field.CHIP_SKU: b"882\0\0\0\0\0\0",
        Field.CHIP_SKU_MOD: b"0\0\0\0\0",
        Field.PROJECT: b"1010\0",
        Field.PROJECT_SKU: b"0200\0",
        Field.PROJECT_SKU_MOD: b"\0\0",
        Field.DRIVER_VERSION: DRIVER.encode() + b"\0",
        Field.GPU_INFO: bytes.fromhex("8001000000000000"),
        Field.MEASUREMENT_COUNTS: bytes(256),
        Field.CPR_INFO: bytes.fromhex("00c00100"),
        Field.NVDEC0_STATUS: b"\xaa",
        Field.FWID: FWID,
        Field.PROTECTED_PCIE_STATUS: b"\x55",
        Field.DATA_VERSION: b"\x01\0",
        Field.FEATURE_FLAG: b"\0\0",
    }
    fields |= changes or {}
    return b"".join(struct.pack("<HH", name, len(value)) + value for name, value in fields.items() if value is not None)


def exchange(
    *,
    nonce: bytes = NONCE,
    measurements: Mapping[int, bytes] | None = None,
    opaque: bytes | None = None,
    record: bytes | None = None,
    count: int | None = None,
    request: bytes = b"\x11\xe0\x01\xff",
    response: bytes = b"\x11\x60\0\0",
    slot: int = 0,
) -> bytes:
    """Request and response without the signature; ``measurements`` are by index in RIMs."""
    values = GOLDEN if measurements is None else measurements
    if record is None:
        record = b"".join(
            struct.pack("<BBHBH", index + 1, 1, len(value) + 3, 1, len(value)) + value
            for index, value in sorted(values.items())
        )
    data = opaque_fields() if opaque is None else opaque
    return (
        request
        + nonce
        + bytes([slot])
        + response
        + bytes([len(values) if count is None else count])
        + len(record).to_bytes(3, "little")
        + record
        + hashlib.sha256(b"response nonce").digest()
        + len(data).to_bytes(2, "little")
        + data
    )


@dataclass(frozen=True)
class Gpu:
    """A GPU that signs what it is told to."""

    chain: Chain

    def sign(self, signed: bytes) -> bytes:
        r, s = decode_dss_signature(self.chain.links[0].key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return signed + r.to_bytes(48, "big") + s.to_bytes(48, "big")

    def report(self, opaque: Opaque | None = None, **changes: object) -> bytes:
        """A report; ``changes`` are those of :func:`exchange`."""
        return self.sign(exchange(opaque=opaque_fields(opaque), **changes))  # type: ignore[arg-type]


def gpu(number: int = 0) -> Gpu:
    """The same GPU for the same number; all have one vendor's certificates above their own."""
    return _gpu(number)


@cache
def _gpu(number: int) -> Gpu:
    if number == 0:
        return Gpu(device_chain())
    vendor = gpu(0).chain.links[2:]
    serial = 0x41_0000_0000_0000_0000 + number
    device = certify(replace(links()[3], serial=serial, subject_serial=f"{serial:018X}"), vendor[0])
    leaf = firmware_link(identifier=f"{number:016X}")
    firmware = certify(replace(leaf, extensions=(*leaf.extensions, (composite_fwid(device), False))), device)
    return Gpu(Chain((firmware, device, *vendor)))


def serial(number: int = 0) -> str:
    """The serial number in a GPU's device certificate: what an inventory lists."""
    return verify_device(gpu(number).chain.ders, {gpu(number).chain.root}).serial


def evidence(*numbers: int, settings: NvidiaSettings = SETTINGS, nonce: bytes = NONCE) -> bytes:
    """The evidence of a worker with these GPUs."""
    shown = tuple(ShownGpu(gpu(each).report(nonce=nonce), gpu(each).chain.ders) for each in numbers)
    return GpuEvidence(settings, shown).to_bytes()


# Reference integrity manifests

_XML = """<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" \
xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" \
xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" corpus="false" name="{product}" patch="false" \
supplemental="false" tagId="00" version="1.0" tagVersion="0">
    <ns0:Entity name="Test Corporation" role="softwareCreator tagCreator"/>
    <ns0:Meta xmlns:ns1="https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/" \
colloquialVersion="{version}" edition="GPU" product="{product}" revision="r1" PayloadType="direct" \
ns1:BindingSpec="RIMIM" ns1:BindingSpecVersion="1.01" ns1:PlatformManufacturerId="5703" \
ns1:PlatformManufacturerStr="Test Corporation" ns1:PlatformModel="{product}" \
ns1:FirmwareManufacturer="Test Corporation" ns1:FirmwareManufacturerId="5703"/>
    <ns0:Payload xmlns:SHA384="http://www.w3.org/2001/04/xmlenc#sha384">
{resources}
    </ns0:Payload>
</SoftwareIdentity>"""  # noqa: E501

_SIGNATURE = (
    '<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:SignedInfo>'
    '<ds:CanonicalizationMethod Algorithm="{c14n}"/><ds:SignatureMethod Algorithm="{method}"/>'
    '<ds:Reference URI="{uri}"><ds:Transforms>'
    '<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"/>'
    '<ds:Transform Algorithm="{c14n}"/></ds:Transforms>'
    '<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>'
    "<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
    "<ds:SignatureValue>{value}</ds:SignatureValue>"
    "<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature>"
)


def resource(index: int, values: Sequence[bytes | str], *, active: str = "True", count: int | None = None) -> str:
    """One Resource element; a value that is text goes in as it is."""
    texts = [each if isinstance(each, str) else each.hex() for each in values]
    hashed = " ".join(f'ns2:Hash{number}="{each}"' for number, each in enumerate(texts))
    return (
        f'        <ns0:Resource type="Measurement" index="{index}" active="{active}" '
        f'alternatives="{len(values) if count is None else count}" {hashed} name="Measurement_{index}" size="48"/>'
    )


def resources(active: Iterable[int]) -> list[str]:
    """Sixty-four of them, as NVIDIA has it, with a second alternative here and there."""
    chosen = set(active)
    lines = []
    for index in range(64):
        if index not in chosen:
            lines.append(resource(index, [bytes(48)], active="False"))
        elif index % 5 == 0:
            lines.append(resource(index, [bytes(range(48)), GOLDEN[index]]))
        else:
            lines.append(resource(index, [GOLDEN[index]]))
    return lines


@dataclass(frozen=True)
class RimMaker:
    """Signs manifests under its own root."""

    chain: Chain

    def xml(
        self, version: str, active: Iterable[int] = (), *, product: str = "GH100", lines: list[str] | None = None
    ) -> str:
        """The manifest before it is signed."""
        return _XML.format(
            product=product,
            version=version,
            resources="\n".join(resources(active) if lines is None else lines),
        )

    def sign(
        self,
        xml: str,
        *,
        c14n: str = "http://www.w3.org/2006/12/xml-c14n11",
        method: str = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384",
        uri: str = "",
        certificates: Sequence[bytes] | None = None,
    ) -> bytes:
        """The manifest with an enveloped signature as its last element."""
        canonical = etree.tostring(etree.fromstring(xml.encode()), method="c14n")
        chosen = self.chain.ders if certificates is None else certificates
        parts = {
            "c14n": c14n,
            "method": method,
            "uri": uri,
            "digest": base64.b64encode(hashlib.sha384(canonical).digest()).decode(),
            "certificates": "".join(
                f"<ds:X509Certificate>{base64.encodebytes(each).decode()}</ds:X509Certificate>" for each in chosen
            ),
        }
        head, end = xml.rsplit("</SoftwareIdentity>", 1)
        unsigned = etree.fromstring(
            (head + _SIGNATURE.format(value="", **parts) + "</SoftwareIdentity>" + end).encode()
        )
        info = etree.tostring(unsigned[-1][0], method="c14n")
        r, s = decode_dss_signature(self.chain.links[0].key.sign(info, ec.ECDSA(hashes.SHA384())))
        value = base64.b64encode(r.to_bytes(48, "big") + s.to_bytes(48, "big")).decode()
        return (head + _SIGNATURE.format(value=value, **parts) + "</SoftwareIdentity>" + end).encode()

    def rim(self, version: str, active: Iterable[int], *, product: str = "GH100") -> bytes:
        return self.sign(self.xml(version, active, product=product))

    @property
    def driver(self) -> bytes:
        return _rim(self, DRIVER, tuple(DRIVER_INDICES))

    @property
    def vbios(self) -> bytes:
        return _rim(self, VBIOS, tuple(VBIOS_INDICES))


@cache
def _rim(maker: RimMaker, version: str, active: tuple[int, ...]) -> bytes:
    return maker.rim(version, active)


def rim_links() -> list[Link]:
    """Root, two authorities, signer: to be changed, and given to :func:`build`."""
    return [
        Link("Test CoRIM signing Root CA"),
        Link("Test Reference Value GH100 CA"),
        Link("Test Reference Value L3 GH100 001", path_length=0),
        Link("Test RIM L4 Signer", ca=False, signs_certificates=False, signs_data=True),
    ]


@cache
def rim_maker() -> RimMaker:
    return RimMaker(build(rim_links()))


# OCSP


def ocsp_response(
    certificate: Authority,
    issuer: Authority,
    *,
    responder: Authority | None = None,
    certificates: Sequence[Authority] = (),
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD,
    this_update: int = CREATED_AT + 1000,
    next_update: int | None = CREATED_AT + 1000 + 86400,
    algorithm: hashes.HashAlgorithm | None = None,
    signature_hash: hashes.SHA384 | hashes.SHA256 | None = None,
) -> bytes:
    """A response about ``certificate``, signed by its issuer unless there is a responder."""
    signer = responder or issuer
    revoked = status is ocsp.OCSPCertStatus.REVOKED
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=certificate.certificate,
            issuer=issuer.certificate,
            algorithm=algorithm or hashes.SHA1(),  # noqa: S303 - what NVIDIA's responder and RFC 5019 use
            cert_status=status,
            this_update=_moment(this_update),
            next_update=None if next_update is None else _moment(next_update),
            revocation_time=_moment(this_update) - timedelta(days=1) if revoked else None,
            revocation_reason=x509.ReasonFlags.certificate_hold if revoked else None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, signer.certificate)
    )
    if certificates:
        builder = builder.certificates([each.certificate for each in certificates])
    return builder.sign(signer.key, signature_hash or hashes.SHA384()).public_bytes(Encoding.DER)


def responder(issuer: Authority, **changes: object) -> Authority:
    """A responder that the issuer certified for OCSP signing."""
    link = Link(
        "Test OCSP Responder",
        ca=None,
        signs_certificates=False,
        signs_data=True,
        extensions=((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]), False),),
    )
    return certify(replace(link, **changes), issuer)  # type: ignore[arg-type]


def ocsp_responses(chain: Chain, first: int = 0) -> list[bytes]:
    """One for each certificate from ``first`` on, but the root's."""
    return [
        ocsp_response(chain.links[position], chain.links[position + 1])
        for position in range(first, len(chain.links) - 1)
    ]


def reference_json(**changes: object) -> dict[str, object]:
    """What the ``nvidia-gpu`` member of a reference values file holds to accept the GPUs here."""
    return {
        "roots": [],
        "rim_roots": [],
        "development_roots": [gpu(0).chain.root, rim_maker().chain.root],
        "chips": ["GH100"],
        "driver_versions": [DRIVER],
        "vbios_versions": [VBIOS],
        "grace": [],
        "revocation": "when-given",
        "max_revocation_age": 86400,
    } | changes
