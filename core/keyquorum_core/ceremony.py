"""What custodians compute and sign while they make an epoch together, in *generate* and *rotate* (DESIGN §9).

1. A :class:`~keyquorum_core.ceremony_plan.CeremonyPlan` orders it.
2. *propose*: each custodian draws a 32-byte part for every seed it holds (:func:`new_parts`), seals to each
   co-holder those of the seeds they share (:mod:`keyquorum_core.parts`), and signs a :class:`PartsHeader` about them.
3. *deliver*: each derives its seeds from the parts of all who take part, and in a rotation from the seeds of the epoch
   before (:func:`derive_seeds`), and signs :class:`Commitments` to them and to the headers it went by.
4. *confirm*: each checks that all holders of a seed committed alike (:mod:`keyquorum_core.ceremony_checks`) and signs
   the :class:`EpochCertificate`, which all of them sign over the same bytes and which names those who were absent.

Payloads are RFC 8785 JSON and refused in any other form, so that equal values have equal bytes. Commitments are hashes
of 256-bit secrets and may be shown; parts and seeds are secret and appear in no message or error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, cast, runtime_checkable

from keyquorum_core import jcs
from keyquorum_core.ceremony_plan import MAX_PLAN, CeremonyPlan
from keyquorum_core.derivation import hkdf_sha256
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CUSTODIAN_ID, check
from keyquorum_core.quorum import MAX_CUSTODIANS, MAX_SEEDS_EACH, Quorum
from keyquorum_core.strictjson import Fields, canonical
from keyquorum_core.transcript import H, H_each, transcript, u64be

__all__ = [
    "CERTIFICATE_TYPE",
    "COMMITMENTS_TYPE",
    "MAX_CERTIFICATE",
    "PARTS_TYPE",
    "PART_SIZE",
    "SEED_SIZE",
    "Commitments",
    "EpochCertificate",
    "KeptSeed",
    "PartsHeader",
    "Seed",
    "before_seed",
    "commitment",
    "commitments_to",
    "derive_seeds",
    "new_parts",
    "seed",
]

PARTS_TYPE: Final = "application/vnd.keyquorum.ceremony-parts.v1+json"
COMMITMENTS_TYPE: Final = "application/vnd.keyquorum.ceremony-commitments.v1+json"
CERTIFICATE_TYPE: Final = "application/vnd.keyquorum.epoch-certificate.v1+json"

PART_SIZE: Final = 32
SEED_SIZE: Final = 32
MAX_CERTIFICATE: Final = 32 << 20
"""Bytes that an epoch certificate's envelope may have, for whoever opens or merges one."""
_DIGEST_SIZE = 32
_BLOCK = 64  # of SHA-256
_MAX_CERTIFICATE = 1 << 24  # 64 characters and a little for each seed: over 200 000
_MAX_SEEDS = 1 << 18

Rng = Callable[[int], bytes]


# Values


@runtime_checkable
class KeptSeed(Protocol):
    """A seed that does not leave where it is kept, a hardware module, which computes with it."""

    def sha256(self, before: bytes, after: bytes) -> bytes:
        """SHA-256(before ‖ seed ‖ after), 32 bytes. Raises :class:`UnavailableError` where the module cannot."""

    def is_committed(self, before: bytes, commitment: bytes) -> bool:
        """Whether ``commitment`` is SHA-256(before ‖ seed)."""


Seed = bytes | KeptSeed


def new_parts(quorum: Quorum, me: str, rng: Rng = secrets.token_bytes) -> dict[int, bytes]:
    """My fresh 32-byte part for each seed I hold, by index. Secret."""
    return {index: rng(PART_SIZE) for index in quorum.indices_of(me)}


def seed(ceremony_id: str, index: int, parts: Mapping[str, bytes], before: bytes | None = None) -> bytes:
    """A seed from the parts of its holders that take part: HKDF-SHA-256, no salt, 32 bytes.

    ikm = parts in order of custodian id, and ``info`` = H("keyquorum/v1/seed", ceremony id, u64be(index)). In a
    rotation ikm = the seed of the epoch ``before`` ‖ parts, under the label "keyquorum/v1/rotated-seed". One honest
    part, or one seed unknown before, makes it unpredictable.
    """
    if len(parts) < 1 or any(len(part) != PART_SIZE for part in parts.values()):
        raise MalformedError(Reason.CEREMONY, "bad seed parts", expected=f"{PART_SIZE} bytes from each holder")
    if before is not None and len(before) != SEED_SIZE:
        raise MalformedError(Reason.CEREMONY, "bad seed size", expected=SEED_SIZE, actual=len(before))
    label = "keyquorum/v1/seed" if before is None else "keyquorum/v1/rotated-seed"
    ikm = (before or b"") + b"".join(parts[name] for name in sorted(parts))
    return hkdf_sha256(ikm, salt=b"", info=H(label, _id_bytes(ceremony_id), _u64(index)), length=SEED_SIZE)


