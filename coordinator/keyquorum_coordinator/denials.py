"""Refusals into the ledger: the coordinator's own of submissions, and custodians' of releases, as they are heard.

A refusal stands whether or not it can be recorded; it is recorded off the release path, through the outbox.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from keyquorum_coordinator.admission import AdmittedRequest, facts_of
from keyquorum_coordinator.fanout import Arrival
from keyquorum_coordinator.jobs import Job
from keyquorum_coordinator.leaf_records import denial_of_release, denial_of_submission
from keyquorum_coordinator.outbox import Outbox
from keyquorum_core.errors import KeyquorumError, RefusedError, UnavailableError
from keyquorum_core.key_request import KeyRequest
from keyquorum_core.ledger.leaves import JobDenied, custodian_seat
from keyquorum_core.manifest import Manifest
from keyquorum_protos.wire.errors import from_status

__all__ = ["Denials"]

_log = structlog.get_logger("denials")


class Denials:
    """``clock``: unix seconds."""

    def __init__(self, outbox: Outbox, *, clock: Callable[[], float] = time.time) -> None:
        self._outbox = outbox
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    async def of_submission(self, manifest: bytes, owner: str, error: RefusedError) -> None:
        """Record that ``owner``'s manifest or key request was refused, if it is its owner's."""
        denial = await asyncio.to_thread(denial_of_submission, manifest, owner, error, int(self._clock()))
        if denial is not None:
            await self._write(denial, denial.job_id, denial.seat, denial.reason)

    def hear(self, job: Job | AdmittedRequest, intent: bytes, arrival: Arrival) -> None:
        """One answer to the release that leaf ``intent`` announced: record it if its custodian said no. One that could
        not be asked, or gave no answer, said nothing."""
        if not arrival.answer.HasField("refusal"):
            return
        error = from_status(arrival.answer.refusal)
        if isinstance(error, UnavailableError):
            return
        seat = custodian_seat(arrival.custodian)
        if isinstance(job, AdmittedRequest):
            document: Manifest | KeyRequest = job.request
            digest = job.payload_sha256
        else:
            facts = facts_of(job)
            document, digest = facts.manifest, facts.manifest_sha256
        denial = denial_of_release(document, digest, job.job_id, intent, seat, error, int(self._clock()))
        task = asyncio.create_task(self._write(denial, denial.intent_sha256, seat))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for what is being recorded."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _write(self, denial: JobDenied, *subject: str) -> None:
        try:
            await self._outbox.write(denial, *subject)
        except KeyquorumError as failure:
            _log.error("denial.not_recorded", job=denial.job_id, reason=str(failure.reason))
