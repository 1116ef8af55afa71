"""NVIDIA GPUs: the evidence of a worker, its appraisal, and the reference values for it (docs/spec/evidence-nvidia.md).

Do we accept a worker's GPUs? :func:`appraise` makes these checks, in this order, and refuses at the first that fails:

1. the evidence is one canonical JSON value with one to sixteen GPUs                     ``MALFORMED``
2. what the worker read from its driver: production, confidential computing on, developer tools off, no
   protected PCIe                                ``MEASUREMENT``, ``DEBUG_ENABLED``, ``UNSUPPORTED``
3. each report is genuine (:mod:`~keyquorum_core.attestation.nvidia_gpu`)                that module's reasons
4. no GPU is shown twice                                                                 ``PROVENANCE``
5. each report answers this challenge                                                    ``BINDING``
6. each RIM is genuine (:mod:`~keyquorum_core.attestation.nvidia_rim`), and used         that module's reasons
7. OCSP responses that are there are verified, and all are there where they are required
   (:mod:`~keyquorum_core.attestation.nvidia_ocsp`)                                      that module's reasons
8. the roots are ones that the reference values name, and development roots only where they name them as such
                                                                                         ``ROOT_NOT_PINNED``
9. no report says that its GPU is in another mode than confidential computing            ``UNSUPPORTED``
10. each report states its firmware (FWID), and it is the signing key's                  ``MEASUREMENT``
11. chip, driver and VBIOS versions are in the allowlists                                ``TCB``
12. both RIMs, driver and VBIOS, are there for each GPU, and all golden values are met   ``MEASUREMENT``

Check 2 is the worker's word. It is worth what the CPU evidence makes it worth: that measures the software which read
the settings, and its report data binds the digest of this evidence. GPU evidence is not to be accepted without it.
Check 12 is the GPU's: NVIDIA's verifier, too, calls debugging disabled when all golden values are met.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

import rfc8785

from keyquorum_core.attestation.evidence import NVIDIA_GPU
from keyquorum_core.attestation.nvidia_certificates import Certificate
from keyquorum_core.attestation.nvidia_gpu import (
    GoldenMatch,
    VerifiedGpu,
    check_distinct,
    check_golden,
    check_mode,
    check_nonce,
    verify,
)
from keyquorum_core.attestation.nvidia_ocsp import MAX_AGE, looks_like_ocsp, require_responses, verify_revocation
from keyquorum_core.attestation.nvidia_report import MAX_REPORT_BYTES
from keyquorum_core.attestation.nvidia_rim import Rim, looks_like_rim, verify_rim
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "NVIDIA_GPU",
    "AppraisedGpus",
    "GpuEvidence",
    "NvidiaReferenceValues",
    "NvidiaSettings",
    "ShownGpu",
    "appraise",
    "check_reference",
    "check_settings",
]

MAX_GPUS = 16

_WHAT = "NVIDIA reference values"
_EVIDENCE = "NVIDIA evidence"
_MAX_EVIDENCE_BYTES = 256 << 10
_MAX_CERTIFICATE_BYTES = 4 << 10
_MAX_ROOTS = 64
_MAX_VERSIONS = 1024
_CHAIN_SIZE = 5
_PRODUCTION = "production"
_CHIP = re.compile(r"G[A-Z][0-9]{3}|G[A-Z][0-9A-Z]{3}", re.ASCII)
_DRIVER = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}", re.ASCII)
_VBIOS = re.compile(r"[0-9A-F]{2}(?:\.[0-9A-F]{2}){4}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NvidiaSettings:
    """What the driver tells the worker (``nvmlSystemGetConfComputeSettings``)."""

    environment: str
    """``production``, ``simulation`` or ``unavailable``."""
    cc_feature: bool
    developer_tools: bool
    multi_gpu: str
    """``none``, ``protected-pcie`` or ``nvlink-encryption``."""


@dataclass(frozen=True, slots=True)
class ShownGpu:
    """One GPU's raw report, and its chain of five as DER, the firmware's certificate first."""

    report: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """The evidence of all GPUs of a worker; RIMs and OCSP responses go with it as endorsements."""

    settings: NvidiaSettings
    gpus: tuple[ShownGpu, ...]

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON: the evidence of one item, which all other evidence binds
        (:func:`~keyquorum_core.attestation.binding.gpu_digest`)."""
        return rfc8785.dumps(
            {
                "v": 1,
                "settings": {
                    "environment": self.settings.environment,
                    "cc_feature": self.settings.cc_feature,
                    "developer_tools": self.settings.developer_tools,
                    "multi_gpu": self.settings.multi_gpu,
                },
                "gpus": [
                    {"report": _base64(each.report), "chain": [_base64(der) for der in each.chain]}
                    for each in self.gpus
                ],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> GpuEvidence:
        """Read evidence of at most 256 KiB. Raises :class:`MalformedError` for anything but canonical bytes of it."""
        fields = Fields(loads(data, _EVIDENCE, max_bytes=_MAX_EVIDENCE_BYTES, max_depth=6), _EVIDENCE)
        fields.integer("v", 1, 1)
        settings = fields.object("settings")
        evidence = cls(
            settings=NvidiaSettings(
                environment=_one_of(settings, "environment", _PRODUCTION, "simulation", "unavailable"),
                cc_feature=settings.boolean("cc_feature"),
                developer_tools=settings.boolean("developer_tools"),
                multi_gpu=_one_of(settings, "multi_gpu", "none", "protected-pcie", "nvlink-encryption"),
            ),
            gpus=tuple(_shown(each) for each in fields.list("gpus", min_items=1, max_items=MAX_GPUS)),
        )
        settings.done()
        fields.done()
        if evidence.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, f"{_EVIDENCE} is not canonical JSON", expected="RFC 8785 bytes")
        return evidence


@dataclass(frozen=True, slots=True)
class NvidiaReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """NVIDIA roots of device certificates, SHA-256 of SubjectPublicKeyInfo in hex."""
    rim_roots: frozenset[str]
    development_roots: frozenset[str]
    """Of either kind."""
    chips: frozenset[str]
    driver_versions: frozenset[str]
    vbios_versions: frozenset[str]
    require_revocation: bool
    max_revocation_age: int
    """Seconds since an OCSP response's update."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def pinned_rim_roots(self) -> frozenset[str]:
        return self.rim_roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> NvidiaReferenceValues:
        """Read the ``nvidia-gpu`` member of a reference values file, as
        :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        roots, rim_roots, development = (_roots(fields, name) for name in ("roots", "rim_roots", "development_roots"))
        values = cls(
            roots=roots,
            rim_roots=rim_roots,
            development_roots=development,
            chips=_versions(fields, "chips", _CHIP),
            driver_versions=_versions(fields, "driver_versions", _DRIVER),
            vbios_versions=_versions(fields, "vbios_versions", _VBIOS),
            require_revocation=_one_of(fields, "revocation", "required", "when-given") == "required",
            max_revocation_age=fields.integer("max_revocation_age", 60, MAX_AGE),
        )
        fields.done()
        known = NVIDIA_DEVICE_ROOTS.keys() | NVIDIA_RIM_ROOTS.keys()
        for name, given, allowed in (("roots", roots, NVIDIA_DEVICE_ROOTS), ("rim_roots", rim_roots, NVIDIA_RIM_ROOTS)):
            if given - allowed.keys():
                raise _bad(name, "fingerprints of NVIDIA's roots; others belong in development_roots", "others")
            if not given | development:
                raise _bad(name, "at least one root, here or in development_roots", "none")
        if development & known:
            raise _bad("development_roots", "no root of NVIDIA's", "NVIDIA's")
        return values


@dataclass(frozen=True, slots=True)
class AppraisedGpus:
    """GPUs that were accepted."""

    gpus: tuple[VerifiedGpu, ...]
    matches: tuple[GoldenMatch, ...]
    hardware_ids: tuple[str, ...]
    """The device certificates' serial numbers in hex: the keys into the inventory."""
    development: bool
    not_before: int
    not_after: int
    """Unix seconds: the window common to all certificates, and to OCSP responses where there are any."""


def appraise(
    evidence: bytes,
    endorsements: Sequence[bytes],
    reference: NvidiaReferenceValues,
    *,
    expected_nonce: bytes,
    now: int,
) -> AppraisedGpus:
    """Appraise a worker's GPU evidence with its RIMs (XML) and OCSP responses (DER) at ``now`` (unix seconds).

    ``expected_nonce`` is that of :func:`~keyquorum_core.attestation.binding.gpu_nonce`.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    shown = GpuEvidence.parse(evidence)
    check_settings(shown.settings)
    gpus = tuple(verify(each.report, each.chain, pinned_roots=reference.pinned_roots, now=now) for each in shown.gpus)
    check_distinct(gpus)
    for gpu in gpus:
        check_nonce(gpu, expected_nonce)
    rims = tuple(
        verify_rim(each, pinned_roots=reference.pinned_rim_roots, now=now)
        for each in endorsements
        if looks_like_rim(each)
    )
    responses = tuple(each for each in endorsements if not looks_like_rim(each))
    if not all(looks_like_ocsp(each) for each in responses):
        raise MalformedError(
            Reason.MALFORMED, "an endorsement of another kind", expected="RIMs and OCSP responses", actual="another"
        )
    return check_reference(gpus, rims, responses, reference, now=now)


def check_reference(
    gpus: Sequence[VerifiedGpu],
    rims: Sequence[Rim],
    responses: Sequence[bytes],
    reference: NvidiaReferenceValues,
    *,
    now: int,
) -> AppraisedGpus:
    """Checks 7 to 12 on genuine reports and RIMs; ``responses`` are OCSP responses, which are verified here."""
    chains = [*(each.device.chain for each in gpus), *(each.chain for each in rims)]
    revocation = verify_revocation(responses, chains, now=now, max_age=reference.max_revocation_age)
    if reference.require_revocation:
        require_responses(revocation, _revocable(gpus, rims))
    for root, ours, theirs in (
        *((each.device.root, reference.roots, NVIDIA_DEVICE_ROOTS) for each in gpus),
        *((each.root, reference.rim_roots, NVIDIA_RIM_ROOTS) for each in rims),
    ):
        allowed = ours if root in theirs else reference.development_roots
        if root not in allowed:
            raise RefusedError(
                Reason.ROOT_NOT_PINNED,
                "the reference values do not name this root",
                expected=", ".join(sorted(allowed)) or "no root of this kind",
                actual=root,
            )
    matches = tuple(_check_gpu(each, rims, reference) for each in gpus)
    used = {rim.sha256 for match in matches for rim in (match.driver, match.vbios) if rim is not None}
    unused = [each.version for each in rims if each.sha256 not in used]
    if unused or len({each.sha256 for each in rims}) != len(rims):
        raise RefusedError(
            Reason.MEASUREMENT,
            "a RIM is given twice, or belongs to none of the GPUs",
            expected="the RIMs of these GPUs, each once",
            actual=", ".join(unused) or "a repetition",
        )
    return AppraisedGpus(
        gpus=tuple(gpus),
        matches=matches,
        hardware_ids=tuple(each.device.serial for each in gpus),
        development=any(each.device.development for each in gpus) or any(each.development for each in rims),
        not_before=max(revocation.not_before, *(each.not_before for chain in chains for each in chain)),
        not_after=min(revocation.not_after, *(each.not_after for chain in chains for each in chain)),
    )


def check_settings(settings: NvidiaSettings) -> None:
    """Check 2. Raises :class:`RefusedError`."""
    if settings.developer_tools:
        raise RefusedError(
            Reason.DEBUG_ENABLED,
            "developer tools are on: the host may profile and debug what the GPU does",
            expected="developer tools off",
            actual="on",
        )
    if not settings.cc_feature or settings.environment != _PRODUCTION:
        raise RefusedError(
            Reason.MEASUREMENT,
            "the GPUs do not do confidential computing in production",
            expected=f"confidential computing on, {_PRODUCTION}",
            actual=f"{'on' if settings.cc_feature else 'off'}, {settings.environment}",
        )
    if settings.multi_gpu == "protected-pcie":
        raise RefusedError(
            Reason.UNSUPPORTED,
            "the GPUs are in protected PCIe mode, which relies on switches that are not attested here",
            expected="none or nvlink-encryption",
            actual=settings.multi_gpu,
        )


def _check_gpu(gpu: VerifiedGpu, rims: Sequence[Rim], reference: NvidiaReferenceValues) -> GoldenMatch:
    """Checks 9 to 12 for one GPU."""
    check_mode(gpu)
    report = gpu.report
    if not report.fwid:
        raise RefusedError(
            Reason.MEASUREMENT,
            "the report does not state the firmware that made it (FWID)",
            expected=gpu.device.fwid.hex(),
            actual="none",
            next_step="install a later driver",
        )
    for what, actual, allowed in (
        ("chip", gpu.device.chip, reference.chips),
        ("driver version", report.driver_version, reference.driver_versions),
        ("VBIOS version", report.vbios_version, reference.vbios_versions),
    ):
        if actual not in allowed:
            raise RefusedError(
                Reason.TCB,
                f"the {what} is not in the allowlist",
                expected=", ".join(sorted(allowed))[:400],
                actual=actual,
            )
    versions = (report.driver_version, report.vbios_version)
    own = [each for each in rims if each.product == gpu.device.chip and each.version in versions]
    match = check_golden(gpu, own)
    if not match.complete:
        raise RefusedError(
            Reason.MEASUREMENT,
            "a RIM is missing",
            expected=f"RIMs for driver {report.driver_version} and VBIOS {report.vbios_version}",
            actual=", ".join(each.version for each in own),
            next_step=f"fetch {report.vbios_rim_id} and the driver's from NVIDIA's RIM service",
        )
    return match


def _revocable(gpus: Sequence[VerifiedGpu], rims: Sequence[Rim]) -> list[Certificate]:
    """All certificates that NVIDIA answers for: not the firmware's, which the GPU itself issued, and not the roots."""
    return [
        *(certificate for gpu in gpus for certificate in gpu.device.chain[1:-1]),
        *(certificate for rim in rims for certificate in rim.chain[:-1]),
    ]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _shown(value: object) -> ShownGpu:
    fields = Fields(value, f"{_EVIDENCE}.gpus")
    gpu = ShownGpu(
        report=fields.base64("report", max_bytes=MAX_REPORT_BYTES),
        chain=tuple(
            Fields({"chain": each}, f"{_EVIDENCE}.gpus").base64("chain", max_bytes=_MAX_CERTIFICATE_BYTES)
            for each in fields.list("chain", min_items=_CHAIN_SIZE, max_items=_CHAIN_SIZE)
        ),
    )
    fields.done()
    return gpu


def _one_of(fields: Fields, name: str, *allowed: str) -> str:
    value = fields.text(name, max_length=32)
    if value not in allowed:
        raise MalformedError(
            Reason.MALFORMED, f"bad member {name!r}", expected=" or ".join(allowed), actual=ascii(value)
        )
    return value


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: bad member {member!r}", expected=expected, actual=actual)


def _roots(fields: Fields, name: str) -> frozenset[str]:
    values = fields.texts(name, max_items=_MAX_ROOTS, max_length=64)
    parsed = frozenset(Fields({name: each}, _WHAT).hex(name, 32).hex() for each in values)
    if len(parsed) != len(values):
        raise _bad(name, "each value once", "a repetition")
    return parsed


def _versions(fields: Fields, name: str, pattern: re.Pattern[str]) -> frozenset[str]:
    values = fields.texts(name, min_items=1, max_items=_MAX_VERSIONS, max_length=32)
    wrong = [each for each in values if not pattern.fullmatch(each)]
    if wrong or len(set(values)) != len(values):
        raise _bad(name, "each value once, as reports state it", ascii(wrong[0]) if wrong else "a repetition")
    return frozenset(values)
