"""From the controls matrix to Cedar: one ``permit`` for each way a key is handed out, one ``forbid`` for each control.

So a denial names the control that denied, as ``personal.region``. The same controls always give the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from keyquorum_core.policy.controls import Control, Controls, Preparation

__all__ = ["compile_controls"]


def compile_controls(controls: Controls) -> dict[str, str]:
    """Policy files by name."""
    files = {f"{row.classification}.cedar": "\n".join(_policies(row)) for row in controls.rows}
    if controls.ceremonies:
        files["ceremonies.cedar"] = "\n".join(
            f'@id("ceremony.{action}")\npermit (principal, action == Action::"{action}", resource)\n'
            f"when {{ context.operator_count >= {count}{_or_scheduled(controls, action)} }};\n"
            for action, count in sorted(controls.ceremonies.items())
        )
    head = f"// Compiled from the controls {_one_line(controls.name)}: {_one_line(controls.title)}.\n"
    head += "// Change controls.yaml, not this file.\n\n"
    return {name: head + text for name, text in sorted(files.items())}


def _or_scheduled(controls: Controls, action: str) -> str:
    return " || context.scheduled" if action in controls.scheduled else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(text: str) -> str:
    """A Cedar string; the text is printable, so that only these two need escaping."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(values: tuple[str, ...]) -> str:
    return f"[{', '.join(_quoted(each) for each in values)}]"


_BOTH: Final = '[Action::"submit", Action::"release"]'


def _policies(row: Control) -> Iterator[str]:
    name = row.classification
    this = f"resource.classification == {_quoted(name)}"
    for policy, principal, action in (
        ("submit", "Owner", "submit"),
        ("open", "Owner", "release"),
        ("release", "Worker", "release"),
    ):
        yield (
            f'@id("{name}.{policy}")\npermit (principal is {principal}, action == Action::"{action}", resource)\n'
            f"when {{ {this} }};\n"
        )

    def of_the_job(control: str, unless: str) -> str:
        """A control on what the owner signed: at submission, and again at every release."""
        return (
            f'@id("{name}.{control}")\nforbid (principal, action in {_BOTH}, resource)\nwhen {{ {this} }}\n'
            f"unless {{ {unless} }};\n"
        )

    def of_the_worker(control: str, unless: str) -> str:
        return (
            f'@id("{name}.{control}")\nforbid (principal is Worker, action == Action::"release", resource)\n'
            f"when {{ {this} }}\nunless {{ {unless} }};\n"
        )

    if row.owners:
        yield of_the_job("owner", f"{_list(row.owners)}.contains(resource.owner)")
    if row.purposes:
        allowed = f"{_list(row.purposes)}.containsAll(resource.purposes)"
        yield of_the_job("purpose", f"!resource.purposes.isEmpty() && {allowed}")
    if row.export_classes is not None:
        yield of_the_job("export-class", f"{_list(row.export_classes)}.contains(resource.export_control)")
    if row.regions:
        yield of_the_job("regions", f"{_list(row.regions)}.containsAll(resource.regions)")
        yield of_the_worker("region", f"{_list(row.regions)}.contains(principal.region)")
    if row.providers:
        yield of_the_worker("provider", f"{_list(row.providers)}.contains(principal.provider)")
    if row.evidence:
        # No manifest asks for nothing; a key request, whose key no worker gets, does.
        asked = f"resource.evidence_types.isEmpty() || resource.evidence_types.containsAll({_list(row.evidence)})"
        yield of_the_job("evidence-asked", asked)
        yield of_the_worker("evidence", f"principal.evidence.containsAll({_list(row.evidence)})")
    for component, level in sorted(row.minimum_tcb.items()):
        tag = _quoted(component)
        yield of_the_worker(f"tcb.{component}", f"principal.hasTag({tag}) && principal.getTag({tag}) >= {level}")
    if row.gpu_models:
        models = _list(row.gpu_models)
        yield of_the_worker("gpu", f"!principal.gpu_models.isEmpty() && {models}.containsAll(principal.gpu_models)")
    if not row.development_hardware:
        yield of_the_worker("development", "!principal.development")
    if row.quorum_custodians or row.quorum_jurisdictions:
        wanted = [
            f"context.quorum.{each} >= {count}"
            for each, count in (("custodians", row.quorum_custodians), ("jurisdictions", row.quorum_jurisdictions))
            if count
        ]
        yield of_the_job("quorum", " && ".join(wanted))
    if row.ledger:
        yield (
            f'@id("{name}.logging")\nforbid (principal, action == Action::"release", resource)\nwhen {{ {this} }}\n'
            "unless { context.logged };\n"
        )
    if row.maximum_lifetime is not None:
        yield of_the_job("lifetime", f"resource.lifetime_seconds <= {row.maximum_lifetime}")
    yield from _prepared(row.preparation, of_the_job)
    for each in row.lists:
        yield of_the_job(f"{each}-list", f"!context.{each}.owner && context.{each}.regions.isEmpty()")
        yield of_the_worker(f"{each}-list-worker", f"!context.{each}.region && !context.{each}.provider")


def _prepared(wanted: Preparation, forbid: Callable[[str, str], str]) -> Iterator[str]:
    if wanted.required:
        # No manifest is without files; a key request is.
        yield forbid("prepared", "!resource.prepared.isEmpty() || resource.unprepared.isEmpty()")
    if wanted.pipelines:
        yield forbid("pipelines", f"{_list(wanted.pipelines)}.containsAll(resource.pipelines)")
    if wanted.columns:
        yield forbid("columns", f"{_list(wanted.columns)}.containsAll(resource.columns)")
    if wanted.unprepared:
        yield forbid("unprepared", f"{_list(wanted.unprepared)}.containsAll(resource.unprepared)")
    if wanted.maximum_epsilon_micro is not None:
        yield forbid("epsilon", f"resource.epsilon_micro <= {wanted.maximum_epsilon_micro}")
