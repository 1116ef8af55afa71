"""An epoch by its certificate, for whoever knows rosters and nothing else: its committee, its rule, its commitments.

A key outlives the roster it was made under. Its epochs keep the committee and rule that they were certified with, and
are combined by those, whatever the roster says by now.
"""

from __future__ import annotations

from collections.abc import Sequence

from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.ceremony_checks import check_certificate
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.roster import Roster
from keyquorum_core.signing import open_multi, peek_payload

__all__ = ["open_certificate"]


def open_certificate(envelope: bytes, rosters: Sequence[Roster]) -> EpochCertificate:
    """A certificate signed by all who made its epoch, under one of these rosters.

    Raises :class:`MalformedError`, :class:`RefusedError` (``ROSTER``, ``SIGNATURE…``, ``CEREMONY``, ``QUORUM_RULE``).
    """
    what = "epoch certificate"
    claimed = EpochCertificate.parse(peek_payload(envelope, CERTIFICATE_TYPE, what, MAX_CERTIFICATE))
    roster = next((each for each in rosters if each.digest == claimed.plan.roster_digest), None)
    if roster is None:
        raise RefusedError(
            Reason.ROSTER,
            "the epoch certificate names a roster that is not known here",
            expected=", ".join(f"version {each.version}" for each in rosters),
            actual=claimed.plan.roster_digest,
        )
    identities = {each.id: each.identity for each in roster.custodians}
    payload, signed = open_multi(
        envelope, CERTIFICATE_TYPE, identities, len(claimed.signers), what, max_bytes=MAX_CERTIFICATE
    )
    if claimed.plan.quorum != roster.quorum_of():
        raise RefusedError(
            Reason.QUORUM_RULE,
            "the epoch was certified for another quorum than its roster's",
            expected=roster.quorum_of().words(),
            actual=claimed.plan.quorum.words(),
        )
    return check_certificate(payload, claimed.plan, claimed.plan.quorum, signed)
