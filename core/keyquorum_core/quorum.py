"""Quorums: which sets of custodians qualify, which seeds that takes, and how much can go wrong (DESIGN §4).

A key's epoch has one seed for each *maximal unqualified set*, held by every custodian outside that set (replicated, or
CNF, secret sharing: Ito–Saito–Nishizeki 1987; Cramer–Damgård–Ishai, TCC 2005). So a qualified set holds all seeds
between its members, and an unqualified one lacks at least one seed entirely.

The sets are found over *classes* of interchangeable custodians, so that "20 of 40" is one class and is counted in
microseconds, exactly, before a single set is written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb, prod

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CUSTODIAN_ID
from keyquorum_core.rule import UNREACHABLE, Jurisdictions, Node, parse_rule
from keyquorum_core.strictjson import Fields

__all__ = ["MAX_CUSTODIANS", "MAX_SEEDS_EACH", "Custodian", "Quorum", "Resilience", "explain", "load_quorum_document"]

MAX_CUSTODIANS = 64
MAX_SEEDS_EACH = 10_000
_MAX_WORK = 2_000_000  # conditions looked at while searching: about a second

_JURISDICTION = re.compile(r"[A-Z]{2}")


@dataclass(frozen=True, slots=True, order=True)
class Custodian:
    """A custodian's id (up to 32 of a–z, 0–9 and inner hyphens) and its jurisdiction (ISO 3166-1 alpha-2)."""

    id: str
    jurisdiction: str

    def __post_init__(self) -> None:
        _check_text(self.id, CUSTODIAN_ID, "custodian id", "up to 32 of a-z, 0-9 and inner hyphens")
        _check_text(self.jurisdiction, _JURISDICTION, "jurisdiction", "two capital letters (ISO 3166-1 alpha-2)")


def _check_text(value: object, pattern: re.Pattern[str], what: str, expected: str) -> None:
    if isinstance(value, str) and pattern.fullmatch(value):
        return
    raise MalformedError(
        Reason.QUORUM_RULE,
        f"bad {what}",
        expected=expected,
        actual=repr(value[:40]) if isinstance(value, str) else type(value).__name__,
        next_step="YAML reads NO without quotes as false." if value is False else "",
    )


