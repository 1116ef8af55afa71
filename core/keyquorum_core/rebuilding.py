"""What is said and checked while co-holders rebuild a custodian's seeds, in *repair* and *replace* (DESIGN §9).

1. *propose*: the custodian to be rebuilt signs a :class:`RebuildRequest` for the plan: nobody is rebuilt unasked.
2. *give*: each co-holder seals all seeds that the two share in one blob to that custodian's roster key, and signs a
   :class:`Gift` that names the blob's digest.
3. *restore*: the custodian opens the blobs and takes, for each of its seeds, the value that the epoch certificate
   commits to (:func:`choose`). The certificate decides, not a count of votes: one honest co-holder outweighs any number
   of liars. It signs a :class:`RebuildReceipt` that names those whose seeds were not the certified ones; their signed
   gifts, with the blobs, are the evidence.

Exact bytes: docs/spec/ceremony.md.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core import derivation, jcs
from keyquorum_core.ceremony import EpochCertificate, refused
from keyquorum_core.ceremony_checks import right_seeds
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CUSTODIAN_ID, SHA256_HEX, check, within
from keyquorum_core.parts import SealedPart, shared_indices
from keyquorum_core.quorum import MAX_CUSTODIANS, MAX_SEEDS_EACH
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.strictjson import Fields, canonical
from keyquorum_core.transcript import H

__all__ = [
    "GIFT_TYPE",
    "REBUILD_RECEIPT_TYPE",
    "REBUILD_REQUEST_TYPE",
    "Gift",
    "RebuildReceipt",
    "RebuildRequest",
    "Rebuilt",
    "check_gift",
    "check_rebuilt",
    "check_request",
    "choose",
    "gift_info",
    "lacking_error",
    "open_gift",
    "seal_gift",
]

REBUILD_REQUEST_TYPE: Final = "application/vnd.keyquorum.rebuild-request.v1+json"
GIFT_TYPE: Final = "application/vnd.keyquorum.rebuild-gift.v1+json"
REBUILD_RECEIPT_TYPE: Final = "application/vnd.keyquorum.rebuild-receipt.v1+json"

_MAX_STATEMENT = 1 << 16


@dataclass(frozen=True, slots=True)
class RebuildRequest:
    """``custodian`` asks its co-holders to rebuild it, by the plan of that digest (hex)."""

    plan_digest: str
    custodian: str

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``REBUILD_REQUEST_TYPE``."""
        return jcs.dumps({"plan_digest": self.plan_digest, "custodian": self.custodian})

    @classmethod
    def parse(cls, payload: bytes) -> RebuildRequest:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "rebuild request", _MAX_STATEMENT)
        made = cls(_digest(fields, "plan_digest"), _custodian(fields, "custodian"))
        fields.done()
        return made


