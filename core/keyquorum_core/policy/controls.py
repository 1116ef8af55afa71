"""The controls matrix: what law and contract ask for, by classification, as a table that compiles to policies.

``controls.yaml`` (docs/policy.md) says for each classification where its jobs may run, with whom, on what evidence,
under how strong a quorum, for how long. A control that is not named is not checked; the table says ``any`` there. What
becomes of it: policies (:mod:`~keyquorum_core.policy.controls_cedar`), and a table for those who answer for it
(:mod:`~keyquorum_core.policy.controls_table`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.manifest import EVIDENCE_TYPES
from keyquorum_core.policy.lists import LIST_KINDS
from keyquorum_core.strictjson import Fields

__all__ = ["CEREMONIES", "Control", "Controls", "Preparation", "read_controls"]

_CLASSIFICATION: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?", re.ASCII)
_TCB: Final = re.compile(r"[a-z0-9-]{1,32}\.[a-z0-9_]{1,32}", re.ASCII)
_SPAN: Final = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
CEREMONIES: Final = ("enrol", "rotate", "destroy")
_SCHEDULED: Final = ("rotate", "destroy")
MAX_CLASSIFICATIONS: Final = 256


@dataclass(frozen=True, slots=True)
class Preparation:
    """What must have been done to the data at home. Empty tuples and ``None`` ask for nothing."""

    required: bool = False
    pipelines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    unprepared: tuple[str, ...] = ()
    maximum_epsilon_micro: int | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """One classification's row. Empty sets and ``None`` mean: not checked."""

    classification: str
    description: str
    owners: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    export_classes: tuple[str, ...] | None = None
    regions: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    minimum_tcb: Mapping[str, int] = field(default_factory=dict)
    gpu_models: tuple[str, ...] = ()
    development_hardware: bool = False
    quorum_custodians: int = 0
    quorum_jurisdictions: int = 0
    ledger: bool = False
    maximum_lifetime: int | None = None
    preparation: Preparation = Preparation()
    lists: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Controls:
    """``ceremonies``: how many operators must have signed for each; one that is not there is denied. ``scheduled``:
    those that a key's own certified policy may order, with nobody's signature."""

    name: str
    title: str
    rows: tuple[Control, ...]
    ceremonies: Mapping[str, int]
    scheduled: frozenset[str] = frozenset()


def read_controls(document: object) -> Controls:
    """From a parsed ``controls.yaml``. Raises :class:`MalformedError` naming the member."""
    top = Fields(document, "controls")
    name = _matching(top.text("name", max_length=48), _NAME, "controls: name")
    title = top.text("title", max_length=200)
    given = top.object("classifications")
    names = given.names()
    if not 1 <= len(names) <= MAX_CLASSIFICATIONS:
        raise _bad("controls: bad number of classifications", f"1…{MAX_CLASSIFICATIONS}", len(names))
    rows = tuple(_row(each, given.object(each)) for each in names)
    ceremonies: dict[str, int] = {}
    scheduled: set[str] = set()
    if "ceremonies" in top:
        orders = top.object("ceremonies")
        for each in CEREMONIES:
            if each in orders:
                order = orders.object(each)
                ceremonies[each] = order.integer("operators", 1, 64)
                if each in _SCHEDULED and "scheduled" in order and order.boolean("scheduled"):
                    scheduled.add(each)
                order.done()
        orders.done()
    top.done()
    return Controls(
        name, title, tuple(sorted(rows, key=lambda row: row.classification)), ceremonies, frozenset(scheduled)
    )


