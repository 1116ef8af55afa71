"""``keyquorum-coordinator status``: ask the running coordinator how it and its custodians are."""

from __future__ import annotations

from pathlib import Path

import grpc.aio

from keyquorum_coordinator.config import load_config
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1.coordinator_pb2_grpc import ClusterStub
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.tls import TlsIdentity, dns_name, open_channel

__all__ = ["fetch_status"]


async def fetch_status(directory: Path, timeout: float = 5.0) -> dict[str, object]:
    """JSON values. Raises ``UNAVAILABLE`` when the coordinator cannot be reached."""
    config = load_config(directory)
    identity = TlsIdentity(
        read_bytes(config.path(config.tls_certificate), "the coordinator's TLS certificate", 64 << 10),
        read_bytes(config.path(config.tls_key), "the coordinator's TLS key", 64 << 10),
    )
    channel = open_channel(
        config.listen, identity, [identity.certificate], dns_name(config.cluster, "coordinator", config.name)
    )
    try:
        found = await ClusterStub(channel).Describe(pb.DescribeClusterRequest(), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, f"the coordinator at {config.listen}") from None
    finally:
        await channel.close()
    return {
        "name": config.name,
        "cluster": config.cluster,
        "address": config.listen,
        "version": found.version,
        "custodians": [
            {
                "custodian": each.custodian,
                "jurisdiction": each.jurisdiction,
                "reachable": each.reachable,
                "circuit": each.circuit,
                "latency_ms": round(each.latency_ms, 3),
                "latency_p95_ms": round(each.latency_p95_ms, 3),
                "clock_skew_ms": each.clock_skew_ms,
                "last_error": each.last_error,
            }
            for each in found.custodians
        ],
    }
