"""``python -m tests.fuzz [--seconds N] [TARGET …]``: fuzz each target in a process of its own, and say what came out.

Needs atheris, which there is for Linux. The corpus grows under ``build/fuzz`` from seeds made at the start; findings
are left there as files, to be replayed with ``--replay FILE TARGET``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "fuzz"
HANG_SECONDS = 10
"""One input. Everything here answers within milliseconds."""
_EXECUTIONS = re.compile(r"stat::number_of_executed_units: +(\d+)")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")


def fuzz_one(name: str, seconds: int) -> bool:
    """Whether nothing was found. Prints one line."""
    folder = FOLDER / name
    command = [sys.executable, "-m", "tests.fuzz.engine", name, str(folder), f"-max_total_time={seconds}",
               f"-timeout={HANG_SECONDS}", "-rss_limit_mb=2048", "-print_final_stats=1",
               f"-artifact_prefix={folder}/"]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        log.seek(0)
        said = log.read()
    executions = _EXECUTIONS.findall(said)
    coverage = _COVERAGE.findall(said)
    done = f"{int(executions[-1]):>10} executions" if executions else "no executions"
    covered = f"{coverage[-1][0]} edges" if coverage else "no coverage"
    verdict = "ok" if status == 0 and executions else f"FINDING: see {folder}"
    print(f"{name:<24} {time.monotonic() - started:6.0f} s {done}, {covered}: {verdict}", flush=True)
    return verdict == "ok"


def main() -> int:
    from tests.fuzz.table import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (30)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input through the one target, and end")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}")
    if arguments.replay is not None:
        if len(arguments.targets) != 1:
            parser.error("--replay goes with one target")
        print("accepted" if TARGETS[arguments.targets[0]].accepts(arguments.replay.read_bytes()) else "refused")
        return 0
    clean = [fuzz_one(name, arguments.seconds) for name in arguments.targets or TARGETS]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
