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

    [sev-snp]                          # or [development], with dir = "platform"
    # report_dir = "/sys/kernel/config/tsm/report"
    # endorsements = "endorsements"    DER or PEM files, where the host hands the guest none

Exactly one of ``[sev-snp]`` and ``[development]`` says where evidence comes from.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core import names
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.roster import MAX_ROSTER, Roster, open_roster, parse_operators
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence import DevelopmentPlatform, EvidenceSource, TsmReports
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["CONFIG_NAME", "WorkerConfig", "load_config", "load_roster", "load_source", "load_tls"]

CONFIG_NAME = "worker.toml"
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Paths are absolute. Either ``platform`` or ``report_dir`` is set."""

    name: str
    cluster: str
    coordinator: str
    coordinator_name: str
    roster: Path
    operators: Path
    tls_certificate: Path
    tls_key: Path
    scratch: Path | None
    platform: Path | None
    report_dir: Path | None
    endorsements: Path | None


def _read(path: Path, what: str, max_bytes: int = _MAX_FILE) -> bytes:
    """Raises :class:`UnavailableError` (``NOT_FOUND``, ``STORAGE``) or :class:`MalformedError` (``TOO_LARGE``)."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise UnavailableError(Reason.NOT_FOUND, f"{what} is missing", expected=f"a file {path}") from None
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"{what} cannot be read", expected=f"a readable file {path}", actual=error.strerror
        ) from None
    if len(data) > max_bytes:
        raise MalformedError(Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {max_bytes} bytes")
    return data


def load_config(directory: Path) -> WorkerConfig:
    """Read ``directory``/worker.toml. Raises :class:`MalformedError` or :class:`UnavailableError`."""
    base = directory.absolute()
    data = _read(base / CONFIG_NAME, "the worker's configuration")
    try:
        parsed = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"{CONFIG_NAME} is not TOML", actual=str(error)[:200]) from None
    fields = Fields(parsed, CONFIG_NAME)

    def path(members: Fields, name: str) -> Path:
        return base / members.text(name, max_length=4096)

    development = fields.object("development") if "development" in fields else None
    snp = fields.object("sev-snp") if "sev-snp" in fields else None
    if (development is None) == (snp is None):
        raise MalformedError(
            Reason.MALFORMED,
            f"{CONFIG_NAME} must say where evidence comes from",
            expected="one section: [sev-snp], or [development] with dir",
            actual="none" if snp is None else "both",
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
        platform=path(development, "dir") if development is not None else None,
        report_dir=None if snp is None else path(snp, "report_dir") if "report_dir" in snp else TsmReports.DEFAULT_ROOT,
        endorsements=path(snp, "endorsements") if snp is not None and "endorsements" in snp else None,
    )
    for section in (development, snp, fields):
        if section is not None:
            section.done()
    names.check(names.PRINCIPAL, config.name, "worker name")
    names.check(names.PRINCIPAL, config.coordinator_name, "coordinator name")
    names.check(names.CLUSTER, config.cluster, "cluster name")
    return config


def load_tls(config: WorkerConfig) -> TlsIdentity:
    return TlsIdentity(
        _read(config.tls_certificate, "the worker's TLS certificate"), _read(config.tls_key, "the worker's TLS key")
    )


def load_roster(config: WorkerConfig, clock: Callable[[], float] = time.time) -> Roster:
    """The roster, signed by the operators that this worker pins, current. Raises as :func:`open_roster`."""
    operators, threshold = parse_operators(_read(config.operators, "operators file"))
    envelope = _read(config.roster, "the roster", 2 * MAX_ROSTER)
    return open_roster(envelope, operators, threshold, int(clock()), cluster=config.cluster)


def load_source(config: WorkerConfig) -> EvidenceSource:
    """Where this worker's evidence comes from. Raises as the source does when it cannot work."""
    if config.platform is not None:
        return DevelopmentPlatform.load(config.platform)
    return TsmReports(config.report_dir or TsmReports.DEFAULT_ROOT, config.endorsements)
