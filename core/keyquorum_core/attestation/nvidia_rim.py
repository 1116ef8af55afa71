"""NVIDIA's reference integrity manifests: golden measurements of one driver or one VBIOS, in signed XML.

A RIM is a TCG RIM in a SWID tag (ISO/IEC 19770-2:2015) with one enveloped XML signature. Checks of :func:`verify_rim`,
in order; each one refuses, none can be turned off:

1. size, plain ASCII, no DTD, entity, comment, CDATA or processing instruction     ``TOO_LARGE``, ``MALFORMED``
2. the elements, each where it belongs and with the attributes it must have, and no other  ``MALFORMED``
3. the one signature profile that NVIDIA uses (below)                                    ``UNSUPPORTED``
4. the chain in the signature, two to six certificates, to a pinned root
   (:mod:`~keyquorum_core.attestation.nvidia_certificates`)  ``MALFORMED``, ``CHAIN``, ``ROOT_NOT_PINNED``
5. the digest in the signature is that of the manifest without the signature             ``SIGNATURE``
6. the signature over ``SignedInfo`` verifies with the first certificate's key           ``SIGNATURE``
7. a complete tag of a GPU's RIM; each index once, as many hashes as it says, 48 bytes each  ``MALFORMED``
8. at least one golden value is active                                                   ``MEASUREMENT``
9. all certificates are valid at ``now``                                   ``NOT_YET_VALID``, ``EXPIRED``

The profile: one ``Reference`` with ``URI=""``, transforms enveloped-signature and C14N, digest SHA-384, signature
ECDSA P-384 with SHA-384 as r ‖ s. C14N is 1.0 or 1.1: the two differ only in attributes of the ``xml:`` prefix, which
are refused. Why this is done here and not by a general library is in docs/adr/0008-rim-signatures.md.

The canonical bytes whose digest was verified are parsed anew, and what comes out is what is read: nothing outside the
signed tree can be, whatever a parser makes of the file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from lxml import etree

from keyquorum_core.attestation.nvidia_certificates import Certificate, check_validity, verify_chain
from keyquorum_core.attestation.roots import NVIDIA_RIM_ROOTS
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["MAX_RIM_BYTES", "Golden", "Rim", "looks_like_rim", "verify_rim"]

MAX_RIM_BYTES = 128 << 10

_SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_TCG = "{https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/}"
_HASH = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"
_DS = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N = frozenset({"http://www.w3.org/2006/12/xml-c14n11", "http://www.w3.org/TR/2001/REC-xml-c14n-20010315"})
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_DECLARATION = re.compile(rb"""\A<\?xml version=["']1\.0["'](?: encoding=["'](?:[Uu][Tt][Ff]-8|US-ASCII)["'])?\s*\?>""")
_HEX = re.compile(r"[0-9a-f]{96}", re.ASCII)
_VERSION = re.compile(r"[0-9A-Za-z]+(?:\.[0-9A-Za-z]+){1,7}", re.ASCII)
_PRODUCT = re.compile(r"[A-Z0-9]{2,16}", re.ASCII)
_DIGEST_BYTES = 48
_CHAIN = range(2, 7)
_MAX_INDEX = 254  # a report's block index is one more, and one byte
_MAX_ALTERNATIVES = 64

_ROOT_ATTRIBUTES = frozenset({"corpus", "name", "patch", "supplemental", "tagId", "tagVersion", "version"})
_META_ATTRIBUTES = frozenset(
    {"PayloadType", "colloquialVersion", "edition", "product", "revision"}
    | {
        f"{_TCG}{each}"
        for each in (
            "BindingSpec",
            "BindingSpecVersion",
            "FirmwareManufacturer",
            "FirmwareManufacturerId",
            "PlatformManufacturerId",
            "PlatformManufacturerStr",
            "PlatformModel",
        )
    }
)
_RESOURCE_ATTRIBUTES = frozenset({"active", "alternatives", "index", "name", "size", "type"})


