"""The roster: the signed, versioned document that everyone's trust starts from (DESIGN §2).

It names a cluster's committee, the custodians' identities, addresses and witness keys, the quorum rule, the operators
who may sign the next roster, the coordinator's TLS certificates, and the ledger's keys and where it is read. A reader
pins operators, a threshold and the last version seen, and refuses anything older. A custodian introduces itself to the
operators with an :class:`EnrolmentCard`. Exact bytes: docs/spec/roster.md.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, cast

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.log_keys import LogKeys
from keyquorum_core.ledger.notes import MAX_SIGNATURES
from keyquorum_core.ledger.verifier_keys import VerifierKey
from keyquorum_core.ledger.witness_keys import MAX_WITNESS_KEY, WitnessKeys, witness_name
from keyquorum_core.names import CLUSTER, PRINCIPAL, SHA256_HEX, check, within
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.sealing import check_public, suite_of
from keyquorum_core.signing import (
    PUBLIC_IDENTITY_SIZE,
    Identity,
    PublicIdentity,
    open_envelope,
    open_multi,
    peek_payload,
    sign,
    sign_many,
)
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "CARD_TYPE",
    "MAX_COSIGNERS",
    "MAX_ROSTER",
    "ROSTER_TYPE",
    "EnrolmentCard",
    "Operator",
    "Roster",
    "RosterCustodian",
    "make_card",
    "open_card",
    "open_roster",
    "parse_operators",
    "sign_roster",
]

ROSTER_TYPE: Final = "application/vnd.keyquorum.roster.v1+json"
CARD_TYPE: Final = "application/vnd.keyquorum.enrolment-card.v1+json"
MAX_ROSTER: Final = 4 << 20
MAX_CUSTODIANS: Final = 64
MAX_OPERATORS: Final = 64
MAX_COSIGNERS: Final = (MAX_SIGNATURES - 2) // 2
"""Custodians whose two cosignatures each fit into one checkpoint beside the log's two lines."""
_MAX_HPKE: Final = 320 << 10
_MAX_PEM: Final = 16384

_ADDRESS: Final = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})", re.ASCII
)
_URL: Final = re.compile(
    r"https?://(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
    r"(?:/[A-Za-z0-9._~-]{1,128}){0,16}",
    re.ASCII,
)
_PEM: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/]{1,76}\n)*[A-Za-z0-9+/]{1,76}={0,2}\n-----END CERTIFICATE-----\n?",
    re.ASCII,
)


def _bad(what: str, expected: str, actual: object = None) -> MalformedError:
    return MalformedError(Reason.ROSTER, what, expected=expected, actual=actual)


def _check_pem(text: str, what: str) -> None:
    # The shape only: what the certificate says is for whoever makes the TLS connection.
    if len(text) > _MAX_PEM or not _PEM.fullmatch(text):
        raise _bad(f"bad {what}", f"one PEM certificate of at most {_MAX_PEM} characters")


@dataclass(frozen=True, slots=True)
class RosterCustodian:
    """One custodian: its law, where it listens (``host:port``), its keys, its TLS certificate (one PEM block), and the
    keys it cosigns checkpoints with.

    Raises :class:`MalformedError` when made with anything else.
    """

    id: str
    jurisdiction: str
    address: str
    identity: PublicIdentity
    hpke: bytes
    tls_certificate: str
    witness_key: WitnessKeys

    def __post_init__(self) -> None:
        Custodian(self.id, self.jurisdiction)
        match = _ADDRESS.fullmatch(self.address)
        if not match or not 1 <= int(match[1]) <= 65535:
            raise _bad(f"bad address of {self.id}", "host:port", ascii(self.address[:80]))
        if len(self.hpke) > _MAX_HPKE:
            raise _bad(f"the HPKE key of {self.id} is too large", f"at most {_MAX_HPKE} bytes", len(self.hpke))
        if "+" not in suite_of(self.hpke):  # whoever seals to a nested key checks it; a reader may lack liboqs
            check_public(self.hpke)
        _check_pem(self.tls_certificate, f"TLS certificate of {self.id}")

    def has_keys_of(self, other: RosterCustodian) -> bool:
        """The same custodian as ``other``, wherever each is reached."""
        return (self.identity, self.hpke) == (other.identity, other.hpke)

    def as_json(self) -> dict[str, str]:
        return {
            "address": self.address,
            "hpke": base64.b64encode(self.hpke).decode(),
            "id": self.id,
            "identity": base64.b64encode(self.identity.to_bytes()).decode(),
            "jurisdiction": self.jurisdiction,
            "tls_certificate": self.tls_certificate,
            "witness_key": self.witness_key.encode(),
        }

    @staticmethod
    def read(fields: Fields) -> RosterCustodian:
        """From an object's members, which are all taken. Raises :class:`MalformedError`."""
        custodian = RosterCustodian(
            id=fields.text("id"),
            jurisdiction=fields.text("jurisdiction"),
            address=fields.text("address", max_length=320),
            identity=_identity(fields),
            hpke=fields.base64("hpke", max_bytes=_MAX_HPKE),
            tls_certificate=fields.text("tls_certificate", max_length=_MAX_PEM),
            witness_key=WitnessKeys.parse(fields.text("witness_key", max_length=MAX_WITNESS_KEY)),
        )
        fields.done()
        return custodian


