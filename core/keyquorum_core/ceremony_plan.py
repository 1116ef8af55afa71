"""The plan of a ceremony: what is ordered, by whom, for which epoch of which key (DESIGN §9).

A plan is ordered by operators, who sign it, or by the key's own policy, which they signed before: then it carries no
signature, and every custodian works out for itself whether the policy has it so (:func:`check_order`). Whatever the
coordinator does, it cannot rotate, repair or destroy what neither ordered. Exact bytes: docs/spec/ceremony.md.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.ceremony_states import PLAN_LIFETIME, PLAN_SKEW, REBUILDING, Kind
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.names import CLUSTER, CUSTODIAN_ID, KEY_ID, check
from keyquorum_core.quorum import Quorum, load_quorum_document
from keyquorum_core.signing import PublicIdentity, open_multi, peek_payload, sign_many
from keyquorum_core.strictjson import Fields, canonical

__all__ = [
    "MAX_PLAN",
    "PLAN_TYPE",
    "CeremonyPlan",
    "OrderedBy",
    "OrderedPlan",
    "check_date",
    "check_order",
    "check_plan",
    "new_ceremony_id",
    "open_plan",
    "unsigned_plan",
]

PLAN_TYPE: Final = "application/vnd.keyquorum.ceremony-plan.v1+json"
MAX_PLAN: Final = 1 << 17

_ID_SIZE = 16
_DIGEST_SIZE = 32
_SUITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.-]{0,63}")
_DIGEST_OR_NONE = re.compile(r"(?:[0-9a-f]{64})?", re.ASCII)

Rng = Callable[[int], bytes]


class OrderedBy(StrEnum):
    """Who ordered a ceremony."""

    OPERATORS = "operators"
    POLICY = "policy"


def new_ceremony_id(rng: Rng = secrets.token_bytes) -> str:
    """16 random bytes as 32 lower-case hex digits."""
    return rng(_ID_SIZE).hex()


@dataclass(frozen=True, slots=True)
class CeremonyPlan:
    """One order. ``epoch`` is the one that is made, rebuilt or destroyed; ``created_at`` in unix seconds.

    ``certificate``: digest of the certificate it goes by: of the epoch before (generate, rotate; empty for a key's
    first), or of the epoch itself (repair, replace, destroy). ``target``: the custodian that is rebuilt, else empty.
    ``quorum`` is the epoch's: today's when one is made, the certificate's otherwise. Raises :class:`MalformedError`.
    """

    ceremony_id: str
    key_id: str
    epoch: int
    suite: str
    cluster: str
    roster_digest: str
    quorum: Quorum
    created_at: int
    policy: KeyPolicy = field(default_factory=KeyPolicy)
    kind: Kind = Kind.GENERATE
    ordered_by: OrderedBy = OrderedBy.OPERATORS
    certificate: str = ""
    target: str = ""
    _payload: bytes = field(default=b"", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = _read_plan(Fields(self.as_dict(), "ceremony plan"), self.quorum)
        object.__setattr__(self, "kind", values["kind"])
        object.__setattr__(self, "ordered_by", values["ordered_by"])
        object.__setattr__(self, "_payload", jcs.dumps(self.as_dict()))

    def as_dict(self) -> dict[str, object]:
        """The payload's members, as JSON values."""
        return {
            "kind": str(self.kind),
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
            "ordered_by": str(self.ordered_by),
            "certificate": self.certificate,
            "target": self.target,
        }

    def to_payload(self) -> bytes:
        """RFC 8785 bytes of type ``PLAN_TYPE``."""
        return self._payload

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: what every later statement of the ceremony names."""
        return hashlib.sha256(self._payload).hexdigest()

    @classmethod
    def parse(cls, payload: bytes) -> CeremonyPlan:
        """Read a payload. Raises :class:`MalformedError`, or :class:`RefusedError` for its quorum rule."""
        return _parse(payload)


@lru_cache(maxsize=32)
def _parse(payload: bytes) -> CeremonyPlan:
    # Every statement of a ceremony names its plan, so that each is read many times.
    fields = canonical(payload, "ceremony plan", MAX_PLAN)
    document = {"custodians": fields.raw("custodians"), "quorum": fields.raw("quorum")}
    values = _read_plan(fields, load_quorum_document(document))
    return CeremonyPlan(**values)  # type: ignore[arg-type]


def _read_plan(fields: Fields, quorum: Quorum) -> dict[str, object]:
    for name in ("custodians", "quorum"):
        if name in fields:
            fields.raw(name)
    values: dict[str, object] = {
        "kind": _one_of(Kind, fields.text("kind", max_length=16)),
        "ceremony_id": fields.hex("ceremony_id", _ID_SIZE).hex(),
        "key_id": fields.text("key_id"),
        "epoch": fields.integer("epoch", minimum=1),
        "suite": fields.text("suite", max_length=64),
        "cluster": fields.text("cluster"),
        "roster_digest": fields.hex("roster_digest", _DIGEST_SIZE).hex(),
        "created_at": fields.integer("created_at"),
        "policy": KeyPolicy.read(fields.object("policy")),
        "ordered_by": _one_of(OrderedBy, fields.text("ordered_by", max_length=16)),
        "certificate": fields.text("certificate", max_length=64, allow_empty=True),
        "target": fields.text("target", max_length=32, allow_empty=True),
        "quorum": quorum,
    }
    fields.done()
    check(KEY_ID, str(values["key_id"]), "key id in the ceremony plan")
    check(CLUSTER, str(values["cluster"]), "cluster in the ceremony plan")
    check(_SUITE, str(values["suite"]), "suite in the ceremony plan")
    check(_DIGEST_OR_NONE, str(values["certificate"]), "certificate digest in the ceremony plan")
    _check_sense(values, quorum)
    return values


def _one_of(kind: type[StrEnum], value: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise MalformedError(
            Reason.MALFORMED, f"ceremony plan: no such {kind.__name__}", expected=", ".join(kind), actual=value
        ) from None


def _check_sense(values: Mapping[str, object], quorum: Quorum) -> None:
    """The members go together: nothing is there that the kind has no use for, and nothing it needs is missing."""
    kind, target, certificate = values["kind"], str(values["target"]), values["certificate"]
    if kind in REBUILDING:
        check(CUSTODIAN_ID, target, "target in the ceremony plan")
        quorum.indices_of(target)
    elif target:
        raise _senseless(f"{kind} has no target", actual=target)
    first = kind is Kind.GENERATE and values["epoch"] == 1
    if first == bool(certificate):
        raise _senseless(
            "the certificate that a ceremony goes by is missing, or a first epoch has one",
            expected="none for a key's first epoch, one for everything else",
            actual=certificate or "none",
        )
    if kind is Kind.ROTATE and values["epoch"] == 1:
        raise _senseless("a key's first epoch is generated, not rotated to", expected="2 or more", actual=1)
    if kind in (Kind.GENERATE, Kind.REPLACE) and values["ordered_by"] is not OrderedBy.OPERATORS:
        raise _senseless(f"{kind} is for operators to order", expected="operators", actual=values["ordered_by"])


def _senseless(what: str, *, expected: object = None, actual: object = None) -> MalformedError:
    return MalformedError(Reason.CEREMONY, f"ceremony plan: {what}", expected=expected, actual=actual)


# Orders


@dataclass(frozen=True, slots=True)
class OrderedPlan:
    """A plan whose order was verified as far as signatures go: ``signers`` are operators, none for the policy's own."""

    plan: CeremonyPlan
    payload: bytes
    signers: tuple[str, ...]


