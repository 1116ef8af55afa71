"""``keyquorum key rotate | repair | destroy | ceremonies | cancel``: what operators order after a key was made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars
from keyquorum.cli.durations import duration
from keyquorum.cli.key import KeyArgument, app, show_ceremonies, show_record
from keyquorum_core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from keyquorum.ceremonies import Ended
    from keyquorum_core.key_policy import KeyPolicy

__all__ = ["app"]

_OperatorKeys = Annotated[
    list[Path] | None,
    typer.Option(
        help="Key file of a further operator who signs, where the roster asks for several.", show_default=False
    ),
]
_Change = Annotated[
    str | None, typer.Option(help="As for create; what isn't given stays as it is.", show_default=False)
]


@app.command()
def rotate(
    key: KeyArgument,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Make the epoch anew, for the roster's committee and rule, instead of out of the present one. Each"
            " custodian's operator approves it.",
        ),
    ] = False,
    lease: _Change = None,
    reattest: _Change = None,
    rotate_after: _Change = None,
    retain: _Change = None,
    absent_at_most: Annotated[int | None, typer.Option(min=0, max=64, show_default=False)] = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Make the key's next epoch. Jobs that run go on with theirs, which is kept as long as the key's policy says.

    Custodians out of reach are left out, as far as the policy allows, and are repaired when they are back.
    """
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        changes = {
            "lease_seconds": lease,
            "reattest_seconds": reattest,
            "rotate_after_seconds": rotate_after,
            "retain_seconds": retain,
        }
        given = {name: duration(text) for name, text in changes.items() if text is not None}
        if absent_at_most is not None:
            given["absent_at_most"] = absent_at_most
        policy = _changed(client.key(key).policy, given) if given else None
        record = client.key_rotate(key, policy=policy, renew=renew, progress=report)
    show_record(record, as_json)


def _changed(policy: KeyPolicy, given: dict[str, int]) -> KeyPolicy:
    from dataclasses import replace

    return replace(policy, **given)  # type: ignore[arg-type]


@app.command()
def repair(
    key: KeyArgument,
    custodian: Annotated[str, typer.Option(help="The custodian that lacks its seeds.")],
    epoch: Annotated[int, typer.Option(min=0, help="The epoch; 0 is the newest.")] = 0,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="It is another than the one the epoch was certified with: each custodian's operator approves it.",
        ),
    ] = False,
    operator_key: _OperatorKeys = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Have a custodian get its seeds back from those who hold them, each checked against the epoch's certificate."""
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        ended = client.key_repair(
            key, custodian, epoch=epoch, replace=replace, operator_keys=operator_key or (), progress=report
        )
    _show_ended(ended, as_json)


@app.command()
def destroy(
    key: KeyArgument,
    epoch: Annotated[int, typer.Option(min=1, help="The epoch whose seeds are erased.")],
    operator_key: _OperatorKeys = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Erase an epoch's seeds at every custodian, for ever. Each custodian's operator approves it first."""
    if not yes:
        if not sys.stdin.isatty():
            raise RefusedError(Reason.APPROVAL, "nobody is at a terminal to confirm", next_step="Use --yes")
        typer.confirm(
            f"What was encrypted under {key} epoch {epoch} can never be read again. Destroy it?", abort=True, err=True
        )
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        ended = client.key_destroy(key, epoch, operator_keys=operator_key or (), progress=report)
    _show_ended(ended, as_json)


@app.command()
def ceremonies(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="Of this key only.", show_default=False)] = "",
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """List ceremonies: where each is, whose operators it waits for, what stopped it, at which custodian and why."""
    with output.client_of(profile, passphrase_file) as client:
        records = client.ceremonies(key)
    if as_json:
        output.emit({"ceremonies": [each.as_dict() for each in records]})
    elif records:
        show_ceremonies(records)
    else:
        output.line("No ceremony yet.")


@app.command()
def cancel(
    ceremony: Annotated[str, typer.Argument(metavar="CEREMONY", help="The ceremony's id.")],
    why: Annotated[str, typer.Option(help="For the custodians' operators.")] = "",
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Give a ceremony up. What was there before stays as it was."""
    with output.client_of(profile, passphrase_file) as client:
        record = client.ceremony_cancel(ceremony, why)
    if as_json:
        output.emit(record.as_dict())
    else:
        show_ceremonies([record])


def _show_ended(ended: Ended, as_json: bool) -> None:
    if as_json:
        output.emit(ended.as_dict())
        return
    rows: list[tuple[str, object]] = [
        ("ceremony", f"{ended.ceremony_id}, to {ended.kind}"),
        ("key", f"{ended.key_id} epoch {ended.epoch}"),
        ("receipts of", ", ".join(ended.receipts)),
    ]
    rows += [("LIED", f"{name} gave {count} wrong seeds") for name, count in sorted(ended.wrong.items())]
    if ended.note:
        rows.append(("note", ended.note))
    output.table("", ("", ""), rows)
