"""NVIDIA GPUs, through NVML's confidential-computing calls (``nvidia-ml-py``, the extra ``nvidia``).

For each GPU of the machine: the chain of its attestation key, and a report over our nonce, which is SPDM's request and
response as they passed between driver and GPU. What the driver says of its settings goes along. RIMs and OCSP
responses, which NVIDIA's services hand out, come from a folder that somebody keeps fresh: everything is offline.

What a GPU does with work before it is attested is the driver's: in confidential-computing mode it takes none until
``nvidia-smi conf-compute -srs 1`` says that it is ready, which is for the machine's image to do.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from keyquorum_core.attestation.evidence import NVIDIA_GPU, EvidenceItem
from keyquorum_core.attestation.nvidia_certificates import read_certificates
from keyquorum_core.attestation.nvidia_evidence import MAX_GPUS, GpuEvidence, NvidiaSettings, ShownGpu
from keyquorum_core.attestation.nvidia_report import parse_report
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.source import Binding, read_folder, unavailable

__all__ = ["NvidiaGpus"]

_SUFFIXES = frozenset({".xml", ".swidtag", ".der", ".ocsp"})
_ENVIRONMENTS = {0: "unavailable", 1: "simulation", 2: "production"}
_MULTI_GPU = {0: "none", 1: "protected-pcie", 2: "nvlink-encryption"}


class NvidiaGpus:
    """The evidence of all GPUs of this machine, in one item. ``nvml`` is the module ``pynvml``, imported when used."""

    type: ClassVar[str] = NVIDIA_GPU
    development: ClassVar[bool] = False

    def __init__(self, endorsements: Path, nvml: Any = None) -> None:
        self._endorsements = endorsements
        self._nvml = nvml

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], NvidiaGpus]:
        """``[nvidia-gpu]`` of worker.toml."""
        endorsements = base / section.text("endorsements", max_length=4096)
        section.done()
        return lambda: cls(endorsements)

    def collect(self, binding: Binding) -> EvidenceItem:
        endorsements = read_folder(
            self._endorsements,
            "RIMs and OCSP responses",
            _SUFFIXES,
            "Put the RIMs of driver and VBIOS there, as NVIDIA's RIM service hands them out, and OCSP responses (DER).",
        )
        with self._session() as nvml:
            count = nvml.nvmlDeviceGetCount()
            if not 1 <= count <= MAX_GPUS:
                raise unavailable(
                    "this machine has no GPU to attest" if not count else "this machine has too many GPUs",
                    expected=f"1 … {MAX_GPUS} GPUs that NVML lists",
                    actual=count,
                    next_step="See nvidia-smi, and which GPUs the machine was given.",
                )
            evidence = GpuEvidence(
                settings=self._settings(nvml),
                gpus=tuple(self._show(nvml, index, binding.gpu_nonce) for index in range(count)),
            ).to_bytes()
        return EvidenceItem(self.type, evidence, endorsements)

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """Raises :class:`UnavailableError` for whatever NVML says."""
        nvml = self._nvml
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                raise unavailable(
                    "NVIDIA GPUs cannot be asked",
                    expected="the Python package nvidia-ml-py",
                    actual="not installed",
                    next_step="Install the extra: pip install 'keyquorum-gpu-worker[nvidia]'.",
                ) from None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise self._failed("NVML cannot be used", "NVIDIA's driver and libnvidia-ml.so.1", error) from None
        try:
            yield nvml
        except nvml.NVMLError as error:
            raise self._failed(
                "the GPUs gave no attestation", "a GPU and a driver with confidential computing on", error
            ) from None
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    @staticmethod
    def _failed(message: str, expected: str, error: Exception) -> UnavailableError:
        return unavailable(
            message,
            expected=expected,
            actual=str(error)[:120],
            next_step="See `nvidia-smi conf-compute -f` for the mode, and the driver's version: 535 or later.",
        )

    @staticmethod
    def _settings(nvml: Any) -> NvidiaSettings:
        """From ``nvmlSystemGetConfComputeSettings``, or what drivers before 550, without protected PCIe, have of it."""
        try:
            settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
            status = nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))
            if status != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(status)
            multi_gpu = settings.multiGpuMode
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            settings = nvml.nvmlSystemGetConfComputeState()
            multi_gpu = nvml.NVML_CC_SYSTEM_MULTIGPU_NONE
        environment, mode = _ENVIRONMENTS.get(settings.environment), _MULTI_GPU.get(multi_gpu)
        if environment is None or mode is None:
            raise _malformed(
                "the driver states settings that are not known",
                f"environment {', '.join(map(str, _ENVIRONMENTS))} and mode {', '.join(map(str, _MULTI_GPU))}",
                f"{settings.environment} and {multi_gpu}",
            )
        return NvidiaSettings(
            environment=environment,
            cc_feature=settings.ccFeature == nvml.NVML_CC_SYSTEM_FEATURE_ENABLED,
            # What is not plainly off counts as on: that is what a custodian refuses.
            developer_tools=settings.devToolsMode != nvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF,
            multi_gpu=mode,
        )

    @staticmethod
    def _show(nvml: Any, index: int, nonce: bytes) -> ShownGpu:
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        certificate = nvml.nvmlDeviceGetConfComputeGpuCertificate(device)
        chain = _taken(certificate.attestationCertChain, certificate.attestationCertChainSize, f"GPU {index}'s chain")
        answer = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(device, nonce)
        report = _taken(answer.attestationReport, answer.attestationReportSize, f"GPU {index}'s report")
        if parse_report(report).nonce != nonce:
            raise _malformed(f"GPU {index}'s report answers another nonce", "ours", "another")
        return ShownGpu(report, read_certificates([chain]))


def _taken(buffer: Any, size: int, what: str) -> bytes:
    """The first ``size`` bytes of one of NVML's fixed buffers."""
    data = bytes(buffer)
    if not 0 < size <= len(data):
        raise _malformed(f"{what} has an impossible size", f"1 … {len(data)} bytes", f"{size} bytes")
    return data[:size]


def _malformed(message: str, expected: str, actual: str) -> MalformedError:
    return MalformedError(Reason.MALFORMED, message, expected=expected, actual=actual)
