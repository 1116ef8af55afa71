"""TDX quotes: appraisal (docs/spec/evidence-tdx.md).

Do we accept a genuine quote? :func:`evaluate` makes these checks, in this order, and a custodian refuses at the first
that is not met:

1. attributes: debugging and profiling off, SEPT_VE_DISABLE on, no migration, no service TD, none unknown
                                     ``DEBUG_ENABLED``, ``UNSUPPORTED``, ``MEASUREMENT``, ``PROVENANCE``
2. the root is one that the reference values name, and a development root only where they name it as one
                                                                                     ``ROOT_NOT_PINNED``
3. the collateral was issued no longer ago than ``max_collateral_age``                          ``STALE``
4. TCB evaluation data number at least the minimum                                                ``TCB``
5. TCB status at launch, now, and of the QE: ``UpToDate``, or an exception names it that has not ended
                                                                                                  ``TCB``
6. for each advisory: an exception names it that has not ended                                    ``TCB``
7. the event log, where there is one, replays into RTMR0–3                   ``MALFORMED``, ``MEASUREMENT``
8. MRTD, RTMR0–3 and MRCONFIGID are all those of one image in the allowlist, whose grace period, if it has one, has
   not ended                                                                              ``MEASUREMENT``
9. report data equals the binding of keys and challenge (:func:`check_binding`)              ``BINDING``
10. the platform names itself: a PPID that is not zero                                    ``PROVENANCE``

Reference values are strict: each member is required, and only the list of exceptions and one of the two lists of roots
may be empty, which accepts less. MRTD and MRCONFIGID are given as values, and so is each RTMR: a register that nothing
extended is 48 zero bytes, and a list says so.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass

from keyquorum_core.attestation.findings import Finding, attempt, finding, require
from keyquorum_core.attestation.tdx import PPID_BYTES, VerifiedQuote, check_attributes
from keyquorum_core.attestation.tdx_events import check_event_log
from keyquorum_core.attestation.tdx_quote import RTMR_COUNT
from keyquorum_core.attestation.tdx_reference import TdxImage, TdxReferenceValues
from keyquorum_core.errors import Reason

__all__ = ["TDX", "UP_TO_DATE", "AppraisedQuote", "about_attributes", "about_log", "check_binding", "evaluate"]

TDX = "tdx"
UP_TO_DATE = "UpToDate"


@dataclass(frozen=True, slots=True)
class AppraisedQuote:
    """What follows from a quote, if every finding about it is met."""

    image: str
    """The name that the reference values give to what was measured; empty for none."""
    hardware_id: str
    """The PPID, 16 bytes in hex: the key into the inventory."""
    used_exceptions: tuple[str, ...]
    not_after: int
    """Unix seconds: the first of the collateral's end, its greatest age, and the ends of exceptions and grace periods
    that were needed."""


def appraise(
    verified: VerifiedQuote,
    reference: TdxReferenceValues,
    *,
    expected_report_data: bytes,
    now: int,
    event_log: bytes | None = None,
) -> AppraisedQuote:
    """All checks on a genuine quote at ``now`` (unix seconds); ``expected_report_data`` is 64 bytes.

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    findings, appraised = evaluate(verified, reference, now=now, event_log=event_log)
    require([*findings, check_binding(verified, expected_report_data)])
    return appraised


def evaluate(
    verified: VerifiedQuote, reference: TdxReferenceValues, *, now: int, event_log: bytes | None = None
) -> tuple[list[Finding], AppraisedQuote]:
    """All checks but that of the binding."""
    used: dict[str, int] = {}
    stale_after = verified.collateral_issued_at + reference.max_collateral_age
    allowed = reference.development_roots if verified.development else reference.roots
    findings = [
        about_attributes(verified),
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
            "collateral.age",
            Reason.STALE,
            "the collateral is older than is accepted",
            expected=f"issued at or after {now - reference.max_collateral_age}",
            actual=verified.collateral_issued_at,
            next_step="fetch the collateral anew",
        ),
        finding(
            verified.tcb_evaluation_data_number >= reference.minimum_tcb_evaluation_data_number,
            "tcb_evaluation_data_number",
            Reason.TCB,
            "the collateral is of an earlier TCB recovery than is accepted",
            expected=f"TCB evaluation data number at least {reference.minimum_tcb_evaluation_data_number}",
            actual=verified.tcb_evaluation_data_number,
        ),
        *_tcb(verified, reference, now, used),
    ]
    if event_log is not None:
        findings.append(about_log(verified, event_log))
    image, about = _image(verified, reference, now)
    findings += about
    findings.append(
        finding(
            len(verified.ppid) == PPID_BYTES and any(verified.ppid),
            "ppid",
            Reason.PROVENANCE,
            "the platform does not name itself",
            expected=f"a PPID of {PPID_BYTES} bytes, not zero",
            actual=verified.ppid.hex(),
        )
    )
    ends = [verified.not_after, stale_after, *used.values()]
    if image is not None and image.until is not None:
        ends.append(image.until)
    name = "" if image is None else image.name
    return findings, AppraisedQuote(name, verified.ppid.hex(), tuple(used), min(ends))


