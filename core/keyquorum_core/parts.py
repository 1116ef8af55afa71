"""Parts on their way between custodians: one sealed blob for each co-holder, and a signed header that vouches for it.

A blob is HPKE to the co-holder's roster key of (u32be index ‖ 32-byte part) for every seed the two share, in order of
index; ``info`` = H("keyquorum/v1/parts", ceremony id (16 bytes), from, to, encoded recipient key). The header names the
SHA-256 of each co-holder's blob (DESIGN §9; docs/adr/0006-custodian-keystore.md says why one blob).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from keyquorum_core import derivation
from keyquorum_core.ceremony import PartsHeader
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Quorum
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.transcript import H

__all__ = [
    "SealedPart",
    "check_header",
    "co_holders",
    "open_parts",
    "parts_header",
    "parts_info",
    "seal_parts",
    "shared_indices",
]


@dataclass(frozen=True, slots=True)
class SealedPart:
    """One blob, as it travels through the coordinator, who cannot open it."""

    sender: str
    to: str
    sealed: bytes = field(repr=False)


def shared_indices(quorum: Quorum, one: str, other: str) -> tuple[int, ...]:
    """The seeds that two custodians both hold, ascending."""
    theirs = set(quorum.indices_of(other))
    return tuple(index for index in quorum.indices_of(one) if index in theirs)


def co_holders(quorum: Quorum, me: str) -> tuple[str, ...]:
    """The other custodians that share a seed with ``me``, sorted."""
    return tuple(name for name in quorum.ids if name != me and shared_indices(quorum, me, name))


def parts_info(ceremony_id: str, sender: str, to: str, recipient_public: bytes) -> bytes:
    """HPKE ``info`` of a blob: 32 bytes, binding ceremony, both custodians and the recipient's key."""
    return H("keyquorum/v1/parts", bytes.fromhex(ceremony_id), sender.encode(), to.encode(), recipient_public)


def seal_parts(
    plan: CeremonyPlan, me: str, parts: Mapping[int, bytes], keys: Mapping[str, bytes]
) -> tuple[SealedPart, ...]:
    """``parts``, one per seed I hold, sealed to each co-holder; ``keys`` are encoded HPKE public keys by custodian."""
    out = []
    for name in co_holders(plan.quorum, me):
        shared = {index: parts[index] for index in shared_indices(plan.quorum, me, name)}
        plaintext = derivation.encode_contributions(shared)
        info = parts_info(plan.ceremony_id, me, name, keys[name])
        out.append(SealedPart(me, name, seal(keys[name], plaintext, info)))
    return tuple(out)


def parts_header(plan: CeremonyPlan, me: str, sealed: tuple[SealedPart, ...]) -> PartsHeader:
    """What I sign about them."""
    return PartsHeader(plan.digest, me, {part.to: hashlib.sha256(part.sealed).hexdigest() for part in sealed})


def open_parts(
    plan: CeremonyPlan, header: PartsHeader, sender: str, me: str, part: SealedPart, recipient: RecipientKey
) -> dict[int, bytes]:
    """The parts that ``sender``, who signed ``header``, sealed to me.

    Raises :class:`RefusedError` (``CEREMONY``) naming the sender when the blob is not the one in its header, does not
    open, or does not hold exactly one part for each seed we share.
    """
    expected = header.recipients.get(me, "")
    found = hashlib.sha256(part.sealed).hexdigest()
    if not hmac.compare_digest(expected, found):
        raise _wrong(sender, "its sealed parts are not those its header names", expected or "an entry for me", found)
    try:
        plaintext = recipient.open(part.sealed, parts_info(plan.ceremony_id, sender, me, recipient.public))
        return derivation.decode_contributions(plaintext, shared_indices(plan.quorum, me, sender))
    except (MalformedError, RefusedError) as error:
        raise _wrong(
            sender, "its sealed parts cannot be used", "one part for each shared seed", error.message
        ) from None


def check_header(plan: CeremonyPlan, header: PartsHeader, sender: str) -> None:
    """The header is ``sender``'s, of this plan, and names exactly its co-holders. Raises as :func:`open_parts`."""
    for what, expected, actual in (
        ("its header speaks for another custodian", sender, header.custodian),
        ("its header is of another plan", plan.digest, header.plan_digest),
        (
            "its header names the wrong recipients",
            ", ".join(co_holders(plan.quorum, sender)),
            ", ".join(sorted(header.recipients)),
        ),
    ):
        if expected != actual:
            raise _wrong(sender, what, expected, actual)


def _wrong(sender: str, what: str, expected: object, actual: object) -> RefusedError:
    return RefusedError(
        Reason.CEREMONY, f"custodian {sender}: {what}", expected=expected, actual=actual, details={"custodians": sender}
    )
