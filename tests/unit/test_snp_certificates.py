"""AMD certificate chains that the right keys signed and that are still wrong: extensions, names, powers, keys."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from keyquorum_core.attestation.snp_certificates import AMD_ARC, Endorsement, verify_endorsements
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.errors import Reason, RefusedError
from tests.support.vendor import CREATED_AT, development_chip, development_vendor


def chain_of(*endorsements: bytes) -> Endorsement:
    return verify_endorsements(endorsements, [development_vendor().root])


def refused(reason: Reason, call: Callable[[], object]) -> None:
    with pytest.raises(RefusedError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)


@pytest.mark.parametrize(
    "replace",
    [
        {f"{AMD_ARC}.1": None},
        {f"{AMD_ARC}.1": b"\x02\x01\x01"},  # the structure version of Turin
        {f"{AMD_ARC}.2": None},
        {f"{AMD_ARC}.2": b"\x16\x05Turin"},
        {f"{AMD_ARC}.2": b"\x16\x05Genoa"},
        {f"{AMD_ARC}.2": b"\x0c\x05Milan"},  # not an IA5String
        {f"{AMD_ARC}.2": b"\x16\x06Naples"},
        {f"{AMD_ARC}.3.1": None},
        {f"{AMD_ARC}.3.4": None},
        {f"{AMD_ARC}.3.8": b"\x02\x02\x01\x00"},  # 256
        {f"{AMD_ARC}.3.8": b"\x02\x02\x00\x01"},  # not the shortest form
        {f"{AMD_ARC}.3.8": b"\x02\x01\xff"},  # negative
        {f"{AMD_ARC}.3.8": b"\x02\x01\x01\x00"},  # bytes left over
        {f"{AMD_ARC}.3.9": b"\x02\x01\x00"},  # FMC, which only Turin has
        {f"{AMD_ARC}.4": None},
        {f"{AMD_ARC}.4": b"\x01" * 8},
        {f"{AMD_ARC}.4": b"\x01" * 63},
        {f"{AMD_ARC}.5": b"\x16\x01x"},  # a provider as well as a chip
        {f"{AMD_ARC}.6": b"\x02\x01\x00"},
        {"1.2.3.4": b"\x05\x00"},
    ],
    ids=str,
)
def test_a_vcek_with_other_extensions_than_amds_is_refused(replace: dict[str, bytes | None]) -> None:
    chip = development_vendor().chip(now=CREATED_AT, replace_extensions=replace)
    refused(Reason.CHAIN, lambda: chain_of(*chip.endorsements))


def test_a_vlek_that_names_no_provider_is_refused() -> None:
    chip = development_vendor().provider_chip("", now=CREATED_AT)
    refused(Reason.CHAIN, lambda: chain_of(*chip.endorsements))


# Authorities that sign what they should not: every signature verifies, and still each is refused


def crafted(
    subject: str,
    issuer: str,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    signer: rsa.RSAPrivateKey,
    extensions: list[tuple[x509.ExtensionType, bool]],
    algorithm: hashes.SHA256 | hashes.SHA384 | None = None,
) -> bytes:
    algorithm = algorithm or hashes.SHA384()
    start = datetime.fromtimestamp(CREATED_AT, UTC)
    builder = x509.CertificateBuilder(
        issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
        public_key=key,
        serial_number=1,
        not_valid_before=start,
        not_valid_after=start + timedelta(days=30),
        extensions=[x509.Extension(each.oid, critical, each) for each, critical in extensions],
    )
    pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    return builder.sign(signer, algorithm, rsa_padding=pss).public_bytes(Encoding.DER)


def usage(*, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not key_cert_sign, False, False, False, False, key_cert_sign, False, False, False)


CA = (x509.BasicConstraints(ca=True, path_length=0), True)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
SIGNS = (usage(key_cert_sign=True), True)
ROOT_NAME, ASK_NAME, VCEK_NAME = (f"keyquorum DEVELOPMENT {each}" for each in ("ARK-Milan", "SEV-Milan", "SEV-VCEK"))


def crafted_intermediate(
    subject: str = ASK_NAME,
    issuer: str = ROOT_NAME,
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (CA, SIGNS),
    algorithm: hashes.SHA256 | None = None,
) -> bytes:
    vendor = development_vendor()
    return crafted(subject, issuer, vendor.ask_key.public_key(), vendor.ark_key, list(extensions), algorithm)


def crafted_leaf(
    subject: str = VCEK_NAME,
    issuer: str = ASK_NAME,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None = None,
    signer: rsa.RSAPrivateKey | None = None,
) -> bytes:
    genuine = x509.load_der_x509_certificate(development_chip().endorsements[0])
    return crafted(
        subject,
        issuer,
        key or development_chip().key.public_key(),
        signer or development_vendor().ask_key,
        [(extension.value, False) for extension in genuine.extensions],
    )


def test_crafted_certificates_verify_where_nothing_is_wrong_with_them() -> None:
    assert chain_of(crafted_leaf(), crafted_intermediate(), development_vendor().ark).product is Product.MILAN


@pytest.mark.parametrize(
    "intermediate",
    [
        lambda: crafted_intermediate(issuer="keyquorum DEVELOPMENT ARK-Genoa"),
        lambda: crafted_intermediate(extensions=(CA, (usage(key_cert_sign=False), True))),
        lambda: crafted_intermediate(extensions=(CA,)),
        lambda: crafted_intermediate(extensions=((x509.BasicConstraints(ca=False, path_length=None), True), SIGNS)),
        lambda: crafted_intermediate(extensions=(SIGNS,)),
        lambda: crafted_intermediate(extensions=(CA, SIGNS, (UNKNOWN, True))),
        lambda: crafted_intermediate(algorithm=hashes.SHA256()),
    ],
    ids=["issuer", "may not sign", "no key usage", "no CA", "no constraints", "unknown critical", "SHA-256"],
)
def test_an_intermediate_that_the_root_should_not_have_signed_is_refused(intermediate: Callable[[], bytes]) -> None:
    refused(Reason.CHAIN, lambda: chain_of(crafted_leaf(), intermediate(), development_vendor().ark))


@pytest.mark.parametrize(
    "name", ["SEV-Milan", "keyquorum DEVELOPMENT SEV-Genoa", "keyquorum DEVELOPMENT SEV-VLEK-Milan"]
)
def test_an_intermediate_for_something_else_is_refused(name: str) -> None:
    leaf = crafted_leaf(issuer=name)
    refused(Reason.CHAIN, lambda: chain_of(leaf, crafted_intermediate(subject=name), development_vendor().ark))


def test_a_small_rsa_key_is_refused() -> None:
    vendor, small = development_vendor(), rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ask = crafted(ASK_NAME, ROOT_NAME, small.public_key(), vendor.ark_key, [CA, SIGNS])
    refused(Reason.CHAIN, lambda: chain_of(crafted_leaf(signer=small), ask, vendor.ark))


@pytest.mark.parametrize(
    "leaf",
    [
        lambda: crafted_leaf(issuer="keyquorum DEVELOPMENT SEV-Genoa"),
        lambda: crafted_leaf(subject="SEV-VCEK"),
        lambda: crafted_leaf(subject="keyquorum DEVELOPMENT SEV-VLEK"),
        lambda: crafted_leaf(key=ec.generate_private_key(ec.SECP256R1()).public_key()),
        lambda: crafted_leaf(key=development_vendor().ask_key.public_key()),
    ],
    ids=["issuer", "AMD's name", "VLEK", "P-256", "RSA"],
)
def test_a_leaf_that_the_intermediate_should_not_have_signed_is_refused(leaf: Callable[[], bytes]) -> None:
    refused(Reason.CHAIN, lambda: chain_of(leaf(), crafted_intermediate(), development_vendor().ark))
