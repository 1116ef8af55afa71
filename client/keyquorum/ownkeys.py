"""Keys for an owner's own data, from the custodians: the owner signs a key request, a quorum answers it.

A key of this kind has to be the same every time, or what was made with it is lost. So it is taken only when two
custodians report each seed alike, or when it meets a key check from an earlier time.
"""

from __future__ import annotations

import secrets

from keyquorum.opening import CLOCK_SKEW
from keyquorum_core.derivation import Combination
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.key_request import KeyRequest
from keyquorum_core.keywrap import LoadedKeys

__all__ = ["make_request", "require_confirmed"]

_LIFETIME = 600  # seconds: long enough to ask again after a coordinator's restart


def make_request(
    owner: LoadedKeys,
    *,
    key_id: str,
    epoch: int,
    purpose: str,
    name: str,
    classification: str,
    export_control: str,
    now: int,
) -> KeyRequest:
    """A request that can be signed; raises :class:`MalformedError` for what none can say."""
    return KeyRequest(
        key_id=key_id,
        epoch=epoch,
        purpose=purpose,
        name=name,
        classification=classification,
        export_control=export_control,
        owner=owner.name,
        owner_identity=owner.identity.public,
        owner_hpke=owner.recipient.public,
        not_before=now - CLOCK_SKEW,
        not_after=now + _LIFETIME,
        issued_at=now,
        nonce=secrets.token_hex(16),
    )


def require_confirmed(opened: Combination, request: KeyRequest) -> None:
    """Raise :class:`UnavailableError` (``NO_QUORUM``) for a key that a single custodian could have planted."""
    if not opened.confirmed:
        raise UnavailableError(
            Reason.NO_QUORUM,
            f"the {request.purpose} key is not confirmed: some seed was reported by one custodian only",
            expected="each seed reported alike by two custodians, or a key check from an earlier time",
            actual=f"answers of {', '.join(opened.used)}",
            next_step="Try again when more custodians answer, or give the key check that an earlier run printed.",
        )
