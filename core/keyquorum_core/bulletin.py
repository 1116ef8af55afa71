"""Bulletins: what a cluster's operators decide together, as signed, versioned documents (docs/spec/bulletin.md).

Reference values, the hardware inventory, policies, lists and revocations are all of this one form: RFC 8785 JSON that
says of what ``kind`` it is and which ``version``, in a DSSE envelope that a threshold of the operators signed. A reader
takes a document only for the kind it asked for, only of its own cluster, only while it is in date, and never one older
than, or contradicting, the last it accepted (:func:`check_successor`). What the body says is the kind's own affair: a
:class:`Kind` names one and holds its reader.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CLUSTER, check, within
from keyquorum_core.signing import Identity, PublicIdentity, open_multi, peek_payload, sign_many
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "BULLETIN_TYPE",
    "MAX_BULLETIN",
    "MAX_BULLETIN_ENVELOPE",
    "Bulletin",
    "Kind",
    "check_successor",
    "open_bulletin",
    "peek_bulletin",
    "sign_bulletin",
    "verify_bulletin",
]

BULLETIN_TYPE: Final = "application/vnd.keyquorum.bulletin.v1+json"
MAX_BULLETIN: Final = 8 << 20
"""Bytes of a payload."""
MAX_BULLETIN_ENVELOPE: Final = 12 << 20
_MAX_DEPTH: Final = 16
_KIND: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, slots=True)
class Bulletin:
    """One version of one document. Times are unix seconds; it counts for ``issued_at <= now < expires_at``.

    Raises :class:`MalformedError` when made with bad names or numbers; the body is looked at when it is written.
    """

    cluster: str
    kind: str
    version: int
    issued_at: int
    expires_at: int
    body: Mapping[str, object]
    signers: tuple[str, ...] = field(default=(), compare=False)
    """Names of the operators whose signatures were verified; not part of the payload."""

    def __post_init__(self) -> None:
        check(CLUSTER, self.cluster, "cluster name")
        check(_KIND, self.kind, "kind of bulletin")
        within(self.version, "version", 1)
        within(self.issued_at, "issued_at")
        within(self.expires_at, "expires_at", self.issued_at + 1)

    @property
    def name(self) -> str:
        """For people: what and which."""
        return f"{self.kind} version {self.version}"

    def payload(self) -> bytes:
        """RFC 8785 JSON. Raises :class:`MalformedError` for a body that has no such form, or is too large."""
        try:
            data = jcs.dumps(
                {
                    "body": self.body,
                    "cluster": self.cluster,
                    "expires_at": self.expires_at,
                    "issued_at": self.issued_at,
                    "kind": self.kind,
                    "version": self.version,
                }
            )
        except (jcs.CanonicalizationError, RecursionError) as error:
            raise MalformedError(
                Reason.MALFORMED, f"the {self.kind} cannot be written as RFC 8785 JSON", actual=type(error).__name__
            ) from None
        if len(data) > MAX_BULLETIN:
            raise MalformedError(
                Reason.TOO_LARGE, f"the {self.kind} is too large", expected=f"at most {MAX_BULLETIN} bytes"
            )
        return bytes(data)

    @property
    def digest(self) -> str:
        """Lower-case hex SHA-256 of the payload: of the exact bytes signed, since only canonical ones are accepted."""
        return hashlib.sha256(self.payload()).hexdigest()

    def check_time(self, now: int) -> None:
        """Raises :class:`RefusedError` (``NOT_YET_VALID``, ``EXPIRED``)."""
        if self.issued_at <= now < self.expires_at:
            return
        early = now < self.issued_at
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            f"{self.name} is not yet valid" if early else f"{self.name} has expired",
            expected=f"{self.issued_at}…{self.expires_at}",
            actual=now,
            next_step="Compare clocks." if early else "Have the operators sign a new version.",
        )

    @staticmethod
    def parse(payload: bytes) -> Bulletin:
        """Strict inverse of :meth:`payload`. Not verified: :func:`open_bulletin` is. Raises :class:`MalformedError`."""
        fields = Fields(loads(payload, "bulletin", max_bytes=MAX_BULLETIN, max_depth=_MAX_DEPTH), "bulletin")
        body = fields.raw("body")
        if not isinstance(body, dict):
            raise MalformedError(
                Reason.MALFORMED, "bulletin: bad member 'body'", expected="object", actual=type(body).__name__
            )
        bulletin = Bulletin(
            cluster=fields.text("cluster"),
            kind=fields.text("kind", max_length=32),
            version=fields.integer("version", minimum=1),
            issued_at=fields.integer("issued_at"),
            expires_at=fields.integer("expires_at"),
            body=body,
        )
        fields.done()
        if bulletin.payload() != payload:
            raise MalformedError(Reason.MALFORMED, f"the {bulletin.kind} is not canonical", expected="RFC 8785 JSON")
        return bulletin


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A kind of bulletin: its name, how its body is read (raising :class:`MalformedError`) into what it means, and what
    may follow what."""

    name: str
    read: Callable[[Bulletin], T]
    follows: Callable[[Any, Any], None] = lambda previous, following: None
    """Raises :class:`RefusedError` where what a newer version means may not come after what the last one accepted
    meant: both as :attr:`read` gives them."""


