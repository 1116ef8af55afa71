"""Everything the log says about one job, as proof files that verify offline."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from keyquorum.atomic import make_folder, replace_file
from keyquorum.ledger.proving import LoggedLeaf, proof_file, prove
from keyquorum.ledger.source import LogSource
from keyquorum.ledger.verification import QUORUM_SECONDS, verify_log
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.strictjson import loads

__all__ = ["JobProofs", "WrittenProof", "belongs_to", "prove_job"]


@dataclass(frozen=True, slots=True)
class WrittenProof:
    """A leaf's index and ``type``, and the file that proves it."""

    index: int
    type: str
    file: Path


@dataclass(frozen=True, slots=True)
class JobProofs:
    """Proofs of one job's leaves under one checkpoint."""

    latest: QuorumCheckpoint
    proofs: tuple[WrittenProof, ...]


def belongs_to(leaf: bytes, job_id: str) -> str | None:
    """The leaf's type, when it is a JSON object whose ``job_id`` is this one."""
    if job_id.encode() not in leaf:  # spares parsing all the others
        return None
    try:
        parsed = loads(leaf, "leaf", max_bytes=len(leaf))
    except KeyquorumError:
        return None
    if not isinstance(parsed, dict) or parsed.get("job_id") != job_id:
        return None
    return str(parsed.get("type", ""))[:64]


async def prove_job(
    source: LogSource,
    trust: LogTrust,
    job_id: str,
    folder: Path,
    *,
    progress: ProgressCallback = silent,
    patience: float = QUORUM_SECONDS,
) -> JobProofs:
    """Verify the log, then write ``<job>-<index>.tlog-proof`` into ``folder`` for each leaf about the job.

    A file of that name is replaced: a later proof says more. Raises as :func:`verify_log` and :func:`prove`, and
    :class:`RefusedError` (``NOT_FOUND``) when no leaf is about the job.
    """
    found: list[tuple[LoggedLeaf, str]] = []

    def look(first: int, leaves: tuple[bytes, ...]) -> None:
        for number, leaf in enumerate(leaves):
            if (kind := belongs_to(leaf, job_id)) is not None:
                found.append((LoggedLeaf(first + number, leaf), kind))

    verified = await verify_log(source, trust, leaves=look, progress=progress, patience=patience)
    if not found:
        raise RefusedError(
            Reason.NOT_FOUND,
            "the ledger has no leaf about this job",
            expected=f"a leaf with job_id {job_id}",
            actual=f"none in {verified.size} leaves",
            next_step="Check the job's id; a job whose key nobody released may not be there.",
        )
    kinds = {each.index: kind for each, kind in found}
    written = []
    make_folder(folder)
    async for each, proof in prove(source, verified.latest.checkpoint, [each for each, _ in found]):
        file = folder / f"{job_id}-{each.index}.tlog-proof"
        data = proof_file(each, proof, verified.latest, trust, int(time.time()))
        await asyncio.to_thread(replace_file, file, data)
        written.append(WrittenProof(each.index, kinds[each.index], file))
        progress(Progress(Stage.PROVE, len(written), len(found)))
    return JobProofs(verified.latest, tuple(written))
