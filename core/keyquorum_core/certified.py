"""An epoch by its certificate, for whoever knows rosters and nothing else: its committee, its rule, its commitments.

A key outlives the roster it was made under. Its epochs keep the committee and rule that they were certified with, and
are combined by those, whatever the roster says by now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.ceremony_checks import check_signed
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.roster import Roster
from keyquorum_core.signing import Unverified, peek_payload

__all__ = ["open_certificate", "open_certificate_of", "peek_certificate"]


def open_certificate(envelope: bytes, rosters: Sequence[Roster]) -> EpochCertificate:
    """A certificate signed by all who made its epoch, under one of these rosters.

    Raises :class:`MalformedError`, :class:`RefusedError` (``ROSTER``, ``SIGNATURE…``, ``CEREMONY``, ``QUORUM_RULE``).
    """

    def roster_of(digest: str) -> Roster:
        found = next((each for each in rosters if each.digest == digest), None)
        if found is None:
            raise RefusedError(
                Reason.ROSTER,
                "the epoch certificate names a roster that is not known here",
                expected=", ".join(f"version {each.version}" for each in rosters),
                actual=digest,
            )
        return found

    return open_certificate_of(envelope, roster_of)


def open_certificate_of(envelope: bytes, roster_of: Callable[[str], Roster]) -> EpochCertificate:
    """As :func:`open_certificate`, under the roster that ``roster_of`` gives for the digest that the plan names."""
    what = "epoch certificate"
    unverified = Unverified(envelope, CERTIFICATE_TYPE, what, MAX_CERTIFICATE)
    certificate = EpochCertificate.parse(unverified.payload)
    plan = certificate.plan
    roster = roster_of(plan.roster_digest)
    identities = {each.id: each.identity for each in roster.custodians}
    check_signed(certificate, plan, plan.quorum, unverified.open_multi(identities, len(certificate.signers), what))
    if plan.quorum != roster.quorum_of():
        raise RefusedError(
            Reason.QUORUM_RULE,
            "the epoch was certified for another quorum than its roster's",
            expected=roster.quorum_of().words(),
            actual=plan.quorum.words(),
        )
    return certificate


def peek_certificate(envelope: bytes) -> EpochCertificate:
    """What a certificate says, UNVERIFIED: for one that was verified before it was kept. Raises
    :class:`MalformedError`."""
    return EpochCertificate.parse(peek_payload(envelope, CERTIFICATE_TYPE, "epoch certificate", MAX_CERTIFICATE))
