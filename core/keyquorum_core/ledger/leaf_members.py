"""What a member of a leaf can be: digests, numbers, fixed words, and nothing that a person could be named in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Final, TypeAlias

from keyquorum_core.names import CUSTODIAN_ID, JOB_ID, KEY_ID, MAX_INTEGER, SHA256_HEX

__all__ = [
    "Bool", "Count", "Flag", "Integer", "JobId", "KeyId", "Kind", "MaybeReason", "ReasonCode", "Seat", "Sha256", "Text",
    "Texts", "Time", "Word", "text",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    pattern: re.Pattern[str]

    def fits(self, value: object) -> bool:
        return isinstance(value, str) and self.pattern.fullmatch(value) is not None

    @property
    def words(self) -> str:
        return self.pattern.pattern


@dataclass(frozen=True, slots=True)
class Texts:
    """A sorted set of strings."""

    pattern: re.Pattern[str]
    most: int

    def fits(self, value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) <= self.most
            and all(isinstance(item, str) and self.pattern.fullmatch(item) for item in value)
            and all(a < b for a, b in pairwise(value))
        )

    @property
    def words(self) -> str:
        return f"at most {self.most} of {self.pattern.pattern}, sorted, each once"


@dataclass(frozen=True, slots=True)
class Integer:
    minimum: int = 0

    def fits(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.minimum <= value <= MAX_INTEGER

    @property
    def words(self) -> str:
        return f"integer in {self.minimum}…{MAX_INTEGER}"


@dataclass(frozen=True, slots=True)
class Flag:
    words: ClassVar[str] = "true or false"

    def fits(self, value: object) -> bool:
        return isinstance(value, bool)


Kind: TypeAlias = Text | Texts | Integer | Flag


def text(pattern: str) -> Text:
    """Text of which all matches."""
    return Text(re.compile(pattern, re.ASCII))


_SEAT: Final = re.compile(rf"coordinator|monitor|custodian/{CUSTODIAN_ID.pattern}", re.ASCII)

Sha256: TypeAlias = Annotated[str, Text(SHA256_HEX)]
JobId: TypeAlias = Annotated[str, Text(JOB_ID)]
KeyId: TypeAlias = Annotated[str, Text(KEY_ID)]
Count: TypeAlias = Annotated[int, Integer()]
Time: TypeAlias = Annotated[int, Integer(1)]
Bool: TypeAlias = Annotated[bool, Flag()]
Seat: TypeAlias = Annotated[str, Text(_SEAT)]
ReasonCode: TypeAlias = Annotated[str, text("[A-Z][A-Z0-9_]{1,39}")]
MaybeReason: TypeAlias = Annotated[str, text("(?:[A-Z][A-Z0-9_]{1,39})?")]
Word: TypeAlias = Annotated[str, text("[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")]
