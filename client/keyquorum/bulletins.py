"""The documents that operators sign together: made, signed one after another, and read (docs/spec/bulletin.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final, TypeVar, cast

from keyquorum.documents import load_document
from keyquorum_core.bulletin import (
    BULLETIN_TYPE,
    MAX_BULLETIN_ENVELOPE,
    Bulletin,
    Kind,
    peek_bulletin,
    sign_bulletin,
    verify_bulletin,
)
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.signing import Identity, PublicIdentity, merge
from keyquorum_core.strictjson import loads

__all__ = ["KINDS", "Trusted", "cosign", "kind_named", "make", "read_as"]

T = TypeVar("T")

KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "reference-values": ("keyquorum_core.attestation.reference", "REFERENCE_VALUES"),
    "inventory": ("keyquorum_core.attestation.inventory", "INVENTORY"),
    "revocations": ("keyquorum_core.revocations", "REVOCATIONS"),
}
"""The kinds there are, each with module and name of its :class:`~keyquorum_core.bulletin.Kind`; loaded when used."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """Whose signatures count, for which cluster, and when a document must be in date (unix seconds)."""

    operators: Mapping[str, PublicIdentity]
    threshold: int
    cluster: str
    now: int


def kind_named(name: str) -> Kind[object]:
    """Raises :class:`MalformedError` (``BULLETIN``) for a kind that nothing here reads."""
    if name not in KINDS:
        raise MalformedError(
            Reason.BULLETIN, "no such kind of document", expected=", ".join(sorted(KINDS)), actual=ascii(name[:64])
        )
    module, attribute = KINDS[name]
    return cast("Kind[object]", getattr(import_module(module), attribute))


def make(
    kind: str, body: bytes, *, cluster: str, version: int, issued_at: int, expires_at: int, signers: Sequence[Identity]
) -> tuple[Bulletin, bytes]:
    """A document of ``kind`` whose body is ``body`` (YAML or JSON), and its envelope signed by ``signers``.

    Raises :class:`MalformedError` for a body that custodians would refuse: nobody signs such a thing.
    """
    reader = kind_named(kind)
    parsed = load_document(body, f"body of the {kind}", max_bytes=MAX_BULLETIN_ENVELOPE)
    if not isinstance(parsed, dict):
        raise MalformedError(
            Reason.MALFORMED, f"the body of the {kind} is no object", expected="object", actual=type(parsed).__name__
        )
    bulletin = Bulletin(cluster, kind, version, issued_at, expires_at, parsed)
    bulletin = Bulletin.parse(bulletin.payload())
    reader.read(bulletin)
    return bulletin, sign_bulletin(bulletin, signers)


def cosign(envelope: bytes, signers: Sequence[Identity]) -> tuple[Bulletin, bytes]:
    """The same document with further signatures. Raises :class:`MalformedError`."""
    bulletin = peek_bulletin(envelope)
    kind_named(bulletin.kind).read(bulletin)
    merged = merge([envelope, sign_bulletin(bulletin, signers)], bulletin.kind, MAX_BULLETIN_ENVELOPE)
    return bulletin, merged


def read_as(kind: Kind[T], data: bytes, trusted: Trusted | None) -> T:
    """What a file of ``kind`` means: a signed document, verified where ``trusted`` says against whom, or only its body
    (YAML or JSON), which is nobody's word but the caller's own.

    Raises :class:`MalformedError`, and :class:`RefusedError` where signatures are not as ``trusted`` asks.
    """
    if _is_envelope(data):
        if trusted is None:
            bulletin = peek_bulletin(data)
        else:
            bulletin = verify_bulletin(data, kind.name, trusted.operators, trusted.threshold, cluster=trusted.cluster)
            bulletin.check_time(trusted.now)
    else:
        if trusted is not None:
            raise MalformedError(
                Reason.SIGNATURE_MISSING,
                f"the {kind.name} are not signed",
                expected=f"a document signed by {trusted.threshold} operators",
                actual="a bare body",
            )
        parsed = load_document(data, kind.name, max_bytes=MAX_BULLETIN_ENVELOPE)
        if not isinstance(parsed, dict):
            raise MalformedError(Reason.MALFORMED, f"the {kind.name} are no object", actual=type(parsed).__name__)
        bulletin = Bulletin("unsigned", kind.name, 1, 0, 1, parsed)
        bulletin = Bulletin.parse(bulletin.payload())
    if bulletin.kind != kind.name:
        raise MalformedError(Reason.BULLETIN, "a document of another kind", expected=kind.name, actual=bulletin.kind)
    return kind.read(bulletin)


def _is_envelope(data: bytes) -> bool:
    try:
        parsed = loads(data, "document", max_bytes=MAX_BULLETIN_ENVELOPE)
    except MalformedError:
        return False
    return isinstance(parsed, dict) and parsed.get("payloadType") == BULLETIN_TYPE