@dataclass(frozen=True, slots=True)
class Resilience:
    """What a quorum withstands. Every number is exact; an example set stands beside the two that concern collusion."""

    custodians: int
    jurisdictions: int
    fewest_custodians_to_collude: int
    custodians_example: tuple[str, ...]
    fewest_jurisdictions_to_collude: int
    jurisdictions_example: tuple[str, ...]
    most_that_may_fail: int
    """Any set of this many custodians may fail and the rest still qualifies."""
    veto_holders: tuple[str, ...]
    """Custodians without whom nobody qualifies."""
    veto_jurisdictions: tuple[str, ...]
    """Jurisdictions without whose custodians nobody qualifies."""
    seed_count: int
    seeds_per_custodian: Mapping[str, int]

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``keyquorum quorum explain --json``."""
        return {
            "custodians": self.custodians,
            "jurisdictions": self.jurisdictions,
            "fewest_custodians_to_collude": self.fewest_custodians_to_collude,
            "custodians_example": list(self.custodians_example),
            "fewest_jurisdictions_to_collude": self.fewest_jurisdictions_to_collude,
            "jurisdictions_example": list(self.jurisdictions_example),
            "most_that_may_fail": self.most_that_may_fail,
            "veto_holders": list(self.veto_holders),
            "veto_jurisdictions": list(self.veto_jurisdictions),
            "seed_count": self.seed_count,
            "seeds_per_custodian": dict(self.seeds_per_custodian),
        }


class Quorum:
    """A rule over a committee. Immutable; equal when rule and committee are.

    Raises :class:`MalformedError` for a rule or committee outside the grammar, :class:`RefusedError` for a rule where
    one custodian alone qualifies, nobody does, or a custodian would hold more than ``MAX_SEEDS_EACH`` seeds; all with
    ``QUORUM_RULE``.
    """

    __slots__ = ("_bit", "_held", "_masks", "_node", "_plain", "_resilience", "_sets", "committee", "ids")

    committee: tuple[Custodian, ...]
    """Sorted by id."""
    ids: tuple[str, ...]

    def __init__(self, rule: Mapping[str, object], committee: Iterable[Custodian]) -> None:
        self.committee = tuple(sorted(committee))
        self.ids = tuple(custodian.id for custodian in self.committee)
        if len(self.ids) > MAX_CUSTODIANS or len(self.ids) < 2:
            raise MalformedError(
                Reason.QUORUM_RULE, "bad committee size", expected=f"2…{MAX_CUSTODIANS}", actual=len(self.ids)
            )
        if len(set(self.ids)) != len(self.ids):
            twice = sorted({name for name in self.ids if self.ids.count(name) > 1})
            raise MalformedError(Reason.QUORUM_RULE, "custodian listed twice", actual=", ".join(twice))
        self._bit = {name: 1 << i for i, name in enumerate(self.ids)}
        jurisdictions = tuple(custodian.jurisdiction for custodian in self.committee)
        self._node, plain = parse_rule(rule, self.ids, jurisdictions)
        self._plain = json.dumps(plain, sort_keys=True)
        self._refuse_trivial()
        self._masks, self._sets = _maximal_unqualified(self._node, self.ids, jurisdictions)
        self._held = {
            name: tuple(i for i, mask in enumerate(self._masks) if not mask & bit) for name, bit in self._bit.items()
        }
        self._resilience: Resilience | None = None

    def _refuse_trivial(self) -> None:
        if not self._node.holds((1 << len(self.ids)) - 1):
            raise RefusedError(
                Reason.QUORUM_RULE,
                "nobody qualifies, not even all custodians together",
                expected=self._node.words(),
                actual="; ".join(self._node.missing((1 << len(self.ids)) - 1)),
            )
        alone = [name for name, bit in self._bit.items() if self._node.holds(bit)]
        if alone:
            raise RefusedError(
                Reason.QUORUM_RULE,
                "one custodian alone qualifies",
                expected="every quorum to have at least two custodians",
                actual=", ".join(alone),
                next_step="Ask for at least two custodians in every alternative of the rule.",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quorum) and (self._plain, self.committee) == (other._plain, other.committee)

    def __hash__(self) -> int:
        return hash((self._plain, self.committee))

    def __repr__(self) -> str:
        return f"Quorum({self._node.words()})"

    @property
    def rule(self) -> dict[str, object]:
        """The rule as plain JSON values; a fresh copy each time."""
        parsed: dict[str, object] = json.loads(self._plain)
        return parsed

    def mask(self, ids: Iterable[str]) -> int:
        """The set as a mask: bit ``i`` stands for ``self.ids[i]``. Ids of others add nothing."""
        out = 0
        for name in ids:
            out |= self._bit.get(name, 0)
        return out

    def is_qualified(self, ids: Iterable[str]) -> bool:
        """Whether the set meets the rule. Ids of others add nothing."""
        return self._node.holds(self.mask(ids))

    def is_qualified_mask(self, mask: int) -> bool:
        """As :meth:`is_qualified`, for searches over masks."""
        return self._node.holds(mask)

    @property
    def maximal_unqualified_sets(self) -> tuple[tuple[str, ...], ...]:
        """Sorted tuples of ids, ordered by length, then lexicographically: seed ``i`` belongs to the i-th."""
        return self._sets

    @property
    def seed_count(self) -> int:
        return len(self._masks)

    def holders(self, index: int) -> tuple[str, ...]:
        """Who holds seed ``index``: every custodian outside its set."""
        if not 0 <= index < len(self._masks):
            raise MalformedError(Reason.QUORUM_RULE, "no such seed", expected=f"0…{len(self._masks) - 1}", actual=index)
        return tuple(name for name, bit in self._bit.items() if not self._masks[index] & bit)

    def holder_counts(self, mask: int) -> list[int]:
        """For each seed in order, how many of the set hold it."""
        return [(mask & ~unqualified).bit_count() for unqualified in self._masks]

    def indices_of(self, custodian_id: str) -> tuple[int, ...]:
        """The seeds a custodian holds, ascending; possibly none, for one that the rule never counts."""
        try:
            return self._held[custodian_id]
        except KeyError:
            raise MalformedError(
                Reason.UNKNOWN_CUSTODIAN,
                "not a custodian of this committee",
                expected=", ".join(self.ids),
                actual=custodian_id[:40],
            ) from None

    def resilience(self) -> Resilience:
        """The resilience report, worked out once. Raises :class:`RefusedError` for a rule too intricate to search."""
        if self._resilience is None:
            self._resilience = _resilience(self, self._node)
        return self._resilience

    def words(self) -> str:
        """The rule in words."""
        return self._node.words()

    def explain_missing(self, ids: Iterable[str]) -> str:
        """Which members of the rule the set does not meet, for people; empty when it qualifies."""
        return "; ".join(self._node.missing(self.mask(ids)))


class _Work:
    """A budget, so that no rule, however contrived, keeps anyone busy."""

    def __init__(self, node: Node) -> None:
        self._cost = sum(1 for _ in node.leaves())
        self._left = _MAX_WORK

    def spend(self) -> bool:
        """Count one look at the whole rule; false when the budget is used up."""
        self._left -= self._cost
        return self._left >= 0


def _classes(node: Node, jurisdictions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Positions of custodians, grouped so that exchanging two of a group changes no leaf of the rule.

    Two are interchangeable when the same leaves name them and, if distinct jurisdictions count, they share a
    jurisdiction or are each alone in theirs.
    """
    masks = sorted({leaf.mask for leaf in node.leaves()})
    by_jurisdiction = any(isinstance(leaf, Jurisdictions) for leaf in node.leaves())
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, jurisdiction in enumerate(jurisdictions):
        tag = jurisdiction if by_jurisdiction and jurisdictions.count(jurisdiction) > 1 else ""
        groups.setdefault((tag, *(mask >> i & 1 for mask in masks)), []).append(i)
    return tuple(tuple(group) for group in groups.values())


