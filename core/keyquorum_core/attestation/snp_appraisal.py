"""SEV-SNP reports: appraisal (docs/spec/evidence.md).

Do we accept a genuine report? :func:`evaluate` makes these checks, in this order, and a custodian refuses at the first
that is not met:

1. debugging is not allowed by the guest policy                                    ``DEBUG_ENABLED``
2. a migration agent is not allowed: the guest could leave the chip it names       ``PROVENANCE``
3. the root is one that the reference values name                                  ``ROOT_NOT_PINNED``
4. the VMPL is an allowed one                                                      ``VMPL``
5. reported, committed and launch TCB are at least the minimum, by component, or at least that of a grace period that
   has not ended; a product without a minimum is refused                           ``TCB``
6. the platform is configured as required, and in nothing as is not allowed        ``PLATFORM``
7. the measurement is that of an image in the allowlist, whose grace period, if it has one, has not ended
                                                                                   ``MEASUREMENT``
8. host data, ID key, author key and guest SVN are ones that this image may have   ``MEASUREMENT``
9. AMD's revocation lists of ARK and ASK are there where they are required, and no list is older than accepted
                                                                                   ``PROVENANCE``, ``STALE``
10. report data equals the binding of keys and challenge                           ``BINDING``
11. the chip names itself: the chip id is not masked                               ``PROVENANCE``
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass

from keyquorum_core.attestation.findings import Finding, finding
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.sev_snp import VerifiedReport
from keyquorum_core.attestation.snp_reference import PLATFORM_INFO, SnpImage, SnpReferenceValues
from keyquorum_core.errors import Reason

__all__ = ["SEV_SNP", "AppraisedReport", "check_binding", "check_chip", "check_debug", "evaluate"]

SEV_SNP = "sev-snp"


@dataclass(frozen=True, slots=True)
class AppraisedReport:
    """What follows from a report, if every finding about it is met."""

    image: str
    """The name that the reference values give to what was measured; empty for none."""
    not_after: int
    """Unix seconds: the first end of certificates, lists and grace periods that were needed."""


def check_debug(verified: VerifiedReport) -> Finding:
    """Check 1."""
    return finding(
        not verified.report.debug_allowed,
        "policy.debug",
        Reason.DEBUG_ENABLED,
        "the guest policy lets the host read the guest's memory for debugging",
        expected="policy bit 19 zero",
        actual=f"{verified.report.policy:#x}",
    )


def check_binding(verified: VerifiedReport, expected: bytes) -> Finding:
    """Check 10, against 64 bytes."""
    return finding(
        hmac.compare_digest(verified.report.report_data, expected),
        "report_data",
        Reason.BINDING,
        "the report is not bound to these keys and this challenge",
        expected=expected.hex(),
        actual=verified.report.report_data.hex(),
    )


def check_chip(verified: VerifiedReport) -> Finding:
    """Check 11."""
    return finding(
        not verified.report.chip_id_masked,
        "chip_id",
        Reason.PROVENANCE,
        "the report does not name its chip, so nobody knows where it stands",
        expected="a chip id that is not masked",
        actual=verified.report.chip_id.hex(),
    )


def evaluate(
    verified: VerifiedReport, reference: SnpReferenceValues, now: int
) -> tuple[list[Finding], AppraisedReport]:
    """Checks 1 to 9 and 11 on a genuine report at ``now`` (unix seconds)."""
    report = verified.report
    ends = [verified.not_after]
    findings = [
        check_debug(verified),
        finding(
            not report.migration_agent_allowed,
            "policy.migration_agent",
            Reason.PROVENANCE,
            "the guest policy allows a migration agent, so the guest may leave the chip that it names",
            expected="policy bit 18 zero",
            actual=f"{report.policy:#x}",
        ),
        _root(verified, reference),
        finding(
            report.vmpl in reference.vmpl,
            "vmpl",
            Reason.VMPL,
            "the report was asked for at a privilege level that is not allowed",
            expected=f"one of {sorted(reference.vmpl)}",
            actual=report.vmpl,
        ),
        *_tcb(verified, reference, now, ends),
        *_platform(verified, reference),
    ]
    image, about = _image(verified, reference, now)
    findings += about
    if image is not None and image.until is not None:
        ends.append(image.until)
    findings += _revocation(verified, reference, now)
    if verified.revocation.issuers:
        ends.append(verified.revocation.issued_at + reference.max_revocation_age)
    findings.append(check_chip(verified))
    return findings, AppraisedReport("" if image is None else image.name, min(ends))


def _root(verified: VerifiedReport, reference: SnpReferenceValues) -> Finding:
    root = verified.endorsement.root
    allowed = reference.roots if root in AMD_ROOTS else reference.development_roots
    return finding(
        root in allowed,
        "root",
        Reason.ROOT_NOT_PINNED,
        "the reference values do not name this root",
        expected=", ".join(sorted(allowed)) or "no root of this kind",
        actual=root,
    )


def _tcb(verified: VerifiedReport, reference: SnpReferenceValues, now: int, ends: list[int]) -> Iterator[Finding]:
    """Check 5; the ends of grace periods that are needed go to ``ends``."""
    product = verified.product
    minimum = reference.minimum_tcb.get(product)
    if minimum is None:
        yield finding(
            False,
            "tcb",
            Reason.TCB,
            "no minimum TCB is set for this product",
            expected=f"a minimum for one of {', '.join(reference.minimum_tcb)}",
            actual=product,
        )
        return
    tcbs = verified.tcbs()
    counted = ("reported", "committed", "launch")
    graces = [each for each in reference.tcb_grace if each.product is product]
    met = all(tcbs[which][name] >= level for which in counted for name, level in minimum.items())
    if not met:
        open_ones = [
            each
            for each in graces
            if now <= each.until
            and all(tcbs[which][name] >= level for which in counted for name, level in each.minimum.items())
        ]
        if open_ones:
            best = max(open_ones, key=lambda each: each.until)
            ends.append(best.until)
            minimum = best.minimum
    over = max((each.until for each in graces if each.until < now), default=None)
    for which in counted:
        for component, level in minimum.items():
            yield finding(
                tcbs[which][component] >= level,
                f"tcb.{which}.{component}",
                Reason.TCB,
                f"the {which} TCB is below the minimum in {component}"
                + ("" if over is None or met else f"; a grace period ended at {over}"),
                expected=f"at least {level}",
                actual=tcbs[which][component],
            )


def _platform(verified: VerifiedReport, reference: SnpReferenceValues) -> Iterator[Finding]:
    """Check 6."""
    info = verified.report.platform_info
    shown = ", ".join(name for name, bit in PLATFORM_INFO.items() if info & bit) or "none"
    for ok, what, bits in (
        (info & reference.platform_required == reference.platform_required, "required", reference.platform_required),
        (not info & ~reference.platform_allowed, "allowed", reference.platform_allowed),
    ):
        named = ", ".join(name for name, bit in PLATFORM_INFO.items() if bits & bit) or "none"
        yield finding(
            ok,
            f"platform_info.{what}",
            Reason.PLATFORM,
            "the platform lacks a setting that is required"
            if what == "required"
            else "the platform has a setting that is not allowed",
            expected=f"{'all' if what == 'required' else 'none but'} of: {named}",
            actual=f"{shown} ({info:#x})",
        )


def _image(verified: VerifiedReport, reference: SnpReferenceValues, now: int) -> tuple[SnpImage | None, list[Finding]]:
    """Checks 7 and 8: of the images with this measurement, the one that fits best."""
    report = verified.report
    best: tuple[int, SnpImage | None, list[Finding]] | None = None
    for image in reference.images:
        if not hmac.compare_digest(image.measurement, report.measurement):
            continue
        findings = _compare(verified, image, now)
        wrong = sum(not each.ok for each in findings)
        if best is None or wrong < best[0]:
            best = wrong, image, findings
    if best is not None:
        return best[1], best[2]
    return None, [
        finding(
            False,
            "measurement",
            Reason.MEASUREMENT,
            "the launch measurement is not in the allowlist",
            expected=f"that of one of {len(reference.images)} images: "
            + ", ".join(f"{each.name} {each.measurement.hex()}" for each in reference.images[:4]),
            actual=report.measurement.hex(),
        )
    ]


def _compare(verified: VerifiedReport, image: SnpImage, now: int) -> list[Finding]:
    report = verified.report
    out = [
        finding(
            image.until is None or now <= image.until,
            "measurement",
            Reason.MEASUREMENT,
            f"the grace period of the image {image.name!r} has ended",
            expected=image.measurement.hex() + ("" if image.until is None else f", until {image.until}"),
            actual=f"{report.measurement.hex()}, at {now}" if image.until is not None else report.measurement.hex(),
        )
    ]
    for field, actual, allowed in (
        ("host_data", report.host_data, image.host_data),
        ("id_key_digest", report.id_key_digest, image.id_key_digests),
        ("author_key_digest", report.author_key_digest, image.author_key_digests),
    ):
        out.append(
            finding(
                actual in allowed,
                field,
                Reason.MEASUREMENT,
                f"the report has another {field} than the image {image.name!r} may have",
                expected=" or ".join(sorted(each.hex() for each in allowed)[:4]),
                actual=actual.hex(),
            )
        )
    out.append(
        finding(
            report.guest_svn >= image.minimum_guest_svn,
            "guest_svn",
            Reason.MEASUREMENT,
            f"the guest's security version is below that of the image {image.name!r}",
            expected=f"at least {image.minimum_guest_svn}",
            actual=report.guest_svn,
        )
    )
    return out


def _revocation(verified: VerifiedReport, reference: SnpReferenceValues, now: int) -> Iterator[Finding]:
    """Check 9. AMD publishes one list for each product, by the ARK, which names ASKs."""
    lists = verified.revocation
    yield finding(
        not reference.require_revocation or "ARK" in lists.issuers,
        "revocation",
        Reason.PROVENANCE,
        "the endorsements come without AMD's revocation list, and the reference values require it",
        expected="a list by the ARK" if reference.require_revocation else "a list, or none",
        actual=", ".join(lists.issuers) or "none",
        next_step="send the product's CRL along with the endorsements",
    )
    if lists.issuers:
        yield finding(
            now - lists.issued_at <= reference.max_revocation_age,
            "revocation.age",
            Reason.STALE,
            "the revocation list is older than is accepted",
            expected=f"issued at or after {now - reference.max_revocation_age}",
            actual=lists.issued_at,
            next_step="fetch it anew from AMD",
        )
