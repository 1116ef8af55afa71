"""What the auditor's commands share: whom to believe, by a profile or by the roster's files, and where the log is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from keyquorum.cli import output

if TYPE_CHECKING:
    from keyquorum.ledger.source import LogSource
    from keyquorum.ledger.trust import Auditor
    from keyquorum_core.ledger.log_trust import QuorumCheckpoint

__all__ = [
    "WAIT",
    "CaOption",
    "LogOption",
    "OperatorsOption",
    "RosterOption",
    "RosterPinOption",
    "WaitOption",
    "auditor_of",
    "checkpoint_facts",
    "checkpoint_rows",
    "moment",
    "read_log",
]

T = TypeVar("T")
WAIT: Final = 15.0
"""Custodians cosign a moment after the log has signed."""

RosterOption = Annotated[
    Path | None, typer.Option("--roster", help="The signed roster, instead of a profile.", show_default=False)
]
OperatorsOption = Annotated[
    Path | None,
    typer.Option("--operators", help="operators.json: who may sign the roster.", show_default=False),
]
RosterPinOption = Annotated[
    str | None, typer.Option("--roster-sha256", metavar="HEX", help="Believe the roster with this digest only.")
]
LogOption = Annotated[
    str | None,
    typer.Option("--log", metavar="URL|DIR", help="The log's read side, or a folder that 'ledger export' made."),
]
WaitOption = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, help="How long a checkpoint may lack a quorum's cosignatures."),
]
CaOption = Annotated[Path | None, typer.Option("--ca", help="PEM: authorities for an https log, not the system's.")]


def auditor_of(
    profile: Path | None, roster: Path | None, operators: Path | None, pin: str | None, at: int | None = None
) -> Auditor:
    """Whom to believe, by a roster valid at ``at`` (unix seconds), by default now; wrong usage (exit 2) where neither a
    profile nor a roster with its operators is named."""
    from keyquorum.ledger.trust import of_profile, of_roster_files

    if roster is not None or operators is not None:
        if roster is None or operators is None:
            raise typer.BadParameter("--roster FILE and --operators FILE go together")
        return of_roster_files(roster, operators, sha256=pin, at=at)
    if pin is not None:
        raise typer.BadParameter("--roster-sha256 goes with --roster; a profile has its own pin")
    if profile is None:
        raise typer.BadParameter(
            "nobody to believe: give --roster FILE and --operators FILE, or --profile FILE, or set KEYQUORUM_PROFILE"
        )
    return of_profile(profile, at=at)


def moment(text: str, now: int, option: str) -> int:
    """Unix seconds: given as such, as ISO 8601 (UTC unless it says otherwise), or as a span ago: 90m, 12h, 30d."""
    if text.isascii() and text.isdigit() and len(text) <= 11:
        return int(text)
    if match := re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text):
        return now - int(match[1]) * {"m": 60, "h": 3600, "d": 86400}[match[2]]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither ISO 8601, nor unix seconds, nor a span such as 30d", param_hint=option
        ) from None
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


def read_log(
    auditor: Auditor, log: str | None, ca: Path | None, work: Callable[[LogSource], Coroutine[Any, Any, T]]
) -> T:
    """Run ``work`` on the log, and let go of its connections."""
    from keyquorum.ledger.trust import open_source

    async def run() -> T:
        source = open_source(auditor, log, ca=ca)
        try:
            return await work(source)
        finally:
            await source.close()

    return asyncio.run(run())


def checkpoint_facts(latest: QuorumCheckpoint) -> dict[str, object]:
    """A verified checkpoint for ``--json``."""
    checkpoint = latest.checkpoint
    return {
        "origin": checkpoint.origin,
        "size": checkpoint.size,
        "root": checkpoint.root.hex(),
        "signed_at": latest.signed.signed_at,
        "quorum_time": latest.quorum_time,
        "cosigned": dict(sorted(latest.times.items())),
    }


def checkpoint_rows(latest: QuorumCheckpoint) -> list[tuple[str, object]]:
    """The same for a table."""
    checkpoint = latest.checkpoint
    return [
        ("log", checkpoint.origin),
        ("leaves", checkpoint.size),
        ("root", checkpoint.root.hex()),
        ("signed by the log", output.when(latest.signed.signed_at)),
        ("cosigned by a quorum", f"{', '.join(sorted(latest.times))}, at {output.when(latest.quorum_time)}"),
    ]
