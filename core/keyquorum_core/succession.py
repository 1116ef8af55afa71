"""From one roster to the next: signed by the rule of the old one and by its own (as TUF does for its root, §5.3).

So operators cannot be put in place of others without them, and nobody becomes one without holding the key. Whoever
trusts one version can follow the chain to any later one, whoever hands it over; and whoever trusts a version knows
every earlier one by the digest that the next one names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
from keyquorum_core.signing import PublicIdentity, open_multi, peek_payload

__all__ = ["earlier_rosters", "follow", "open_successor", "signed_by"]

_MAX_ENVELOPE = 2 * MAX_ROSTER


def open_successor(envelope: bytes, current: Roster) -> Roster:
    """The roster that follows ``current``: its next version, naming its digest, signed by ``operator_threshold`` of the
    operators of ``current`` and of its own.

    Whether it is in date is not looked at: an intermediate version may have expired. Raises :class:`MalformedError`,
    and :class:`RefusedError`: ``ROSTER`` (another cluster, version or predecessor), ``SIGNATURE…``.
    """
    return _open(envelope, current)[0]


def signed_by(envelope: bytes, current: Roster) -> tuple[str, ...]:
    """Which of its own operators signed the successor of ``current``. Raises as :func:`open_successor`."""
    roster, fingerprints = _open(envelope, current)
    return tuple(each.name for each in roster.operators if each.identity.fingerprint in fingerprints)


def _open(envelope: bytes, current: Roster) -> tuple[Roster, tuple[str, ...]]:
    claimed = Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=_MAX_ENVELOPE))
    for what, expected, actual in (
        ("cluster", current.cluster, claimed.cluster),
        ("version", current.version + 1, claimed.version),
        ("previous roster", current.digest, claimed.previous),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.ROSTER,
                f"the roster does not follow the one known: another {what}",
                expected=expected,
                actual=actual,
                next_step="Give every version in between, in order.",
            )
    both: dict[str, PublicIdentity] = {
        each.identity.fingerprint: each.identity for each in (*current.operators, *claimed.operators)
    }
    payload, signed = open_multi(envelope, ROSTER_TYPE, both, 1, "roster", max_bytes=_MAX_ENVELOPE)
    for roster, whose in ((current, "the roster before"), (claimed, "the roster itself")):
        names = [each.name for each in roster.operators if each.identity.fingerprint in signed]
        if len(names) < roster.operator_threshold:
            raise RefusedError(
                Reason.SIGNATURE_MISSING,
                f"the roster is not signed by enough operators of {whose}",
                expected=f"{roster.operator_threshold} of {', '.join(each.name for each in roster.operators)}",
                actual=", ".join(names) or "none of them",
            )
    return Roster.parse(payload), signed


def follow(current: Roster, envelopes: Iterable[bytes]) -> Roster:
    """The end of a chain of successors, each following the one before. Raises as :func:`open_successor`."""
    for envelope in envelopes:
        current = open_successor(envelope, current)
    return current


def earlier_rosters(current: Roster, envelopes: Sequence[bytes]) -> dict[str, Roster]:
    """Rosters before ``current`` by digest, from envelopes in any order: each is known by the digest that a later one
    names, so that its signatures need no checking. Others are left out. Raises :class:`MalformedError`."""
    payloads = {
        hashlib.sha256(payload).hexdigest(): payload
        for payload in (peek_payload(each, ROSTER_TYPE, "earlier roster", _MAX_ENVELOPE) for each in envelopes)
    }
    out: dict[str, Roster] = {}
    expected = current.previous
    while expected in payloads:
        out[expected] = Roster.parse(payloads[expected])
        expected = out[expected].previous
    return out
