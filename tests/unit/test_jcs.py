"""Canonical JSON, written fast where that is safe: the same bytes, and the same refusals, as the library's."""

from __future__ import annotations

import json
from enum import IntEnum, StrEnum
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyquorum_core import jcs

TEXT = st.text(max_size=8)
"""Lone surrogates included."""
ASCII = st.text(st.characters(max_codepoint=127), max_size=8)
NUMBERS = st.integers() | st.integers(-(2**53) - 1, -(2**53) + 2) | st.integers(2**53 - 2, 2**53 + 1) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT | ASCII
NAMES = ASCII | TEXT | st.sampled_from(["\ufb33", "\U0001f600", "€", "a", "\r", "1", "\u0080"])
VALUES = st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=4) | st.tuples(x, x) | st.dictionaries(NAMES, x, max_size=4),
    max_leaves=12,
)


def outcome(dumps: Any, value: object) -> object:
    try:
        return dumps(value)
    except rfc8785.CanonicalizationError as error:
        return type(error)


@given(VALUES)
@example("".join(map(chr, range(128))))
@example({"\ufb33": 1, "\U0001f600": 2})
@example(-0.0)
@settings(max_examples=600, deadline=None)
def test_writes_what_the_library_writes(value: object) -> None:
    assert outcome(jcs.dumps, value) == outcome(rfc8785.dumps, value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | ASCII,
        lambda x: st.lists(x, max_size=4) | st.dictionaries(ASCII, x, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_what_we_write_ourselves_never_takes_the_slow_way(value: object) -> None:
    assert jcs._is_plain(value)
    assert json.loads(jcs.dumps(value)) == value


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    BIG = 7


@pytest.mark.parametrize(
    "value", [{"a": Colour.RED, "b": [Size.BIG]}, {Colour.RED: 1}, {"a": {1: 2}}, {"a": b"x"}, {1}]
)
def test_other_types_are_the_librarys_to_judge(value: object) -> None:
    assert not jcs._is_plain(value)
    assert outcome(jcs.dumps, value) == outcome(rfc8785.dumps, value)
