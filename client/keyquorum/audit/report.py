"""The audit report: a log verified from its first leaf, summed up as HTML for people and as JSON for scripts.

Nothing is written unless the whole log verified and every proof that the report shows did. Both files appear whole.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from keyquorum.atomic import make_folder, replace_file
from keyquorum.audit.facts import LISTED, Facts
from keyquorum.audit.page import Listing, Scope, render
from keyquorum.audit.summary import Summary, summarise
from keyquorum.ledger.proving import LoggedLeaf, prove
from keyquorum.ledger.source import LogSource
from keyquorum.ledger.trust import Auditor
from keyquorum.ledger.verification import QUORUM_SECONDS, Verified, verify_log
from keyquorum.moments import LAST_SECOND
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["Report", "make_report"]
_SHOWN: Final = 300
"""Leaves of each type that the page shows with their proofs; the JSON report has all."""
_TITLES: Final = {
    "alarm": "Alarms",
    "unreadable": "Leaves of no known form",
    "job.denied": "Refusals",
    "release.intent": "Releases",
    "ceremony": "Ceremonies",
    "drill": "Drills",
    "revocation": "Revocations",
    "roster": "Rosters",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, and from what."""

    verified: Verified
    summary: Summary
    html: Path
    json: Path
    rows: int


async def make_report(
    source: LogSource,
    auditor: Auditor,
    folder: Path,
    begin: int,
    end: int,
    *,
    progress: ProgressCallback = silent,
    patience: float = QUORUM_SECONDS,
) -> Report:
    """Verify the log, and write ``report.html`` and ``report.json`` about ``begin`` ≤ time < ``end`` into ``folder``.

    No period ends after the year 9999. Raises as :func:`verify_log` and :func:`prove`, and :class:`UnavailableError`
    (``STORAGE``).
    """
    end = min(end, LAST_SECOND)
    make_folder(folder)
    with _scratch() as scratch, contextlib.closing(Facts(scratch, begin, end)) as facts:
        verified = await verify_log(source, auditor.trust, leaves=facts.add, progress=progress, patience=patience)
        scope = Scope(
            auditor.roster,
            verified.latest,
            source.where,
            (begin, end),
            int(time.time()),
            (facts.before, facts.after),
        )
        found = summarise(facts)
        listings = [Listing(_TITLES[kind], kind, facts.rows(kind, _SHOWN), facts.count(kind)) for kind in LISTED]
        shown = {row.index for listing in listings for row in listing.rows}
        total = sum(listing.total for listing in listings)
        proven: dict[int, list[str]] = {}
        with _whole(folder / "report.json") as out:
            _head(out, scope, found)
            written = 0
            async for leaf, proof in prove(source, verified.latest.checkpoint, facts.leaves(LISTED)):
                hashes = [base64.b64encode(value).decode() for value in proof]
                if leaf.index in shown:
                    proven[leaf.index] = hashes
                out.write((",\n" if written else "\n") + json.dumps(_row(leaf, hashes)))
                written += 1
                progress(Progress(Stage.PROVE, written, total))
            out.write("\n]}\n")
        page = render(scope, found, listings, proven).encode()
    await asyncio.to_thread(replace_file, folder / "report.html", page)
    return Report(verified, found, folder / "report.html", folder / "report.json", written)


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="keyquorum-audit-")
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, "no temporary folder can be made", actual=error.strerror) from None
    with folder as name:
        yield Path(name)


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` once all of it is written."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{path} can't be written", actual=error.strerror) from None


def _head(out: TextIO, scope: Scope, found: Summary) -> None:
    checkpoint = scope.latest.checkpoint
    head = {
        "report": "keyquorum-audit/1",
        "made_at": scope.made,
        "cluster": scope.roster.cluster,
        "roster": {"version": scope.roster.version, "sha256": scope.roster.digest},
        "log": {"origin": checkpoint.origin, "read_from": scope.where},
        "from": scope.begin,
        "to": scope.end,
        "leaves_before": scope.before,
        "leaves_after": scope.after,
        "verified": {
            "size": checkpoint.size,
            "root": checkpoint.root.hex(),
            "signed_at": scope.latest.signed.signed_at,
            "quorum_time": scope.latest.quorum_time,
            "cosigned": dict(sorted(scope.latest.times.items())),
            "checkpoint": scope.latest.signed.encode().decode(),
        },
        "summary": found.as_dict(),
    }
    out.write(json.dumps(head, indent=1)[:-2] + ',\n "rows": [')


def _row(leaf: LoggedLeaf, proof: list[str]) -> dict[str, object]:
    """``leaf`` is the exact text that was logged, base64 where it is no UTF-8; ``proof`` runs from its sibling up."""
    try:
        text: dict[str, object] = {"leaf": leaf.leaf.decode("utf-8")}
    except UnicodeDecodeError:
        text = {"leaf_base64": base64.b64encode(leaf.leaf).decode()}
    return {"index": leaf.index, **text, "proof": proof}
