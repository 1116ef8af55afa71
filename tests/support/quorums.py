"""Random committees and rules for property tests, and a reading of rules that shares nothing with the product's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from keyquorum_core.errors import RefusedError
from keyquorum_core.quorum import Custodian, Quorum

JURISDICTIONS = ("CH", "DE", "FR", "SE")


def committee(size: int, spread: int = 4) -> tuple[Custodian, ...]:
    """``ch-1``-like custodians, dealt over the first ``spread`` jurisdictions."""
    names = [JURISDICTIONS[i % spread] for i in range(size)]
    return tuple(Custodian(f"{name.lower()}-{i // spread + 1}", name) for i, name in enumerate(names))


def qualifies(rule: Mapping[str, Any], custodians: Iterable[Custodian], chosen: Iterable[str]) -> bool:
    """DESIGN §4 read literally, over sets of names."""
    everyone = {c.id: c.jurisdiction for c in custodians}
    have = set(chosen) & set(everyone)

    def one(item: Mapping[str, str]) -> bool:
        if "custodian" in item:
            return item["custodian"] in have
        return any(everyone[name] == item["jurisdiction"] for name in have)

    verdicts = []
    if "at_least" in rule:
        verdicts.append(len(have & set(rule.get("of", everyone))) >= rule["at_least"])
    if "jurisdictions" in rule:
        verdicts.append(len({everyone[name] for name in have}) >= rule["jurisdictions"])
    if "include" in rule:
        include = rule["include"]
        verdicts.append(all(one(item) for item in (include if isinstance(include, list) else [include])))
    if "all_of" in rule:
        verdicts.append(all(qualifies(part, custodians, have) for part in rule["all_of"]))
    if "any_of" in rule:
        verdicts.append(any(qualifies(part, custodians, have) for part in rule["any_of"]))
    return all(verdicts)


def subsets(ids: Iterable[str]) -> list[tuple[str, ...]]:
    names = sorted(ids)
    return [chosen for size in range(len(names) + 1) for chosen in combinations(names, size)]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


@st.composite
def rules(draw: st.DrawFn, custodians: tuple[Custodian, ...], depth: int = 2) -> dict[str, object]:
    """A rule inside the grammar; it may still be one that is refused."""
    ids = [c.id for c in custodians]
    places = sorted({c.jurisdiction for c in custodians})
    kinds = ["at_least", "of", "jurisdictions", "include"] + (["all_of", "any_of"] if depth else [])
    rule: dict[str, object] = {}
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2, unique=True)):
        if kind == "at_least" and "of" not in rule:
            rule["at_least"] = draw(st.integers(1, len(ids)))
        elif kind == "of":
            of = draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
            rule["of"], rule["at_least"] = of, draw(st.integers(1, len(of)))
        elif kind == "jurisdictions":
            rule["jurisdictions"] = draw(st.integers(1, len(places)))
        elif kind == "include":
            one = st.sampled_from([{"custodian": x} for x in ids] + [{"jurisdiction": x} for x in places])
            listed = st.lists(one, min_size=1, max_size=2, unique_by=_text)
            rule["include"] = draw(st.one_of(one, listed))
        elif kind in ("all_of", "any_of"):
            rule[kind] = draw(st.lists(rules(custodians, depth - 1), min_size=1, max_size=3, unique_by=_text))
    if not rule:
        rule["at_least"] = draw(st.integers(1, len(ids)))
    return rule


@st.composite
def quorums(draw: st.DrawFn, max_size: int = 6) -> Quorum:
    """A quorum that is accepted."""
    custodians = committee(draw(st.integers(2, max_size)), draw(st.integers(1, 4)))
    thresholds = st.builds(lambda k: {"at_least": k}, st.integers(2, len(custodians)))
    rule: dict[str, object] = draw(st.one_of(thresholds, rules(custodians)))
    try:
        return Quorum(rule, custodians)
    except RefusedError:
        assume(False)
        raise
