"""worker.toml: who this worker is, whom it trusts, where its evidence comes from.

Read strictly: an unknown member is refused. Paths are relative to the file's folder::

    name = "gpu-1"
    cluster = "demo"
    coordinator = "127.0.0.1:7400"
    coordinator_name = "main"
    roster = "roster.json"
    operators = "operators.json"
    tls_certificate = "gpu-1-cert.pem"
    tls_key = "gpu-1-key.pem"
    # scratch = "/mnt/job-memory"      where job folders go; by default shared memory

    [sev-snp]
    # endorsements = "endorsements"    DER or PEM files, where the host hands the guest none
    # vmpl = 2                         where the guest does not run at VMPL 0

    [nvidia-gpu]
    endorsements = "gpu"               RIMs (.xml, .swidtag) and OCSP responses (.der, .ocsp)

A section for each kind of evidence that the machine gives: ``[sev-snp]``, ``[tdx]``, ``[tpm2]``, ``[nitro]`` or
``[development]`` (with ``dir``), one or more of them; beside them ``[nvidia-gpu]``. docs/workers.md has all members.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core import names
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.roster import MAX_ROSTER, Roster, open_roster, parse_operators
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence import Collection, EvidenceSource
from keyquorum_gpu_worker.evidence.development import DevelopmentPlatform
from keyquorum_gpu_worker.evidence.nitro import Nitro
from keyquorum_gpu_worker.evidence.nvidia import NvidiaGpus
from keyquorum_gpu_worker.evidence.sev_snp import SevSnp
from keyquorum_gpu_worker.evidence.tdx import Tdx
from keyquorum_gpu_worker.evidence.tpm2 import Tpm2
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["CONFIG_NAME", "WorkerConfig", "load_config", "load_roster", "load_sources", "load_tls"]

CONFIG_NAME = "worker.toml"
_SECTIONS: Mapping[str, Callable[[Fields, Path], Callable[[], EvidenceSource]]] = {
    "development": DevelopmentPlatform.from_section,
    "sev-snp": SevSnp.from_section,
    "tdx": Tdx.from_section,
    "tpm2": Tpm2.from_section,
    "nitro": Nitro.from_section,
    "nvidia-gpu": NvidiaGpus.from_section,
}


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Paths are absolute."""

    name: str
    cluster: str
    coordinator: str
    coordinator_name: str
    roster: Path
    operators: Path
    tls_certificate: Path
    tls_key: Path
    scratch: Path | None
    sources: tuple[Callable[[], EvidenceSource], ...]
    """Each makes one source of evidence, and raises as that does where it cannot work."""


def load_config(directory: Path) -> WorkerConfig:
    """Read ``directory``/worker.toml. Raises :class:`MalformedError` or :class:`UnavailableError`."""
    base = directory.absolute()
    data = read_bytes(base / CONFIG_NAME, "the worker's configuration")
    try:
        parsed = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"{CONFIG_NAME} is not TOML", actual=str(error)[:200]) from None
    fields = Fields(parsed, CONFIG_NAME)

    def path(members: Fields, name: str) -> Path:
        return base / members.text(name, max_length=4096)

    sections = [name for name in _SECTIONS if name in fields]
    if not sections or {"development", "sev-snp"} <= set(sections):
        raise MalformedError(
            Reason.MALFORMED,
            f"{CONFIG_NAME} must say where evidence comes from",
            expected=f"sections out of [{'], ['.join(_SECTIONS)}]; [development] stands for [sev-snp]",
            actual=", ".join(sections) or "none",
        )
    config = WorkerConfig(
        name=fields.text("name", max_length=64),
        cluster=fields.text("cluster", max_length=64),
        coordinator=fields.text("coordinator"),
        coordinator_name=fields.text("coordinator_name", max_length=64),
        roster=path(fields, "roster"),
        operators=path(fields, "operators"),
        tls_certificate=path(fields, "tls_certificate"),
        tls_key=path(fields, "tls_key"),
        scratch=path(fields, "scratch") if "scratch" in fields else None,
        sources=tuple(_SECTIONS[name](fields.object(name), base) for name in sections),
    )
    fields.done()
    names.check(names.PRINCIPAL, config.name, "worker name")
    names.check(names.PRINCIPAL, config.coordinator_name, "coordinator name")
    names.check(names.CLUSTER, config.cluster, "cluster name")
    return config


def load_tls(config: WorkerConfig) -> TlsIdentity:
    return TlsIdentity(
        read_bytes(config.tls_certificate, "the worker's TLS certificate"),
        read_bytes(config.tls_key, "the worker's TLS key"),
    )


def load_roster(config: WorkerConfig, clock: Callable[[], float] = time.time) -> Roster:
    """The roster, signed by the operators that this worker pins, current. Raises as :func:`open_roster`."""
    operators, threshold = parse_operators(read_bytes(config.operators, "operators file"))
    envelope = read_bytes(config.roster, "the roster", 2 * MAX_ROSTER)
    return open_roster(envelope, operators, threshold, int(clock()), cluster=config.cluster)


def load_sources(config: WorkerConfig) -> Collection:
    """Where this worker's evidence comes from. Raises as the sources do when they cannot work, and
    :class:`MalformedError` for sources that do not make a worker's evidence."""
    return Collection([make() for make in config.sources])