def open_plan(envelope: bytes, operators: Mapping[str, PublicIdentity], threshold: int) -> OrderedPlan:
    """The plan in an envelope, signed as its kind needs it.

    Making and rebuilding take one operator; destroying and replacing the roster's ``threshold`` of them. A plan ordered
    by policy carries no signature: :func:`check_order` is then what it stands on. Raises :class:`MalformedError` and
    :class:`RefusedError` (``SIGNATURE…``, ``QUORUM_RULE``).
    """
    plan = CeremonyPlan.parse(peek_payload(envelope, PLAN_TYPE, "ceremony plan"))
    if plan.ordered_by is OrderedBy.POLICY:
        payload = plan.to_payload()
        if envelope != unsigned_plan(plan):
            raise RefusedError(
                Reason.SIGNATURE_EXTRA,
                "a plan that the key's policy orders carries no signature",
                expected="no signatures",
                actual="some, or another way of writing the plan",
            )
        return OrderedPlan(plan, payload, ())
    needed = threshold if plan.kind in (Kind.DESTROY, Kind.REPLACE) else 1
    payload, signers = open_multi(envelope, PLAN_TYPE, operators, needed, "ceremony plan")
    return OrderedPlan(plan, payload, signers)


def unsigned_plan(plan: CeremonyPlan) -> bytes:
    """The envelope of a plan that the key's policy orders."""
    return sign_many((), PLAN_TYPE, plan.to_payload())