def sign_bulletin(bulletin: Bulletin, operators: Iterable[Identity]) -> bytes:
    """DSSE envelope signed by each of ``operators``; more are added with :func:`keyquorum_core.signing.merge`.

    Raises :class:`MalformedError` for what no reader would take."""
    payload = bulletin.payload()
    Bulletin.parse(payload)
    return sign_many(operators, BULLETIN_TYPE, payload)


def peek_bulletin(envelope: bytes) -> Bulletin:
    """What an envelope holds, UNVERIFIED: to show it, or to sign it too. Raises :class:`MalformedError`."""
    return Bulletin.parse(peek_payload(envelope, BULLETIN_TYPE, "bulletin", MAX_BULLETIN_ENVELOPE))


def verify_bulletin(
    envelope: bytes, kind: str, operators: Mapping[str, PublicIdentity], threshold: int, *, cluster: str
) -> Bulletin:
    """A bulletin of ``kind`` for ``cluster`` that ``threshold`` of ``operators`` signed, at whatever time.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``; ``BULLETIN`` for another kind or cluster.
    """
    payload, signers = open_multi(envelope, BULLETIN_TYPE, operators, threshold, kind, MAX_BULLETIN_ENVELOPE)
    bulletin = replace(Bulletin.parse(payload), signers=signers)
    for what, expected, actual in (("kind", kind, bulletin.kind), ("cluster", cluster, bulletin.cluster)):
        if expected != actual:
            raise RefusedError(Reason.BULLETIN, f"a bulletin of another {what}", expected=expected, actual=actual)
    return bulletin


def open_bulletin(
    envelope: bytes,
    kind: str,
    operators: Mapping[str, PublicIdentity],
    threshold: int,
    now: int,
    *,
    cluster: str,
    minimum_version: int = 1,
) -> Bulletin:
    """As :func:`verify_bulletin`, and in date at ``now``, and not of a version before ``minimum_version``.

    Raises also ``NOT_YET_VALID``, ``EXPIRED`` and ``ROLLBACK``. Who keeps the last digest too asks
    :func:`check_successor`.
    """
    bulletin = verify_bulletin(envelope, kind, operators, threshold, cluster=cluster)
    check_successor(bulletin, minimum_version, "")
    bulletin.check_time(now)
    return bulletin


def check_successor(bulletin: Bulletin, version: int, digest: str) -> None:
    """The bulletin may follow the last one accepted, of ``version`` and ``digest`` (empty: not known): it is newer, or
    the same. Raises :class:`RefusedError` (``ROLLBACK``)."""
    if bulletin.version < version:
        raise RefusedError(
            Reason.ROLLBACK,
            f"an older {bulletin.kind} than the last one accepted",
            expected=f"version {version} or later",
            actual=f"version {bulletin.version}",
            next_step="Fetch the current one; if this is the current one, somebody rolled it back.",
        )
    if bulletin.version == version and digest and bulletin.digest != digest:
        raise RefusedError(
            Reason.ROLLBACK,
            f"another {bulletin.kind} was accepted under the same version",
            expected=f"version {version} with digest {digest}",
            actual=f"digest {bulletin.digest}",
            next_step="Give every change a new version.",
        )
