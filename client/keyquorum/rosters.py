"""Making a roster: enrolment cards, a quorum rule and operators become one signed document."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keyquorum.atomic import make_folder, replace_file
from keyquorum.profile import load_profile
from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.log_keys import LogKeys
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Operator, Roster, open_card, sign_roster
from keyquorum_core.signing import Identity, PublicIdentity, merge, peek_payload
from keyquorum_core.succession import follow
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "SignedRoster",
    "assemble_roster",
    "change_roster",
    "cosign_roster",
    "follow_profile",
    "operators_file",
    "rule_of",
]


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A roster and its DSSE envelope."""

    roster: Roster
    envelope: bytes


def rule_of(document: object) -> Mapping[str, object]:
    """The quorum rule in a document: the whole of it, or its member ``quorum`` beside a member ``custodians``.

    Raises :class:`MalformedError` (``QUORUM_RULE``).
    """
    rule = document.get("quorum", document) if isinstance(document, dict) else None
    if not isinstance(rule, dict) or not all(isinstance(name, str) for name in rule):
        raise MalformedError(
            Reason.QUORUM_RULE,
            "the quorum file holds no rule",
            expected="an object, or one under 'quorum'",
            actual=type(rule).__name__,
        )
    return rule


def operators_file(operators: Mapping[str, PublicIdentity], threshold: int) -> bytes:
    """An ``operators.json``: who may sign rosters, for custodians and clients to pin."""
    return jcs.dumps(
        {
            "threshold": threshold,
            "operators": {name: base64.b64encode(each.to_bytes()).decode() for name, each in operators.items()},
        }
    )


def assemble_roster(
    *,
    cluster: str,
    committee: str,
    issued_at: int,
    expires_at: int,
    cards: Sequence[bytes],
    rule: Mapping[str, object],
    operators: Mapping[str, PublicIdentity],
    operator_threshold: int,
    signers: Sequence[Identity],
    coordinator_tls: Sequence[str],
    log_key: str,
    log_url: str,
) -> SignedRoster:
    """A first roster of the custodians that signed ``cards``, signed by ``signers``. Times are unix seconds;
    ``log_key`` is the line in the coordinator's ``log.vkey``, empty for a cluster that is to release nothing yet.

    Raises :class:`RefusedError` for a card that its custodian didn't sign or of another cluster,
    :class:`MalformedError` for anything that a roster can't say.
    """
    roster = Roster(
        cluster=cluster,
        version=1,
        issued_at=issued_at,
        expires_at=expires_at,
        committee=committee,
        custodians=tuple(open_card(card, cluster=cluster).custodian for card in cards),
        quorum=rule,
        operators=tuple(Operator(name, identity) for name, identity in operators.items()),
        operator_threshold=operator_threshold,
        coordinator_tls=tuple(coordinator_tls),
        log_key=LogKeys.parse(log_key) if log_key else None,
        log_url=log_url,
    )
    return SignedRoster(roster, sign_roster(roster, signers))


def change_roster(
    current: Roster,
    *,
    issued_at: int,
    expires_at: int,
    cards: Sequence[bytes] = (),
    drop: Sequence[str] = (),
    rule: Mapping[str, object] | None = None,
    operators: Mapping[str, PublicIdentity] | None = None,
    operator_threshold: int | None = None,
    coordinator_tls: Sequence[str] | None = None,
    signers: Sequence[Identity],
) -> SignedRoster:
    """The version after ``current``: a card of a known id puts another custodian in its place, of a new id adds one;
    those in ``drop`` leave. What isn't given stays. It counts once enough operators of both versions have signed.

    Raises :class:`RefusedError`, :class:`MalformedError` as :func:`assemble_roster`.
    """
    entries = {each.id: each for each in current.custodians}
    for name in drop:
        current.custodian(name)
        del entries[name]
    for card in cards:
        entry = open_card(card, cluster=current.cluster).custodian
        entries[entry.id] = entry
    everyone = operators if operators is not None else current.operator_identities()
    roster = replace(
        current,
        version=current.version + 1,
        previous=current.digest,
        issued_at=issued_at,
        expires_at=expires_at,
        custodians=tuple(entries.values()),
        quorum=rule if rule is not None else current.quorum,
        operators=tuple(Operator(name, identity) for name, identity in everyone.items()),
        operator_threshold=current.operator_threshold if operator_threshold is None else operator_threshold,
        coordinator_tls=tuple(coordinator_tls) if coordinator_tls is not None else current.coordinator_tls,
    )
    return SignedRoster(roster, sign_roster(roster, signers))


def cosign_roster(envelope: bytes, signers: Sequence[Identity]) -> SignedRoster:
    """The same roster with further operators' signatures."""
    roster = Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER))
    return SignedRoster(roster, merge([envelope, sign_roster(roster, signers)], "roster", max_bytes=2 * MAX_ROSTER))


def follow_profile(path: Path, envelopes: Sequence[bytes], *, now: int | None = None) -> Roster:
    """Pin a later roster in a profile, if a chain of successors leads to it from the one that is pinned.

    The one before is kept for keys made under it. The profile is replaced last, in one move: before that nothing has
    changed for whoever reads it. Raises as :func:`open_successor`, and ``STORAGE``.
    """
    profile = load_profile(path, now=now)
    newest = follow(profile.roster, envelopes)
    text = read_bytes(path, "profile").decode("utf-8")
    folder = path.parent / "rosters"
    make_folder(folder)
    replace_file(folder / f"{profile.roster.version}.json", profile.roster_envelope)
    for envelope in envelopes[:-1]:
        version = Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER)).version
        replace_file(folder / f"{version}.json", envelope)
    name = f"roster-{newest.version}.json"
    replace_file(path.parent / name, envelopes[-1])
    text = _replaced(_replaced(text, "roster", name), "roster_sha256", newest.digest)
    replace_file(path, text.encode())
    return newest


def _replaced(profile: str, member: str, value: str) -> str:
    """The profile's text with another value for one of its members, which stands on a line of its own."""
    changed, count = re.subn(rf'(?m)^{member}\s*=\s*"[^"\n]*"', f'{member} = "{value}"', profile, count=1)
    if count != 1:
        raise MalformedError(Reason.MALFORMED, f"the profile has no line for {member}", expected=f'{member} = "…"')
    return changed
