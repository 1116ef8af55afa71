"""What a coordinator knows of epochs without having made them: certificates from custodians, rosters of earlier times.

A coordinator that lost its database, or joins later, learns everything it needs from custodians; nothing it learns is
believed before its signatures verify.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc.aio
from sqlalchemy import select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import RosterRow
from keyquorum_coordinator.link import Link
from keyquorum_core.ceremony import CERTIFICATE_TYPE, MAX_CERTIFICATE, EpochCertificate
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.roster import Roster
from keyquorum_core.signing import peek_payload
from keyquorum_core.succession import earlier_rosters
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["fetch_certificate", "keep_roster", "older_rosters"]

_TIMEOUT = 30.0


def keep_roster(session: Session, roster: Roster, envelope: bytes) -> None:
    """Remember the roster in force."""
    if session.get(RosterRow, roster.digest) is None:
        session.add(RosterRow(digest=roster.digest, version=roster.version, envelope=envelope))


def older_rosters(session: Session, current: Roster) -> list[bytes]:
    """Envelopes of the rosters before ``current`` that are known here, newest first, without a gap."""
    query = select(RosterRow).where(RosterRow.version < current.version).order_by(RosterRow.version.desc())
    found = {row.digest: row.envelope for row in session.scalars(query)}
    known = earlier_rosters(current, list(found.values()))
    return [found[digest] for digest in known]


async def fetch_certificate(links: Mapping[str, Link], key_id: str, epoch: int, digest: str = "") -> bytes:
    """The certificate of that digest, or of any, from whichever custodian has it. Raises ``UNAVAILABLE``."""
    request = pb.GetCertificateRequest(key_id=key_id, epoch=epoch)
    for link in links.values():
        try:
            answer = await link.ceremonies.GetCertificate(request, timeout=_TIMEOUT)
            payload = peek_payload(answer.certificate, CERTIFICATE_TYPE, "epoch certificate", MAX_CERTIFICATE)
            found = EpochCertificate.parse(payload)
            if (found.plan.key_id, found.plan.epoch) == (key_id, epoch) and digest in ("", found.digest):
                return answer.certificate
        except (grpc.aio.AioRpcError, KeyquorumError):
            continue
    raise UnavailableError(
        Reason.UNAVAILABLE,
        f"no custodian at hand has the certificate of key {key_id} epoch {epoch}",
        expected=digest or "one",
        next_step="Bring back a custodian that holds the epoch",
    )