@dataclass(frozen=True, slots=True)
class Gift:
    """``custodian`` sealed its share of ``to``'s seeds in the blob of that SHA-256 (hex)."""

    plan_digest: str
    custodian: str
    to: str
    sealed_sha256: str

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``GIFT_TYPE``."""
        return jcs.dumps(
            {
                "plan_digest": self.plan_digest,
                "custodian": self.custodian,
                "to": self.to,
                "sealed_sha256": self.sealed_sha256,
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> Gift:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "rebuild gift", _MAX_STATEMENT)
        made = cls(
            _digest(fields, "plan_digest"),
            _custodian(fields, "custodian"),
            _custodian(fields, "to"),
            _digest(fields, "sealed_sha256"),
        )
        fields.done()
        return made


@dataclass(frozen=True, slots=True)
class RebuildReceipt:
    """``custodian`` holds all its ``seeds`` of the certificate of that digest. ``wrong``: by co-holder, how many of the
    seeds it gave were not the certified ones; all of them where its blob could not be used."""

    plan_digest: str
    custodian: str
    certificate: str
    seeds: int
    wrong: Mapping[str, int]

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``REBUILD_RECEIPT_TYPE``."""
        return jcs.dumps(
            {
                "plan_digest": self.plan_digest,
                "custodian": self.custodian,
                "certificate": self.certificate,
                "seeds": self.seeds,
                "wrong": dict(self.wrong),
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> RebuildReceipt:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "rebuild receipt", _MAX_STATEMENT)
        plan_digest, custodian = _digest(fields, "plan_digest"), _custodian(fields, "custodian")
        certificate, seeds = _digest(fields, "certificate"), fields.integer("seeds", 0, MAX_SEEDS_EACH)
        counts = fields.object("wrong")
        fields.done()
        names = counts.names()
        within(len(names), "number of wrong gifts", 0, MAX_CUSTODIANS)
        for name in names:
            check(CUSTODIAN_ID, name, "custodian id")
        wrong = {name: counts.integer(name, 1, MAX_SEEDS_EACH) for name in names}
        return cls(plan_digest, custodian, certificate, seeds, wrong)


def _digest(fields: Fields, name: str) -> str:
    value = fields.text(name, max_length=64)
    check(SHA256_HEX, value, name)
    return value


def _custodian(fields: Fields, name: str) -> str:
    value = fields.text(name, max_length=32)
    check(CUSTODIAN_ID, value, "custodian id")
    return value


def gift_info(ceremony_id: str, sender: str, to: str, recipient_public: bytes) -> bytes:
    """HPKE ``info`` of a blob: H("keyquorum/v1/rebuild", ceremony id (16 bytes), from, to, recipient's key)."""
    return H("keyquorum/v1/rebuild", bytes.fromhex(ceremony_id), sender.encode(), to.encode(), recipient_public)


def seal_gift(plan: CeremonyPlan, me: str, seeds: Mapping[int, bytes], recipient_public: bytes) -> tuple[Gift, bytes]:
    """What I say and send: my seeds that the plan's target shares, as u32be index ‖ seed, ascending, in one blob."""
    shared = {index: seeds[index] for index in shared_indices(plan.quorum, me, plan.target)}
    info = gift_info(plan.ceremony_id, me, plan.target, recipient_public)
    sealed = seal(recipient_public, derivation.encode_contributions(shared), info)
    return Gift(plan.digest, me, plan.target, hashlib.sha256(sealed).hexdigest()), sealed


def check_request(plan: CeremonyPlan, request: RebuildRequest) -> None:
    """The request is the target's own, for this plan. Raises :class:`RefusedError` (``CEREMONY``)."""
    for what, expected, actual in (
        ("in another custodian's name", plan.target, request.custodian),
        ("for another plan", plan.digest, request.plan_digest),
    ):
        if expected != actual:
            raise refused(f"rebuild request {what}", [plan.target], expected=expected, actual=actual)


def check_gift(plan: CeremonyPlan, gift: Gift, sender: str, sealed: bytes) -> None:
    """The gift is ``sender``'s, for this plan's target, and names this blob. Raises :class:`RefusedError`
    (``CEREMONY``) naming the sender."""
    for what, expected, actual in (
        ("gift in another custodian's name", sender, gift.custodian),
        ("gift for another plan", plan.digest, gift.plan_digest),
        ("gift to another custodian", plan.target, gift.to),
        ("gift of another blob than it names", gift.sealed_sha256, hashlib.sha256(sealed).hexdigest()),
    ):
        if not hmac.compare_digest(expected.encode(), actual.encode()):
            raise refused(what, [sender], expected=expected, actual=actual)


def open_gift(plan: CeremonyPlan, part: SealedPart, recipient: RecipientKey) -> dict[int, bytes]:
    """The seeds in a blob: exactly those that sender and target share, by index. Secret.

    Raises :class:`RefusedError` (``CEREMONY``) naming the sender.
    """
    info = gift_info(plan.ceremony_id, part.sender, plan.target, recipient.public)
    try:
        plaintext = recipient.open(part.sealed, info)
        return derivation.decode_contributions(plaintext, shared_indices(plan.quorum, part.sender, plan.target))
    except (MalformedError, RefusedError) as error:
        raise refused("its sealed seeds cannot be used", [part.sender], actual=error.message) from None


def check_rebuilt(plan: CeremonyPlan, receipt: RebuildReceipt) -> None:
    """The receipt is the target's, for this plan, for all its seeds, and blames only co-holders, for no more than they
    share with it. Raises :class:`RefusedError` (``CEREMONY``) naming the target."""
    for what, expected, actual in (
        ("receipt in another custodian's name", plan.target, receipt.custodian),
        ("receipt for another plan", plan.digest, receipt.plan_digest),
        ("receipt for another certificate", plan.certificate, receipt.certificate),
        ("receipt for some of its seeds", len(plan.quorum.indices_of(plan.target)), receipt.seeds),
    ):
        if expected != actual:
            raise refused(what, [plan.target], expected=expected, actual=actual)
    for name, count in receipt.wrong.items():
        most = len(shared_indices(plan.quorum, plan.target, name)) if name in plan.quorum.ids else 0
        if name == plan.target or count > most:
            raise refused(
                f"receipt blames {name} for seeds that they do not share",
                [plan.target],
                expected=f"at most {most}",
                actual=count,
            )


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """``seeds`` are the certified ones, by index; secret. ``wrong``: how many each liar gave. ``lacking``: the seeds
    that nobody gave rightly."""

    seeds: Mapping[int, bytes]
    wrong: Mapping[str, int]
    lacking: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Rebuilt({len(self.seeds)} seeds, wrong={dict(self.wrong)}, lacking={len(self.lacking)})"


def choose(certificate: EpochCertificate, me: str, given: Mapping[str, Mapping[int, bytes] | None]) -> Rebuilt:
    """For each seed of mine the value that the certificate commits to, whoever gave it.

    ``given``: co-holder → index → seed, or None where its blob could not be used.
    """
    quorum = certificate.plan.quorum
    seeds: dict[int, bytes] = {}
    wrong: dict[str, int] = {}
    for sender, values in sorted(given.items()):
        right = _right(certificate, seeds, values) if values is not None else set()
        seeds |= {index: values[index] for index in right - seeds.keys()} if values is not None else {}
        bad = len(shared_indices(quorum, me, sender)) - len(right)
        if bad:
            wrong[sender] = bad
    lacking = tuple(index for index in quorum.indices_of(me) if index not in seeds)
    return Rebuilt(seeds, wrong, lacking)


def _right(certificate: EpochCertificate, known: Mapping[int, bytes], values: Mapping[int, bytes]) -> set[int]:
    """The indices whose value is the certified one: equal to one that was found to be, or found to be now."""
    new = {index: value for index, value in values.items() if index not in known}
    again = values.keys() & known.keys()
    return right_seeds(certificate, new) | {
        index for index in again if hmac.compare_digest(values[index], known[index])
    }


def lacking_error(certificate: EpochCertificate, me: str, rebuilt: Rebuilt) -> RefusedError:
    """Why ``me`` cannot be rebuilt from what it was given: which seed nobody gave rightly, and who lied."""
    index = rebuilt.lacking[0]
    holders = [name for name in certificate.plan.quorum.holders(index) if name != me]
    error = RefusedError(
        Reason.CEREMONY,
        f"{len(rebuilt.lacking)} seeds of {me} were given by nobody as the certificate has them",
        expected=f"seed {index} from one of {', '.join(holders)}",
        actual=f"wrong seeds from {', '.join(sorted(rebuilt.wrong))}" if rebuilt.wrong else "too few co-holders",
        next_step="Bring back a co-holder that holds them; those who gave wrong ones lied or are damaged themselves.",
        details={"custodians": ",".join(sorted(rebuilt.wrong) or holders), "index": str(index)},
    )
    error.details |= {f"wrong.{name}": str(count) for name, count in sorted(rebuilt.wrong.items())}
    return error
