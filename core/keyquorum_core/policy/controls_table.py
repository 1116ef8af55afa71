"""The controls matrix in Markdown, for those who answer for it: what is in the policies, and nothing else."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from keyquorum_core.policy.controls import CEREMONIES, Control, Controls

__all__ = ["table"]

_COLUMNS: Final = (
    "classification", "regions", "providers", "evidence", "minimum TCB", "development hardware", "fewest to collude",
    "logging", "longest manifest", "further",
)  # fmt: skip


def table(controls: Controls) -> str:
    """The matrix in Markdown."""
    lines = [f"## {_cell(controls.title)}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_cells(row)) for row in controls.rows]
    lines += ["", *(f"- **{row.classification}**: {_cell(row.description)}" for row in controls.rows)]
    orders = "; ".join(
        f"{action} takes {count} operator{'s' if count > 1 else ''}"
        + (" or the key's own schedule" if action in controls.scheduled else "")
        for action, count in sorted(controls.ceremonies.items())
    )
    denied = ", ".join(action for action in CEREMONIES if action not in controls.ceremonies)
    lines += [
        "",
        f"Ceremonies: {orders or 'none is permitted'}" + (f"; denied: {denied}." if denied and orders else "."),
    ]
    lines += ["", "Any classification that is not in the table is denied."]
    return "\n".join(lines) + "\n"


def _cells(row: Control) -> list[str]:
    further = []
    for what, values in (("owners", row.owners), ("purposes", row.purposes), ("GPUs", row.gpu_models)):
        if values:
            further.append(f"{what}: {_names(values)}")
    if row.export_classes is not None:
        further.append("export classes: " + ", ".join(each or "none" for each in row.export_classes))
    prepared = row.preparation
    if prepared.required:
        further.append("prepared at home")
    if prepared.pipelines:
        further.append(f"by pipeline {', '.join(each[:12] for each in prepared.pipelines)}")
    if prepared.columns:
        further.append(f"columns: {_names(prepared.columns)}")
    if prepared.unprepared:
        further.append(f"other files: {_names(prepared.unprepared)}")
    if prepared.maximum_epsilon_micro is not None:
        further.append(f"ε ≤ {Decimal(prepared.maximum_epsilon_micro) / 1_000_000:f}")
    if row.lists:
        further.append(f"denied if on the {' or '.join(row.lists)} list")
    quorum = [
        f"{count} {one if count == 1 else many}"
        for count, one, many in (
            (row.quorum_custodians, "custodian", "custodians"),
            (row.quorum_jurisdictions, "jurisdiction", "jurisdictions"),
        )
        if count
    ]
    return [
        row.classification,
        _names(row.regions),
        _names(row.providers),
        _names(row.evidence),
        ", ".join(f"{name} {level}" for name, level in sorted(row.minimum_tcb.items())) or "any",
        "allowed" if row.development_hardware else "denied",
        " from ".join(quorum) or "any",
        "ledger" if row.ledger else "not asked for",
        "any" if row.maximum_lifetime is None else _span(row.maximum_lifetime),
        "; ".join(further) or "–",
    ]


def _names(values: tuple[str, ...]) -> str:
    return ", ".join(values) or "any"


def _span(seconds: int) -> str:
    for unit, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds % unit == 0:
            count = seconds // unit
            return f"{count} {word}{'s' if count > 1 else ''}"
    return f"{seconds} seconds"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(_cell(each) for each in cells) + " |"
