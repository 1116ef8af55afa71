"""Resident memory of each role, idle, a few seconds after it got ready and made one key; and what it consists of.

``rss_mib`` is VmRSS of /proc/PID/status. ``of_which`` are the largest parts by mapping: ``heap`` is what the process
allocated itself, the others are files mapped into it, whose pages processes of one machine share.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import keyquorum
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import create

TARGET_CUSTODIAN_MIB = 90
LARGEST = 8


def resident_mib(pid: int) -> float:
    """VmRSS of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no resident memory")


def parts_mib(pid: int) -> dict[str, float]:
    """The largest parts of resident memory, MiB; empty where the kernel keeps a hardened process's mappings to root."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except PermissionError:
        return {}
    found: Counter[str] = Counter()
    name = ""
    for line in text.splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):  # a mapping: its address range, then permissions … and perhaps a path
            path = rest[4] if len(rest) > 4 else ""
            name = path.rsplit("/", 1)[-1].split(".cpython")[0] if path.startswith("/") else "heap"
        elif head == "Rss:":
            found[name] += int(rest[0])
    return {name: round(kib / 1024, 1) for name, kib in found.most_common(LARGEST)}


def measure(scratch: Path) -> dict[str, object]:
    layout = create(scratch / "cluster")
    with Cluster(layout) as cluster:
        with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
            client.key_create("bench")
        time.sleep(5)
        largest = max((process.pid for process in cluster.custodians.values()), key=resident_mib)
        pids = {"custodian": largest, "coordinator": cluster.coordinator.pid, "worker": cluster.worker.pid}
        out: dict[str, object] = {
            role: {"rss_mib": round(resident_mib(pid), 1), "of_which": parts_mib(pid)} for role, pid in pids.items()
        }
        return {**out, "custodian_target": f"under {TARGET_CUSTODIAN_MIB} MiB"}
