"""AWS Nitro documents: appraisal (docs/spec/evidence-nitro.md).

Do we accept a genuine document? :func:`appraise` makes these checks, in this order, and refuses at the first failure:

1. PCR0, PCR1 and PCR2 are not zero, as they all are in an enclave that runs in debug mode    ``DEBUG_ENABLED``
2. the document can bind keys: ``public_key`` and ``nonce`` are there and not empty                  ``BINDING``
3. the root is one that the reference values name, and a development root only where they name it as one
                                                                                             ``ROOT_NOT_PINNED``
4. the document is no older than ``max_document_age``                                                  ``STALE``
5. all PCRs that an image in the allowlist names, PCR0, PCR1 and PCR2 among them, have its values, and the image's
   grace period, if it has one, has not ended                                                    ``MEASUREMENT``
6. ``public_key`` is the report data, and ``nonce`` the challenge                                    ``BINDING``
7. the module id names the instance, which the inventory knows it by                              ``PROVENANCE``

The Security Module takes at most 1024 bytes as ``public_key``, less than a hybrid public key has. So ``public_key``
holds the 64 bytes of :func:`~keyquorum_core.attestation.binding.report_data`, which commit to both public keys, the
challenge and the GPU evidence; ``nonce`` holds the 32 bytes of the challenge. ``user_data`` is not looked at.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass

from keyquorum_core.attestation.findings import Finding, finding, require
from keyquorum_core.attestation.nitro import VerifiedDocument
from keyquorum_core.attestation.nitro_reference import REQUIRED_PCRS, NitroImage, NitroReferenceValues
from keyquorum_core.errors import Reason

__all__ = [
    "NITRO",
    "AppraisedDocument",
    "appraise",
    "check_can_bind",
    "check_challenge",
    "check_debug",
    "check_report_data",
    "evaluate",
]

NITRO = "nitro"


@dataclass(frozen=True, slots=True)
class AppraisedDocument:
    """What follows from a document, if every finding about it is met."""

    image: str
    """The name that the reference values give to what was measured; empty for none."""
    hardware_id: str
    """The EC2 instance id: the key into the inventory."""
    not_after: int
    """Unix seconds: the first of the certificates' end, the document's greatest age, the end of a grace period."""


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
    findings, appraised = evaluate(verified, reference, now=now)
    require([*findings, check_report_data(verified, expected_report_data), check_challenge(verified, challenge)])
    return appraised


def evaluate(
    verified: VerifiedDocument, reference: NitroReferenceValues, *, now: int
) -> tuple[list[Finding], AppraisedDocument]:
    """All checks but the sixth, which comes to nothing where no keys are asked about."""
    document = verified.document
    allowed = reference.development_roots if verified.development else reference.roots
    stale_after = document.timestamp + reference.max_document_age
    image, about = _image(verified, reference, now)
    findings = [
        check_debug(verified),
        *check_can_bind(verified),
        finding(
            verified.root in allowed,
            "root",
            Reason.ROOT_NOT_PINNED,
            "the reference values do not name this root",
            expected=", ".join(sorted(allowed)) or "no root of this kind",
            actual=verified.root,
        ),
        finding(
            now <= stale_after,
            "timestamp",
            Reason.STALE,
            "the document is older than is accepted",
            expected=f"made at or after {now - reference.max_document_age}",
            actual=document.timestamp,
        ),
        *about,
        finding(
            bool(document.instance_id),
            "module_id",
            Reason.PROVENANCE,
            "the document does not name its instance",
            expected="a module id i-…-enc…",
            actual=document.module_id,
        ),
    ]
    ends = [verified.not_after, stale_after]
    if image is not None and image.until is not None:
        ends.append(image.until)
    return findings, AppraisedDocument("" if image is None else image.name, document.instance_id, min(ends))


def check_debug(verified: VerifiedDocument) -> Finding:
    """Check 1."""
    zero = next((index for index in REQUIRED_PCRS if not any(verified.document.pcrs[index])), None)
    return finding(
        zero is None,
        "debug",
        Reason.DEBUG_ENABLED,
        "the enclave runs in debug mode: the parent instance reads its console, and nothing is measured",
        expected="PCR0, PCR1 and PCR2 that are not zero",
        actual="none is zero" if zero is None else f"PCR{zero} is zero",
    )


def check_can_bind(verified: VerifiedDocument) -> Iterator[Finding]:
    """Check 2: required for every release."""
    for name, value in (("public_key", verified.document.public_key), ("nonce", verified.document.nonce)):
        yield finding(
            bool(value),
            name,
            Reason.BINDING,
            f"the document holds no {name}, and so can be bound to no key and no challenge",
            expected=f"a {name} given to the Security Module",
            actual="null" if value is None else f"{len(value)} bytes",
        )


def check_report_data(verified: VerifiedDocument, expected: bytes) -> Finding:
    """The first half of check 6, against 64 bytes."""
    actual = verified.document.public_key or b""
    return finding(
        hmac.compare_digest(actual, expected) and bool(expected),
        "public_key.binding",
        Reason.BINDING,
        "the document is not bound to these keys and this challenge",
        expected=expected.hex(),
        actual=actual.hex(),
    )


def check_challenge(verified: VerifiedDocument, challenge: bytes) -> Finding:
    """The second half of check 6, against 32 bytes."""
    actual = verified.document.nonce or b""
    return finding(
        hmac.compare_digest(actual, challenge) and bool(challenge),
        "nonce.binding",
        Reason.BINDING,
        "the document answers another challenge",
        expected=challenge.hex(),
        actual=actual.hex(),
    )


def _image(
    verified: VerifiedDocument, reference: NitroReferenceValues, now: int
) -> tuple[NitroImage | None, list[Finding]]:
    """Check 5: the image that fits best, and how it compares."""
    best: tuple[int, NitroImage, list[Finding]] | None = None
    for image in reference.images:
        findings = list(_compare(verified, image, now))
        wrong = sum(not each.ok for each in findings)
        if best is None or wrong < best[0]:
            best = wrong, image, findings
    if best is not None:
        return best[1], best[2]
    return None, [finding(False, "image", Reason.MEASUREMENT, "no image is listed", expected="an image", actual="none")]


def _compare(verified: VerifiedDocument, image: NitroImage, now: int) -> Iterator[Finding]:
    for index, value in sorted(image.pcrs.items()):
        actual = verified.document.pcrs.get(index)
        yield finding(
            actual is not None and hmac.compare_digest(actual, value),
            f"PCR{index}",
            Reason.MEASUREMENT,
            f"PCR{index} is not that of an image in the allowlist",
            expected=f"{value.hex()}, as of {image.name}",
            actual="none" if actual is None else actual.hex(),
        )
    if image.until is not None:
        yield finding(
            now <= image.until,
            "image.until",
            Reason.MEASUREMENT,
            f"the grace period of the image {image.name!r} has ended",
            expected=f"at or before {image.until}",
            actual=now,
        )
