"""Drills as an operator runs them: failures rehearsed on a canary key, followed live, believed by their report alone.

The coordinator runs a drill and says what happens while it runs; what counts is the report it signs in the end, with
the drill identity that the profile pins. A report cannot say that a drill passed whose checks did not
(:mod:`keyquorum_core.drill_report`), and its digest stands in the ledger.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import grpc.aio

from keyquorum.ledger.source import LogSource
from keyquorum.ledger.verification import verify_log
from keyquorum.profile import Profile
from keyquorum.progress import ProgressCallback, silent
from keyquorum.revoking import fetch, successor
from keyquorum.session import Connection
from keyquorum_core.drill_report import ABOUT, FULL, KINDS, DrillReport, Moment, clip, open_report
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.ledger.leaves import Drill as DrillLeaf
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.revocations import Revocation
from keyquorum_protos.v1 import drills_pb2 as pb

__all__ = ["DrillKind", "DrillRun", "DrillState", "Drills", "Finished", "MomentCallback", "find_in_ledger"]

MomentCallback = Callable[[Moment], None]
_RUN_SECONDS: Final = 3600.0
_REVOKED_FOR: Final = 365 * 86400
_MAX_RUNS: Final = 1000
_REASON: Final = "a drill rehearses revocation"
_LEAF_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class DrillKind:
    """A kind of drill, and how it stands with it, by the coordinator's word. Unix seconds, 0 for never."""

    kind: str
    about: str
    last_passed: int
    last_run: int
    every_seconds: int
    next_run: int


@dataclass(frozen=True, slots=True)
class DrillRun:
    """One that was run, or runs: ``state`` is running, passed, failed or interrupted."""

    drill_id: str
    kind: str
    key_id: str
    started_at: int
    duration_ms: int
    state: str
    report_sha256: str


@dataclass(frozen=True, slots=True)
class DrillState:
    """What there is: kinds in the order in which a full drill runs them, runs with the latest first."""

    kinds: tuple[DrillKind, ...]
    runs: tuple[DrillRun, ...]
    running: str

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "kinds": [{name: getattr(each, name) for name in DrillKind.__slots__} for each in self.kinds],
            "runs": [{name: getattr(each, name) for name in DrillRun.__slots__} for each in self.runs],
            "running": self.running,
        }


@dataclass(frozen=True, slots=True)
class Finished:
    """A report whose signature was verified, and the envelope it came in."""

    report: DrillReport
    envelope: bytes


