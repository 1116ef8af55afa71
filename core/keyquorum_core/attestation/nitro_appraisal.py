"""AWS Nitro documents: appraisal, and the reference values for it (docs/spec/evidence-nitro.md).

Do we accept a genuine document? :func:`appraise` makes these checks, in this order, and refuses at the first failure:

1. PCR0, PCR1 and PCR2 are not zero, as they all are in an enclave that runs in debug mode    ``DEBUG_ENABLED``
2. the document can bind keys: ``public_key`` and ``nonce`` are there and not empty                  ``BINDING``
3. the root is one that the reference values name, and a development root only where they name it as one
                                                                                             ``ROOT_NOT_PINNED``
4. the document is no older than ``max_document_age``                                                  ``STALE``
5. all PCRs that an image in the allowlist names, PCR0, PCR1 and PCR2 among them, have its values
                                                                                                 ``MEASUREMENT``
6. ``public_key`` is the report data, and ``nonce`` the challenge                                    ``BINDING``
7. the module id names the instance, which the inventory knows it by                              ``PROVENANCE``

The Security Module takes at most 1024 bytes as ``public_key``, less than a hybrid public key has. So ``public_key``
holds the 64 bytes of :func:`~keyquorum_core.attestation.binding.report_data`, which commit to both public keys, the
challenge and the GPU evidence; ``nonce`` holds the 32 bytes of the challenge. ``user_data`` is not looked at.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.nitro import VerifiedDocument
from keyquorum_core.attestation.nitro_document import PCR_BYTES
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields

__all__ = [
    "AppraisedDocument",
    "NitroImage",
    "NitroReferenceValues",
    "appraise",
    "check_binding",
    "check_can_bind",
    "check_not_debug",
    "check_reference",
    "check_report_data",
]

NITRO = "nitro"

_WHAT = "Nitro reference values"
_REQUIRED_PCRS = (0, 1, 2)
_FURTHER_PCRS = range(3, 32)
_MAX_ROOTS = 64
_MAX_IMAGES = 1024
_MAX_DOCUMENT_AGE = 3 * 3600


@dataclass(frozen=True, slots=True)
class NitroImage:
    """One image and its PCRs, 48 bytes each: 0, 1 and 2, and those of 3 … 31 that are to be met too."""

    name: str
    pcrs: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class NitroReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """AWS roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    images: tuple[NitroImage, ...]
    max_document_age: int
    """Seconds."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> NitroReferenceValues:
        """Read the ``nitro`` member of a reference values file, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        roots = _roots(fields, "roots")
        development = _roots(fields, "development_roots")
        images = tuple(_image(each) for each in fields.list("images", min_items=1, max_items=_MAX_IMAGES))
        max_document_age = fields.integer("max_document_age", 1, _MAX_DOCUMENT_AGE)
        fields.done()
        if roots - AWS_NITRO_ROOTS.keys():
            raise _bad("roots", "fingerprints of AWS's roots; others belong in development_roots", "others")
        if development & AWS_NITRO_ROOTS.keys():
            raise _bad("development_roots", "no root of AWS's", "AWS's")
        if not roots | development:
            raise _bad("roots", "at least one root, here or in development_roots", "none")
        if len({each.name for each in images}) != len(images):
            raise _bad("images", "each name once", "a repetition")
        return cls(roots, development, images, max_document_age)


@dataclass(frozen=True, slots=True)
class AppraisedDocument:
    """A document that was accepted."""

    verified: VerifiedDocument
    image: str
    """The name that the reference values give to what was measured."""
    hardware_id: str
    """The EC2 instance id: the key into the inventory."""
    not_before: int
    not_after: int
    """Unix seconds: the first of the certificates' end and the document's greatest age."""


def appraise(
    verified: VerifiedDocument,
    reference: NitroReferenceValues,
    *,
    expected_report_data: bytes,
    challenge: bytes,
    now: int,
) -> AppraisedDocument:
    """Appraise a genuine document at ``now`` (unix seconds); ``expected_report_data`` is 64 bytes, ``challenge`` 32.

    Raises :class:`RefusedError` with the reasons in the module's list.
    """
    appraised = check_reference(verified, reference, now=now)
    check_binding(verified, expected_report_data, challenge)
    return appraised


