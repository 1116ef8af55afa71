"""A parser to be fuzzed, and the bytes to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from keyquorum_core.errors import KeyquorumError
from tests.support.genuine import Genuine

__all__ = ["Target", "of_genuine", "one_of"]


@dataclass(frozen=True)
class Target:
    """``parse`` is given any bytes; ``seeds`` makes inputs to start from, of which the first is accepted."""

    name: str
    parse: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    max_length: int = 1 << 14
    """Bytes. Longer inputs find nothing more where a parser has a bound, and cost more."""

    def accepts(self, data: bytes) -> bool:
        """Whether the parser takes it. Raises only what no parser may raise."""
        try:
            self.parse(data)
        except KeyquorumError:
            return False
        return True


def one_of(name: str, parsers: Sequence[Callable[[bytes], object]], seeds: Callable[[], Iterable[tuple[int, bytes]]],
           max_length: int = 1 << 14) -> Target:  # fmt: skip
    """Several parsers in one target: the first byte of an input says which. Seeds are (parser, bytes)."""

    def parse(data: bytes) -> object:
        return parsers[data[0] % len(parsers)](data[1:]) if data else None

    return Target(name, parse, lambda: [bytes([which]) + data for which, data in seeds()], max_length)


def of_genuine(
    name: str, makers: Sequence[Callable[[], Genuine]], part: Callable[[str], bool], max_length: int = 1 << 14
) -> Target:
    """One part of genuine evidence is fuzzed and the rest stays as it is. The first byte says which evidence and part.

    Verdicts never raise, so whatever comes out of one is a finding; what the parser refused is for the verdict to say.
    """

    def cases() -> list[tuple[Genuine, str]]:
        return [(each, name) for each in (make() for make in makers) for name in each.parts if part(name)]

    known: list[tuple[Genuine, str]] = []

    def parse(data: bytes) -> object:
        known[:] = known or cases()
        if not data:
            return None
        genuine, which = known[data[0] % len(known)]
        return genuine.with_part(which, data[1:])

    def seeds() -> list[bytes]:
        known[:] = known or cases()
        return [bytes([index]) + genuine.parts[which] for index, (genuine, which) in enumerate(known)]

    return Target(name, parse, seeds, max_length)
