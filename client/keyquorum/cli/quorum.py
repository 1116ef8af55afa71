"""``keyquorum quorum``: what a quorum rule means, before anybody relies on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output

__all__ = ["app"]

app = typer.Typer(name="quorum", help="Quorum rules.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Quorum rules."""


@app.command()
def explain(
    file: Annotated[str, typer.Argument(help="YAML or JSON with 'custodians' and 'quorum'; - for standard input.")],
    as_json: output.JsonOption = False,
) -> None:
    """Say how many custodians or jurisdictions could collude, and how many may fail."""
    from keyquorum.documents import MAX_DOCUMENT, load_document
    from keyquorum_core.quorum import load_quorum_document
    from keyquorum_protos.wire.files import read_bytes

    if file == "-":
        data = sys.stdin.buffer.read(MAX_DOCUMENT + 1)
    else:
        data = read_bytes(Path(file), "quorum file", max_bytes=MAX_DOCUMENT + 1)
    quorum = load_quorum_document(load_document(data, "quorum document"))
    report = quorum.resilience()
    if as_json:
        custodians = [{"id": each.id, "jurisdiction": each.jurisdiction} for each in quorum.committee]
        output.emit(
            {
                "rule": quorum.rule,
                "words": quorum.words(),
                "custodians": custodians,
                "resilience": report.as_dict(),
                "maximal_unqualified_sets": [list(members) for members in quorum.maximal_unqualified_sets],
            }
        )
        return
    typer.echo(f"A quorum is {quorum.words()}.\n")
    output.table(
        "Resilience",
        ("question", "answer", "for example"),
        (
            (
                "fewest custodians that could collude",
                report.fewest_custodians_to_collude,
                ", ".join(report.custodians_example),
            ),
            (
                "fewest jurisdictions that could collude",
                report.fewest_jurisdictions_to_collude,
                ", ".join(report.jurisdictions_example),
            ),
            ("custodians that may fail, whichever they are", report.most_that_may_fail, ""),
            ("custodians with a veto", len(report.veto_holders), ", ".join(report.veto_holders)),
            ("jurisdictions with a veto", len(report.veto_jurisdictions), ", ".join(report.veto_jurisdictions)),
            ("seeds of an epoch", report.seed_count, ""),
        ),
    )
    output.table(
        "Custodians",
        ("custodian", "jurisdiction", "seeds"),
        [(each.id, each.jurisdiction, report.seeds_per_custodian[each.id]) for each in quorum.committee],
    )