def check_reference(verified: VerifiedDocument, reference: NitroReferenceValues, *, now: int) -> AppraisedDocument:
    """All checks but the sixth, which comes to nothing where no keys are asked about."""
    check_not_debug(verified)
    check_can_bind(verified)
    allowed = reference.development_roots if verified.development else reference.roots
    if verified.root not in allowed:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the reference values do not name this root",
            expected=", ".join(sorted(allowed)) or "no root of this kind",
            actual=verified.root,
        )
    stale_after = verified.document.timestamp + reference.max_document_age
    if now > stale_after:
        raise RefusedError(
            Reason.STALE,
            "the document is older than is accepted",
            expected=f"made at or after {now - reference.max_document_age}",
            actual=verified.document.timestamp,
        )
    image = _find_image(verified, reference)
    if not verified.document.instance_id:
        raise RefusedError(
            Reason.PROVENANCE,
            "the document does not name its instance",
            expected="a module id i-…-enc…",
            actual=verified.document.module_id,
        )
    return AppraisedDocument(
        verified=verified,
        image=image.name,
        hardware_id=verified.document.instance_id,
        not_before=verified.not_before,
        not_after=min(verified.not_after, stale_after),
    )


def check_not_debug(verified: VerifiedDocument) -> None:
    """Check 1. Raises :class:`RefusedError` ``DEBUG_ENABLED``."""
    zero = next((index for index in _REQUIRED_PCRS if not any(verified.document.pcrs[index])), None)
    if zero is not None:
        raise RefusedError(
            Reason.DEBUG_ENABLED,
            "the enclave runs in debug mode: the parent instance reads its console, and nothing is measured",
            expected=f"a PCR{zero} that is not zero",
            actual="zero",
        )


def check_can_bind(verified: VerifiedDocument) -> None:
    """Check 2: required for every release. Raises :class:`RefusedError` ``BINDING``."""
    for name, value in (("public_key", verified.document.public_key), ("nonce", verified.document.nonce)):
        if not value:
            raise RefusedError(
                Reason.BINDING,
                f"the document holds no {name}, and so can be bound to no key and no challenge",
                expected=f"a {name} given to the Security Module",
                actual="null" if value is None else "an empty one",
            )


def check_report_data(verified: VerifiedDocument, expected: bytes) -> None:
    """The first half of check 6, against 64 bytes. Raises :class:`RefusedError` ``BINDING``."""
    check_can_bind(verified)
    actual = verified.document.public_key or b""
    if not hmac.compare_digest(actual, expected):
        raise RefusedError(
            Reason.BINDING,
            "the document is not bound to these keys and this challenge",
            expected=f"public_key {expected.hex()}",
            actual=actual.hex(),
        )


def check_binding(verified: VerifiedDocument, expected_report_data: bytes, challenge: bytes) -> None:
    """Check 6. Raises :class:`RefusedError` ``BINDING``."""
    check_report_data(verified, expected_report_data)
    actual = verified.document.nonce or b""
    if not hmac.compare_digest(actual, challenge):
        raise RefusedError(
            Reason.BINDING,
            "the document answers another challenge",
            expected=f"nonce {challenge.hex()}",
            actual=actual.hex(),
        )


def _find_image(verified: VerifiedDocument, reference: NitroReferenceValues) -> NitroImage:
    """Check 5. Names the first PCR in which the nearest image differs."""
    pcrs = verified.document.pcrs
    wrong = 0
    for image in reference.images:
        differing = [index for index, value in sorted(image.pcrs.items()) if pcrs.get(index) != value]
        if not differing:
            return image
        wrong = max(wrong, differing[0])
    raise RefusedError(
        Reason.MEASUREMENT,
        f"PCR{wrong} is not that of an image in the allowlist",
        expected=f"all PCRs of one of {len(reference.images)} images",
        actual=pcrs[wrong].hex() if wrong in pcrs else "none",
    )


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: bad member {member!r}", expected=expected, actual=actual)


def _roots(fields: Fields, name: str) -> frozenset[str]:
    values = fields.texts(name, max_items=_MAX_ROOTS, max_length=64)
    parsed = [Fields({name: each}, _WHAT).hex(name, 32).hex() for each in values]
    if len(set(parsed)) != len(parsed):
        raise _bad(name, "each value once", "a repetition")
    return frozenset(parsed)


def _image(value: object) -> NitroImage:
    fields = Fields(value, f"{_WHAT}.images")
    name = fields.text("name", max_length=128)
    given = fields.object("pcrs")
    fields.done()
    pcrs = {index: given.hex(str(index), PCR_BYTES) for index in _REQUIRED_PCRS}
    pcrs |= {index: given.hex(str(index), PCR_BYTES) for index in _FURTHER_PCRS if str(index) in given}
    given.done()
    if not all(any(value) for value in pcrs.values()):
        raise _bad("pcrs", "no value of zeros", "zeros")
    return NitroImage(name, MappingProxyType(pcrs))
