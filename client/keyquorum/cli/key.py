"""``keyquorum key``: keys that the custodians generate together, and their certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars

if TYPE_CHECKING:
    from keyquorum.keys import KeyRecord

__all__ = ["app"]

app = typer.Typer(name="key", help="Keys of the cluster.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key's id.")]


@app.command()
def create(
    key: KeyArgument,
    suite: Annotated[
        str, typer.Option(help="Sealing suite: MLKEM768_X25519 or MLKEM1024_P384, with an optional +KEM.")
    ] = "MLKEM768_X25519",
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Have the custodians generate a key by a dealerless ceremony. Needs an operator's profile."""
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        record = client.key_create(key, suite=suite, progress=report)
    _show(record, as_json)


@app.command("list")
def list_keys(
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """List the cluster's keys, each with its certificate verified."""
    with output.client_of(profile, passphrase_file) as client:
        records = client.keys()
    if as_json:
        output.emit({"keys": [record.as_dict() for record in records]})
        return
    output.table(
        "",
        ("key", "epoch", "state", "suite", "created", "seeds"),
        [(r.key_id, r.epoch, r.state, r.suite, output.when(r.created_at), r.seed_count) for r in records],
    )


@app.command()
def show(
    key: KeyArgument,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show one key and who signed its certificate."""
    with output.client_of(profile, passphrase_file) as client:
        record = client.key(key)
    _show(record, as_json)


def _show(record: KeyRecord, as_json: bool) -> None:
    if as_json:
        output.emit(record.as_dict())
        return
    output.table(
        "",
        ("", ""),
        (
            ("key", record.key_id),
            ("epoch", record.epoch),
            ("state", f"{record.state} (the coordinator's word)"),
            ("suite", record.suite),
            ("ceremony", record.ceremony_id),
            ("created", output.when(record.created_at)),
            ("seeds", record.seed_count),
            ("certified by", ", ".join(record.custodians)),
            ("certificate", f"sha256:{record.certificate_sha256}"),
        ),
    )