def check_plan(plan: CeremonyPlan, *, cluster: str, roster_digest: str, quorum: Quorum) -> None:
    """The plan is for my cluster, my roster and ``quorum``; else :class:`RefusedError` with ``CEREMONY``."""
    for what, expected, actual in (
        ("cluster", cluster, plan.cluster),
        ("roster", roster_digest, plan.roster_digest),
        ("quorum", quorum, plan.quorum),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.CEREMONY, f"ceremony plan is for another {what}", expected=expected, actual=actual
            )


def check_date(plan: CeremonyPlan, now: int) -> None:
    """The plan is of these days. Raises :class:`RefusedError` (``STALE``)."""
    if not now - PLAN_LIFETIME <= plan.created_at <= now + PLAN_SKEW:
        raise RefusedError(
            Reason.STALE,
            "the ceremony plan is of another time",
            expected=f"{now - PLAN_LIFETIME}…{now + PLAN_SKEW}",
            actual=plan.created_at,
            next_step="Order the ceremony anew; if this goes on, compare clocks.",
        )


def check_order(
    plan: CeremonyPlan, before: CeremonyPlan, now: int, *, activated_at: int, retired_at: int | None
) -> None:
    """The policy certified with ``before`` orders this plan at ``now``, by the reader's own clock and memory.

    ``before`` is the certified plan that ``plan.certificate`` names, ``activated_at`` and ``retired_at`` (None: it is
    active) what happened to its epoch here, in unix seconds. Rotation: the epoch is as old as the policy says, and
    nothing but the epoch's number changes. Destruction: it is retired, and was kept as long as the policy says. Repair
    is always in order: it changes nothing but what a custodian lacks. A canary's epochs are for drills, which need not
    wait. Raises :class:`RefusedError` (``CEREMONY``) for a
    plan that changes more than it may, :class:`StateError` (``STATE``) for one that comes too soon.
    """
    if plan.ordered_by is not OrderedBy.POLICY:
        return
    for what, expected, actual in (
        ("policy", before.policy, plan.policy),
        ("suite", before.suite, plan.suite),
        ("quorum", before.quorum, plan.quorum),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.CEREMONY,
                f"only operators may change a key's {what}",
                expected=expected,
                actual=actual,
                next_step="Have an operator sign the plan.",
            )
    policy = before.policy
    if plan.kind is Kind.ROTATE:
        if policy.canary:
            return
        if policy.rotate_after_seconds == 0:
            raise _too_soon(plan, "the key's policy has no rotation by itself", "an operator's order")
        _not_before(plan, activated_at + policy.rotate_after_seconds, now)
    elif plan.kind is Kind.DESTROY:
        if retired_at is None:
            raise _too_soon(plan, "the epoch is in use", "a retired epoch, or an operator's order")
        if not policy.canary:
            _not_before(plan, retired_at + policy.retain_seconds, now)


def _not_before(plan: CeremonyPlan, due: int, now: int) -> None:
    if now < due:
        raise _too_soon(plan, "by the key's policy it is too soon", f"{due} or later", now)


def _too_soon(plan: CeremonyPlan, why: str, expected: str, actual: object = None) -> StateError:
    return StateError(
        Reason.STATE,
        f"key {plan.key_id} epoch {plan.epoch}: {why}",
        expected=expected,
        actual=actual,
        next_step="Wait, or have an operator order it.",
    )
