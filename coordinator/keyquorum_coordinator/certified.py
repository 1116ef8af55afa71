"""What epochs' certificates say, for whoever serves an epoch: its own committee and rule, whatever the roster's are.

Certificates were verified when they were stored, and never change; they can be large, so what matters of them is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from sqlalchemy.orm import Session

from keyquorum_coordinator.certificates import older_rosters
from keyquorum_coordinator.database import Database, KeyRow
from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.signing import peek_payload

__all__ = ["Certified", "CertifiedEpochs", "Handed"]

_KEPT = 4096
_MAX_ROSTERS = 64


@dataclass(frozen=True, slots=True)
class Certified:
    """``digest``: SHA-256 of the certificate's payload, hex."""

    quorum: Quorum
    digest: str


@dataclass(frozen=True, slots=True)
class Handed:
    """A certificate (DSSE envelope), and the rosters down to the one that it names, for somebody who has the one in
    force."""

    certificate: bytes
    rosters: tuple[bytes, ...]


class CertifiedEpochs:
    """Certificates of the database, each read once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[tuple[str, int], Certified] = OrderedDict()

    async def of(self, key_id: str, epoch: int) -> Certified | None:
        """None where this coordinator has no certificate of the epoch yet."""
        where = key_id, epoch
        known = self._known.get(where)
        if known is None:

            def load(session: Session) -> bytes | None:
                row = session.get(KeyRow, where)
                return None if row is None else row.certificate

            envelope = await self._database.read(load)
            if envelope is None:
                return None
            known = self._known[where] = await asyncio.to_thread(_read, envelope)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return known

    async def handed(self, key_id: str, epoch: int, roster: Roster) -> Handed | None:
        """What tells an epoch's rule to who knows ``roster``; None where it is the roster's own, or not known here."""
        certified = await self.of(key_id, epoch)
        if certified is None or certified.quorum == roster.quorum_of():
            return None

        def load(session: Session) -> Handed | None:
            row = session.get(KeyRow, (key_id, epoch))
            return (
                None if row is None else Handed(row.certificate, tuple(older_rosters(session, roster)[:_MAX_ROSTERS]))
            )

        return await self._database.read(load)


def _read(envelope: bytes) -> Certified:
    payload = peek_payload(envelope, CERTIFICATE_TYPE, "epoch certificate", MAX_CERTIFICATE)
    return Certified(EpochCertificate.parse(payload).plan.quorum, hashlib.sha256(payload).hexdigest())
