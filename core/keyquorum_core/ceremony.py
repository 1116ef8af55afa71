"""The *generate* ceremony's pure part: what each step computes, says and checks (DESIGN §9).

1. A roster operator signs a :class:`CeremonyPlan`.
2. *propose*: each custodian draws a 32-byte part for every seed it holds (:func:`new_parts`), seals to each
   co-holder those of the seeds they share (:mod:`keyquorum_core.parts`), and signs a :class:`PartsHeader` about them.
3. *deliver*: each derives its seeds from all parts (:func:`derive_seeds`) and signs :class:`Commitments` to them.
4. *confirm*: each checks that all holders of a seed committed alike (:func:`check_commitments`) and signs the
   :class:`EpochCertificate`, which all of them sign over the same bytes.

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

import rfc8785

from keyquorum_core.derivation import hkdf_sha256
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.names import CLUSTER, CUSTODIAN_ID, KEY_ID, check
from keyquorum_core.quorum import MAX_CUSTODIANS, MAX_SEEDS_EACH, Quorum, load_quorum_document
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import H, u64be

__all__ = [
    "CERTIFICATE_TYPE",
    "COMMITMENTS_TYPE",
    "MAX_CERTIFICATE",
    "PARTS_TYPE",
    "PART_SIZE",
    "PLAN_TYPE",
    "SEED_SIZE",
    "CeremonyPlan",
    "Commitments",
    "EpochCertificate",
    "PartsHeader",
    "check_certificate",
    "check_commitments",
    "check_plan",
    "check_seeds",
    "commitment",
    "derive_seeds",
    "new_ceremony_id",
    "new_parts",
    "seed",
]

PLAN_TYPE = "application/vnd.keyquorum.ceremony-plan.v1+json"
PARTS_TYPE = "application/vnd.keyquorum.ceremony-parts.v1+json"
COMMITMENTS_TYPE = "application/vnd.keyquorum.ceremony-commitments.v1+json"
CERTIFICATE_TYPE = "application/vnd.keyquorum.epoch-certificate.v1+json"

PART_SIZE = 32
SEED_SIZE = 32
_DIGEST_SIZE = 32
_ID_SIZE = 16
MAX_CERTIFICATE = 32 << 20
"""Bytes that an epoch certificate's envelope may have, for whoever opens or merges one."""
_MAX_PLAN = 1 << 17
_MAX_CERTIFICATE = 1 << 24  # 64 characters and a little for each seed: over 200 000
_MAX_SEEDS = 1 << 18
_SUITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.-]{0,63}")

Rng = Callable[[int], bytes]


# Values


def new_ceremony_id(rng: Rng = secrets.token_bytes) -> str:
    """16 random bytes as 32 lower-case hex digits."""
    return rng(_ID_SIZE).hex()


def new_parts(quorum: Quorum, me: str, rng: Rng = secrets.token_bytes) -> dict[int, bytes]:
    """My fresh 32-byte part for each seed I hold, by index. Secret."""
    return {index: rng(PART_SIZE) for index in quorum.indices_of(me)}


def seed(ceremony_id: str, index: int, parts: Mapping[str, bytes]) -> bytes:
    """A seed from its holders' parts: HKDF-SHA-256, no salt, ikm = parts in order of custodian id, 32 bytes.

    ``info`` = H("keyquorum/v1/seed", ceremony id, u64be(index)). One honest holder's part makes it unpredictable.
    """
    if len(parts) < 1 or any(len(part) != PART_SIZE for part in parts.values()):
        raise MalformedError(Reason.CEREMONY, "bad seed parts", expected=f"{PART_SIZE} bytes from each holder")
    info = H("keyquorum/v1/seed", _id_bytes(ceremony_id), _u64(index))
    return hkdf_sha256(b"".join(parts[name] for name in sorted(parts)), salt=b"", info=info, length=SEED_SIZE)


