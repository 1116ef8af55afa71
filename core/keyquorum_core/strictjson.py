"""JSON as input from others: bounded, and with nothing in it that nobody asked for.

Signed structures are RFC 8785 JSON. Readers refuse duplicate members, floats, unknown members and anything over
their bounds, so that two implementations cannot read the same bytes differently.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, NoReturn

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["Fields", "canonical", "loads"]

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_HEX = re.compile(r"[0-9a-f]*")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_BRACKET = re.compile(rb"[\[\]{}]")
_MAX_INTEGER = 2**53 - 1  # RFC 8785 §3.2.2.3 inherits I-JSON's range of exact integers


def loads(data: bytes, what: str, *, max_bytes: int = 1 << 20, max_depth: int = 32) -> object:
    """Parse UTF-8 JSON; ``what`` names the structure in errors. Raises :class:`MalformedError`."""
    if len(data) > max_bytes:
        raise MalformedError(
            Reason.TOO_LARGE,
            f"{what} is too large",
            expected=f"at most {max_bytes} bytes",
            actual=f"{len(data)} bytes",
        )
    if _deeper_than(data, max_depth):
        raise MalformedError(Reason.MALFORMED, f"{what} is nested too deeply", expected=f"at most {max_depth} levels")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise MalformedError(Reason.MALFORMED, f"{what} repeats a member name")
        return out

    def no_float(text: str) -> NoReturn:
        raise MalformedError(Reason.MALFORMED, f"{what} holds a number that is not an integer", actual=text[:40])

    def integer(text: str) -> int:
        if len(text) > 17 or abs(int(text)) > _MAX_INTEGER:
            raise MalformedError(Reason.MALFORMED, f"{what} holds an integer out of range", actual=text[:40])
        return int(text)

    try:
        parsed: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_float=no_float,
            parse_constant=no_float,
            parse_int=integer,
        )
        if b"\\u" in data:  # the one way to a lone surrogate, which no other writer of UTF-8 could repeat
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedError(Reason.MALFORMED, f"{what} holds a string that is not Unicode text") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(Reason.MALFORMED, f"{what} is not JSON", actual=type(error).__name__) from None
    return parsed


def _deeper_than(data: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than ``limit``, found without recursion: the parser has some."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            return True
    return False


def _has_controls(text: str) -> bool:
    return _CONTROL.search(text) is not None


class Fields:
    """Typed, bounded access to the members of one JSON object; :meth:`done` refuses members nobody read.

    Every accessor raises :class:`MalformedError` naming the structure, the member, what was expected and what came.
    """

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise MalformedError(
                Reason.MALFORMED, f"{what} is not an object", expected="object", actual=type(value).__name__
            )
        self._members: dict[str, object] = dict(value)
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def _fail(self, name: str, expected: str, actual: object) -> NoReturn:
        shown = actual if isinstance(actual, int | bool) else type(actual).__name__
        raise MalformedError(Reason.MALFORMED, f"{self._what}: bad member {name!r}", expected=expected, actual=shown)

    def _take(self, name: str, expected: str) -> object:
        if name not in self._members:
            raise MalformedError(
                Reason.MALFORMED,
                f"{self._what}: member {name!r} is missing",
                expected=expected,
                actual="nothing",
            )
        return self._members.pop(name)

    def text(self, name: str, *, max_length: int = 256, allow_empty: bool = False) -> str:
        """A string of 1 (or 0) … ``max_length`` characters without control characters."""
        value = self._take(name, "string")
        if not isinstance(value, str) or len(value) > max_length or (not value and not allow_empty):
            self._fail(name, f"string of at most {max_length} characters", value)
        if _has_controls(value):
            self._fail(name, "string without control characters", value)
        return value

    def literal(self, name: str, expected: str) -> str:
        """A member that can only have one value."""
        value = self._take(name, repr(expected))
        if value != expected:
            shown = value[:60] if isinstance(value, str) else type(value).__name__
            raise MalformedError(
                Reason.MALFORMED, f"{self._what}: bad member {name!r}", expected=expected, actual=shown
            )
        return expected

    def integer(self, name: str, minimum: int = 0, maximum: int = _MAX_INTEGER) -> int:
        value = self._take(name, "integer")
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            self._fail(name, f"integer in {minimum}…{maximum}", value)
        return value

    def boolean(self, name: str) -> bool:
        value = self._take(name, "true or false")
        if not isinstance(value, bool):
            self._fail(name, "true or false", value)
        return value

    def hex(self, name: str, size: int) -> bytes:
        """Exactly ``size`` bytes as lower-case hex."""
        value = self._take(name, f"{size} bytes as lower-case hex")
        if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
            self._fail(name, f"{size} bytes as lower-case hex", value)
        return bytes.fromhex(value)

    def base64(self, name: str, *, max_bytes: int = 1 << 20, min_bytes: int = 1) -> bytes:
        """Standard, padded, canonical base64 of ``min_bytes`` … ``max_bytes`` bytes."""
        value = self._take(name, "base64")
        if not isinstance(value, str) or len(value) > 4 * (max_bytes // 3 + 1):
            self._fail(name, f"base64 of at most {max_bytes} bytes", value)
        try:
            out = base64.b64decode(value.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            self._fail(name, "standard base64", value)
        if not min_bytes <= len(out) <= max_bytes or base64.b64encode(out).decode() != value:
            self._fail(name, f"canonical base64 of {min_bytes}…{max_bytes} bytes", value)
        return out

    def list(self, name: str, *, max_items: int, min_items: int = 0) -> list[object]:
        value = self._take(name, "list")
        if not isinstance(value, list) or not min_items <= len(value) <= max_items:
            self._fail(name, f"list of {min_items}…{max_items} items", value)
        return list(value)

    def texts(self, name: str, *, max_items: int, min_items: int = 0, max_length: int = 256) -> tuple[str, ...]:
        """A list of non-empty strings."""
        out = self.list(name, max_items=max_items, min_items=min_items)
        for item in out:
            if not isinstance(item, str) or not 0 < len(item) <= max_length or _has_controls(item):
                self._fail(name, f"list of strings of 1…{max_length} characters without control characters", item)
        return tuple(str(item) for item in out)

    def hexes(self, name: str, size: int, *, max_items: int) -> tuple[bytes, ...]:
        """A list of :meth:`hex`, all of ``size`` bytes."""
        values = self.list(name, max_items=max_items)
        texts = [value for value in values if isinstance(value, str) and len(value) == 2 * size]
        joined = "".join(texts)
        if len(texts) != len(values) or not _HEX.fullmatch(joined):
            self._fail(name, f"list of {size} bytes each as lower-case hex", values)
        raw = bytes.fromhex(joined)
        return tuple(raw[start : start + size] for start in range(0, len(raw), size))

    def raw(self, name: str) -> object:
        """The member as parsed, for readers with rules of their own."""
        return self._take(name, "value")

    def rest(self) -> dict[str, object]:
        """All that was not read yet, which is then read."""
        taken, self._members = self._members, {}
        return taken

    def names(self) -> tuple[str, ...]:
        """Member names not yet read."""
        return tuple(self._members)

    def done(self) -> None:
        """Refuse whatever was not read."""
        if self._members:
            raise MalformedError(
                Reason.MALFORMED,
                f"{self._what} has unknown members",
                expected="no further members",
                actual=", ".join(sorted(self._members))[:200],
            )

    def object(self, name: str) -> Fields:
        return Fields(self._take(name, "object"), f"{self._what}.{name}")


def canonical(payload: bytes, what: str, max_bytes: int) -> Fields:
    """The members of an RFC 8785 object; any other way of writing the same values is :class:`MalformedError`."""
    value = loads(payload, what, max_bytes=max_bytes)
    if jcs.dumps(value) != payload:
        raise MalformedError(Reason.MALFORMED, f"{what} is not canonical JSON", expected="RFC 8785")
    return Fields(value, what)
