"""TDX quotes: appraisal, and the reference values for it (docs/spec/evidence-tdx.md).

Do we accept a genuine quote? :func:`appraise` makes these checks, in this order, and refuses at the first that fails:

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
8. MRTD, RTMR0–3 and MRCONFIGID are all those of one image in the allowlist              ``MEASUREMENT``
9. report data equals the binding of keys and challenge                                      ``BINDING``
10. the platform names itself: a PPID that is not zero                                    ``PROVENANCE``

Reference values are strict: each member is required, and only the list of exceptions and one of the two lists of roots
may be empty, which accepts less. MRTD and MRCONFIGID are given as values, and so is each RTMR: a register that nothing
extended is 48 zero bytes, and a list says so.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass

from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx import PPID_BYTES, VerifiedQuote, check_attributes
from keyquorum_core.attestation.tdx_events import check_event_log
from keyquorum_core.attestation.tdx_quote import MEASUREMENT_BYTES, RTMR_COUNT
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields

__all__ = [
    "AppraisedQuote",
    "TcbException",
    "TdxImage",
    "TdxReferenceValues",
    "appraise",
    "check_binding",
    "check_reference",
]

TDX = "tdx"
UP_TO_DATE = "UpToDate"
EXCEPTABLE = frozenset(
    {
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "TDRelaunchAdvised",
        "TDRelaunchAdvisedConfigurationNeeded",
    }
)
"""The statuses that an exception may name; ``Revoked`` is none of them."""

_WHAT = "TDX reference values"
_ADVISORY = re.compile(r"[A-Z][A-Z0-9]{0,15}(-[A-Z0-9]{1,16}){1,4}", re.ASCII)
_MAX_ROOTS = 64
_MAX_IMAGES = 1024
_MAX_VALUES = 256
_MAX_EXCEPTIONS = 256
_MAX_COLLATERAL_AGE = 400 * 86400


@dataclass(frozen=True, slots=True)
class TcbException:
    """A TCB status or an advisory that is accepted up to and including ``until`` (unix seconds)."""

    name: str
    until: int


@dataclass(frozen=True, slots=True)
class TdxImage:
    """One image and what it may measure as; measurements of different images are never mixed."""

    name: str
    mrtd: bytes
    rtmrs: tuple[frozenset[bytes], ...]
    """What each of RTMR0–3 may be: it depends on the machine's shape, and so there may be several."""
    mrconfigid: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class TdxReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """Intel roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    images: tuple[TdxImage, ...]
    minimum_tcb_evaluation_data_number: int
    max_collateral_age: int
    """Seconds."""
    tcb_exceptions: tuple[TcbException, ...]

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> TdxReferenceValues:
        """Read the ``tdx`` member of a reference values file, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        roots = frozenset(each.hex() for each in _values(fields, "roots", 32, minimum=0, maximum=_MAX_ROOTS))
        development = frozenset(
            each.hex() for each in _values(fields, "development_roots", 32, minimum=0, maximum=_MAX_ROOTS)
        )
        images = tuple(_image(each) for each in fields.list("images", min_items=1, max_items=_MAX_IMAGES))
        minimum = fields.integer("minimum_tcb_evaluation_data_number", 1, 0xFFFFFFFF)
        max_collateral_age = fields.integer("max_collateral_age", 1, _MAX_COLLATERAL_AGE)
        exceptions = tuple(_exception(each) for each in fields.list("tcb_exceptions", max_items=_MAX_EXCEPTIONS))
        fields.done()
        if roots - INTEL_ROOTS.keys():
            raise _bad("roots", "fingerprints of Intel's roots; others belong in development_roots", "others")
        if development & INTEL_ROOTS.keys():
            raise _bad("development_roots", "no root of Intel's", "Intel's")
        if not roots | development:
            raise _bad("roots", "at least one root, here or in development_roots", "none")
        if len({each.name for each in images}) != len(images):
            raise _bad("images", "each name once", "a repetition")
        if len({each.name for each in exceptions}) != len(exceptions):
            raise _bad("tcb_exceptions", "each status and advisory once", "a repetition")
        return cls(roots, development, images, minimum, max_collateral_age, exceptions)


@dataclass(frozen=True, slots=True)
class AppraisedQuote:
    """A quote that was accepted."""

    verified: VerifiedQuote
    image: str
    """The name that the reference values give to what was measured."""
    hardware_id: str
    """The PPID, 16 bytes in hex: the key into the inventory."""
    used_exceptions: tuple[str, ...]
    not_before: int
    not_after: int
    """Unix seconds: the first of the collateral's end, its greatest age, and the end of an exception that was used."""


