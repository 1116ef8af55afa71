"""``keyquorum-custodian backup`` and ``restore``."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyquorum_core.errors import MalformedError, Reason, RefusedError, printable
from keyquorum_custodian.cli_parts import Directory, Json, PassphraseFile, passphrase_from
from keyquorum_custodian.cli_sealing import (
    Module,
    PinFile,
    Sealing,
    ShareDirectory,
    Shares,
    TokenLabel,
    choose_wrapping,
    say_void,
)
from keyquorum_protos.wire.refusals import refusals

if TYPE_CHECKING:
    from keyquorum_core.backup import Statement

__all__ = ["backup_app", "restore"]

backup_app = typer.Typer(
    help="Everything a custodian knows, encrypted to recipients whose keys are kept away from it.",
    invoke_without_command=True,
)

_RecipientKey = Annotated[Path, typer.Option(help="A recipient's private key file, as `backup keygen` made it.")]
_RecipientPassphrase = Annotated[
    Path | None,
    typer.Option(
        help="A file whose first line is that key's passphrase. Otherwise KEYQUORUM_RECIPIENT_PASSPHRASE, or a prompt."
    ),
]
_Operators = Annotated[
    Path, typer.Option(help="operators.json, from the operators themselves: who may name the cluster's custodians.")
]


@backup_app.callback()
def backup(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Option("--dir", help="The custodian's folder.")] = None,
    to: Annotated[
        list[Path] | None, typer.Option(help="A recipient's public file, FILE.pub; once for each, at most 16.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the backup; never replaced.")] = None,
    offline: Annotated[bool, typer.Option(help="Open the keystore of a custodian that isn't running.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Back a custodian up: seeds, certificates, documents, what it saw of the ledger, releases, revocations.

    A running custodian makes it while it goes on serving. Each recipient's key alone opens it. The custodian's own keys
    are not in it: what is restored from it is another custodian in the roster.
    """
    if context.invoked_subcommand is not None:
        return
    for name, value in (("--dir", directory), ("--to", to), ("--out", out)):
        if not value:
            raise typer.BadParameter("is needed", param_hint=name)
    import asyncio

    from keyquorum_custodian.backup_files import backup_running, backup_stopped, read_public
    from keyquorum_protos.wire.files import read_bytes
    from keyquorum_protos.wire.process import harden

    assert directory is not None and to is not None and out is not None  # noqa: S101, PT018 - just looked at
    with refusals(as_json):
        recipients = [read_public(read_bytes(path, "the recipient's public file", 2 << 20)) for path in to]
        if len(set(recipients)) != len(recipients):
            raise MalformedError(Reason.MALFORMED, "a recipient is named twice")
        if offline:
            harden()
            made = backup_stopped(directory, passphrase_from(passphrase_file), recipients, out, int(time.time()))
        else:
            made = asyncio.run(backup_running(directory, recipients, out))
        _show(made, as_json, {"file": str(out), "bytes": out.stat().st_size})


@backup_app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="The private key file to make; FILE.pub is made beside it.")],
    suite: Annotated[str, typer.Option(help="HPKE suite.")] = "MLKEM768_X25519",
    recipient_passphrase_file: _RecipientPassphrase = None,
    as_json: Json = False,
) -> None:
    """Make a recipient's key. FILE and its passphrase stay offline, away from custodians; FILE.pub goes to them."""
    from keyquorum_custodian.backup_files import new_recipient
    from keyquorum_protos.wire.process import harden

    with refusals(as_json):
        harden()
        name = new_recipient(file, _recipient_passphrase(recipient_passphrase_file, confirm=True), suite)
        if as_json:
            typer.echo(json.dumps({"file": str(file), "public": f"{file}.pub", "fingerprint": name}))
        else:
            typer.echo(f"{file} is private: keep it offline, with its passphrase elsewhere.")
            typer.echo(f"{file}.pub is for `keyquorum-custodian backup --to`; fingerprint {name}")


