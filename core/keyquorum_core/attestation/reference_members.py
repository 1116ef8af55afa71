"""What the sections of reference values have in common: how their members are read, and what may not stand in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields

__all__ = ["MAX_ROOTS", "bad", "hex_values", "one_of", "pinned_roots", "unique", "until"]

MAX_ROOTS = 64


def bad(what: str, member: str, expected: str, actual: object) -> MalformedError:
    """The error for a member of ``what`` that is there and says something it may not."""
    return MalformedError(Reason.MALFORMED, f"{what}: bad member {member!r}", expected=expected, actual=actual)


def hex_values(
    fields: Fields, what: str, name: str, size: int, *, minimum: int, maximum: int, zeros: bool = True
) -> frozenset[bytes]:
    """A list of distinct values of ``size`` bytes in lower-case hex; with ``zeros`` false none of them all zero."""
    texts = fields.texts(name, min_items=minimum, max_items=maximum, max_length=2 * size)
    values = [Fields({name: each}, what).hex(name, size) for each in texts]
    if not zeros and not all(any(each) for each in values):
        raise bad(what, name, "no value of zeros", "zeros")
    unique(what, name, values)
    return frozenset(values)


def unique(what: str, name: str, values: Collection[object]) -> None:
    """Raises :class:`MalformedError` where a value is there twice."""
    if len(set(values)) != len(values):
        raise bad(what, name, "each value once", "a repetition")


def pinned_roots(
    fields: Fields, what: str, vendor: str, **known: Iterable[str]
) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """The lists of the vendor's roots, by name, and ``development_roots``; SHA-256 of SubjectPublicKeyInfo in hex.

    ``known`` are the vendor's root keys for each list. A list may be empty where there are development roots; each
    root stands where it belongs.
    """
    lists = {
        name: frozenset(each.hex() for each in hex_values(fields, what, name, 32, minimum=0, maximum=MAX_ROOTS))
        for name in (*known, "development_roots")
    }
    development = lists.pop("development_roots")
    for name, given in lists.items():
        if given - set(known[name]):
            raise bad(what, name, f"fingerprints of {vendor}'s roots; others belong in development_roots", "others")
        if not given | development:
            raise bad(what, name, "at least one root, here or in development_roots", "none")
    if development & {root for roots in known.values() for root in roots}:
        raise bad(what, "development_roots", f"no root of {vendor}'s", f"{vendor}'s")
    return lists, development


def one_of(fields: Fields, what: str, name: str, *choices: str) -> str:
    """A text that is one of ``choices``."""
    value = fields.text(name, max_length=64)
    if value not in choices:
        raise bad(what, name, " or ".join(choices), value)
    return value


def until(fields: Fields) -> int | None:
    """The end of a grace period, unix seconds and included; ``None`` where the member is not there: no end is set."""
    return fields.integer("until", 1) if "until" in fields else None
