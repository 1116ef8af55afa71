"""Resident memory of each role, idle, a few seconds after it got ready and made one key (VmRSS, MiB)."""

from __future__ import annotations

import time
from pathlib import Path

import keyquorum
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import create

TARGET_CUSTODIAN_MIB = 90


def resident_mib(pid: int) -> float:
    """VmRSS of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no resident memory")


def measure(scratch: Path) -> dict[str, object]:
    layout = create(scratch / "cluster")
    with Cluster(layout) as cluster:
        with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
            client.key_create("bench")
        time.sleep(5)
        custodians = [resident_mib(process.pid) for process in cluster.custodians.values()]
        return {
            "custodian_mib": {"largest": round(max(custodians), 1), "target": f"under {TARGET_CUSTODIAN_MIB}"},
            "coordinator_mib": round(resident_mib(cluster.coordinator.pid), 1),
            "worker_mib": round(resident_mib(cluster.worker.pid), 1),
        }
