"""The operator's side of ``CustodianAdmin``: asks the running custodian over mTLS, with its folder's certificates."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import grpc.aio

from keyquorum_custodian.config import load_config, read_bytes
from keyquorum_custodian.init import ADMIN_CERTIFICATE, ADMIN_KEY, TLS_CERTIFICATE
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["fetch_status", "show_status"]


async def fetch_status(directory: Path, timeout: float = 5.0) -> dict[str, Any]:
    """What the custodian serving ``directory`` says of itself. Raises its error, or ``UNAVAILABLE`` without one."""
    config = load_config(directory)
    identity = tls.TlsIdentity(
        read_bytes(config.path(ADMIN_CERTIFICATE), "the operator's certificate", 64 << 10),
        read_bytes(config.path(ADMIN_KEY), "the operator's TLS key", 64 << 10),
    )
    root = read_bytes(config.path(TLS_CERTIFICATE), "the custodian's TLS certificate", 64 << 10)
    name = tls.dns_name(config.cluster, "custodian", config.id)
    async with tls.open_channel(config.admin_listen, identity, [root], name) as channel:
        try:
            found = await rpc.CustodianAdminStub(channel).Status(pb.StatusRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"custodian {config.id} at {config.admin_listen}") from None
    described = found.description
    return {
        "custodian": described.custodian,
        "jurisdiction": described.jurisdiction,
        "cluster": described.cluster,
        "version": described.version,
        "roster_version": described.roster_version,
        "roster_digest": described.roster_digest,
        "trusts_development_hardware": described.trusts_development_hardware,
        "started_at": found.started_at,
        "now": described.now,
        "releases": found.releases,
        "refusals": found.refusals,
        "warnings": list(found.warnings),
        "keys": [
            {
                "key_id": key.key_id,
                "epoch": key.epoch,
                "state": key.state,
                "seeds": key.seeds,
                "certificate_digest": key.certificate_digest,
            }
            for key in described.keys
        ],
        "ceremonies": [
            {"ceremony_id": each.ceremony_id, "key_id": each.key_id, "epoch": each.epoch, "state": each.state}
            for each in found.ceremonies
        ],
    }


def show_status(found: dict[str, Any]) -> str:
    """The same, for people."""
    started = datetime.datetime.fromtimestamp(found["started_at"], datetime.UTC).isoformat()
    lines = [f"WARNING: {warning}" for warning in found["warnings"]]
    lines += [
        f"custodian {found['custodian']} ({found['jurisdiction']}) of {found['cluster']}, version {found['version']}",
        f"  serving since  {started}",
        f"  roster         version {found['roster_version']}, {found['roster_digest']}",
        f"  releases       {found['releases']} answered, {found['refusals']} refused since then",
    ]
    lines += [
        f"  key            {key['key_id']} epoch {key['epoch']}: {key['state']}, {key['seeds']} seeds,"
        f" certificate {key['certificate_digest'][:16]}"
        for key in found["keys"]
    ] or ["  keys           none"]
    lines += [
        f"  ceremony       {each['ceremony_id']} for {each['key_id']} epoch {each['epoch']}: {each['state']}"
        for each in found["ceremonies"]
        if each["state"] != "active"
    ]
    return "\n".join(lines)
