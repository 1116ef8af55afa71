"""The targets of ``make fuzz`` as they are: each takes its first seed, and refuses rubbish with the typed error."""

from __future__ import annotations

import pytest

from tests.fuzz.table import TARGETS
from tests.fuzz.target import Target


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_takes_its_seed_and_refuses_it_cut_short(target: Target) -> None:
    seeds = list(target.seeds())
    assert target.accepts(seeds[0])
    assert all(len(each) <= target.max_length for each in seeds)
    for data in (b"", b"\x00", b"\x01" + bytes(64), seeds[0][:-1], seeds[0] + b"\xff" * 9, b"\xff" * 300):
        target.accepts(data)  # raises whatever is no typed error