class Drills:
    """Over one connection. ``operators`` sign what a drill of *revocation* needs signed; none are needed otherwise."""

    def __init__(self, connection: Connection, profile: Profile, operators: Sequence[LoadedKeys] = ()) -> None:
        self._connection = connection
        self._profile = profile
        self._operators = tuple(operators)

    async def state(self) -> DrillState:
        """The kinds of drill, when each passed last, what is scheduled, and the latest runs."""
        found = await self._connection.unary(self._connection.drills.List, pb.ListDrillsRequest())
        return DrillState(
            tuple(
                DrillKind(
                    _word(each.kind),
                    clip(each.about),
                    each.last_passed,
                    each.last_run,
                    each.every_seconds,
                    each.next_run,
                )
                for each in found.kinds[: len(ABOUT) + 1]
            ),
            tuple(
                DrillRun(
                    _word(each.drill_id),
                    _word(each.kind),
                    clip(each.key_id[:64]),
                    each.started_at,
                    each.duration_ms,
                    _word(each.state),
                    clip(each.report_sha256[:64]),
                )
                for each in found.runs[:_MAX_RUNS]
            ),
            _word(found.running),
        )

    async def run(self, kind: str, key_id: str, *, now: int, moment: MomentCallback) -> Finished:
        """Run a drill and follow it to its report; a broken connection goes on with the same drill.

        A drill that failed is a report that says so, and no error. Raises ``MALFORMED`` for a kind that there is not;
        ``NOT_FOUND`` where the profile pins no drill identity; ``CANARY``, ``UNKNOWN_KEY``, ``STATE`` (another drill
        runs) and what else the coordinator refuses with; ``SIGNATURE…`` for a report that it did not sign so.
        """
        if kind not in (*KINDS, FULL):
            raise MalformedError(
                Reason.MALFORMED, "no such kind of drill", expected=", ".join((*KINDS, FULL)), actual=ascii(kind[:40])
            )
        self._profile.drill_identity()  # before anything is begun
        request = pb.RunDrillRequest(drill_id=secrets.token_hex(16), kind=kind, key_id=key_id)
        if kind in ("revocation", FULL):
            request.revoke, request.lift = await self._revocations(kind, now)
        backoff = self._connection.backoff()
        while True:
            try:
                return await self._follow(request, moment)
            except grpc.aio.AioRpcError as error:
                if not (self._connection.transient(error) and await backoff.wait()):
                    raise self._connection.error(error) from None

    async def report(self, drill_id: str) -> Finished:
        """The report of a drill that ended. Raises ``NOT_FOUND``, ``STATE`` while it runs, ``SIGNATURE…``."""
        self._profile.drill_identity()
        found = await self._connection.unary(
            self._connection.drills.GetReport, pb.GetDrillReportRequest(drill_id=drill_id)
        )
        return self._open(found.report, drill_id)

    async def cancel(self, drill_id: str) -> bool:
        """Stop the one that runs; what it injected is undone. False: it does not run."""
        request = pb.CancelDrillRequest(drill_id=drill_id)
        return (await self._connection.unary(self._connection.drills.Cancel, request)).running

    async def _follow(self, request: pb.RunDrillRequest, moment: MomentCallback) -> Finished:
        stream = self._connection.stream(self._connection.drills.Run, request, timeout=_RUN_SECONDS)
        async with aclosing(stream) as events:
            async for event in events:
                if event.report:
                    return self._open(event.report, request.drill_id, request.kind, request.key_id)
                try:
                    moment(Moment(event.at_ms, event.kind, event.step, event.custodian, clip(event.text)))
                except MalformedError:
                    continue  # for looking at only: the report is what counts
        raise RefusedError(Reason.STATE, "the drill ended without a report", expected="a signed report")

    def _open(self, envelope: bytes, drill_id: str, kind: str | None = None, key_id: str = "") -> Finished:
        """``kind`` and ``key_id``: what was ordered, where that is known; without a key the coordinator picks it."""
        report = open_report(envelope, self._profile.drill_identity())
        for what, expected, actual in (
            ("drill", drill_id, report.drill_id),
            ("cluster", self._profile.cluster, report.cluster),
            ("kind", report.kind if kind is None else kind, report.kind),
            ("key", key_id or report.key_id, report.key_id),
        ):
            if expected != actual:
                raise RefusedError(Reason.STATE, f"the report is of another {what}", expected=expected, actual=actual)
        return Finished(report, envelope)

    async def _revocations(self, kind: str, now: int) -> tuple[bytes, bytes]:
        """Two documents: the next version of the revocations with the drill's owner in it, and the one after, without.
        A full drill goes on without them where too few operators are here to sign."""
        roster = self._profile.roster
        if len(self._operators) < roster.operator_threshold:
            if kind == FULL:
                return b"", b""
            raise RefusedError(
                Reason.SIGNATURE_MISSING,
                "a drill of revocation takes as many operators as a revocation does",
                expected=f"{roster.operator_threshold} operators of the roster",
                actual=", ".join(each.name for each in self._operators) or "none",
                next_step="Add the others' key files with --operator-key",
            )
        held = await fetch(self._connection, self._profile)
        fingerprint = self._profile.drill_identity().fingerprint
        entry = Revocation("owner", fingerprint, _REASON, now)
        signers = [each.identity for each in self._operators]
        common = {"now": now, "expires_at": now + _REVOKED_FOR, "signers": signers}
        cluster = self._profile.cluster
        first, revoke = successor(held.document, cluster, entry, lift=False, **common)  # type: ignore[arg-type]
        _, lift = successor(first, cluster, replace(entry), lift=True, **common)  # type: ignore[arg-type]
        return revoke, lift


async def find_in_ledger(
    source: LogSource,
    trust: LogTrust,
    report: DrillReport,
    *,
    progress: ProgressCallback = silent,
    patience: float = _LEAF_SECONDS,
) -> int:
    """Verify the ledger, and return the index of the leaf about this report: what it says agrees with the report.

    The leaf is entered, and cosigned, moments after the drill: for ``patience`` seconds the ledger is read again.

    Raises as :func:`verify_log`, and :class:`RefusedError` (``NOT_FOUND``, ``LEAF``).
    """
    found: list[tuple[int, DrillLeaf]] = []

    def look(first: int, leaves: tuple[bytes, ...]) -> None:
        for number, data in enumerate(leaves):
            if b'"drill"' in data:
                try:
                    leaf = DrillLeaf.parse(data)
                except KeyquorumError:
                    continue
                if leaf.report_sha256 == report.digest:
                    found.append((first + number, leaf))

    deadline = time.monotonic() + patience
    while True:
        verified = await verify_log(source, trust, leaves=look, progress=progress)
        if found or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    if not found:
        raise RefusedError(
            Reason.NOT_FOUND,
            "the ledger has no leaf about this drill's report",
            expected=f"a leaf with report_sha256 {report.digest}",
            actual=f"none in {verified.size} leaves",
            next_step="Look again in a minute: `keyquorum drill show`. If it stays so, the coordinator hides it.",
        )
    index, leaf = found[0]
    if (leaf.drill, leaf.passed, leaf.duration_ms) != (report.kind, report.passed, report.duration_ms):
        raise RefusedError(
            Reason.LEAF,
            "the ledger says something else of this drill than its report",
            expected=f"{report.kind}, passed {report.passed}, {report.duration_ms} ms",
            actual=f"{leaf.drill}, passed {leaf.passed}, {leaf.duration_ms} ms",
        )
    return index


def _word(text: str) -> str:
    return clip(text[:64])
