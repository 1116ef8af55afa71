"""The demonstration: a cluster from nothing, a key that nobody dealt, an encrypted job, its decrypted result."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keyquorum
from keyquorum_core.errors import Reason, StateError
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import QUORUM, REGION, Layout, create

__all__ = ["Demonstration", "example", "run"]

KEY = "demo"


@dataclass(slots=True)
class Demonstration:
    """What the demonstration found; :meth:`as_json` is the object that ``keyquorum demo --json`` prints."""

    job_id: str = ""
    quorum: dict[str, object] = field(default_factory=lambda: dict(QUORUM))
    custodians_answered: list[str] = field(default_factory=list)
    worker_evidence: list[str] = field(default_factory=list)
    confirmed: bool = False
    result: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    timings_ms: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        return {
            "job_id": self.job_id,
            "quorum": self.quorum,
            "custodians_answered": self.custodians_answered,
            "confirmed": self.confirmed,
            "evidence": self.worker_evidence,
            "result": self.result,
            "timings_ms": self.timings_ms,
        }


def example(name: str = "h2_vqe") -> Path:
    """The folder of an example job: beside the package when installed, in the repository otherwise."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "examples" / name, here.parents[3] / "examples" / name):
        if (folder / "job.toml").is_file():
            return folder
    raise StateError(Reason.NOT_FOUND, f"the example job {name} is not installed", next_step="Pass --job DIR")


def run(
    job: Path | None = None,
    *,
    step: Callable[[str], None] = lambda text: None,
    root: Path | None = None,
) -> Demonstration:
    """Run it below ``root`` (default: a temporary folder, removed afterwards). ``step`` hears what happens."""
    folder = job or example()
    if root is not None:
        return _run(folder, root, step)
    with tempfile.TemporaryDirectory(prefix="keyquorum-demo-") as scratch:
        return _run(folder, Path(scratch) / "cluster", step)


def _run(folder: Path, root: Path, step: Callable[[str], None]) -> Demonstration:
    out = Demonstration()
    started = time.monotonic()

    def lap(name: str, since: float) -> float:
        now = time.monotonic()
        out.timings_ms[name] = round((now - since) * 1000)
        return now

    layout: Layout = create(root, step=step)
    at = lap("set_up", started)
    with Cluster(layout, step=step) as cluster:
        at = lap("start", at)
        where = sorted({jurisdiction for _, jurisdiction in layout.custodians})
        step(f"{len(cluster.custodians)} custodians in {len(where)} jurisdictions ({', '.join(where)}) serve")
        with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
            key = client.key_create(KEY)
            at = lap("key_ceremony", at)
            step(
                f"key {KEY!r}, epoch {key.epoch}: no dealer; {len(layout.custodians)} custodians signed its certificate"
            )
            submitted = client.submit(folder, key=KEY, regions=[REGION])
            out.job_id = submitted.id
            at = lap("submit", at)
            step(f"job {submitted.id} is signed, encrypted and uploaded")
            for event in client.watch(submitted.id):
                step(f"job is {event.state}" + (f": {event.detail}" if event.detail else ""))
            at = lap("run", at)
            result = client.result(submitted.id)
            lap("result", at)
            out.custodians_answered = list(result.custodians)
            out.worker_evidence = list(result.evidence)
            out.confirmed = result.confirmed
            out.result = _facts(result)
            out.log = result.log.decode("utf-8", "replace")
    lap("total", started)
    return out


def _facts(result: keyquorum.Result) -> dict[str, Any]:
    """The job's ``result.json``. Raises :class:`StateError` (``NOT_FOUND``) for a job that wrote none."""
    if "result.json" not in result.files:
        raise StateError(
            Reason.NOT_FOUND,
            "the job wrote no result.json",
            expected="a JSON object in $KEYQUORUM_OUTPUT/result.json",
            actual=", ".join(sorted(result.files)) or "no files",
        )
    facts = json.loads(result.files["result.json"])
    return facts if isinstance(facts, dict) else {"result": facts}