def _row(name: str, given: Fields) -> Control:
    what = f"controls.classifications.{name[:40]}"
    _matching(name, _CLASSIFICATION, f"{what}: classification")
    out: dict[str, object] = {"description": given.text("description", max_length=500)}
    for each, most in (("owners", 256), ("purposes", 16), ("regions", 256), ("providers", 256), ("gpu_models", 64)):
        if each in given:
            out[each] = _set(given, each, most, what)
    if "export_classes" in given:
        out["export_classes"] = _set(given, "export_classes", 256, what, blank=True)
    if "evidence" in given:
        out["evidence"] = _set(given, "evidence", 16, what)
        unknown = set(_texts(out["evidence"])) - EVIDENCE_TYPES
        if unknown:
            raise _bad(f"{what}.evidence: unknown type", ", ".join(sorted(EVIDENCE_TYPES)), ", ".join(sorted(unknown)))
    if "minimum_tcb" in given:
        levels = given.object("minimum_tcb")
        out["minimum_tcb"] = {_matching(n, _TCB, f"{what}.minimum_tcb"): levels.integer(n) for n in levels.names()}
    if "development_hardware" in given:
        out["development_hardware"] = given.boolean("development_hardware")
    if "quorum" in given:
        quorum = given.object("quorum")
        for each in ("custodians", "jurisdictions"):
            if each in quorum:
                out[f"quorum_{each}"] = quorum.integer(each, 1, 64)
        quorum.done()
    if "logging" in given:
        logging = given.text("logging", max_length=16)
        if logging not in ("ledger", "none"):
            raise _bad(f"{what}.logging", "ledger or none", ascii(logging))
        out["ledger"] = logging == "ledger"
    if "maximum_lifetime" in given:
        out["maximum_lifetime"] = _seconds(given.raw("maximum_lifetime"), f"{what}.maximum_lifetime")
    if "preparation" in given:
        out["preparation"] = _preparation(given.object("preparation"), f"{what}.preparation")
    if "lists" in given:
        out["lists"] = _set(given, "lists", 2, what)
        if not set(_texts(out["lists"])) <= set(LIST_KINDS):
            raise _bad(f"{what}.lists", " or ".join(LIST_KINDS), out["lists"])
    given.done()
    return Control(name, **out)  # type: ignore[arg-type]


def _preparation(given: Fields, what: str) -> Preparation:
    out: dict[str, object] = {}
    if "required" in given:
        out["required"] = given.boolean("required")
    for each, most in (("pipelines", 64), ("columns", 1024), ("unprepared", 1024)):
        if each in given:
            out[each] = _set(given, each, most, what)
    if "maximum_epsilon" in given:
        text = given.text("maximum_epsilon", max_length=20)
        try:
            micro = Decimal(text) * 1_000_000
        except InvalidOperation:
            raise _bad(f"{what}.maximum_epsilon", 'a decimal number in quotes, as "1.5"', ascii(text)) from None
        if not micro.is_finite() or micro < 0 or micro != micro.to_integral_value() or micro > 2**53 - 1:
            raise _bad(f"{what}.maximum_epsilon", "at most six decimals, not below 0", ascii(text))
        out["maximum_epsilon_micro"] = int(micro)
    given.done()
    return Preparation(**out)  # type: ignore[arg-type]


def _set(given: Fields, name: str, most: int, what: str, *, blank: bool = False) -> tuple[str, ...]:
    raw = given.list(name, max_items=most, min_items=1)
    out = []
    for each in raw:
        if not isinstance(each, str) or len(each) > 256 or not each.isprintable() or (not each and not blank):
            hint = "strings (in YAML write 'NO' in quotes)" if isinstance(each, bool) else "printable strings"
            raise _bad(f"{what}.{name}", hint, ascii(each)[:60])
        out.append(each)
    if len(set(out)) != len(out):
        raise _bad(f"{what}.{name}", "each once", "one of them twice")
    return tuple(sorted(out))


def _texts(value: object) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def _seconds(value: object, what: str) -> int:
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if found is None or not int(found[1]):
        raise _bad(what, "a span such as 90m, 12h or 7d", ascii(value)[:40])
    return int(found[1]) * _UNITS[found[2]]


def _matching(text: str, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.fullmatch(text):
        raise _bad(what, pattern.pattern, ascii(text[:60]))
    return text


def _bad(message: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, message, expected=expected, actual=actual)