def commitment(ceremony_id: str, index: int, seed: bytes) -> bytes:
    """H("keyquorum/v1/commitment", ceremony id, u64be(index), seed): 32 bytes, public."""
    if len(seed) != SEED_SIZE:
        raise MalformedError(Reason.CEREMONY, "bad seed size", expected=SEED_SIZE, actual=len(seed))
    return H("keyquorum/v1/commitment", _id_bytes(ceremony_id), _u64(index), seed)


def derive_seeds(
    quorum: Quorum, ceremony_id: str, me: str, parts: Mapping[str, Mapping[int, bytes]]
) -> dict[int, bytes]:
    """All seeds I hold, from what each custodian (myself included) gave me: custodian id → index → part. Secret.

    Raises :class:`RefusedError` with ``CEREMONY`` naming the custodian whose parts are missing, surplus or misshapen.
    """
    mine = set(quorum.indices_of(me))
    for name in parts:
        quorum.indices_of(name)
    for name in quorum.ids:
        _check_indices("parts", name, parts.get(name, {}), mine.intersection(quorum.indices_of(name)))
        if any(len(part) != PART_SIZE for part in parts.get(name, {}).values()):
            raise _refused("part of the wrong size", [name], expected=f"{PART_SIZE} bytes")
    return {
        index: seed(ceremony_id, index, {name: parts[name][index] for name in quorum.holders(index)})
        for index in sorted(mine)
    }