def commitment(ceremony_id: str, index: int, seed: bytes) -> bytes:
    """H("keyquorum/v1/commitment", ceremony id, u64be(index), seed): 32 bytes, public."""
    if len(seed) != SEED_SIZE:
        raise MalformedError(Reason.CEREMONY, "bad seed size", expected=SEED_SIZE, actual=len(seed))
    return H("keyquorum/v1/commitment", _id_bytes(ceremony_id), _u64(index), seed)


def before_seed(ceremony_id: str, index: int) -> bytes:
    """What a commitment hashes before the seed that it ends with."""
    return transcript("keyquorum/v1/commitment", _id_bytes(ceremony_id), _u64(index)) + u64be(SEED_SIZE)


def commitments_to(ceremony_id: str, seeds: Mapping[int, bytes]) -> dict[int, bytes]:
    """:func:`commitment` to each of many seeds, by index."""
    for index, value in seeds.items():
        if len(value) != SEED_SIZE:
            raise MalformedError(Reason.CEREMONY, "bad seed size", expected=SEED_SIZE, actual=len(value))
        _u64(index)
    rest = ((index.to_bytes(8, "big"), value) for index, value in seeds.items())
    return dict(zip(seeds, H_each("keyquorum/v1/commitment", _id_bytes(ceremony_id), rest), strict=True))


def derive_seeds(
    quorum: Quorum,
    ceremony_id: str,
    me: str,
    parts: Mapping[str, Mapping[int, bytes]],
    present: Collection[str] | None = None,
    before: Mapping[int, Seed] | None = None,
) -> dict[int, bytes]:
    """All seeds I hold, from what each custodian (myself included) gave me: custodian id → index → part. Secret.

    ``present``: who takes part, by default everyone. ``before``: in a rotation, my seeds of the epoch before. Raises
    :class:`RefusedError` with ``CEREMONY`` naming the custodian whose parts are missing, surplus or misshapen.
    """
    mine = set(quorum.indices_of(me))
    taking_part = set(quorum.ids if present is None else present)
    for name in parts:
        quorum.indices_of(name)
    for name in quorum.ids:
        expected = mine.intersection(quorum.indices_of(name)) if name in taking_part else set()
        check_indices("parts", name, parts.get(name, {}), expected)
        if any(len(part) != PART_SIZE for part in parts.get(name, {}).values()):
            raise refused("part of the wrong size", [name], expected=f"{PART_SIZE} bytes")
    if before is not None:
        check_indices("seeds of the epoch before", me, before, mine)
        if any(isinstance(value, bytes) and len(value) != SEED_SIZE for value in before.values()):
            raise MalformedError(Reason.CEREMONY, "bad seed size", expected=SEED_SIZE)
    return _derive(ceremony_id, sorted(mine), [parts.get(name, {}) for name in quorum.ids], before)


def _derive(
    ceremony_id: str, indices: list[int], parts: list[Mapping[int, bytes]], before: Mapping[int, Seed] | None
) -> dict[int, bytes]:
    """:func:`seed` for many at once; ``parts`` in order of custodian id, each of its own seeds."""
    kept = {index: value for index, value in (before or {}).items() if isinstance(value, KeptSeed)}
    inputs = {index: bytearray() for index in indices}
    for index, value in (before or {}).items():
        inputs[index] += bytes(SEED_SIZE) if isinstance(value, KeptSeed) else value
    for given in parts:
        for index, part in given.items():
            inputs[index] += part
    shortest = PART_SIZE + (SEED_SIZE if before is not None else 0)
    if any(len(value) < shortest for value in inputs.values()):
        raise MalformedError(Reason.CEREMONY, "bad seed parts", expected=f"{PART_SIZE} bytes from each holder")
    label = "keyquorum/v1/seed" if before is None else "keyquorum/v1/rotated-seed"
    infos = H_each(label, _id_bytes(ceremony_id), ((_u64(index),) for index in indices))
    return {
        index: _from_kept(kept[index], bytes(inputs[index][SEED_SIZE:]), info)
        if index in kept
        else hkdf_sha256(bytes(inputs[index]), salt=b"", info=info, length=SEED_SIZE)
        for index, info in zip(indices, infos, strict=True)
    }