@backup_app.command("verify")
def verify_backup(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    recipient_key: Annotated[
        Path | None, typer.Option(help="A recipient's private key file; without it only digests and form are checked.")
    ] = None,
    operators: Annotated[
        Path | None, typer.Option(help="operators.json, from the operators themselves: who may name custodians.")
    ] = None,
    roster: Annotated[
        Path | None, typer.Option(help="Without a recipient's key: the roster it was made under, to check who signed.")
    ] = None,
    recipient_passphrase_file: _RecipientPassphrase = None,
    as_json: Json = False,
) -> None:
    """Check a backup without restoring it: every seed against its certificate, certificates against rosters, the
    ledger's checkpoint, the custodian's signature, and that nothing is missing. Writes nothing."""
    from keyquorum_custodian.backup_files import inspect, load_recipient, verify
    from keyquorum_custodian.trust import load_operators
    from keyquorum_protos.wire.files import read_bytes
    from keyquorum_protos.wire.process import harden

    with refusals(as_json):
        trusted = load_operators(operators) if operators is not None else None
        if recipient_key is None:
            envelope = read_bytes(roster, "the roster", 16 << 20) if roster is not None else None
            statement, signed = inspect(file, envelope, trusted)
            said = "form, digests and signature" if signed else "form and digests only: who signed it is not known"
            _show(statement, as_json, {"checked": said, "seeds_checked": False, "signature_checked": signed})
            return
        harden()
        found = verify(file, load_recipient(recipient_key, _recipient_passphrase(recipient_passphrase_file)), trusted)
        whose = "" if found.operators_checked else "; that its roster is the cluster's nobody vouched for (--operators)"
        _show(
            found.statement,
            as_json,
            {
                "checked": f"every seed, certificate, document and checkpoint{whose}",
                "seeds_checked": True,
                "signature_checked": True,
                "operators_checked": found.operators_checked,
            },
        )


def restore(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    directory: Directory,
    recipient_key: _RecipientKey,
    operators: _Operators,
    listen: Annotated[str, typer.Option(help="host:port for coordinators; by default as before.")] = "",
    address: Annotated[str, typer.Option(help="host:port that others reach it at; by default as --listen.")] = "",
    admin_listen: Annotated[str, typer.Option(help="host:port for its operator; by default as before.")] = "",
    metrics_listen: Annotated[str, typer.Option(help="host:port for Prometheus; by default as before.")] = "",
    witness_listen: Annotated[str, typer.Option(help="host:port for add-checkpoint; by default as before.")] = "",
    suite: Annotated[str, typer.Option(help="HPKE suite of the custodian's own key.")] = "MLKEM768_X25519",
    sealing: Sealing = "passphrase",
    passphrase_file: PassphraseFile = None,
    shares: Shares = "",
    share_dir: ShareDirectory = None,
    token: TokenLabel = "",
    module: Module = "",
    pin_file: PinFile = None,
    recipient_passphrase_file: _RecipientPassphrase = None,
    as_json: Json = False,
) -> None:
    """Make a new custodian's folder from a backup: new identity and keys, the old one's seeds and memory.

    All of the backup is checked; then nothing is missing, or nothing is made. The operators put the new card in the
    old one's place (`keyquorum roster change --card`). It serves once you approved the restore and its peers testified
    that nothing in it is old.
    """
    from keyquorum_custodian.backup_files import load_recipient, opened, verify
    from keyquorum_custodian.config import check_module
    from keyquorum_custodian.init import CARD
    from keyquorum_custodian.restoring import restore as make
    from keyquorum_custodian.trust import load_operators
    from keyquorum_protos.wire.files import read_bytes
    from keyquorum_protos.wire.process import harden

    changes = {
        name: value
        for name, value in (
            ("listen", listen),
            ("admin_listen", admin_listen),
            ("metrics_listen", metrics_listen),
            ("witness_listen", witness_listen),
            ("pkcs11_module", module),
        )
        if value
    }
    with refusals(as_json):
        harden()
        check_module(module)
        key = load_recipient(recipient_key, _recipient_passphrase(recipient_passphrase_file))
        trusted = load_operators(operators)
        # First, so that officers write down no shares, and no module makes a key, for a backup that isn't good.
        custodian = verify(file, key, trusted).statement.custodian
        wrapping = choose_wrapping(
            sealing,
            custodian,
            passphrase_file=passphrase_file,
            shares=shares,
            share_dir=share_dir,
            token=token,
            module=module,
            pin_file=pin_file,
        )
        try:
            with opened(file) as source:
                made = make(
                    source,
                    key,
                    directory.absolute(),
                    wrapping,
                    trusted,
                    read_bytes(operators, "operators file"),
                    now=int(time.time()),
                    changes=changes,
                    address=address,
                    suite=suite,
                )
        except BaseException:
            say_void(sealing)
            raise
        fingerprint = made.card.custodian.identity.fingerprint
        card = str(made.config.path(CARD))
        if as_json:
            out = {
                "custodian": made.config.id,
                "directory": str(made.config.directory),
                "fingerprint": fingerprint,
                "card": card,
                "request": made.request_id,
                **_facts(made.checked.statement),
            }
            typer.echo(json.dumps(out))
            return
        typer.echo(f"Custodian {made.config.id} restored in {made.config.directory}, under new keys")
        typer.echo(f"  reached at   {made.card.custodian.address}")
        typer.echo(f"  fingerprint  {fingerprint}")
        typer.echo(_text(made.checked.statement))
        typer.echo(f"Give {card} to the operators for the next roster; read them the fingerprint by another channel.")
        typer.echo(f"With that roster in place: serve, then `keyquorum-custodian approve {made.request_id}`.")


