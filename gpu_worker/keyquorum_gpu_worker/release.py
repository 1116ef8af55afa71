"""From the custodians' challenge to the job's key: windows, evidence, answers, combination (DESIGN §6, §7).

The coordinator carries everything and is believed in nothing: window statements and answers are verified under the
pinned roster's identities, the leaf must name exactly this job, key and evidence.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio

from keyquorum_core.answers import Answers
from keyquorum_core.attestation.evidence import WindowNonce
from keyquorum_core.derivation import Combination
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.presentation import sign_presentation
from keyquorum_core.release import Answer, Window, open_window
from keyquorum_core.roster import Roster
from keyquorum_gpu_worker.documents import JobDocuments
from keyquorum_gpu_worker.evidence import Collection
from keyquorum_gpu_worker.keys import JobKeys
from keyquorum_gpu_worker.lease import Grant, boottime
from keyquorum_gpu_worker.link import Link
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_status

__all__ = ["Challenge", "make_evidence", "obtain_key", "read_windows"]

_RELEASE_SECONDS = 60.0
_MAX_STATEMENTS = 256
_SIGNED_BUT_WRONG = frozenset({Reason.STALE, Reason.UNKNOWN_CUSTODIAN})


@dataclass(frozen=True, slots=True)
class Challenge:
    """Current, verified windows by custodian, and why others' statements do not count."""

    windows: dict[str, Window]
    doubts: dict[str, KeyquorumError]


def read_windows(statements: Iterable[bytes], roster: Roster, now: int) -> Challenge:
    """Verify window statements. Whose a statement is follows from whose signature verifies, not from what it says.

    Of a custodian's statements the latest current one counts.
    """
    windows: dict[str, Window] = {}
    doubts: dict[str, KeyquorumError] = {}
    for statement in list(statements)[:_MAX_STATEMENTS]:
        for custodian in roster.custodians:
            try:
                window = open_window(
                    statement, custodian.identity, custodian=custodian.id, cluster=roster.cluster, now=now
                )
            except KeyquorumError as error:
                if error.reason in _SIGNED_BUT_WRONG:
                    doubts[custodian.id] = error
                continue
            known = windows.get(custodian.id)
            if known is None or window.window > known.window:
                windows[custodian.id] = window
            break
    for name in windows:
        doubts.pop(name, None)
    return Challenge(windows, doubts)


def make_evidence(challenge: Challenge, keys: JobKeys, sources: Collection) -> bytes:
    """The evidence document over every valid window's nonce. Blocking. Raises :class:`UnavailableError`.

    A custodian whose window is missing will refuse; whether the others suffice is seen when they answer.
    """
    if not challenge.windows:
        raise UnavailableError(
            Reason.NO_QUORUM,
            "no custodian's window is valid, so there is nothing to attest to",
            expected="current window statements signed by the roster's custodians",
            actual="; ".join(f"{name}: {error.message}" for name, error in sorted(challenge.doubts.items())) or "none",
            next_step="See whether the coordinator reaches the custodians, and compare clocks.",
        )
    nonces = tuple(
        WindowNonce(name, window.window, window.nonce_bytes) for name, window in sorted(challenge.windows.items())
    )
    return sources.document(nonces, keys.recipient.public, keys.identity.public.to_bytes()).to_bytes()


async def obtain_key(
    link: Link,
    documents: JobDocuments,
    roster: Roster,
    keys: JobKeys,
    sources: Collection,
    *,
    clock: Callable[[], float] = time.time,
    lease_clock: Callable[[], float] = boottime,
    patience: float = 30.0,
    said: Callable[[str, dict[str, object]], None] = lambda event, values: None,
) -> tuple[Combination, Grant]:
    """Ask for the job's key until a quorum's answers give it, or ``patience`` seconds of asking again have passed. With
    the key comes the lease it is held under, which counts from the beginning of this.

    ``said(event, values)`` is told what to log: counts and names, never a value. Raises what :meth:`Answers.failure`
    gives, and what the evidence source or the coordinator raise.
    """
    answers = Answers(
        documents.binding,
        roster,
        documents.quorum,
        keys.recipient,
        "worker",
        clock=clock,
        key_check=documents.opening.key_check_bytes,
    )
    asked_at = lease_clock()
    deadline = time.monotonic() + patience
    pause = 0.25
    while True:
        response = await link.unary(link.workers.GetChallenge, pb.GetChallengeRequest(job_id=documents.job_id))
        challenge = await asyncio.to_thread(read_windows, response.window_statements, roster, int(clock()))
        evidence = await asyncio.to_thread(make_evidence, challenge, keys, sources)
        digest = hashlib.sha256(evidence).hexdigest()
        presentation = await asyncio.to_thread(sign_presentation, keys.identity, documents.job_id, digest)
        answers.ask(evidence=evidence, windows=challenge.windows.values())
        answers.rejected |= challenge.doubts
        said("asking for the key", {"windows": sorted(challenge.windows), "evidence": sources.name})
        request = pb.WorkerReleaseRequest(
            job_id=documents.job_id, request_id=secrets.token_hex(16), evidence=evidence, presentation=presentation
        )
        found = await _ask_once(link, request, answers)
        if found is not None:
            if found.blamed:
                said("custodians answered wrongly", {"blamed": list(found.blamed)})
            terms = answers.lease()
            said("key combined", {"custodians": list(found.used), "lease_seconds": terms.seconds})
            return found, Grant(asked_at, terms)
        if not answers.worth_asking_again() or time.monotonic() + pause > deadline:
            raise answers.failure()
        said("no quorum yet", {"answered": answers.answered, "refused": sorted(answers.refused)})
        await asyncio.sleep(pause)
        pause = min(5.0, 2 * pause)


async def _ask_once(link: Link, request: pb.WorkerReleaseRequest, answers: Answers) -> Combination | None:
    try:
        async with aclosing(link.stream(link.workers.Release, request, timeout=_RELEASE_SECONDS)) as events:
            async for event in events:
                if event.leaf:
                    answers.take_leaf(event.leaf, event.leaf_proof)
                which = event.answer.WhichOneof("outcome")
                if which == "refusal":
                    answers.take_refusal(event.answer.custodian, from_status(event.answer.refusal))
                elif which == "share":
                    share = event.answer.share
                    answer = Answer(
                        event.answer.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
                    )
                    answers.take(answer, event.window_statement)
                    found = answers.combination(confirmed=False)
                    if found is not None:
                        return found
    except grpc.aio.AioRpcError as error:
        if not link.transient(error):
            raise link.error(error) from None
    return None
