"""The evidence of one ``nvidia-gpu`` item: GPUs' reports with their chains, and what the worker's driver says of them.

Reading it needs none of the code that verifies reports and manifests, so that a worker can write it without.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from keyquorum_core import jcs
from keyquorum_core.attestation.nvidia_report import MAX_REPORT_BYTES
from keyquorum_core.attestation.reference_members import one_of
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields, loads

__all__ = ["MAX_GPUS", "PRODUCTION", "GpuEvidence", "NvidiaSettings", "ShownGpu"]

MAX_GPUS = 16
PRODUCTION = "production"

_EVIDENCE = "NVIDIA evidence"
_MAX_EVIDENCE_BYTES = 256 << 10
_MAX_CERTIFICATE_BYTES = 4 << 10
_CHAIN_SIZE = 5


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
        return jcs.dumps(
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
                environment=one_of(settings, _EVIDENCE, "environment", PRODUCTION, "simulation", "unavailable"),
                cc_feature=settings.boolean("cc_feature"),
                developer_tools=settings.boolean("developer_tools"),
                multi_gpu=one_of(settings, _EVIDENCE, "multi_gpu", "none", "protected-pcie", "nvlink-encryption"),
            ),
            gpus=tuple(_shown(each) for each in fields.list("gpus", min_items=1, max_items=MAX_GPUS)),
        )
        settings.done()
        fields.done()
        if evidence.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, f"{_EVIDENCE} is not canonical JSON", expected="RFC 8785 bytes")
        return evidence


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
