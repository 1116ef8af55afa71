"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.evidence import EVIDENCE
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

TARGETS: Mapping[str, Target] = {each.name: each for each in (*EVIDENCE, *DOCUMENTS)}