def _id_bytes(ceremony_id: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{32}", ceremony_id):
        raise MalformedError(Reason.CEREMONY, "bad ceremony id", expected="32 lower-case hex digits")
    return bytes.fromhex(ceremony_id)


def _u64(index: int) -> bytes:
    if not 0 <= index < 1 << 63:
        raise MalformedError(Reason.CEREMONY, "bad seed index", expected="0…2⁶³-1", actual=index)
    return u64be(index)


# Signed payloads


def _canonical(payload: bytes, what: str, max_bytes: int) -> Fields:
    """The members of an RFC 8785 payload; any other way of writing the same values is refused."""
    value = loads(payload, what, max_bytes=max_bytes)
    try:
        canonical = rfc8785.dumps(value)  # type: ignore[arg-type]  # loads gives JSON values only
    except ValueError:  # lone surrogates
        canonical = b""
    if canonical != payload:
        raise MalformedError(Reason.MALFORMED, f"{what} is not canonical JSON", expected="RFC 8785")
    return Fields(value, what)


@dataclass(frozen=True, slots=True)
class CeremonyPlan:
    """What a roster operator orders: a new epoch of a key, held by this quorum. ``created_at`` in unix seconds."""

    ceremony_id: str
    key_id: str
    epoch: int
    suite: str
    cluster: str
    roster_digest: str
    quorum: Quorum
    created_at: int
    policy: KeyPolicy = field(default_factory=KeyPolicy)
    kind: str = "generate"

    def __post_init__(self) -> None:
        _read_plan(Fields(self.as_dict(), "ceremony plan"), self.quorum)

    def as_dict(self) -> dict[str, object]:
        """The payload's members, as JSON values."""
        return {
            "kind": self.kind,
            "ceremony_id": self.ceremony_id,
            "key_id": self.key_id,
            "epoch": self.epoch,
            "suite": self.suite,
            "cluster": self.cluster,
            "roster_digest": self.roster_digest,
            "custodians": [{"id": c.id, "jurisdiction": c.jurisdiction} for c in self.quorum.committee],
            "quorum": self.quorum.rule,
            "policy": self.policy.as_dict(),
            "created_at": self.created_at,
        }

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``PLAN_TYPE``."""
        return rfc8785.dumps(self.as_dict())  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: what every later statement of the ceremony names."""
        return hashlib.sha256(self.to_payload()).hexdigest()

    @classmethod
    def parse(cls, payload: bytes) -> CeremonyPlan:
        """Read a verified payload. Raises :class:`MalformedError`, or :class:`RefusedError` for its quorum rule."""
        return cls._from_fields(_canonical(payload, "ceremony plan", _MAX_PLAN))

    @classmethod
    def _from_fields(cls, fields: Fields) -> CeremonyPlan:
        document = {"custodians": fields.raw("custodians"), "quorum": fields.raw("quorum")}
        values = _read_plan(fields, load_quorum_document(document))
        return cls(**values)  # type: ignore[arg-type]


def _read_plan(fields: Fields, quorum: Quorum) -> dict[str, object]:
    for name in ("custodians", "quorum"):
        if name in fields:
            fields.raw(name)
    values: dict[str, object] = {
        "kind": fields.literal("kind", "generate"),
        "ceremony_id": fields.hex("ceremony_id", _ID_SIZE).hex(),
        "key_id": fields.text("key_id"),
        "epoch": fields.integer("epoch", minimum=1),
        "suite": fields.text("suite", max_length=64),
        "cluster": fields.text("cluster"),
        "roster_digest": fields.hex("roster_digest", _DIGEST_SIZE).hex(),
        "created_at": fields.integer("created_at"),
        "policy": KeyPolicy.read(fields.object("policy")),
        "quorum": quorum,
    }
    fields.done()
    check(KEY_ID, str(values["key_id"]), "key id in the ceremony plan")
    check(CLUSTER, str(values["cluster"]), "cluster in the ceremony plan")
    check(_SUITE, str(values["suite"]), "suite in the ceremony plan")
    return values


@dataclass(frozen=True, slots=True)
class PartsHeader:
    """What a custodian signs about the parts it sealed: for each co-holder, the SHA-256 of its blob, hex."""

    plan_digest: str
    custodian: str
    recipients: Mapping[str, str]

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``PARTS_TYPE``."""
        return rfc8785.dumps(
            {"plan_digest": self.plan_digest, "custodian": self.custodian, "recipients": dict(self.recipients)}
        )

    @classmethod
    def parse(cls, payload: bytes) -> PartsHeader:
        """Read a verified payload; raises :class:`MalformedError`."""
        fields = _canonical(payload, "parts header", _MAX_PLAN)
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        custodian = fields.text("custodian", max_length=32)
        check(CUSTODIAN_ID, custodian, "custodian id")
        recipients = fields.object("recipients")
        fields.done()
        names = recipients.names()
        if len(names) > MAX_CUSTODIANS:
            raise MalformedError(Reason.TOO_LARGE, "parts header has too many recipients", expected=MAX_CUSTODIANS)
        for name in names:
            check(CUSTODIAN_ID, name, "recipient's custodian id")
        return cls(plan_digest, custodian, {name: recipients.hex(name, _DIGEST_SIZE).hex() for name in names})


@dataclass(frozen=True, slots=True)
class Commitments:
    """What a custodian commits to: for each seed it holds, :func:`commitment` (32 bytes), by index.

    In the payload a list of ``[index, hex]``, ascending, so that an index given twice is visible and refused.
    """

    plan_digest: str
    custodian: str
    commitments: Mapping[int, bytes]

    @classmethod
    def to_seeds(cls, plan: CeremonyPlan, custodian: str, seeds: Mapping[int, bytes]) -> Commitments:
        """Commit to these seeds."""
        made = {index: commitment(plan.ceremony_id, index, secret) for index, secret in seeds.items()}
        return cls(plan.digest, custodian, made)

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``COMMITMENTS_TYPE``."""
        pairs = [[index, self.commitments[index].hex()] for index in sorted(self.commitments)]
        return rfc8785.dumps({"plan_digest": self.plan_digest, "custodian": self.custodian, "commitments": pairs})  # type: ignore[dict-item]

    @classmethod
    def parse(cls, payload: bytes) -> Commitments:
        """Read a verified payload; raises :class:`MalformedError`, also for indices repeated or out of order."""
        fields = _canonical(payload, "commitments", 1 << 20)
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        custodian = fields.text("custodian", max_length=32)
        check(CUSTODIAN_ID, custodian, "custodian id")
        pairs = fields.list("commitments", max_items=MAX_SEEDS_EACH)
        fields.done()
        out: dict[int, bytes] = {}
        last = -1
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:
                raise MalformedError(Reason.MALFORMED, "commitments: bad entry", expected="[index, hex]")
            entry = Fields({"index": pair[0], "commitment": pair[1]}, "commitments")
            index = entry.integer("index")
            if index <= last:
                raise MalformedError(
                    Reason.MALFORMED,
                    "commitments: an index is repeated or out of order",
                    expected=f"more than {last}",
                    actual=index,
                )
            last, out[index] = index, entry.hex("commitment", _DIGEST_SIZE)
        return cls(plan_digest, custodian, out)


@dataclass(frozen=True, slots=True)
class EpochCertificate:
    """The epoch as all its custodians agreed it is: the plan, and the commitment of every seed in order of index."""

    plan: CeremonyPlan
    commitments: tuple[bytes, ...] = field(repr=False)

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``CERTIFICATE_TYPE``: the same at every custodian, who all sign them."""
        return rfc8785.dumps(
            {
                "plan": self.plan.as_dict(),  # type: ignore[dict-item]
                "plan_digest": self.plan.digest,
                "commitments": [value.hex() for value in self.commitments],
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: what the ledger records."""
        return hashlib.sha256(self.to_payload()).hexdigest()

    @classmethod
    def parse(cls, payload: bytes) -> EpochCertificate:
        """Read a verified payload; raises :class:`MalformedError`, also for a digest or count at odds with its plan."""
        fields = _canonical(payload, "epoch certificate", _MAX_CERTIFICATE)
        plan = CeremonyPlan._from_fields(fields.object("plan"))
        plan_digest = fields.hex("plan_digest", _DIGEST_SIZE).hex()
        values = fields.texts("commitments", max_items=_MAX_SEEDS, max_length=2 * _DIGEST_SIZE)
        fields.done()
        if plan_digest != plan.digest:
            raise MalformedError(
                Reason.CEREMONY, "certificate names another plan", expected=plan.digest, actual=plan_digest
            )
        if len(values) != plan.quorum.seed_count:
            raise MalformedError(
                Reason.CEREMONY,
                "certificate has the wrong number of commitments",
                expected=plan.quorum.seed_count,
                actual=len(values),
            )
        commitments = tuple(
            Fields({"commitment": value}, "epoch certificate").hex("commitment", 32) for value in values
        )
        return cls(plan, commitments)


# Checks


def check_plan(plan: CeremonyPlan, *, cluster: str, roster_digest: str, quorum: Quorum) -> None:
    """The plan is for my cluster, my roster and its quorum; else :class:`RefusedError` with ``CEREMONY``."""
    for what, expected, actual in (
        ("cluster", cluster, plan.cluster),
        ("roster", roster_digest, plan.roster_digest),
        ("quorum", quorum, plan.quorum),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.CEREMONY, f"ceremony plan is for another {what}", expected=expected, actual=actual
            )


def check_commitments(plan: CeremonyPlan, quorum: Quorum, stated: Mapping[str, Commitments]) -> tuple[bytes, ...]:
    """Every custodian committed to exactly its seeds, and all holders of a seed alike; one commitment per index.

    ``stated`` is by the custodian whose signature was verified. Raises :class:`RefusedError` with ``CEREMONY``, naming
    custodians, index and values: among them is whoever committed to another seed or gave co-holders unequal parts.
    """
    if plan.quorum != quorum:
        raise RefusedError(Reason.CEREMONY, "ceremony plan is for another quorum", expected=quorum, actual=plan.quorum)
    if set(stated) != set(quorum.ids):
        names = sorted(set(quorum.ids) ^ set(stated))
        raise _refused("commitments missing or from strangers", names, expected=", ".join(quorum.ids))
    for name in quorum.ids:
        _check_statement("commitments", plan, stated[name].plan_digest, stated[name].custodian, name)
        _check_indices("commitments", name, stated[name].commitments, set(quorum.indices_of(name)))
    agreed: list[bytes] = []
    for index in range(quorum.seed_count):
        values: dict[bytes, list[str]] = {}
        for name in quorum.holders(index):
            values.setdefault(stated[name].commitments[index], []).append(name)
        if len(values) > 1:
            shown = [f"{', '.join(names)}: {value.hex()}" for value, names in values.items()]
            raise RefusedError(
                Reason.CEREMONY,
                f"holders of seed {index} committed differently",
                expected="one value from all holders",
                actual="; ".join(shown),
                next_step="The ceremony is void: one of those named lied. Keep its signed statements as evidence.",
                details={
                    "index": str(index),
                    "custodians": ",".join(quorum.holders(index)),
                    **{f"commitment.{name}": value.hex() for value, names in values.items() for name in names},
                },
            )
        agreed.append(next(iter(values)))
    return tuple(agreed)


def check_certificate(payload: bytes, plan: CeremonyPlan, quorum: Quorum, signers: Collection[str]) -> EpochCertificate:
    """The certificate is for this plan and quorum and was signed by all its custodians.

    ``signers`` are the custodians whose signatures over ``payload`` were verified. Raises :class:`MalformedError` or
    :class:`RefusedError` with ``CEREMONY``.
    """
    certificate = EpochCertificate.parse(payload)
    if certificate.plan != plan or certificate.plan.quorum != quorum:
        raise RefusedError(
            Reason.CEREMONY,
            "epoch certificate is for another plan or quorum",
            expected=f"key {plan.key_id} epoch {plan.epoch}, plan {plan.digest}",
            actual=f"key {certificate.plan.key_id} epoch {certificate.plan.epoch}, plan {certificate.plan.digest}",
        )
    if set(signers) != set(quorum.ids):
        names = sorted(set(quorum.ids) ^ set(signers))
        raise _refused("epoch certificate is not signed by all custodians", names, expected=", ".join(quorum.ids))
    return certificate


def check_seeds(certificate: EpochCertificate, me: str, seeds: Mapping[int, bytes]) -> None:
    """The seeds are exactly those that the certificate says I hold; on start-up, what is on disk.

    Raises :class:`RefusedError` with ``CEREMONY`` naming the first index that differs, never a seed.
    """
    plan = certificate.plan
    _check_indices("seeds", me, seeds, set(plan.quorum.indices_of(me)))
    for index in sorted(seeds):
        found = commitment(plan.ceremony_id, index, seeds[index])
        if not hmac.compare_digest(found, certificate.commitments[index]):
            raise _refused(
                f"seed {index} is not the one in the epoch certificate",
                [me],
                expected=certificate.commitments[index].hex(),
                actual=found.hex(),
                index=index,
            )


def _check_statement(what: str, plan: CeremonyPlan, plan_digest: str, stated: str, signer: str) -> None:
    if stated != signer:
        raise _refused(f"{what} in another custodian's name", [signer], expected=signer, actual=stated)
    if plan_digest != plan.digest:
        raise _refused(f"{what} for another plan", [signer], expected=plan.digest, actual=plan_digest)


def _check_indices(what: str, name: str, given: Mapping[int, object], expected: set[int]) -> None:
    """Neither short nor long; a mapping cannot repeat an index, and the parsers refuse payloads that do."""
    if set(given) == expected:
        return
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    said = [
        f"{word} {', '.join(map(str, items[:10]))}" for word, items in (("lacks", missing), ("adds", extra)) if items
    ]
    raise _refused(
        f"{what} of {name} are for the wrong seeds",
        [name],
        expected=f"{len(expected)} seeds",
        actual="; ".join(said),
        index=(missing + extra)[0],
    )


def _refused(
    message: str,
    custodians: Collection[str],
    *,
    expected: object = None,
    actual: object = None,
    index: int | None = None,
) -> RefusedError:
    details = {"custodians": ",".join(custodians)}
    if index is not None:
        details["index"] = str(index)
    named = message if all(name in message for name in custodians) else f"{message}: {', '.join(custodians)}"
    return RefusedError(Reason.CEREMONY, named, expected=expected, actual=actual, details=details)
