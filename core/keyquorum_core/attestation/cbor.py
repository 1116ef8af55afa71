"""CBOR as attestation documents use it (RFC 8949), bounded: a reader for data items from others.

Taken: integers, byte and text strings, arrays, maps, tags, ``null``, ``true`` and ``false``. Each integer and length
must be in its shortest form, and each key of a map must be distinct, so that one value has few encodings and no reader
can see another one than this does. Lengths are definite, save where :func:`loads` allows maps of indefinite length, as
AWS's encoder writes them. Floats, ``undefined`` and other simple values are refused, and so is what follows the item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["Tagged", "Value", "item_size", "loads"]

_INDEFINITE = 31
_BREAK = 0xFF
_MAX_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class Tagged:
    """A value under a tag."""

    tag: int
    value: Value


Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[int | bytes | str, Value] | Tagged | None"


def loads(data: bytes, what: str, *, max_bytes: int, max_depth: int, indefinite_maps: bool = False) -> Value:
    """Read exactly one data item; ``what`` names the structure in errors. Raises :class:`MalformedError`.

    ``max_depth`` counts arrays, maps and tags that are nested in each other.
    """
    if len(data) > max_bytes:
        raise MalformedError(
            Reason.MALFORMED, f"{what} is too large", expected=f"at most {max_bytes} bytes", actual=f"{len(data)} bytes"
        )
    reader = _Reader(data, what, indefinite_maps)
    value = reader.item(max_depth)
    if reader.at != len(data):
        raise reader.malformed("bytes after its end", f"{reader.at} bytes", f"{len(data)} bytes")
    return value


def item_size(data: bytes, what: str, *, max_depth: int) -> int:
    """How many bytes the first data item takes, whatever follows it. Raises :class:`MalformedError`."""
    reader = _Reader(data, what, indefinite_maps=False)
    reader.item(max_depth)
    return reader.at


class _Reader:
    def __init__(self, data: bytes, what: str, indefinite_maps: bool) -> None:
        self.at = 0
        self._data = data
        self._what = what
        self._indefinite_maps = indefinite_maps
        self._items = 0

    def malformed(self, what: str, expected: str, actual: object) -> MalformedError:
        return MalformedError(Reason.MALFORMED, f"{self._what}: {what}", expected=expected, actual=actual)

    def item(self, depth: int) -> Value:
        self._items += 1
        if self._items > _MAX_ITEMS:
            raise self.malformed("too many items", f"at most {_MAX_ITEMS}", "more")
        initial = self._take(1)[0]
        major, information = initial >> 5, initial & 0x1F
        if major >= 4 and major != 7 and depth <= 0:
            raise self.malformed("it is nested too deeply", "less", "more")
        if major == 7:
            return self._simple(information)
        if major == 5 and information == _INDEFINITE and self._indefinite_maps:
            return self._map(None, depth)
        argument = self._argument(information)
        if major == 0:
            return argument
        if major == 1:
            return -1 - argument
        if major == 2:
            return self._take(argument)
        if major == 3:
            return self._text(argument)
        if major == 4:
            return [self.item(depth - 1) for _ in range(self._count(argument))]
        if major == 5:
            return self._map(self._count(argument), depth)
        return Tagged(argument, self.item(depth - 1))

    def _take(self, size: int) -> bytes:
        part = self._data[self.at : self.at + size]
        if len(part) != size:
            raise self.malformed(f"it ends at {self.at}", f"{size} more bytes", f"{len(part)}")
        self.at += size
        return part

    def _argument(self, information: int) -> int:
        if information < 24:
            return information
        if information > 27:
            raise self.malformed(f"length at {self.at - 1}", "a definite one", f"{information}")
        size = 1 << (information - 24)
        argument = int.from_bytes(self._take(size), "big")
        if argument < (24 if size == 1 else 1 << (4 * size)):
            raise self.malformed(f"integer before {self.at}", "its shortest form", f"{argument} in {size} bytes")
        return argument

    def _count(self, argument: int) -> int:
        if argument > len(self._data) - self.at:  # each item takes a byte at least
            raise self.malformed("count of items", f"at most {len(self._data) - self.at}", argument)
        return argument

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise self.malformed(f"text before {self.at}", "UTF-8", "something else") from None

    def _simple(self, information: int) -> Value:
        if information not in (20, 21, 22):
            raise self.malformed(f"value at {self.at - 1}", "null, true or false", f"simple value {information}")
        return {20: False, 21: True, 22: None}[information]

    def _map(self, count: int | None, depth: int) -> Value:
        """``count`` pairs, or pairs up to the break."""
        out: dict[int | bytes | str, Value] = {}
        read = 0
        while read != count:
            if count is None and self._data[self.at : self.at + 1] == bytes([_BREAK]):
                self.at += 1
                break
            key = self.item(depth - 1)
            if isinstance(key, bool) or not isinstance(key, int | bytes | str) or key in out:
                raise self.malformed("key of a map", "an integer or string, each once", "another or a repetition")
            out[key] = self.item(depth - 1)
            read += 1
        return out
