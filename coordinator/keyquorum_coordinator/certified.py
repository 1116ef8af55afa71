"""What epochs' certificates say, for whoever serves an epoch: its own committee and rule, whatever the roster's are.

Certificates were verified when they were stored, and never change; they can be large, so what matters of them is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, KeyRow
from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.quorum import Quorum
from keyquorum_core.signing import peek_payload

__all__ = ["Certified", "CertifiedEpochs"]

_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Certified:
    """``digest``: SHA-256 of the certificate's payload, hex."""

    quorum: Quorum
    digest: str


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


def _read(envelope: bytes) -> Certified:
    payload = peek_payload(envelope, CERTIFICATE_TYPE, "epoch certificate", MAX_CERTIFICATE)
    return Certified(EpochCertificate.parse(payload).plan.quorum, hashlib.sha256(payload).hexdigest())
