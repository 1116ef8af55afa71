"""``keyquorum prepare``: run a pipeline at home, look one over, undo tokens, keep a data set's privacy budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars

__all__ = ["app"]

app = typer.Typer(name="prepare", help="Prepare data at home, before a job takes it abroad.", no_args_is_help=True)

PipelineArgument = Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline, TOML.")]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .parquet, .arrow or .csv.")]


@app.command()
def run(
    pipeline: PipelineArgument,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="The data: .parquet, .arrow or .csv.")],
    out: OutputArgument,
    mapping: Annotated[
        Path | None, typer.Option(help="Also write the sealed mapping, which undoes tokens, to this file.")
    ] = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Prepare INPUT into OUT, with the signed statement OUT.provenance.json beside it for `keyquorum job submit`."""
    from keyquorum.prepare import prepare

    with bars() as report:
        made = prepare(
            output.needs_profile(profile),
            pipeline,
            source,
            out,
            mapping=mapping,
            passphrase=output.passphrase_source(passphrase_file),
            progress=report,
        )
    facts = made.as_dict()
    if as_json:
        output.emit(facts)
        return
    output.table("prepared", ("", ""), [(name, _shown(value)) for name, value in facts.items()])


def _shown(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


@app.command()
def check(
    pipeline: PipelineArgument,
    source: Annotated[Path | None, typer.Argument(metavar="[INPUT]", help="Data that it should fit.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Say what a pipeline makes, and whether it fits INPUT. Reads no rows, spends nothing."""
    from keyquorum.prepare import check as look

    found, columns = look(pipeline, source)
    facts: dict[str, object] = {
        "name": found.name,
        "pipeline_sha256": found.sha256,
        "columns_out": list(columns),
        "needs_key": found.needs_key,
        "dataset": found.dataset,
        "epsilon": found.epsilon_micro / 1_000_000,
    }
    if as_json:
        output.emit(facts)
        return
    output.table("pipeline", ("", ""), [(name, _shown(value)) for name, value in facts.items()])


@app.command()
def detokenize(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Data with tokens.")],
    out: OutputArgument,
    mapping: Annotated[Path, typer.Option(help="The sealed mapping of the run that made the tokens.")],
    column: Annotated[list[str], typer.Option(help="A column of tokens; repeat for more.")],
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Put back what tokens stand for. Only their owner can."""
    from keyquorum.prepare import detokenize as undo

    with bars() as report:
        rows = undo(
            output.needs_profile(profile),
            source,
            out,
            mapping=mapping,
            columns=tuple(column),
            passphrase=output.passphrase_source(passphrase_file),
            progress=report,
        )
    output.emit({"output": str(out), "rows": rows}) if as_json else output.line(f"{rows} rows in {out}")


@app.command()
def budget(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The data set's id.")],
    amount: Annotated[str | None, typer.Option("--set", metavar="EPSILON", help="Declare its budget.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="With --set: also where another was declared.")] = False,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show a data set's privacy budget and what was spent of it, or declare it."""
    from keyquorum.prepare import PrivacyLedger, ledger_path
    from keyquorum.prepare.pipeline import epsilon_micro
    from keyquorum.profile import load_profile

    ledger = PrivacyLedger(ledger_path(load_profile(output.needs_profile(profile)).state_dir))
    if amount is None:
        found = ledger.budget(dataset)
    else:
        found = ledger.set_budget(dataset, epsilon_micro(amount), replace=replace)
    if as_json:
        output.emit(found.as_dict())
        return
    rows = [
        (output.when(each.spent_at), each.epsilon_micro / 1_000_000, each.pipeline_sha256[:16])
        for each in found.spendings
    ]
    output.table(f"privacy budget of {dataset}", ("spent at", "epsilon", "pipeline"), rows)
    output.line(f"{found.left_micro / 1_000_000:g} of {found.epsilon_micro / 1_000_000:g} left")