def _maximal_counts(node: Node, classes: Sequence[Sequence[int]], work: _Work) -> Iterator[tuple[int, ...]]:
    """How many to take of each class, for every maximal unqualified set up to exchange. Ends early when out of work."""
    firsts = [[sum(1 << i for i in group[:v]) for v in range(len(group) + 1)] for group in classes]
    later = [sum(group[-1] for group in firsts[c:]) for c in range(len(classes) + 1)]

    def descend(c: int, chosen: int, counts: tuple[int, ...], nexts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if c == len(classes):
            yield counts
            return
        for v in range(len(classes[c]), -1, -1):
            taken = chosen | firsts[c][v]
            if not work.spend():
                return
            if node.holds(taken):
                continue
            # Whoever is left out must be able to tip the set over.
            reach = taken | later[c + 1]
            left_out = nexts if v == len(classes[c]) else (*nexts, 1 << classes[c][v])
            idle = next((bit for bit in left_out if not (work.spend() and node.can_tip(taken, reach, bit))), 0)
            if idle and not node.holds(reach | idle):
                return  # out of reach, and the more so with fewer taken
            if idle:
                continue
            yield from descend(c + 1, taken, (*counts, v), left_out)

    yield from descend(0, 0, (), ())


@lru_cache(maxsize=32)
def _maximal_unqualified(
    node: Node, ids: tuple[str, ...], jurisdictions: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """Masks and id tuples in seed order. Refuses rules that would load a custodian with too many seeds."""
    classes = _classes(node, jurisdictions)
    work = _Work(node)
    found: list[tuple[int, ...]] = []
    held = [0] * len(classes)
    for counts in _maximal_counts(node, classes, work):
        found.append(counts)
        ways = prod(comb(len(group), v) for group, v in zip(classes, counts, strict=True))
        for c, (group, v) in enumerate(zip(classes, counts, strict=True)):
            held[c] += ways * (len(group) - v) // len(group)  # the ways that leave one given member out: exact
    finished = work.spend()
    most = max(held)
    if most > MAX_SEEDS_EACH:
        raise RefusedError(
            Reason.QUORUM_RULE,
            "a custodian would hold too many seeds",
            expected=f"at most {MAX_SEEDS_EACH}",
            actual=str(most) if finished else f"more than {MAX_SEEDS_EACH}",
            next_step="Use fewer custodians, a threshold nearer to one end, or a quorum of groups.",
            details={"custodian": ids[classes[held.index(most)][0]]},
        )
    if not finished:
        raise RefusedError(
            Reason.QUORUM_RULE,
            "the rule is too intricate to work out its maximal unqualified sets",
            next_step="Use fewer overlapping lists of custodians.",
        )
    sets = [
        tuple(sorted(i for chosen in choice for i in chosen))
        for counts in found
        for choice in product(*(combinations(group, v) for group, v in zip(classes, counts, strict=True)))
    ]
    sets.sort(key=lambda members: (len(members), members))  # ids are sorted, so positions order as ids do
    masks = tuple(sum(1 << i for i in members) for members in sets)
    return masks, tuple(tuple(ids[i] for i in members) for members in sets)


def _fewest(node: Node, classes: Sequence[Sequence[tuple[str, int]]]) -> tuple[str, ...]:
    """The smallest choice of items (name, mask) whose union qualifies, by branch and bound.

    Items are disjoint, and those of a class interchangeable.
    """
    later = [sum(mask for group in classes[c:] for _, mask in group) for c in range(len(classes) + 1)]
    widest = max(mask.bit_count() for group in classes for _, mask in group)
    best = tuple(name for group in classes for name, _ in group)
    work = _Work(node)

    def descend(c: int, chosen: int, taken: tuple[str, ...]) -> None:
        nonlocal best
        if not work.spend():
            raise RefusedError(Reason.QUORUM_RULE, "the rule is too intricate to report on")
        lack = node.shortfall(chosen, later[c])
        if lack >= UNREACHABLE or len(taken) + -(-lack // widest) >= len(best):
            return
        if lack == 0:
            best = taken
            return
        for v in range(len(classes[c]) + 1):
            more = classes[c][:v]
            descend(c + 1, chosen | sum(mask for _, mask in more), (*taken, *(name for name, _ in more)))

    descend(0, 0, ())
    return tuple(sorted(best))


def _resilience(quorum: Quorum, node: Node) -> Resilience:
    located = [custodian.jurisdiction for custodian in quorum.committee]
    masks = {
        jurisdiction: sum(1 << i for i, where in enumerate(located) if where == jurisdiction)
        for jurisdiction in sorted(set(located))
    }
    # Whole jurisdictions are interchangeable when every leaf counts as many of their custodians.
    leaves = sorted({leaf.mask for leaf in node.leaves()})
    alike: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for jurisdiction, mask in masks.items():
        alike.setdefault(tuple((mask & leaf).bit_count() for leaf in leaves), []).append((jurisdiction, mask))
    singles = [[(quorum.ids[i], 1 << i) for i in group] for group in _classes(node, located)]
    few, allied = _fewest(node, singles), _fewest(node, list(alike.values()))
    everyone = quorum.mask(quorum.ids)
    return Resilience(
        custodians=len(quorum.ids),
        jurisdictions=len(masks),
        fewest_custodians_to_collude=len(few),
        custodians_example=few,
        fewest_jurisdictions_to_collude=len(allied),
        jurisdictions_example=allied,
        most_that_may_fail=len(quorum.ids) - max(map(len, quorum.maximal_unqualified_sets)) - 1,
        veto_holders=tuple(name for i, name in enumerate(quorum.ids) if not node.holds(everyone & ~(1 << i))),
        veto_jurisdictions=tuple(name for name, mask in masks.items() if not node.holds(everyone & ~mask)),
        seed_count=quorum.seed_count,
        seeds_per_custodian={name: len(quorum.indices_of(name)) for name in quorum.ids},
    )


def explain(quorum: Quorum) -> str:
    """The resilience report for people: what ``keyquorum quorum explain FILE`` prints."""
    report = quorum.resilience()
    seeds = sorted(set(report.seeds_per_custodian.values()))
    each = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    idle = [name for name, count in report.seeds_per_custodian.items() if count == 0]
    lines = [
        f"rule: {quorum.words()}",
        f"committee: {report.custodians} custodians in {report.jurisdictions} jurisdictions",
        f"fewest custodians that could collude: {report.fewest_custodians_to_collude}"
        f" (such as {', '.join(report.custodians_example)})",
        f"fewest jurisdictions that could collude: {report.fewest_jurisdictions_to_collude}"
        f" (such as {', '.join(report.jurisdictions_example)})",
        f"most custodians that may fail, whichever they are: {report.most_that_may_fail}",
        f"veto holders: {', '.join(report.veto_holders) or 'none'}",
        f"veto jurisdictions: {', '.join(report.veto_jurisdictions) or 'none'}",
        f"seeds: {report.seed_count}, of which each custodian holds {each}",
    ]
    if idle:
        lines.append(f"custodians the rule never counts: {', '.join(idle)}")
    return "\n".join(lines)


def load_quorum_document(value: object) -> Quorum:
    """Read ``{"custodians": [{"id", "jurisdiction"}], "quorum": rule}``, already parsed from YAML or JSON.

    Raises :class:`MalformedError` or :class:`RefusedError` as :class:`Quorum` does.
    """
    document = _fields(value, "quorum document")
    listed = document.list("custodians", min_items=1, max_items=MAX_CUSTODIANS)
    rule = document.raw("quorum")
    document.done()
    committee: list[Custodian] = []
    for i, item in enumerate(listed):
        entry = _fields(item, f"custodians[{i}]")
        name, jurisdiction = entry.raw("id"), entry.raw("jurisdiction")
        entry.done()
        _check_text(name, CUSTODIAN_ID, "custodian id", "up to 32 of a-z, 0-9 and inner hyphens")
        _check_text(jurisdiction, _JURISDICTION, "jurisdiction", "two capital letters (ISO 3166-1 alpha-2)")
        committee.append(Custodian(str(name), str(jurisdiction)))
    if not isinstance(rule, dict):
        raise MalformedError(Reason.QUORUM_RULE, "quorum is not an object", actual=type(rule).__name__)
    return Quorum(rule, committee)


def _fields(value: object, what: str) -> Fields:
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        raise MalformedError(Reason.MALFORMED, f"{what} has a member name that is not text")
    return Fields(value, what)
