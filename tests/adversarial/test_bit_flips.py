"""One bit of genuine evidence changed: refused where something signs it, refused or without effect where nothing does.

The suite takes :data:`FLIPS` bits of each type's signed regions, spread evenly over all its parts; ``make flips`` takes
every bit there is. What is refused must be refused as *not genuine*: that the changed evidence is not accepted would
prove little, since most of it says something that reference values do not list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.genuine import OWN, REAL, Genuine

EVERY_BIT = bool(os.environ.get("KEYQUORUM_EVERY_BIT"))
FLIPS = 2_000
"""Of each type's signed regions. A prime step spreads them, so that all eight bits of a byte get their turn."""
UNSIGNED_FLIPS = 500


class TamperedEvidence:
    """A host, or a coordinator on the way, that changes a bit of somebody's genuine evidence."""

    def __init__(self, genuine: Genuine) -> None:
        self.genuine = genuine
        verdict = genuine.judge(genuine.parts)
        assert verdict.verified, verdict.detail
        self._before = (verdict.ok, verdict.reason, dict(verdict.claims))

    def bits(self, *, signed: bool) -> list[tuple[str, int]]:
        """Part and bit number, in order."""
        found: list[tuple[str, int]] = []
        for name, data in self.genuine.parts.items():
            open_ranges = self.genuine.unsigned.get(name, ())
            for at in range(len(data)):
                if any(at in each for each in open_ranges) != signed:
                    found += [(name, 8 * at + bit) for bit in range(8)]
        return found

    def flip(self, name: str, bit: int) -> bytes:
        changed = bytearray(self.genuine.parts[name])
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    def is_refused(self, name: str, bit: int) -> bool:
        """Refused as not genuine, with a reason."""
        verdict = self.genuine.with_part(name, self.flip(name, bit))
        return not verdict.ok and not verdict.verified and bool(verdict.reason)

    def has_effect(self, name: str, bit: int) -> bool:
        """Neither refused nor judged as before, claim by claim."""
        verdict = self.genuine.with_part(name, self.flip(name, bit))
        if not verdict.ok and verdict.reason != self._before[1]:
            return False
        return (verdict.ok, verdict.reason, dict(verdict.claims)) != self._before


def sample(bits: list[tuple[str, int]], count: int) -> Iterator[tuple[str, int]]:
    """``count`` different ones, spread over all; or all."""
    if EVERY_BIT or len(bits) <= count:
        yield from bits
        return
    step = len(bits) // count
    for number in range(count):
        # The offset inside each stretch changes, so that no bit of a byte is left out for the step's sake.
        yield bits[number * step + number * 5 % step]


def tampered(make: Callable[[], Genuine]) -> TamperedEvidence:
    return TamperedEvidence(make())


MAKERS = [
    *(pytest.param(make, id=f"{kind} of our making") for kind, make in OWN.items()),
    *(pytest.param(make, id=f"{kind} of real hardware") for kind, make in REAL.items()),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.timeout(0 if EVERY_BIT else 120)
def test_a_flipped_bit_of_a_signed_region_is_refused(make: Callable[[], Genuine]) -> None:
    evidence = tampered(make)
    chosen = list(sample(evidence.bits(signed=True), FLIPS))
    assert len(set(chosen)) == len(chosen) >= FLIPS
    accepted = [each for each in chosen if not evidence.is_refused(*each)]
    assert accepted == []


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.timeout(0 if EVERY_BIT else 120)
def test_a_flipped_bit_that_nobody_signs_is_refused_or_changes_nothing(make: Callable[[], Genuine]) -> None:
    evidence = tampered(make)
    effects = [each for each in sample(evidence.bits(signed=False), UNSIGNED_FLIPS) if evidence.has_effect(*each)]
    assert effects == []