@dataclass(frozen=True, slots=True)
class Golden:
    """The values that a measurement may have, 48 bytes each, and what it is called."""

    name: str
    alternatives: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rim:
    """A manifest that is genuine."""

    product: str
    """The chip: ``GH100``, ``GB100`` …"""
    version: str
    """Of the driver (``535.86.09``) or the VBIOS (``96.00.5E.00.01``); nothing in a RIM says which of the two it is."""
    tag_id: str
    golden: Mapping[int, Golden]
    """The active ones by index, from 0; never empty."""
    inactive: frozenset[int]
    sha256: str
    """Of the file, hex."""
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    development: bool
    """The root is not NVIDIA's."""
    chain: tuple[Certificate, ...]
    """The signer's certificate first, the root last."""


@dataclass(frozen=True, slots=True)
class _Signed:
    """The manifest's two signed forms, and what was signed over them."""

    content: bytes
    info: bytes
    digest: bytes
    signature: bytes
    certificates: tuple[bytes, ...]


def looks_like_rim(data: bytes) -> bool:
    """Whether a file is XML, and so no certificate: for sorting, never a decision."""
    return data.lstrip()[:1] == b"<"


def verify_rim(data: bytes, *, pinned_roots: Collection[str], now: int) -> Rim:
    """Verify a RIM file at ``now`` (unix seconds). A RIM that verified is kept, but for its time.

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    if len(data) > MAX_RIM_BYTES:
        raise MalformedError(
            Reason.TOO_LARGE, "RIM: it is too large", expected=f"at most {MAX_RIM_BYTES} bytes", actual=len(data)
        )
    rim = _verify(data, frozenset(pinned_roots))
    check_validity(rim.chain, now)
    return rim


# All this costs milliseconds, a fleet has few RIMs, and only those signed under pinned roots are kept.
@lru_cache(maxsize=64)
def _verify(data: bytes, pinned_roots: frozenset[str]) -> Rim:
    signed = _parse(data)
    chain = verify_chain(signed.certificates, pinned_roots, what="RIM chain", sizes=_CHAIN)
    _check_signature(signed, chain)
    return _manifest(signed.content, hashlib.sha256(data).hexdigest(), chain)


def _parse(data: bytes) -> _Signed:
    """Checks 1 to 3."""
    root = _read(data)
    if root.tag != f"{_SWID}SoftwareIdentity" or len(root) == 0 or root[-1].tag != f"{_DS}Signature":
        raise _malformed("the document", "a SoftwareIdentity that ends in a Signature", root.tag)
    signature = root[-1]
    info, value, key_info = _children(signature, "SignedInfo", "SignatureValue", "KeyInfo")
    method, algorithm, reference = _children(info, "CanonicalizationMethod", "SignatureMethod", "Reference")
    transforms, digest_method, digest = _children(reference, "Transforms", "DigestMethod", "DigestValue")
    enveloped, canonical = _children(transforms, "Transform", "Transform")
    (x509_data,) = _children(key_info, "X509Data")
    certificates = _children(x509_data, *["X509Certificate"] * len(x509_data))
    for element, expected in (
        (method, _C14N),
        (algorithm, {_ECDSA_SHA384}),
        (enveloped, {_ENVELOPED}),
        (canonical, _C14N),
        (digest_method, {_SHA384}),
    ):
        actual = _attributes(element, frozenset({"Algorithm"}))["Algorithm"]
        _children(element)
        if actual not in expected:
            raise _unsupported(element.tag, " or ".join(sorted(expected)), actual)
    if _attributes(reference, frozenset({"URI"}))["URI"] != "":
        raise _unsupported("Reference", "the whole document, URI empty", reference.get("URI"))
    for element in (signature, info, transforms, digest, value, key_info, x509_data, *certificates):
        _attributes(element, frozenset())
    before = signature.getprevious()
    if before is None or (signature.tail or "").strip():
        raise _malformed("Signature", "after the payload, and nothing after it", "another place")
    signed_info = _canonical(info)
    # The enveloped-signature transform takes the element out, and leaves the text after it.
    before.tail = (before.tail or "") + (signature.tail or "")
    root.remove(signature)
    return _Signed(
        content=_canonical(root),
        info=signed_info,
        digest=_base64(digest, _DIGEST_BYTES),
        signature=_base64(value, 2 * _DIGEST_BYTES),
        certificates=tuple(_base64(each) for each in certificates),
    )


def _check_signature(signed: _Signed, chain: tuple[Certificate, ...]) -> None:
    """Checks 5 and 6."""
    if not hmac.compare_digest(hashlib.sha384(signed.content).digest(), signed.digest):
        raise RefusedError(
            Reason.SIGNATURE,
            "the RIM is not what was signed",
            expected=f"a SHA-384 digest of {signed.digest.hex()}",
            actual=hashlib.sha384(signed.content).hexdigest(),
        )
    r, s = (int.from_bytes(signed.signature[at : at + _DIGEST_BYTES], "big") for at in (0, _DIGEST_BYTES))
    try:
        chain[0].key.verify(encode_dss_signature(r, s), signed.info, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        raise RefusedError(
            Reason.SIGNATURE, f"the RIM's signature does not verify with the key of {chain[0].common_name}"
        ) from None


def _manifest(content: bytes, sha256: str, chain: tuple[Certificate, ...]) -> Rim:
    """Checks 7 and 8, on the canonical bytes that were verified."""
    root = _read(content)
    tag = _attributes(root, _ROOT_ATTRIBUTES)
    elements = list(root)
    if [each.tag for each in elements] != [f"{_SWID}{name}" for name in ("Entity", "Meta", "Payload")]:
        raise _malformed("SoftwareIdentity", "Entity, Meta and Payload", ", ".join(str(each.tag) for each in elements))
    entity, meta, payload = elements
    _attributes(entity, frozenset({"name", "role"}))
    _attributes(payload, frozenset())
    facts = _attributes(meta, _META_ATTRIBUTES)
    if {tag["corpus"], tag["patch"], tag["supplemental"]} != {"false"} or facts["edition"] != "GPU":
        raise _malformed("SoftwareIdentity", "the base RIM of a GPU: no corpus, patch or supplement", "another kind")
    product, version = facts["product"], facts["colloquialVersion"]
    if not _PRODUCT.fullmatch(product) or {tag["name"], facts[f"{_TCG}PlatformModel"]} != {product}:
        raise _malformed("product", "one name of a chip in all three places", ascii(product)[:40])
    if not _VERSION.fullmatch(version) or len(version) > 64:
        raise _malformed("colloquialVersion", "the version of a driver or a VBIOS", ascii(version)[:80])
    golden: dict[int, Golden] = {}
    inactive: set[int] = set()
    for resource in payload:
        index, active, value = _resource(resource)
        if index in golden or index in inactive:
            raise _malformed("Payload", "each index once", f"{index} twice")
        if active:
            golden[index] = value
        else:
            inactive.add(index)
    if not golden:
        raise RefusedError(
            Reason.MEASUREMENT,
            "the RIM holds no golden value to compare with",
            expected="at least one active measurement",
            actual=f"{len(inactive)} inactive ones",
        )
    return Rim(
        product=product,
        version=version,
        tag_id=tag["tagId"],
        golden=MappingProxyType(golden),
        inactive=frozenset(inactive),
        sha256=sha256,
        root=chain[-1].spki_sha256,
        development=chain[-1].spki_sha256 not in NVIDIA_RIM_ROOTS,
        chain=chain,
    )


def _resource(resource: etree._Element) -> tuple[int, bool, Golden]:
    if resource.tag != f"{_SWID}Resource" or len(resource):
        raise _malformed("Payload", "Resource elements with nothing inside", str(resource.tag)[-40:])
    names = {str(name) for name in resource.attrib}
    hashed = {name for name in names if name.startswith(_HASH)}
    facts = _attributes(resource, _RESOURCE_ATTRIBUTES | hashed)
    index = _number(facts["index"], 0, _MAX_INDEX)
    count = _number(facts["alternatives"], 1, _MAX_ALTERNATIVES)
    if hashed != {f"{_HASH}{number}" for number in range(count)}:
        raise _malformed(f"measurement {index}", f"Hash0 … Hash{count - 1}, as it says", f"{len(hashed)} hashes")
    values = [facts[f"{_HASH}{number}"] for number in range(count)]
    if facts["size"] != str(_DIGEST_BYTES) or not all(_HEX.fullmatch(each) for each in values):
        raise _malformed(f"measurement {index}", f"{_DIGEST_BYTES} bytes each in lower-case hex", facts["size"][:20])
    if facts["type"] != "Measurement" or facts["active"] not in ("True", "False"):
        raise _malformed(f"measurement {index}", "a Measurement that is active or is not", facts["active"][:20])
    golden = Golden(facts["name"][:64], tuple(bytes.fromhex(each) for each in values))
    return index, facts["active"] == "True", golden


def _read(data: bytes) -> etree._Element:
    """Check 1. What the parser never sees, it cannot expand, fetch or leave out."""
    body = data[len(found.group()) :] if (found := _DECLARATION.match(data)) else data
    for token in (b"<!", b"<?", b"&", b"\0"):
        if token in body:
            raise _malformed("the document", "no DTD, comment, CDATA, instruction or entity", repr(token)[1:])
    if not body.isascii():
        raise _malformed("the document", "ASCII", "other bytes")
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
        remove_blank_text=False,
    )
    try:
        root = etree.fromstring(body, parser)
    except (etree.LxmlError, ValueError) as error:
        raise _malformed("the document", "well-formed XML", type(error).__name__) from None
    for element in root.iter():
        if not isinstance(element.tag, str):
            raise _malformed("the document", "elements only", "another node")
        if any(str(name).startswith("{http://www.w3.org/XML/1998/namespace}") for name in element.attrib):
            raise _malformed("the document", "no attribute of the prefix xml", str(element.tag)[-40:])
    return root


def _canonical(element: etree._Element) -> bytes:
    """C14N without comments; a subtree inherits the namespaces around it, as the standard wants it."""
    try:
        return etree.tostring(element, method="c14n")
    except (etree.LxmlError, ValueError) as error:  # a relative namespace URI has no canonical form
        raise _malformed("the document", "XML with a canonical form", type(error).__name__) from None


def _children(element: etree._Element, *names: str) -> list[etree._Element]:
    """The children of an element of the signature, which must be exactly these, without text between them."""
    children = list(element)
    text = (element.text or "") + "".join(each.tail or "" for each in children)
    if [each.tag for each in children] != [f"{_DS}{name}" for name in names] or text.strip():
        raise _malformed(
            str(element.tag)[-40:], ", ".join(names) or "nothing inside", ", ".join(str(x.tag)[-30:] for x in children)
        )
    return children


def _attributes(element: etree._Element, expected: Collection[str]) -> dict[str, str]:
    attributes = {str(name): str(value) for name, value in element.attrib.items()}
    if attributes.keys() != set(expected):
        difference = ", ".join(sorted(attributes.keys() ^ set(expected)))
        raise _malformed(str(element.tag)[-40:], "exactly the attributes of the profile", difference[:200])
    return attributes


def _base64(element: etree._Element, size: int | None = None) -> bytes:
    """Canonical base64 in lines of any length, of ``size`` bytes where that is fixed."""
    text = "".join((element.text or "").split())
    try:
        value = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(element) or base64.b64encode(value).decode() != text or not value or size not in (None, len(value)):
        raise _malformed(str(element.tag)[-40:], f"base64 of {size or 'some'} bytes", f"{len(text)} characters")
    return value


def _number(text: str, minimum: int, maximum: int) -> int:
    value = int(text) if re.fullmatch(r"0|[1-9][0-9]{0,3}", text, re.ASCII) else -1
    if not minimum <= value <= maximum:
        raise _malformed("number", f"{minimum} … {maximum}", ascii(text)[:40])
    return value


def _unsupported(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(
        Reason.UNSUPPORTED, f"RIM: another signature profile: {str(what)[-40:]}", expected=expected, actual=actual
    )


def _malformed(what: object, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"RIM: {what}", expected=expected, actual=actual)