def _identity(fields: Fields) -> PublicIdentity:
    return PublicIdentity.from_bytes(
        fields.base64("identity", max_bytes=PUBLIC_IDENTITY_SIZE, min_bytes=PUBLIC_IDENTITY_SIZE)
    )


@dataclass(frozen=True, slots=True)
class Operator:
    """A person, or a key, that may sign rosters and ceremony plans."""

    name: str
    identity: PublicIdentity

    def __post_init__(self) -> None:
        check(PRINCIPAL, self.name, "operator name")


@dataclass(frozen=True, slots=True)
class Roster:
    """One version of the trust bundle. Times are unix seconds; ``quorum`` is the rule as JSON values; ``log_key`` holds
    the ledger's keys: a roster without them is one under which custodians release nothing. ``log_url`` is where its
    read side is served, without a slash at the end, or empty. Custodians and operators are put in order by id and name.

    Raises :class:`MalformedError` or :class:`RefusedError` (a rule that :class:`Quorum` refuses) when made otherwise.
    """

    cluster: str
    version: int
    issued_at: int
    expires_at: int
    committee: str
    custodians: tuple[RosterCustodian, ...]
    quorum: Mapping[str, object]
    operators: tuple[Operator, ...]
    operator_threshold: int
    coordinator_tls: tuple[str, ...]
    log_key: LogKeys | None
    log_url: str = ""
    previous: str = ""
    """Digest of the roster before this one; empty in version 1 only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "custodians", tuple(sorted(self.custodians, key=lambda c: c.id)))
        object.__setattr__(self, "operators", tuple(sorted(self.operators, key=lambda o: o.name)))
        object.__setattr__(self, "coordinator_tls", tuple(self.coordinator_tls))
        check(CLUSTER, self.cluster, "cluster name")
        check(PRINCIPAL, self.committee, "committee name")
        within(self.version, "roster version", 1)
        within(self.issued_at, "issued_at")
        within(self.expires_at, "expires_at", self.issued_at + 1)
        if self.previous:
            check(SHA256_HEX, self.previous, "digest of the previous roster")
        if (self.version == 1) == bool(self.previous):
            raise _bad("every roster but the first names the one before", "its digest", self.previous or "nothing")
        if not 1 <= self.operator_threshold <= len(self.operators) <= MAX_OPERATORS:
            raise _bad(
                "bad operator threshold",
                f"1 ≤ threshold ≤ operators ≤ {MAX_OPERATORS}",
                f"{self.operator_threshold} of {len(self.operators)}",
            )
        _check_unique([o.name for o in self.operators], "operator name")
        _check_unique([c.hpke for c in self.custodians], "custodian HPKE key")
        _check_unique([c.address for c in self.custodians], "custodian address")
        if not 1 <= len(self.coordinator_tls) <= 16:
            raise _bad("bad coordinator_tls", "1…16 certificates", len(self.coordinator_tls))
        for certificate in self.coordinator_tls:
            _check_pem(certificate, "coordinator TLS certificate")
        if self.log_url and not (len(self.log_url) <= 2048 and _URL.fullmatch(self.log_url)):
            raise _bad("bad log_url", "http(s)://host[:port][/path], or nothing", ascii(self.log_url[:80]))
        self._check_keys()
        quorum = self.quorum_of()
        object.__setattr__(self, "quorum", quorum.rule)  # as JSON values, written the one way
        if self.log_key is not None and len(self.custodians) > MAX_COSIGNERS:
            fewest = quorum.resilience().fewest_custodians_to_collude
            if fewest > MAX_COSIGNERS:
                raise _bad(
                    "no checkpoint can carry the cosignatures of a quorum this large",
                    f"a quorum that {MAX_COSIGNERS} custodians can be",
                    f"no fewer than {fewest}",
                )

    def _check_keys(self) -> None:
        keys = [key for custodian in self.custodians for key in custodian.witness_key.pair]
        for custodian in self.custodians:
            _check_witness_name(self.cluster, custodian)
        if self.log_key is not None:
            keys += [self.log_key.ed25519, self.log_key.ml_dsa_44]
            if self.log_key.origin in {custodian.witness_key.name for custodian in self.custodians}:
                raise _bad("the log is named like one of its witnesses", "an origin of its own", self.log_key.origin)
        identities = [o.identity for o in self.operators] + [c.identity for c in self.custodians]
        halves = [half for identity in identities for half in (identity.ed25519, identity.ml_dsa_65)]
        _check_unique([*(key.public for key in keys), *halves], "signing key")

    def quorum_of(self) -> Quorum:
        """The committee with its rule. Raises as :class:`Quorum`."""
        return Quorum(self.quorum, (Custodian(c.id, c.jurisdiction) for c in self.custodians))

    def custodian(self, custodian_id: str) -> RosterCustodian:
        """Raises :class:`RefusedError` (``UNKNOWN_CUSTODIAN``)."""
        for custodian in self.custodians:
            if custodian.id == custodian_id:
                return custodian
        raise RefusedError(
            Reason.UNKNOWN_CUSTODIAN,
            "no such custodian in the roster",
            expected=", ".join(c.id for c in self.custodians),
            actual=ascii(custodian_id[:64]),
        )

    def witnesses(self) -> dict[str, tuple[VerifierKey, VerifierKey]]:
        """Every custodian's witness keys, by custodian id."""
        return {custodian.id: custodian.witness_key.pair for custodian in self.custodians}

    def operator_identities(self) -> dict[str, PublicIdentity]:
        """By name: whom the next roster, and ceremony plans, are verified against."""
        return {operator.name: operator.identity for operator in self.operators}

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        operators = [
            {"identity": base64.b64encode(o.identity.to_bytes()).decode(), "name": o.name} for o in self.operators
        ]
        return jcs.dumps(
            {
                "cluster": self.cluster,
                "committee": self.committee,
                "coordinator_tls": list(self.coordinator_tls),
                "custodians": [c.as_json() for c in self.custodians],
                "expires_at": self.expires_at,
                "issued_at": self.issued_at,
                "log_key": self.log_key.encode() if self.log_key is not None else "",
                "log_url": self.log_url,
                "operator_threshold": self.operator_threshold,
                "operators": operators,
                "previous": self.previous,
                "quorum": cast("dict[str, str]", dict(self.quorum)),
                "version": self.version,
            }
        )

    @property
    def digest(self) -> str:
        """Lower-case hex SHA-256 of the payload; of the exact bytes signed, since only canonical ones are accepted."""
        return hashlib.sha256(self.payload()).hexdigest()

    @staticmethod
    def parse(payload: bytes) -> Roster:
        """Strict inverse of :meth:`payload`. Not verified: see :func:`open_roster`. Raises as the constructor."""
        fields = Fields(loads(payload, "roster", max_bytes=MAX_ROSTER, max_depth=24), "roster")
        operators = []
        for item in fields.list("operators", max_items=MAX_OPERATORS, min_items=1):
            entry = Fields(item, "roster operator")
            operators.append(Operator(entry.text("name"), _identity(entry)))
            entry.done()
        rule = fields.raw("quorum")
        if not isinstance(rule, dict):
            raise _bad("the roster's quorum is not an object", "object", type(rule).__name__)
        log_key = fields.text("log_key", max_length=MAX_WITNESS_KEY, allow_empty=True)
        custodians = fields.list("custodians", max_items=MAX_CUSTODIANS, min_items=2)
        roster = Roster(
            cluster=fields.text("cluster"),
            version=fields.integer("version", minimum=1),
            issued_at=fields.integer("issued_at"),
            expires_at=fields.integer("expires_at"),
            committee=fields.text("committee"),
            custodians=tuple(RosterCustodian.read(Fields(item, "roster custodian")) for item in custodians),
            quorum=rule,
            operators=tuple(operators),
            operator_threshold=fields.integer("operator_threshold"),
            coordinator_tls=fields.texts("coordinator_tls", max_items=16, min_items=1, max_length=_MAX_PEM),
            log_key=LogKeys.parse(log_key) if log_key else None,
            log_url=fields.text("log_url", max_length=2048, allow_empty=True),
            previous=fields.text("previous", max_length=64, allow_empty=True),
        )
        fields.done()
        if roster.payload() != payload:
            raise _bad("the roster is not canonical", "RFC 8785 JSON, sorted custodians and operators, normal rule")
        return roster