def appraise(
    verified: VerifiedQuote,
    reference: TdxReferenceValues,
    *,
    expected_report_data: bytes,
    now: int,
    event_log: bytes | None = None,
) -> AppraisedQuote:
    """Appraise a genuine quote at ``now`` (unix seconds); ``expected_report_data`` is 64 bytes.

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    appraised = check_reference(verified, reference, now=now, event_log=event_log)
    check_binding(verified, expected_report_data)
    return appraised


def check_reference(
    verified: VerifiedQuote, reference: TdxReferenceValues, *, now: int, event_log: bytes | None = None
) -> AppraisedQuote:
    """All checks but that of the binding, which comes to nothing where no keys are asked about."""
    check_attributes(verified.quote)
    allowed = reference.development_roots if verified.development else reference.roots
    if verified.root not in allowed:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the reference values do not name this root",
            expected=", ".join(sorted(allowed)) or "no root of this kind",
            actual=verified.root,
        )
    stale_after = verified.collateral_issued_at + reference.max_collateral_age
    if now > stale_after:
        raise RefusedError(
            Reason.STALE,
            "the collateral is older than is accepted",
            expected=f"issued at or after {now - reference.max_collateral_age}",
            actual=verified.collateral_issued_at,
            next_step="fetch the collateral anew",
        )
    used = _check_tcb(verified, reference, now)
    if event_log is not None:
        check_event_log(verified.quote, event_log)
    image = _find_image(verified, reference)
    if len(verified.ppid) != PPID_BYTES or not any(verified.ppid):
        raise RefusedError(
            Reason.PROVENANCE,
            "the platform does not name itself",
            expected=f"a PPID of {PPID_BYTES} bytes, not zero",
            actual=verified.ppid.hex(),
        )
    return AppraisedQuote(
        verified=verified,
        image=image.name,
        hardware_id=verified.ppid.hex(),
        used_exceptions=tuple(each.name for each in used),
        not_before=verified.not_before,
        not_after=min(verified.not_after, stale_after, *(each.until for each in used)),
    )


def check_binding(verified: VerifiedQuote, expected: bytes) -> None:
    """Check 9, against 64 bytes. Raises :class:`RefusedError` ``BINDING``."""
    if not hmac.compare_digest(verified.quote.report_data, expected):
        raise RefusedError(
            Reason.BINDING,
            "the quote is not bound to these keys and this challenge",
            expected=f"report data {expected.hex()}",
            actual=verified.quote.report_data.hex(),
        )


def _check_tcb(verified: VerifiedQuote, reference: TdxReferenceValues, now: int) -> tuple[TcbException, ...]:
    """Checks 4 to 6. Returns the exceptions that were needed."""
    if verified.tcb_evaluation_data_number < reference.minimum_tcb_evaluation_data_number:
        raise RefusedError(
            Reason.TCB,
            "the collateral is of an earlier TCB recovery than is accepted",
            expected=f"TCB evaluation data number at least {reference.minimum_tcb_evaluation_data_number}",
            actual=verified.tcb_evaluation_data_number,
        )
    current = verified.current_tcb_status or verified.tcb_status  # a TD 1.0 body states the launch TCB alone
    needed = [
        (f"{which} TCB status", status)
        for which, status in (("platform", verified.tcb_status), ("current", current), ("QE", verified.qe_status))
        if status != UP_TO_DATE
    ]
    needed += [("advisory", each) for each in verified.advisory_ids]
    exceptions = {each.name: each for each in reference.tcb_exceptions}
    used: dict[str, TcbException] = {}
    for which, name in needed:
        exception = exceptions.get(name)
        if exception is None or now > exception.until:
            raise RefusedError(
                Reason.TCB,
                f"the {which} is not accepted" + (f"; its exception ended at {exception.until}" if exception else ""),
                expected=f"{UP_TO_DATE} and no advisory, or an exception for {name}",
                actual=name,
            )
        used[name] = exception
    return tuple(used.values())


def _find_image(verified: VerifiedQuote, reference: TdxReferenceValues) -> TdxImage:
    """Check 8. Names the first field in which the nearest image differs."""
    quote = verified.quote
    mismatch = ("MRTD", quote.mrtd)
    for image in reference.images:
        if image.mrtd != quote.mrtd:
            continue
        wrong = next((i for i in range(RTMR_COUNT) if quote.rtmrs[i] not in image.rtmrs[i]), None)
        if wrong is not None:
            mismatch = (f"RTMR{wrong}", quote.rtmrs[wrong])
        elif quote.mrconfigid not in image.mrconfigid:
            mismatch = ("MRCONFIGID", quote.mrconfigid)
        else:
            return image
    raise RefusedError(
        Reason.MEASUREMENT,
        f"{mismatch[0]} is not that of an image in the allowlist",
        expected=f"all measurements of one of {len(reference.images)} images",
        actual=mismatch[1].hex(),
    )


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: bad member {member!r}", expected=expected, actual=actual)


def _values(fields: Fields, name: str, size: int, *, minimum: int, maximum: int) -> frozenset[bytes]:
    values = fields.texts(name, min_items=minimum, max_items=maximum, max_length=2 * size)
    parsed = [Fields({name: each}, _WHAT).hex(name, size) for each in values]
    if len(set(parsed)) != len(parsed):
        raise _bad(name, "each value once", "a repetition")
    return frozenset(parsed)


def _image(value: object) -> TdxImage:
    fields = Fields(value, f"{_WHAT}.images")
    image = TdxImage(
        name=fields.text("name", max_length=128),
        mrtd=fields.hex("mrtd", MEASUREMENT_BYTES),
        rtmrs=tuple(
            _values(fields, f"rtmr{index}", MEASUREMENT_BYTES, minimum=1, maximum=_MAX_VALUES)
            for index in range(RTMR_COUNT)
        ),
        mrconfigid=_values(fields, "mrconfigid", MEASUREMENT_BYTES, minimum=1, maximum=_MAX_VALUES),
    )
    fields.done()
    if not any(image.mrtd):
        raise _bad("mrtd", "no value of zeros", "zeros")
    return image


def _exception(value: object) -> TcbException:
    fields = Fields(value, f"{_WHAT}.tcb_exceptions")
    status = "status" in fields
    name = fields.text("status" if status else "advisory", max_length=64)
    until = fields.integer("until", 1)
    fields.done()
    if status and name not in EXCEPTABLE:
        raise _bad("tcb_exceptions", f"a status out of {', '.join(sorted(EXCEPTABLE))}", ascii(name))
    if not status and not _ADVISORY.fullmatch(name):
        raise _bad("tcb_exceptions", "an advisory id such as INTEL-SA-00615", ascii(name))
    return TcbException(name, until)
