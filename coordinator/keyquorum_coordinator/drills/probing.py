"""Probes: the coordinator asks for the canary's key as the drill owner, by the way that every owner's request goes.

A key request, signed and new each time, goes into the ledger; all custodians are asked; each share is verified, opened
and combined by the same code as at owners. A canary's key guards nothing, and leaves this module only as equal or not.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from keyquorum_coordinator.admission import AdmittedRequest, admit_key_request
from keyquorum_coordinator.outbox import Outbox
from keyquorum_coordinator.releases import Releases
from keyquorum_core.answers import Answers, JobBinding
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.key_request import KeyRequest, key_subject, sign_key_request
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.policy.engine import Decision
from keyquorum_core.policy.facts import JobFacts
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import Answer
from keyquorum_core.roster import Roster
from keyquorum_protos.wire.errors import from_status

__all__ = ["LIFETIME", "SKEW", "Derived", "Probe", "Prober"]

LIFETIME = 600
SKEW = 120
_PURPOSE = "data"
_NAME = "drill"


class Derived:
    """A canary's key in one epoch: it can be compared, and does not show."""

    __slots__ = ("_root", "key_check")

    def __init__(self, root: bytes, key_check: bytes) -> None:
        self._root = root
        self.key_check = key_check

    def same(self, other: Derived | None) -> bool:
        return other is not None and hmac.compare_digest(self._root, other._root)

    def __repr__(self) -> str:
        return f"Derived({self.key_check.hex()})"


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one. ``served``: by custodian whose share verified, milliseconds until it came; ``failed``: why the
    others have none; ``blamed``: who contradicts the rest; ``quorum_ms``: until the key was there."""

    epoch: int
    key: Derived | None
    quorum_ms: int | None
    blamed: tuple[str, ...] = ()
    served: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, KeyquorumError] = field(default_factory=dict)

    def words(self) -> str:
        """For people: who served, who did not and why."""
        parts = [f"shares from {', '.join(sorted(self.served)) or 'nobody'}"]
        parts += [f"{name}: {error.reason}" for name, error in sorted(self.failed.items())]
        if self.blamed:
            parts.append(f"wrong: {', '.join(self.blamed)}")
        return "; ".join(parts)


class Prober:
    """``decide``: the coordinator's own policy, which raises for a request that it denies."""

    def __init__(
        self,
        keys: LoadedKeys,
        roster: Roster,
        quorum: Quorum,
        releases: Releases,
        outbox: Outbox,
        decide: Callable[[JobFacts], Decision],
        classification: str,
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._roster = roster
        self._quorum = quorum
        self._releases = releases
        self._outbox = outbox
        self._decide = decide
        self._classification = classification
        self._clock = clock

    async def probe(self, key_id: str, epoch: int, known: Derived | None = None) -> Probe:
        """Ask everybody, and wait for everybody as long as the deadline of releases lets them. ``known``: the key as
        it was derived before, whose key check then tells the right from the wrong.

        Raises what the ledger or the coordinator's own policy refuse with; custodians' refusals are in the result."""
        request = self._request(key_id, epoch)
        envelope = await asyncio.to_thread(sign_key_request, request, self._keys.identity)
        admitted = await asyncio.to_thread(
            admit_key_request,
            envelope,
            self._keys.name,
            int(self._clock()),
            _Whatever(),
            self._decide,
        )
        await self._outbox.write(admitted.leaf, admitted.job_id)
        subject = bytes.fromhex(admitted.payload_sha256)
        binding = JobBinding(
            admitted.job_id, subject, key_id, epoch, request.purpose, key_subject(request.owner, request.name)
        )
        answers = Answers(
            binding,
            self._roster,
            self._quorum,
            self._keys.recipient,
            "owner",
            clock=self._clock,
            key_check=None if known is None else known.key_check,
        )
        answers.ask()
        return await self._gather(admitted, answers, epoch)

    async def _gather(self, admitted: AdmittedRequest, answers: Answers, epoch: int) -> Probe:
        started = time.monotonic()
        arrived: dict[str, int] = {}
        failed: dict[str, KeyquorumError] = {}
        quorum_ms: int | None = None
        try:
            async with aclosing(self._releases.of_key(admitted)) as stream:
                async for shown, arrival in stream:
                    elapsed = round((time.monotonic() - started) * 1000)
                    answers.take_leaf(shown.leaf, shown.proof)
                    if arrival.answer.WhichOneof("outcome") != "share":
                        failed[arrival.custodian] = from_status(arrival.answer.refusal)
                        continue
                    share = arrival.answer.share
                    answer = Answer(
                        arrival.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
                    )
                    answers.take(answer, arrival.window_statement)
                    if arrival.custodian in answers.answered:
                        arrived[arrival.custodian] = elapsed
                    if quorum_ms is None and answers.combination(confirmed=False) is not None:
                        quorum_ms = elapsed
        except KeyquorumError:
            if not failed and not arrived:
                raise
        failed |= answers.rejected
        found = answers.combination(confirmed=False)
        key = None if found is None else Derived(found.key.root, found.key.key_check)
        blamed = found.blamed if found is not None else answers.blamed
        return Probe(epoch, key, quorum_ms if key is not None else None, tuple(blamed), arrived, failed)

    def _request(self, key_id: str, epoch: int) -> KeyRequest:
        now = int(self._clock())
        return KeyRequest(
            key_id=key_id,
            epoch=epoch,
            purpose=_PURPOSE,
            name=_NAME,
            classification=self._classification,
            export_control="",
            owner=self._keys.name,
            owner_identity=self._keys.identity.public,
            owner_hpke=self._keys.recipient.public,
            not_before=now - SKEW,
            not_after=now + LIFETIME,
            issued_at=now,
            nonce=secrets.token_hex(16),
        )


class _Whatever:
    """Whatever a drill asks about goes to the custodians: what they say of it is what the drill is about."""

    def state(self, key_id: str, epoch: int) -> str:
        return "active"

    def all(self) -> tuple[tuple[str, int], ...]:
        return ()
