"""What the operators revoked, as an operator sees it: fetched, made into its next version, and handed over.

The format is docs/spec/revocations.md. A document from the coordinator is verified against the pinned roster's
operators before anything is built on it: an operator signs the whole list each time, so nobody else's entries may slip
in. That it is the newest one only custodians can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyquorum.profile import Profile
from keyquorum.session import Connection
from keyquorum_core.bulletin import Bulletin, sign_bulletin, verify_bulletin
from keyquorum_core.errors import MalformedError, Reason, StateError
from keyquorum_core.revocations import NOTHING, REVOCATIONS, Revocation, Revocations, check_follows
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["CustodianHas", "Held", "fetch", "hand_over", "open_revocations", "successor"]


@dataclass(frozen=True, slots=True)
class CustodianHas:
    """The coordinator's word of which version a custodian has (0: none), and why it lacks the present one."""

    custodian: str
    version: int
    digest: str
    problem: str

    def as_dict(self) -> dict[str, object]:
        return {
            "custodian": self.custodian,
            "version": self.version,
            "digest": self.digest,
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class Held:
    """The document that the coordinator has, verified, or None; the rest is the coordinator's word."""

    document: Bulletin | None
    custodians: tuple[CustodianHas, ...]
    jobs: tuple[str, ...] = ()
    """After handing over: jobs that ended, or lost their worker."""

    @property
    def revocations(self) -> Revocations:
        return Revocations.read(self.document) if self.document is not None else NOTHING


def open_revocations(envelope: bytes, profile: Profile) -> Bulletin:
    """A document that enough operators of the pinned roster signed for its cluster, in date or not.

    Raises :class:`MalformedError` and :class:`RefusedError`."""
    bulletin = verify_bulletin(
        envelope,
        REVOCATIONS.name,
        profile.roster.operator_identities(),
        profile.roster.operator_threshold,
        cluster=profile.cluster,
    )
    Revocations.read(bulletin)
    return bulletin


def successor(
    previous: Bulletin | None,
    cluster: str,
    entry: Revocation,
    *,
    lift: bool,
    now: int,
    expires_at: int,
    signers: Sequence[Identity],
) -> tuple[Bulletin, bytes]:
    """The next version, with ``entry`` revoked, or lifted, and everything else as it was; and its envelope.

    Raises :class:`StateError`: ``EXISTS`` (it is revoked already), ``NOT_FOUND`` (nothing to lift); and
    :class:`MalformedError` for an entry that custodians would not read.
    """
    before = Revocations.read(previous) if previous is not None else NOTHING
    revoked, lifted = dict(before.revoked), dict(before.lifted)
    if lift and entry.name not in revoked:
        raise StateError(Reason.NOT_FOUND, f"this {entry.target} is not revoked", actual=entry.subject[:200])
    if not lift and entry.name in revoked:
        raise StateError(
            Reason.EXISTS,
            f"this {entry.target} is revoked already",
            actual=f"{entry.subject[:200]}: {revoked[entry.name].reason}",
        )
    revoked.pop(entry.name, None)
    lifted.pop(entry.name, None)
    (lifted if lift else revoked)[entry.name] = entry
    body: dict[str, object] = {
        "revoked": [each.as_json() for _, each in sorted(revoked.items())],
        "lifted": [each.as_json() for _, each in sorted(lifted.items())],
    }
    version = previous.version + 1 if previous is not None else 1
    bulletin = Bulletin.parse(Bulletin(cluster, REVOCATIONS.name, version, now, expires_at, body).payload())
    check_follows(before, Revocations.read(bulletin))
    return bulletin, sign_bulletin(bulletin, signers)


async def fetch(connection: Connection, profile: Profile) -> Held:
    """What the coordinator has. Raises as :func:`open_revocations`."""
    found = await connection.unary(connection.revocations.Get, pb.GetRevocationsRequest())
    return _held(found, profile)


async def hand_over(connection: Connection, profile: Profile, envelope: bytes) -> Held:
    """Have the coordinator store the document, act on it, and hand it to custodians. Raises what it refuses with, and
    ``BULLETIN`` where it answers with another document."""
    sent = open_revocations(envelope, profile)
    request = pb.AcceptRevocationsRequest(document=envelope)
    held = _held(await connection.unary(connection.revocations.Accept, request), profile)
    if held.document is None or held.document.digest != sent.digest:
        raise MalformedError(
            Reason.BULLETIN,
            "the coordinator answers with another document than it was given",
            expected=sent.digest,
            actual=held.document.digest if held.document is not None else "none",
            next_step="Give the file to each custodian's operator: `keyquorum-custodian revoke FILE --dir DIR`.",
        )
    return held


def _held(found: pb.RevocationsState, profile: Profile) -> Held:
    return Held(
        open_revocations(found.document, profile) if found.document else None,
        tuple(
            CustodianHas(each.custodian[:32], each.version, each.digest[:64], each.problem[:400])
            for each in found.custodians[:256]
        ),
        tuple(job[:26] for job in found.jobs),
    )
