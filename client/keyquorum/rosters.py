"""Making a roster: enrolment cards, a quorum rule and operators become one signed document."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rfc8785

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.log_keys import LogKeys
from keyquorum_core.roster import Operator, Roster, open_card, sign_roster
from keyquorum_core.signing import Identity, PublicIdentity

__all__ = ["SignedRoster", "assemble_roster", "operators_file", "rule_of"]


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
    return rfc8785.dumps(
        {
            "threshold": threshold,
            "operators": {name: base64.b64encode(each.to_bytes()).decode() for name, each in operators.items()},
        }
    )


def assemble_roster(
    *,
    cluster: str,
    committee: str,
    version: int,
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
    """A roster of the custodians that signed ``cards``, signed by ``signers``. Times are unix seconds; ``log_key`` is
    the line in the coordinator's ``log.vkey``, empty for a cluster that is to release nothing yet.

    Raises :class:`RefusedError` for a card that its custodian didn't sign or of another cluster,
    :class:`MalformedError` for anything that a roster can't say.
    """
    roster = Roster(
        cluster=cluster,
        version=version,
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
