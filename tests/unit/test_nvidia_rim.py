"""NVIDIA's manifests: a real one, and every way in which one can fail to be signed, complete or safe to read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation.nvidia_rim import MAX_RIM_BYTES, Rim, looks_like_rim, verify_rim
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support import nvidia
from tests.support.nvidia import CREATED_AT, DRIVER, GOLDEN, VBIOS, RimMaker, resource, rim_links, rim_maker
from tests.support.vectors import vector

NOW = CREATED_AT + 2000
JANUARY_2025 = int(datetime(2025, 1, 15, tzinfo=UTC).timestamp())


def real() -> bytes:
    return vector("nvidia/vbios_1010_0200_882_96005E0001.swidtag")


def verify(data: bytes, *, maker: RimMaker | None = None, now: int = NOW) -> Rim:
    return verify_rim(data, pinned_roots={(maker or rim_maker()).chain.root}, now=now)


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def signed(xml: str) -> bytes:
    return rim_maker().sign(xml)


def with_lines(*lines: str) -> str:
    return rim_maker().xml(VBIOS, lines=list(lines))


# The real manifest


def test_the_real_rim_verifies() -> None:
    rim = verify_rim(real(), pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025)
    assert (rim.product, rim.version, rim.development) == ("GH100", "96.00.5E.00.01", False)
    assert len(rim.golden) == 12
    assert len(rim.inactive) == 52
    assert len(rim.golden[12].alternatives) == 4
    assert rim.golden[1].name == "HashedMeasurement_1_FSP"


def test_the_real_rim_is_refused_outside_its_time() -> None:
    for reason, at in ((Reason.EXPIRED, JANUARY_2025 + 365 * 86400), (Reason.NOT_YET_VALID, JANUARY_2025 - 10**8)):
        refused(reason, lambda at=at: verify_rim(real(), pinned_roots=NVIDIA_RIM_ROOTS, now=at))  # type: ignore[misc]


def test_the_device_root_does_not_pass_for_the_rim_root() -> None:
    refused(Reason.ROOT_NOT_PINNED, lambda: verify_rim(real(), pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025))


def test_bit_flips_in_the_real_rim_are_refused() -> None:
    data = real()
    certificates = data.index(b"<ds:KeyInfo>")
    choose = random.Random("rim")  # noqa: S311 - a fixed sample
    for bit in choose.sample(range(8 * certificates), 2200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            verify_rim(bytes(flipped), pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025)


def test_bit_flips_in_the_real_rims_chain_are_refused_or_without_effect() -> None:
    data = real()
    genuine = verify_rim(data, pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025)
    start = data.index(b"<ds:KeyInfo>")
    for bit in random.Random("chain").sample(range(8 * start, 8 * len(data)), 400):  # noqa: S311
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            accepted = verify_rim(bytes(flipped), pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025)
        except KeyquorumError:
            continue
        assert replace(accepted, sha256=genuine.sha256) == genuine


# Signature and chain


def test_a_rim_of_ours_verifies() -> None:
    rim = verify(rim_maker().vbios)
    assert (rim.product, rim.version, rim.development) == ("GH100", VBIOS, True)
    assert sorted(rim.golden) == sorted(nvidia.VBIOS_INDICES)
    assert rim.golden[5].alternatives[1] == GOLDEN[5]


@pytest.mark.parametrize("c14n", ["http://www.w3.org/TR/2001/REC-xml-c14n-20010315"])
def test_canonical_xml_1_0_is_as_good_as_1_1(c14n: str) -> None:
    assert verify(rim_maker().sign(rim_maker().xml(VBIOS, [1]), c14n=c14n)).golden.keys() == {1}


def test_a_declaration_of_plain_xml_changes_nothing() -> None:
    assert verify(b'<?xml version="1.0" encoding="UTF-8"?>\n' + rim_maker().vbios).version == VBIOS


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(GOLDEN[3].hex(), bytes(48).hex()),
        lambda text: text.replace('active="False"', 'active="True"', 1),
        lambda text: text.replace(VBIOS, "96.00.D9.00.03"),
        lambda text: text.replace('    <ns0:Entity name="Test Corporation"', '   <ns0:Entity name="Test Corporation"'),
        lambda text: re.sub("<ds:DigestValue>.{8}", "<ds:DigestValue>AAAAAAAA", text),
        lambda text: re.sub("<ds:SignatureValue>.{8}", "<ds:SignatureValue>AAAAAAAA", text),
    ],
    ids=["value", "active", "version", "space", "digest", "signature"],
)
def test_a_changed_rim_is_refused(change: Callable[[str], str]) -> None:
    text = rim_maker().vbios.decode()
    assert change(text) != text
    refused(Reason.SIGNATURE, lambda: verify(change(text).encode()))


def test_what_was_signed_in_one_rim_is_not_signed_in_another() -> None:
    ours, theirs = rim_maker().vbios.decode(), rim_maker().driver.decode()
    head, _, _ = ours.partition("<ds:Signature ")
    _, mark, tail = theirs.partition("<ds:Signature ")
    refused(Reason.SIGNATURE, lambda: verify((head + mark + tail).encode()))


def test_a_rim_signed_by_another_key_is_refused() -> None:
    other = RimMaker(nvidia.build(rim_links()))
    forged = other.sign(rim_maker().xml(VBIOS, [1]), certificates=rim_maker().chain.ders)
    refused(Reason.SIGNATURE, lambda: verify(forged))
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(other.vbios))
    refused(Reason.ROOT_NOT_PINNED, lambda: verify_rim(rim_maker().vbios, pinned_roots=NVIDIA_RIM_ROOTS, now=NOW))


def broken(position: int, **changes: object) -> RimMaker:
    made = rim_links()
    made[position] = replace(made[position], **changes)  # type: ignore[arg-type]
    return RimMaker(nvidia.build(made))


@pytest.mark.parametrize(
    "maker",
    [
        lambda: broken(1, ca=False),
        lambda: broken(3, ca=True),
        lambda: broken(3, signs_data=False),
        lambda: broken(1, path_length=0),
        lambda: broken(2, signed_by=ec.generate_private_key(ec.SECP384R1())),
        lambda: broken(2, issuer_name="Test Reference Value GB100 CA"),
        lambda: broken(3, curve=ec.SECP521R1()),
    ],
    ids=["no CA", "signer is a CA", "usage", "path length", "another key", "another name", "curve"],
)
def test_a_rim_whose_chain_does_not_hold_is_refused(maker: Callable[[], RimMaker]) -> None:
    made = maker()
    data = RimMaker(rim_maker().chain).sign(rim_maker().xml(VBIOS, [1]), certificates=made.chain.ders)
    refused(Reason.CHAIN, lambda: verify(data, maker=made))


def test_a_rim_without_a_whole_chain_is_refused() -> None:
    ders = rim_maker().chain.ders
    xml = rim_maker().xml(VBIOS, [1])
    for chosen in ((), ders[:1], ders * 2):
        refused(Reason.CHAIN, lambda chosen=chosen: verify(rim_maker().sign(xml, certificates=chosen)))  # type: ignore[misc]
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(rim_maker().sign(xml, certificates=ders[:3])))
    refused(Reason.MALFORMED, lambda: verify(rim_maker().sign(xml, certificates=[b"junk", *ders[1:]])))


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": "#other"},
        {"c14n": "http://www.w3.org/2001/10/xml-exc-c14n#"},
        {"c14n": "http://www.w3.org/2006/12/xml-c14n11#WithComments"},
        {"method": "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha256"},
        {"method": "http://www.w3.org/2000/09/xmldsig#hmac-sha1"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_another_signature_profile_is_refused(changes: dict[str, str]) -> None:
    data = rim_maker().sign(rim_maker().xml(VBIOS, [1]), **changes)  # type: ignore[arg-type]
    refused(Reason.UNSUPPORTED, lambda: verify(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("</ds:Reference>", "</ds:Reference><ds:Reference/>"),
        lambda text: text.replace("<ds:Transform ", "<ds:Transform Extra='' ", 1),
        lambda text: re.sub("<ds:Transform [^>]*enveloped[^>]*>", "", text),
        lambda text: text.replace("<ds:KeyInfo>", "<ds:KeyInfo><ds:KeyValue/>"),
        lambda text: text.replace("<ds:X509Data>", "<ds:X509Data>text"),
        lambda text: text.replace("<ds:SignatureValue>", "<ds:SignatureValue>!"),
        lambda text: text.replace("</ds:Signature>", "</ds:Signature><ns0:Payload/>"),
        lambda text: text.replace("</ds:Signature>", "</ds:Signature>text"),
        lambda text: re.sub("<ds:Signature .*</ds:Signature>", "", text, flags=re.DOTALL),
        lambda text: re.sub("(<ds:Signature .*</ds:Signature>)", r"\1\1", text, flags=re.DOTALL),
        lambda text: text.replace('URI=""', ""),
    ],
    ids=[
        "two references", "attribute", "no transform", "key value", "text", "base64", "after it",
        "text after it", "none", "twice", "no URI",
    ],
)  # fmt: skip
def test_a_signature_of_another_form_is_refused(change: Callable[[str], str]) -> None:
    text = rim_maker().vbios.decode()
    assert change(text) != text
    with pytest.raises(KeyquorumError) as caught:
        verify(change(text).encode())
    assert caught.value.reason in (Reason.MALFORMED, Reason.SIGNATURE)


def test_a_signed_rim_wrapped_in_another_is_refused() -> None:
    inner = rim_maker().vbios.decode()
    evil = rim_maker().xml(VBIOS, [2]).replace("</SoftwareIdentity>", f"{inner}</SoftwareIdentity>")
    refused(Reason.MALFORMED, lambda: verify(evil.encode()))
    _, mark, signature = inner.partition("<ds:Signature ")
    end = "</SoftwareIdentity>"
    moved = evil.replace(mark + signature, end + mark + signature.removesuffix(end))
    refused(Reason.SIGNATURE, lambda: verify(moved.encode()))


# Contents


def test_an_empty_rim_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: verify(signed(with_lines())))
    refused(Reason.MEASUREMENT, lambda: verify(signed(with_lines(resource(1, [bytes(48)], active="False")))))
    refused(Reason.MALFORMED, lambda: verify(b""))


BAD_RESOURCES = {
    "twice": (resource(1, [GOLDEN[1]]), resource(1, [GOLDEN[2]])),
    "twice, once inactive": (resource(1, [GOLDEN[1]]), resource(1, [GOLDEN[2]], active="False")),
    "fewer hashes": (resource(1, [GOLDEN[1]], count=2),),
    "more hashes": (resource(1, [GOLDEN[1], GOLDEN[2]], count=1),),
    "no hash": (resource(1, [], count=0),),
    "a short hash": (resource(1, [GOLDEN[1][:47]]),),
    "an empty hash": (resource(1, [""]),),
    "a hash in capitals": (resource(1, [GOLDEN[1].hex().upper()]),),
    "an index out of range": (resource(255, [GOLDEN[1]]),),
    "an index with a zero before": (resource(1, [GOLDEN[1]]).replace('index="1"', 'index="01"'),),
    "a negative index": (resource(1, [GOLDEN[1]]).replace('index="1"', 'index="-1"'),),
    "neither active nor not": (resource(1, [GOLDEN[1]], active="true"),),
    "another type": (resource(1, [GOLDEN[1]]).replace('type="Measurement"', 'type="Other"'),),
    "another size": (resource(1, [GOLDEN[1]]).replace('size="48"', 'size="47"'),),
    "an unknown attribute": (resource(1, [GOLDEN[1]]).replace(" size=", ' extra="" size='),),
    "no name": (resource(1, [GOLDEN[1]]).replace(' name="Measurement_1"', ""),),
    "another element": (resource(1, [GOLDEN[1]]), "<ns0:File/>"),
    "something inside": (resource(1, [GOLDEN[1]]).replace("/>", "><ns0:Resource/></ns0:Resource>"),),
}


@pytest.mark.parametrize("name", BAD_RESOURCES)
def test_a_measurement_that_is_not_as_it_must_be_is_refused(name: str) -> None:
    data = signed(with_lines(resource(9, [GOLDEN[9]]), *BAD_RESOURCES[name]))
    refused(Reason.MALFORMED, lambda: verify(data))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('corpus="false"', 'corpus="true"'),
        ('patch="false"', 'patch="true"'),
        ('supplemental="false"', 'supplemental="true"'),
        ('edition="GPU"', 'edition="SWITCH"'),
        ('ns1:PlatformModel="GH100"', 'ns1:PlatformModel="GB100"'),
        ('product="GH100"', 'product=""'),
        (f'colloquialVersion="{VBIOS}"', 'colloquialVersion=""'),
        (f'colloquialVersion="{VBIOS}"', 'colloquialVersion="96"'),
        (' revision="r1"', ""),
        (' revision="r1"', ' revision="r1" extra=""'),
        (' tagVersion="0"', ""),
        ('<ns0:Entity name="Test Corporation" role="softwareCreator tagCreator"/>', ""),
        ("<ns0:Payload ", "<ns0:Link/><ns0:Payload "),
        ("SoftwareIdentity", "Software"),
        (' patch="false"', ' patch="false" xml:lang="en"'),
    ],
)
def test_a_tag_that_is_not_as_it_must_be_is_refused(old: str, new: str) -> None:
    xml = rim_maker().xml(VBIOS, [1])
    assert old in xml
    changed = xml.replace(old, new)
    if "SoftwareIdentity" in old:
        data = rim_maker().sign(xml).replace(b"SoftwareIdentity", b"Software")
    else:
        data = signed(changed)
    refused(Reason.MALFORMED, lambda: verify(data))


# Unsafe XML


def inserted(text: str) -> bytes:
    return rim_maker().vbios.replace(b"<ns0:Payload ", text.encode() + b"<ns0:Payload ")


@pytest.mark.parametrize(
    "data",
    [
        lambda: b"<!DOCTYPE a [<!ENTITY x 'y'>]>" + rim_maker().vbios,
        lambda: b'<!DOCTYPE a SYSTEM "file:///etc/passwd">' + rim_maker().vbios,
        lambda: inserted("<!-- a comment -->"),
        lambda: inserted("<![CDATA[x]]>"),
        lambda: inserted("<?php ?>"),
        lambda: inserted("&amp;"),
        lambda: inserted("&#32;"),
        lambda: rim_maker().vbios.replace(b'name="GH100"', b'name="GH&xxe;"'),
        lambda: rim_maker().vbios.decode().encode("utf-16"),
        lambda: b'<?xml version="1.0" encoding="UTF-7"?>' + rim_maker().vbios,
        lambda: b"\xef\xbb\xbf" + rim_maker().vbios,
        lambda: rim_maker().vbios.replace(b"Test Corporation", "Tést Corporation".encode()),
        lambda: rim_maker().vbios[:-1],
        lambda: rim_maker().vbios + b"<a/>",
        lambda: rim_maker().vbios * 2,
        lambda: b"<a>" * 5000 + b"</a>" * 5000,
        lambda: b"<a " + b"b='' " * 2000 + b"/>",
    ],
)
def test_xml_that_is_not_plain_is_refused(data: Callable[[], bytes]) -> None:
    refused(Reason.MALFORMED, lambda: verify(data()))


def test_a_rim_that_is_too_large_is_refused() -> None:
    refused(Reason.TOO_LARGE, lambda: verify(b"<" * (MAX_RIM_BYTES + 1)))


def test_files_are_sorted_by_how_they_begin() -> None:
    assert looks_like_rim(rim_maker().driver)
    assert looks_like_rim(b'\n<?xml version="1.0"?><a/>')
    assert not looks_like_rim(rim_maker().chain.pem)
    assert not looks_like_rim(b"")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 22000), st.integers(0, 100))
def test_no_bytes_make_the_reader_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    rim = rim_maker().vbios
    for data in (noise, b"<" + noise, rim[:at] + noise + rim[at + cut :]):
        try:
            verify(data)
        except KeyquorumError:
            continue


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["ns0:Resource", "ns0:Meta", "ds:Signature", "a", "ns0:Payload"]), max_size=8))
def test_no_arrangement_of_elements_makes_the_reader_raise_anything_else(names: list[str]) -> None:
    inside = "".join(f"<{name}>" for name in names) + "".join(f"</{name}>" for name in reversed(names))
    inside = inside.replace("ds:", "ns0:")
    data = signed(rim_maker().xml(DRIVER, [21]).replace("<ns0:Payload ", f"{inside}<ns0:Payload "))
    for each in (data, inserted(inside)):
        try:
            verify(each)
        except KeyquorumError:
            continue
        assert not names