def _from_kept(before: KeptSeed, parts: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 without salt over a seed that its module hashes: the inner hash of HKDF-Extract's HMAC under the
    zero key (RFC 5869 §2.2, RFC 2104 §2) is all that sees the seed."""
    inner = before.sha256(b"\x36" * _BLOCK, parts)
    extracted = hashlib.sha256(b"\x5c" * _BLOCK + inner).digest()
    return hmac.digest(extracted, info + b"\x01", "sha256")


def _id_bytes(ceremony_id: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{32}", ceremony_id):
        raise MalformedError(Reason.CEREMONY, "bad ceremony id", expected="32 lower-case hex digits")
    return bytes.fromhex(ceremony_id)


def _u64(index: int) -> bytes:
    if not 0 <= index < 1 << 63:
        raise MalformedError(Reason.CEREMONY, "bad seed index", expected="0…2⁶³-1", actual=index)
    return u64be(index)


def check_indices(what: str, name: str, given: Mapping[int, object], expected: set[int]) -> None:
    """Neither short nor long; a mapping cannot repeat an index, and the parsers refuse payloads that do."""
    if set(given) == expected:
        return
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    said = [
        f"{word} {', '.join(map(str, items[:10]))}" for word, items in (("lacks", missing), ("adds", extra)) if items
    ]
    raise refused(
        f"{what} of {name} are for the wrong seeds",
        [name],
        expected=f"{len(expected)} seeds",
        actual="; ".join(said),
        index=(missing + extra)[0],
    )


def refused(
    message: str,
    custodians: Collection[str],
    *,
    expected: object = None,
    actual: object = None,
    index: int | None = None,
) -> RefusedError:
    """A check of a ceremony that said no, naming whom it concerns."""
    details = {"custodians": ",".join(custodians)}
    if index is not None:
        details["index"] = str(index)
    named = message if all(name in message for name in custodians) else f"{message}: {', '.join(custodians)}"
    return RefusedError(Reason.CEREMONY, named, expected=expected, actual=actual, details=details)


# Signed payloads


@dataclass(frozen=True, slots=True)
class PartsHeader:
    """What a custodian signs about the parts it sealed: for each co-holder, the SHA-256 of its blob, hex."""

    plan_digest: str
    custodian: str
    recipients: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: what commitments name."""
        return hashlib.sha256(self.to_payload()).hexdigest()

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``PARTS_TYPE``."""
        return jcs.dumps(
            {"plan_digest": self.plan_digest, "custodian": self.custodian, "recipients": dict(self.recipients)}
        )

    @classmethod
    def parse(cls, payload: bytes) -> PartsHeader:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = canonical(payload, "parts header", MAX_PLAN)
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        custodian = fields.text("custodian", max_length=32)
        check(CUSTODIAN_ID, custodian, "custodian id")
        recipients = _digests(fields.object("recipients"), "recipients")
        fields.done()
        return cls(plan_digest, custodian, recipients)


def _digests(fields: Fields, what: str) -> dict[str, str]:
    """Custodian id → digest, hex."""
    names = fields.names()
    if len(names) > MAX_CUSTODIANS:
        raise MalformedError(Reason.TOO_LARGE, f"a statement has too many {what}", expected=MAX_CUSTODIANS)
    for name in names:
        check(CUSTODIAN_ID, name, f"custodian id among {what}")
    return {name: fields.hex(name, _DIGEST_SIZE).hex() for name in names}


@dataclass(frozen=True, slots=True)
class Commitments:
    """What a custodian commits to: for each seed it holds, :func:`commitment` (32 bytes), by index.

    In the payload a list of ``[index, hex]``, ascending, so that an index given twice is visible and refused.
    ``headers``: by custodian, the digest of the parts header it went by. So it shows whether a custodian signed two of
    them, or a coordinator told some that others were absent.
    """

    plan_digest: str
    custodian: str
    commitments: Mapping[int, bytes]
    headers: Mapping[str, str]

    @classmethod
    def to_seeds(
        cls, plan: CeremonyPlan, custodian: str, seeds: Mapping[int, bytes], headers: Mapping[str, str]
    ) -> Commitments:
        """Commit to these seeds, made from the parts under ``headers``."""
        return cls(plan.digest, custodian, commitments_to(plan.ceremony_id, seeds), dict(headers))

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``COMMITMENTS_TYPE``."""
        pairs = [[index, self.commitments[index].hex()] for index in sorted(self.commitments)]
        return jcs.dumps(
            {
                "plan_digest": self.plan_digest,
                "custodian": self.custodian,
                "commitments": pairs,
                "headers": dict(self.headers),
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> Commitments:
        """Read a verified payload; raises :class:`MalformedError`, also for indices repeated or out of order."""
        fields = canonical(payload, "commitments", 1 << 20)
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        custodian = fields.text("custodian", max_length=32)
        check(CUSTODIAN_ID, custodian, "custodian id")
        pairs = fields.list("commitments", max_items=MAX_SEEDS_EACH)
        headers = _digests(fields.object("headers"), "headers")
        fields.done()
        return cls(plan_digest, custodian, _read_commitments(pairs), headers)


def _read_commitments(pairs: list[object]) -> dict[int, bytes]:
    """``[index, hex]``, ascending; columns at a time, since there may be ten thousand."""
    if not all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in pairs):
        raise MalformedError(Reason.MALFORMED, "commitments: bad entry", expected="[index, hex]")
    rows = cast(list[tuple[int, object]], pairs)
    last = -1
    for index, _ in rows:
        if index <= last:
            raise MalformedError(
                Reason.MALFORMED,
                "commitments: an index is repeated or out of order",
                expected=f"more than {last}",
                actual=index,
            )
        last = index
    values = Fields({"commitment": [value for _, value in rows]}, "commitments")
    digests = values.hexes("commitment", _DIGEST_SIZE, max_items=MAX_SEEDS_EACH)
    return {index: digest for (index, _), digest in zip(rows, digests, strict=True)}


@dataclass(frozen=True, slots=True)
class EpochCertificate:
    """The epoch as those who made it agreed it is: the plan, the commitment of every seed in order of index, and who of
    the committee was absent (sorted), holds nothing of it yet and did not sign."""

    plan: CeremonyPlan
    commitments: tuple[bytes, ...] = field(repr=False)
    absent: tuple[str, ...] = ()
    _payload: bytes = field(default=b"", init=False, repr=False, compare=False)

    @property
    def signers(self) -> tuple[str, ...]:
        """Who must have signed it: everyone but the absent."""
        return tuple(name for name in self.plan.quorum.ids if name not in self.absent)

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``CERTIFICATE_TYPE``: the same at every custodian that signs them."""
        if not self._payload:  # written once: there may be megabytes of it
            written = jcs.dumps(
                {
                    "absent": list(self.absent),
                    "plan": self.plan.as_dict(),
                    "plan_digest": self.plan.digest,
                    "commitments": [value.hex() for value in self.commitments],
                }
            )
            object.__setattr__(self, "_payload", written)
        return self._payload

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: what the ledger records."""
        return hashlib.sha256(self.to_payload()).hexdigest()

    @classmethod
    def parse(cls, payload: bytes) -> EpochCertificate:
        """Read a verified payload; raises :class:`MalformedError`, also for a digest or count at odds with its plan."""
        fields = canonical(payload, "epoch certificate", _MAX_CERTIFICATE)
        plan = CeremonyPlan.parse(jcs.dumps(fields.object("plan").rest()))
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        commitments = fields.hexes("commitments", _DIGEST_SIZE, max_items=_MAX_SEEDS)
        absent = fields.texts("absent", max_items=MAX_CUSTODIANS, max_length=32)
        fields.done()
        if plan_digest != plan.digest:
            raise MalformedError(
                Reason.CEREMONY, "certificate names another plan", expected=plan.digest, actual=plan_digest
            )
        if len(commitments) != plan.quorum.seed_count:
            raise MalformedError(
                Reason.CEREMONY,
                "certificate has the wrong number of commitments",
                expected=plan.quorum.seed_count,
                actual=len(commitments),
            )
        if list(absent) != sorted(set(absent) & set(plan.quorum.ids)):
            raise MalformedError(
                Reason.CEREMONY, "certificate names absent custodians twice, out of order or from outside the committee"
            )
        made = cls(plan, commitments, absent)
        object.__setattr__(made, "_payload", payload)
        return made
