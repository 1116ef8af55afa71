"""``keyquorum data``: files that stay home, under a key that only a quorum of custodians gives back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars

if TYPE_CHECKING:
    from keyquorum.data_keys import DataFile

__all__ = ["app"]

app = typer.Typer(name="data", help="Encrypt data that stays home longer than a job.", no_args_is_help=True)

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="A new file.")]
DataArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A data file.")]


@app.command()
def encrypt(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="The file to encrypt; it stays as it is.")],
    out: OutArgument,
    key: Annotated[str, typer.Option(help="The key's id.")],
    classification: Annotated[str, typer.Option(help="Of the data, for the custodians' policies.")],
    export_control: Annotated[str, typer.Option(help="Export control class of the data.")] = "",
    name: Annotated[str, typer.Option(help="Which of your data keys: a data set, a store.")] = "files",
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Encrypt INPUT into OUT, under the newest epoch of the key."""
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        made = client.encrypt(
            key,
            source,
            out,
            classification=classification,
            export_control=export_control,
            name=name,
            progress=report,
        )
    _show(made, as_json, output=str(out))


@app.command()
def decrypt(
    source: DataArgument,
    out: OutArgument,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Decrypt FILE into OUT: all of it, or nothing."""
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        found = client.decrypt(source, out, progress=report)
    _show(found, as_json, output=str(out))


@app.command()
def rewrap(
    source: DataArgument,
    to_epoch: Annotated[
        int | None, typer.Option(min=1, help="A later epoch than FILE's; the newest by default.")
    ] = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Put FILE under a later epoch of its key, before the old one is destroyed. What it holds is not decrypted."""
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        made = client.rewrap(source, to_epoch=to_epoch, progress=report)
    _show(made, as_json, output=str(source))


@app.command()
def show(source: DataArgument, as_json: output.JsonOption = False) -> None:
    """Say whose FILE is and which key opens it, as its header has it. Asks nobody, verifies nothing."""
    from keyquorum.data_keys import read_header

    _show(read_header(source), as_json, verified=False)


def _show(found: DataFile, as_json: bool, **more: object) -> None:
    facts = found.as_dict() | more
    if as_json:
        output.emit(facts)
        return
    facts["rewrap_before"] = output.when(found.rewrap_before)
    output.table("", ("", ""), list(facts.items()))
    if found.rewrap_before:
        output.note(
            f"Epoch {found.header.epoch} is retired and may be destroyed from {output.when(found.rewrap_before)} on; "
            "before that: keyquorum data rewrap"
        )