def _recipient_passphrase(path: Path | None, *, confirm: bool = False) -> str:
    if path is not None:
        return passphrase_from(path)
    found = os.environ.pop("KEYQUORUM_RECIPIENT_PASSPHRASE", None)
    if found is not None:
        return found
    if sys.stdin.isatty():
        return str(
            typer.prompt("The recipient key's passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
        )
    raise RefusedError(
        Reason.PASSPHRASE,
        "no passphrase of the recipient's key was given",
        next_step="Set KEYQUORUM_RECIPIENT_PASSPHRASE, or use --recipient-passphrase-file, or run at a terminal.",
    )


def _facts(statement: Statement) -> dict[str, Any]:
    return {
        "backup_id": statement.backup_id,
        "sequence": statement.sequence,
        "cluster": statement.cluster,
        "custodian": statement.custodian,
        "created_at": statement.created_at,
        "roster_version": statement.roster_version,
        "ledger_size": statement.ledger_size,
        "epochs": [each.as_json() for each in statement.epochs],
    }


def _text(statement: Statement) -> str:
    made = datetime.datetime.fromtimestamp(statement.created_at, datetime.UTC).isoformat()
    lines = [
        f"  backup       {statement.backup_id}, number {statement.sequence} of custodian {statement.custodian} of"
        f" {statement.cluster}, made {made}",
        f"  roster       version {statement.roster_version}, {statement.roster_digest}",
        f"  ledger       {statement.ledger_size} leaves",
    ]
    lines += [
        f"  key          {each.key_id} epoch {each.epoch}: {each.state}, "
        + (
            f"{each.seeds} seeds"
            if each.held == "keystore"
            else "NO SEEDS: they are in a token, which gives none out; a repair brings them back"
        )
        for each in statement.epochs
    ]
    return printable("\n".join(lines))


def _show(statement: Statement, as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps({**_facts(statement), **more}))
        return
    typer.echo(_text(statement))
    for name, value in more.items():
        if name in ("file", "bytes", "checked"):
            typer.echo(printable(f"  {name:<12} {value}"))
