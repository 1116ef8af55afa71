"""Epoch certificates, each verified once: a rotation comes back to the same one four times, a repair thrice.

What was verified stays so: an envelope is known by its digest, a roster by the digest that the certificate names.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from keyquorum_core import ceremony
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.ceremony_checks import check_signed
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.roster import Roster, RosterCustodian
from keyquorum_core.signing import Unverified
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.pacing import Work, at_once, on_the_spot

__all__ = ["Certificates"]

_KEPT: Final = 64
_KEPT_BYTES: Final = 16 << 20
_WHAT: Final = "epoch certificate"


class Certificates:
    """Those that one custodian has opened, the latest used in memory; used from the keystore's thread."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._opened: OrderedDict[bytes, EpochCertificate] = OrderedDict()
        self._bytes = 0
        self._roster: tuple[str, Roster] | None = None

    async def open(self, envelope: bytes, work: Work = on_the_spot) -> EpochCertificate:
        """A certificate signed by every custodian that it does not name as absent.

        Their identities are those of the roster that its plan names, which this custodian knows by its digest. Raises
        ``SIGNATURE…``, ``CEREMONY``, or ``ROSTER`` for a roster never seen here.
        """
        digest = hashlib.sha256(envelope).digest()
        known = self._opened.get(digest)
        if known is not None:
            self._opened.move_to_end(digest)
            return known
        unverified, found = await work(_read, envelope)
        await work(_verify, unverified, found, self._roster_of(found))
        self._keep(digest, found)
        return found

    def open_now(self, envelope: bytes) -> EpochCertificate:
        """:meth:`open` on the spot."""
        return at_once(self.open(envelope))

    def certified(self, certificate: EpochCertificate, custodian: str) -> RosterCustodian | None:
        """A custodian as it was when the epoch was certified; None where it holds no seed of it. Raises ``ROSTER``."""
        if custodian not in certificate.plan.quorum.ids:
            return None
        return self._roster_of(certificate).custodian(custodian)

    def _roster_of(self, certificate: EpochCertificate) -> Roster:
        digest = certificate.plan.roster_digest
        if self._roster is None or self._roster[0] != digest:
            stored = self._keystore.roster_payload(digest)
            if stored is None or hashlib.sha256(stored).hexdigest() != digest:
                raise RefusedError(
                    Reason.ROSTER,
                    "the epoch certificate names a roster that this custodian never served under",
                    expected="a roster it accepted",
                    actual=digest,
                )
            self._roster = digest, Roster.parse(stored)
        return self._roster[1]

    def _keep(self, digest: bytes, certificate: EpochCertificate) -> None:
        if digest in self._opened:  # two steps opened it at once
            return
        self._opened[digest] = certificate
        self._bytes += len(certificate.to_payload())
        while len(self._opened) > 1 and (len(self._opened) > _KEPT or self._bytes > _KEPT_BYTES):
            _, dropped = self._opened.popitem(last=False)
            self._bytes -= len(dropped.to_payload())


def _read(envelope: bytes) -> tuple[Unverified, EpochCertificate]:
    unverified = Unverified(envelope, ceremony.CERTIFICATE_TYPE, _WHAT, ceremony.MAX_CERTIFICATE)
    return unverified, EpochCertificate.parse(unverified.payload)


def _verify(unverified: Unverified, claimed: EpochCertificate, roster: Roster) -> None:
    identities = {custodian.id: custodian.identity for custodian in roster.custodians}
    signed = unverified.open_multi(identities, len(claimed.signers), _WHAT)
    check_signed(claimed, claimed.plan, claimed.plan.quorum, signed)