def _check_witness_name(cluster: str, custodian: RosterCustodian) -> None:
    name = witness_name(cluster, custodian.id)
    if custodian.witness_key.name != name:
        raise _bad(f"the witness keys of {custodian.id} have another name", name, custodian.witness_key.name)


def _check_unique(values: Iterable[object], what: str) -> None:
    values = list(values)
    if len(set(values)) != len(values):
        raise _bad(f"the roster uses one {what} twice", f"each {what} once")


def sign_roster(roster: Roster, operators: Iterable[Identity]) -> bytes:
    """DSSE envelope signed by each of ``operators``; more are added with :func:`keyquorum_core.signing.merge`."""
    return sign_many(operators, ROSTER_TYPE, roster.payload())


def parse_operators(data: bytes) -> tuple[dict[str, PublicIdentity], int]:
    """``(operators by name, threshold)`` from an ``operators.json``, which everyone pins for itself:
    ``{"threshold": n, "operators": {name: base64 of a public identity}}``. Raises :class:`MalformedError`."""
    what = "operators file"
    fields = Fields(loads(data, what, max_depth=3), what)
    members = fields.object("operators")
    for name in members.names():
        check(PRINCIPAL, name, "operator name")
    operators = {
        name: PublicIdentity.from_bytes(
            members.base64(name, min_bytes=PUBLIC_IDENTITY_SIZE, max_bytes=PUBLIC_IDENTITY_SIZE)
        )
        for name in members.names()
    }
    if not 1 <= len(operators) <= MAX_OPERATORS:
        raise MalformedError(
            Reason.MALFORMED, f"{what}: bad number of operators", expected=f"1…{MAX_OPERATORS}", actual=len(operators)
        )
    threshold = fields.integer("threshold", 1, len(operators))
    fields.done()
    return operators, threshold