def about_attributes(verified: VerifiedQuote) -> Finding:
    """Check 1."""

    def check() -> str:
        check_attributes(verified.quote)
        return ", ".join(verified.quote.names_of_attributes())

    return attempt("td_attributes", "SEPT_VE_DISABLE; no debugging, migration or service TD", check)


def about_log(verified: VerifiedQuote, event_log: bytes) -> Finding:
    """Check 7."""
    return attempt(
        "event_log",
        "a log that replays into RTMR0–3",
        lambda: f"{len(check_event_log(verified.quote, event_log))} events that do",
    )


def check_binding(verified: VerifiedQuote, expected: bytes) -> Finding:
    """Check 9, against 64 bytes."""
    return finding(
        hmac.compare_digest(verified.quote.report_data, expected),
        "report_data",
        Reason.BINDING,
        "the quote is not bound to these keys and this challenge",
        expected=expected.hex(),
        actual=verified.quote.report_data.hex(),
    )


def _tcb(verified: VerifiedQuote, reference: TdxReferenceValues, now: int, used: dict[str, int]) -> Iterator[Finding]:
    """Checks 5 and 6; the exceptions that were needed go to ``used`` with their ends."""
    current = verified.current_tcb_status or verified.tcb_status  # a TD 1.0 body states the launch TCB alone
    exceptions = {each.name: each.until for each in reference.tcb_exceptions}
    statuses = [("platform", verified.tcb_status), ("current", current), ("QE", verified.qe_status)]
    for which, name in (
        *((f"{which} TCB status", status) for which, status in statuses),
        *(("advisory", each) for each in verified.advisory_ids),
    ):
        if name == UP_TO_DATE and which != "advisory":
            yield Finding(f"tcb.{which}", UP_TO_DATE, name)
            continue
        end = exceptions.get(name)
        if end is not None and now <= end:
            used[name] = end
        yield finding(
            end is not None and now <= end,
            f"tcb.{which}",
            Reason.TCB,
            f"the {which} is not accepted" + ("" if end is None else f"; its exception ended at {end}"),
            expected=f"{UP_TO_DATE} and no advisory, or an exception for {name}",
            actual=name,
        )


def _image(verified: VerifiedQuote, reference: TdxReferenceValues, now: int) -> tuple[TdxImage | None, list[Finding]]:
    """Check 8: of the images with this MRTD, the one that fits best."""
    best: tuple[int, TdxImage, list[Finding]] | None = None
    for image in reference.images:
        if not hmac.compare_digest(image.mrtd, verified.quote.mrtd):
            continue
        findings = list(_compare(verified, image, now))
        wrong = sum(not each.ok for each in findings)
        if best is None or wrong < best[0]:
            best = wrong, image, findings
    if best is not None:
        return best[1], best[2]
    return None, [
        finding(
            False,
            "MRTD",
            Reason.MEASUREMENT,
            "MRTD is not that of an image in the allowlist",
            expected=f"that of one of {len(reference.images)} images: "
            + ", ".join(f"{each.name} {each.mrtd.hex()}" for each in reference.images[:4]),
            actual=verified.quote.mrtd.hex(),
        )
    ]


def _compare(verified: VerifiedQuote, image: TdxImage, now: int) -> Iterator[Finding]:
    quote = verified.quote
    yield finding(
        image.until is None or now <= image.until,
        "MRTD",
        Reason.MEASUREMENT,
        f"the grace period of the image {image.name!r} has ended",
        expected=image.mrtd.hex() + ("" if image.until is None else f", until {image.until}"),
        actual=quote.mrtd.hex() + ("" if image.until is None else f", at {now}"),
    )
    registers = [(f"RTMR{index}", quote.rtmrs[index], image.rtmrs[index]) for index in range(RTMR_COUNT)]
    for name, actual, allowed in (*registers, ("MRCONFIGID", quote.mrconfigid, image.mrconfigid)):
        yield finding(
            actual in allowed,
            name,
            Reason.MEASUREMENT,
            f"{name} is not that of the image {image.name!r}",
            expected=" or ".join(sorted(each.hex() for each in allowed)[:4]),
            actual=actual.hex(),
        )
