"""``make bench``: every measurement beside its floor, as a table for people and JSON for machines.

Nothing here fails on a slow figure: a benchmark reports, good or bad. The JSON goes to ``bench-results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    artifact_rate,
    attestation,
    audit,
    ceremonies,
    gate,
    jobs,
    ledger,
    memory,
    policy,
    prepare,
    release,
)

PARTS: dict[str, Callable[[Path], dict[str, object]]] = {
    "release": release.measure,
    "gate": gate.measure,
    "attestation": lambda scratch: attestation.measure(),
    "artifact": lambda scratch: artifact_rate.measure(),
    "memory": memory.measure,
    "job": jobs.measure,
    "ledger": ledger.measure,
    "audit": audit.measure,
    "policy": policy.measure,
    "prepare": prepare.measure,
    "ceremonies": ceremonies.measure,
}


def flatten(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Rows of dotted names and values, in order."""
    if isinstance(value, dict):
        return [row for key, each in value.items() for row in flatten(each, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(each) for each in value))]
    return [(prefix, f"{value:.3f}" if isinstance(value, float) else str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False)
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    found: dict[str, object] = {"measured_at": int(time.time()), "machine": machine}
    for name in arguments.parts or PARTS:
        started = time.monotonic()
        progress.print(f"[dim]measuring {name} …[/]")
        with tempfile.TemporaryDirectory(prefix="keyquorum-bench-") as scratch:
            found[name] = PARTS[name](Path(scratch))
        table = Table(title=f"{name} ({time.monotonic() - started:.0f} s)", show_header=False)
        for row in flatten(found[name]):
            table.add_row(*row)
        console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / time.strftime("%Y%m%d-%H%M%S.json", time.gmtime())
    path.write_text(json.dumps(found, indent=1) + "\n")
    progress.print(f"written to {path}")


if __name__ == "__main__":
    main()