def open_roster(
    envelope: bytes,
    operators: Mapping[str, PublicIdentity],
    threshold: int,
    now: int,
    *,
    minimum_version: int = 1,
    cluster: str | None = None,
) -> Roster:
    """A roster that ``threshold`` of the pinned ``operators`` signed, current at ``now``, not older than the last seen.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``; ``ROSTER`` (another cluster, or a version
    below ``minimum_version``); ``NOT_YET_VALID``, ``EXPIRED``.
    """
    payload, _ = open_multi(envelope, ROSTER_TYPE, operators, threshold, "roster", max_bytes=2 * MAX_ROSTER)
    roster = Roster.parse(payload)
    if cluster is not None and roster.cluster != cluster:
        raise RefusedError(Reason.ROSTER, "the roster of another cluster", expected=cluster, actual=roster.cluster)
    if roster.version < minimum_version:
        raise RefusedError(
            Reason.ROSTER,
            "an older roster than the last one seen",
            expected=f"version {minimum_version} or later",
            actual=f"version {roster.version}",
            next_step="Fetch the current roster; if this is the current one, somebody rolled it back.",
        )
    if not roster.issued_at <= now < roster.expires_at:
        early = now < roster.issued_at
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            "the roster is not yet valid" if early else "the roster has expired",
            expected=f"{roster.issued_at}…{roster.expires_at}",
            actual=now,
            next_step="Compare clocks." if early else "Ask the operators for a newer roster.",
        )
    return roster


@dataclass(frozen=True, slots=True)
class EnrolmentCard:
    """What a new custodian hands to the operators: its roster entry for a cluster, signed by the identity in it."""

    cluster: str
    custodian: RosterCustodian
    issued_at: int

    def __post_init__(self) -> None:
        check(CLUSTER, self.cluster, "cluster name")
        within(self.issued_at, "issued_at")
        _check_witness_name(self.cluster, self.custodian)

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps({"cluster": self.cluster, "custodian": self.custodian.as_json(), "issued_at": self.issued_at})

    @staticmethod
    def parse(payload: bytes) -> EnrolmentCard:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = Fields(loads(payload, "enrolment card", max_depth=2), "enrolment card")
        card = EnrolmentCard(
            cluster=fields.text("cluster"),
            custodian=RosterCustodian.read(fields.object("custodian")),
            issued_at=fields.integer("issued_at"),
        )
        fields.done()
        if card.payload() != payload:
            raise _bad("the enrolment card is not canonical", "RFC 8785 JSON")
        return card


def make_card(card: EnrolmentCard, identity: Identity) -> bytes:
    """DSSE envelope. Raises :class:`MalformedError` unless ``identity`` is the one that the card names."""
    if identity.public != card.custodian.identity:
        raise _bad("the card names another identity", card.custodian.identity.fingerprint, identity.public.fingerprint)
    return sign(identity, CARD_TYPE, card.payload())


def open_card(envelope: bytes, *, cluster: str) -> EnrolmentCard:
    """A card whose maker holds the identity in it. That it is *whose* the operators believe, they must check elsewhere:
    compare fingerprints by another channel. Raises as :func:`open_envelope`, and ``ROSTER`` for another cluster."""
    claimed = EnrolmentCard.parse(peek_payload(envelope, CARD_TYPE, "enrolment card"))
    card = EnrolmentCard.parse(open_envelope(envelope, CARD_TYPE, claimed.custodian.identity, "enrolment card"))
    if card.cluster != cluster:
        raise RefusedError(
            Reason.ROSTER, "an enrolment card for another cluster", expected=cluster, actual=card.cluster
        )
    return card
