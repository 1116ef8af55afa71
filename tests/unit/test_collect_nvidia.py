"""NVIDIA collection: the real ``pynvml``, with NVML's C functions beneath it replaced."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import pytest

from keyquorum_core.attestation.nvidia_appraisal import appraise
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_gpu_worker.evidence.nvidia import NvidiaGpus
from tests.support import nvidia
from tests.support.bindings import BINDING

NOT_SUPPORTED, FUNCTION_NOT_FOUND = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND


@dataclass
class Nvml:
    """libnvidia-ml as it answers: each method is a C function, given what ctypes would pass, and returns its status."""

    gpus: int = 2
    environment: int = 2
    cc_feature: int = 1
    developer_tools: int = 0
    multi_gpu: int = 0
    missing: frozenset[str] = frozenset()
    """Functions that this driver does not have."""
    status: dict[str, int] = field(default_factory=dict)
    """What these functions return instead of success."""
    report: Callable[[int, bytes], bytes] = lambda number, nonce: nvidia.gpu(number).report(nonce=nonce)
    chain: Callable[[int], bytes] = lambda number: nvidia.gpu(number).chain.pem
    report_size: int | None = None
    chain_size: int | None = None
    called: list[str] = field(default_factory=list)
    nonces: list[bytes] = field(default_factory=list)

    def function(self, name: str) -> Callable[..., int]:
        if name in self.missing:
            raise pynvml.NVMLError(FUNCTION_NOT_FOUND)

        def call(*arguments: Any) -> int:
            self.called.append(name)
            status = self.status.get(name, 0)
            if not status:
                getattr(self, name)(*arguments)
            return status

        return call

    def nvmlInitWithFlags(self, flags: Any) -> None:
        assert flags == 0

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = self.gpus

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> None:
        # A handle is opaque; this one says which GPU it is of, as an address that is never followed.
        ctypes.cast(ctypes.pointer(handle._obj), ctypes.POINTER(ctypes.c_void_p))[0] = 0x1000 + index.value

    def nvmlSystemGetConfComputeSettings(self, settings: Any) -> None:
        found = settings._obj
        assert found.version == 0x1000014
        found.environment, found.ccFeature = self.environment, self.cc_feature
        found.devToolsMode, found.multiGpuMode = self.developer_tools, self.multi_gpu

    def nvmlSystemGetConfComputeState(self, state: Any) -> None:
        found = state._obj
        found.environment, found.ccFeature, found.devToolsMode = (
            self.environment, self.cc_feature, self.developer_tools,
        )  # fmt: skip

    @staticmethod
    def _number(device: Any) -> int:
        return int(ctypes.cast(device, ctypes.c_void_p).value or 0) - 0x1000

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: Any, certificate: Any) -> None:
        data = self.chain(self._number(device))
        found = certificate._obj
        found.attestationCertChainSize = len(data) if self.chain_size is None else self.chain_size
        ctypes.memmove(found.attestationCertChain, data, len(data))

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: Any, report: Any) -> None:
        found = report._obj
        self.nonces.append(bytes(found.nonce))
        data = self.report(self._number(device), bytes(found.nonce))
        found.attestationReportSize = len(data) if self.report_size is None else self.report_size
        ctypes.memmove(found.attestationReport, data, len(data))


@pytest.fixture
def rims(tmp_path: Path) -> Path:
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "driver.xml").write_bytes(nvidia.rim_maker().driver)
    (folder / "vbios.swidtag").write_bytes(nvidia.rim_maker().vbios)
    (folder / "notes.txt").write_text("not sent")
    return folder


@pytest.fixture
def collect(rims: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Nvml], Any]:
    def make(nvml: Nvml) -> Any:
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", nvml.function)
        return NvidiaGpus(rims).collect(BINDING)

    return make


def test_all_gpus_are_shown_and_appraised(collect: Callable[[Nvml], Any]) -> None:
    nvml = Nvml()
    item = collect(nvml)
    assert item.type == "nvidia-gpu"
    assert nvml.nonces == [BINDING.gpu_nonce] * 2
    assert nvml.called[0] == "nvmlInitWithFlags"
    assert nvml.called[-1] == "nvmlShutdown"
    assert item.endorsements == (nvidia.rim_maker().driver, nvidia.rim_maker().vbios)
    parsed = GpuEvidence.parse(item.evidence)
    assert parsed.settings == nvidia.SETTINGS
    assert [gpu.chain for gpu in parsed.gpus] == [nvidia.gpu(0).chain.ders, nvidia.gpu(1).chain.ders]
    appraised = appraise(
        [item.evidence],
        item.endorsements,
        NvidiaReferenceValues.parse(nvidia.reference_json()),
        expected_nonce=BINDING.gpu_nonce,
        now=nvidia.CREATED_AT + 2000,
    )
    assert len(appraised.gpus) == 2


def test_a_driver_without_the_newer_settings_is_asked_for_the_state(collect: Callable[[Nvml], Any]) -> None:
    nvml = Nvml(gpus=1, missing=frozenset({"nvmlSystemGetConfComputeSettings"}))
    assert GpuEvidence.parse(collect(nvml).evidence).settings == nvidia.SETTINGS
    assert "nvmlSystemGetConfComputeState" in nvml.called


def test_settings_are_told_as_they_are(collect: Callable[[Nvml], Any]) -> None:
    told = GpuEvidence.parse(collect(Nvml(environment=1, cc_feature=0, developer_tools=1, multi_gpu=1)).evidence)
    settings = told.settings
    assert (settings.environment, settings.cc_feature, settings.developer_tools, settings.multi_gpu) == (
        "simulation", False, True, "protected-pcie",
    )  # fmt: skip
    assert GpuEvidence.parse(collect(Nvml(developer_tools=7)).evidence).settings.developer_tools


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (Nvml(environment=9), "settings that are not known"),
        (Nvml(multi_gpu=9), "settings that are not known"),
        (Nvml(report_size=0), "report has an impossible size"),
        (Nvml(report_size=0x2001), "report has an impossible size"),
        (Nvml(chain_size=0), "chain has an impossible size"),
        (Nvml(chain_size=0x1401), "chain has an impossible size"),
        (Nvml(report=lambda number, nonce: nvidia.gpu(number).report()), "answers another nonce"),
        (Nvml(report=lambda number, nonce: b"x" * 100), "report"),
        (Nvml(chain=lambda number: b"-----BEGIN CERTIFICATE-----\nrubbish"), "certificate"),
    ],
)
def test_hostile_answers_are_refused(collect: Callable[[Nvml], Any], nvml: Nvml, words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        collect(nvml)
    assert nvml.called[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (Nvml(gpus=0), "no GPU to attest"),
        (Nvml(gpus=17), "too many GPUs"),
        (Nvml(status={"nvmlInitWithFlags": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}), "NVML cannot be used"),
        (Nvml(status={"nvmlDeviceGetConfComputeGpuAttestationReport": NOT_SUPPORTED}), "gave no attestation"),
        (Nvml(status={"nvmlDeviceGetConfComputeGpuCertificate": NOT_SUPPORTED}), "gave no attestation"),
        (Nvml(status={"nvmlSystemGetConfComputeSettings": NOT_SUPPORTED}), "gave no attestation"),
    ],
)
def test_a_machine_whose_gpus_cannot_attest_is_told_why(collect: Callable[[Nvml], Any], nvml: Nvml, words: str) -> None:
    with pytest.raises(UnavailableError, match=words) as caught:
        collect(nvml)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert caught.value.next_step


def test_a_machine_without_nvml_is_told_what_was_looked_for(rims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    error = unavailable(rims)
    assert "libnvidia-ml.so.1" in str(error.expected)


def test_without_the_package_the_extra_is_named(rims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "keyquorum-gpu-worker[nvidia]" in unavailable(rims).next_step


def test_a_missing_folder_of_rims_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in str(unavailable(tmp_path / "none").expected)


def unavailable(folder: Path) -> KeyquorumError:
    with pytest.raises(UnavailableError) as caught:
        NvidiaGpus(folder).collect(BINDING)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    return caught.value
