"""``init`` and ``issue-cert``: a coordinator's folder, and certificates for those who call it. Nothing is overwritten.

The folder is made beside its place and renamed into it last: an interrupted ``init`` leaves no half coordinator.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from keyquorum_coordinator.config import (
    CONFIG_NAME,
    CoordinatorConfig,
    check_names,
    load_config,
    render_config,
)
from keyquorum_coordinator.drill_key import (
    DRILL_KEY,
    DRILL_PUBLIC,
    encode_drill_key,
    encode_drill_public,
    generate_drill_key,
)
from keyquorum_coordinator.ledger.setup import create_ledger
from keyquorum_coordinator.log_key import LOG_VKEY, encode_log_key, log_origin
from keyquorum_core import names
from keyquorum_core.errors import MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.ports import choose_port, parse_address
from keyquorum_protos.wire.tls import CertificateAuthority, TlsIdentity, self_signed, spiffe_id

__all__ = ["CALLER_ROLES", "initialise", "issue_certificate"]

CALLER_ROLES = ("owner", "worker", "operator")


def initialise(config: CoordinatorConfig, *, now: int, signer: LogSigner | None = None) -> CoordinatorConfig:
    """Make the folder: TLS identity, callers' authority, an empty ledger with its keys, a drill identity,
    configuration.

    Returns the configuration as written: a port 0 was replaced by one that is free now, so that the address survives
    restarts. ``signer``: the ledger's keys, by default new ones. Raises ``EXISTS``, ``STORAGE``."""
    check_names(config.name, config.cluster)
    config = dataclasses.replace(
        config,
        listen=_choose_port(config.listen, "--listen"),
        metrics_listen=_choose_port(config.metrics_listen, "--metrics-listen") if config.metrics_listen else "",
        ledger_listen=_choose_port(config.ledger_listen, "--ledger-listen") if config.ledger_listen else "",
    )
    target = config.directory
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StateError(
            Reason.EXISTS,
            f"{target} is there already and not empty",
            next_step="Choose another folder; none is changed",
        )
    stage = target.with_name(f"{target.name}.init")
    identity = self_signed(config.cluster, "coordinator", config.name, now=now)
    authority = CertificateAuthority.create(config.cluster, now=now).identity
    signer = signer or LogSigner.generate(log_origin(config.cluster))
    drill = generate_drill_key()
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True, mode=0o700)
        _write(stage / config.tls_certificate, identity.certificate, 0o644)
        _write(stage / config.tls_key, identity.key, 0o600)
        _write(stage / config.clients_ca, authority.certificate, 0o644)
        _write(stage / config.clients_ca_key, authority.key, 0o600)
        _write(stage / config.log_key, encode_log_key(signer), 0o600)
        _write(stage / LOG_VKEY, signer.keys.encode().encode() + b"\n", 0o644)
        _write(stage / DRILL_KEY, encode_drill_key(drill), 0o600)
        _write(stage / DRILL_PUBLIC, encode_drill_public(drill), 0o644)
        _write(stage / CONFIG_NAME, render_config(config).encode(), 0o644)
        for folder in ("artifacts", config.bulletins):
            (stage / folder).mkdir(mode=0o700)
        create_ledger(dataclasses.replace(config, directory=stage), signer, now=now)
        stage.rename(target)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"the coordinator's folder could not be made at {target}", actual=error.strerror
        ) from None
    return config


def issue_certificate(directory: Path, role: str, name: str, out: Path, *, now: int, days: int = 365) -> str:
    """Issue a caller's certificate: ``out``/NAME-cert.pem and NAME-key.pem. Returns its SPIFFE id.

    Raises ``EXISTS``, ``STORAGE``, or :class:`MalformedError` for a role or name that cannot be.
    """
    if role not in CALLER_ROLES:
        raise MalformedError(
            Reason.ROLE, "no such role of a caller", expected=" or ".join(CALLER_ROLES), actual=role[:32]
        )
    names.check(names.PRINCIPAL, name, f"{role} name")
    config = load_config(directory)
    authority = CertificateAuthority(
        TlsIdentity(
            read_bytes(config.path(config.clients_ca), "the callers' authority", 64 << 10),
            read_bytes(config.path(config.clients_ca_key), "the callers' authority's key", 64 << 10),
        )
    )
    issued = authority.issue(config.cluster, role, name, now=now, days=days)
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(out / f"{name}-key.pem", issued.key, 0o600)
        _write(out / f"{name}-cert.pem", issued.certificate, 0o644)
    except FileExistsError as error:
        raise StateError(Reason.EXISTS, f"{error.filename} is there already; it was not changed") from None
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"the certificate could not be written to {out}", actual=error.strerror
        ) from None
    return spiffe_id(config.cluster, role, name)


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file, synced; an existing one is an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _choose_port(address: str, what: str) -> str:
    host, port = parse_address(address, what)
    return address if port else f"{host}:{choose_port(host.strip('[]'))}"
