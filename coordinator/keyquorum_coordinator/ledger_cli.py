"""``keyquorum-coordinator ledger``: make a log's stores, look at them, verify all of it, put a lost checkpoint back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from keyquorum_coordinator.command import Directory, Json
from keyquorum_protos.wire.refusals import refusals

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The coordinator's log: make, look at, verify, restore.")


@app.command()
def init(directory: Directory, as_json: Json = False) -> None:
    """Make an empty log in the places that coordinator.toml names, for the keys in log_key. Never a second one."""
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.ledger.setup import create_ledger
    from keyquorum_coordinator.log_key import load_log_key

    with refusals(as_json):
        config = load_config(directory)
        signer = load_log_key(config.path(config.log_key))
        create_ledger(config, signer, now=int(time.time()))
        made = {"origin": signer.origin, "log_key": signer.keys.encode()}
        typer.echo(json.dumps(made) if as_json else f"log {made['origin']} made, empty\n  {made['log_key']}")


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """The latest checkpoints and what waits for its tiles; also while the coordinator serves."""
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.ledger.setup import open_log

    with refusals(as_json):
        log = open_log(load_config(directory), read_only=True)
        latest, witnessed, unsealed = log.latest, log.witnessed, log.unsealed
        log.close()
        by = {line.name for line in witnessed.note.signatures} if witnessed is not None else set()
        cosigners = sorted(by - {latest.checkpoint.origin})
        found = {
            "origin": latest.checkpoint.origin,
            "size": latest.checkpoint.size,
            "root": latest.checkpoint.root.hex(),
            "signed_at": latest.signed_at,
            "witnessed_size": witnessed.checkpoint.size if witnessed is not None else None,
            "witnessed_by": cosigners,
            "waiting_for_tiles": unsealed,
        }
        if as_json:
            typer.echo(json.dumps(found))
            return
        typer.echo(f"log {found['origin']}: {found['size']} leaves, root {found['root']}")
        typer.echo(f"  signed at {found['signed_at']}; {unsealed} leaves wait for their tiles")
        if witnessed is None:
            typer.echo("  cosigned: never")
        else:
            typer.echo(f"  cosigned: {found['witnessed_size']} leaves, by {', '.join(cosigners)}")


@app.command()
def verify(directory: Directory, as_json: Json = False) -> None:
    """Hash every stored leaf again and compare every tile and the latest root; also while the coordinator serves."""
    from rich.console import Console
    from rich.progress import Progress

    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.ledger.setup import verify_log

    with refusals(as_json), Progress(console=Console(stderr=True), disable=as_json, transient=True) as bar:
        task = bar.add_task("leaves", total=None)
        signed = verify_log(
            load_config(directory), lambda done, total: bar.update(task, completed=done, total=max(total, 1))
        )
        size, root = signed.checkpoint.size, signed.checkpoint.root.hex()
        if as_json:
            typer.echo(json.dumps({"verified": True, "size": size, "root": root}))
        else:
            typer.echo(f"all {size} leaves and their tiles are those of the latest checkpoint, root {root}")


@app.command()
def restore(
    directory: Directory,
    checkpoint: Annotated[Path, typer.Option(help="The newest signed checkpoint that anybody has.")],
    as_json: Json = False,
) -> None:
    """Put a lost ledger_checkpoint back. Only a checkpoint of this log, over the leaves that are there."""
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.ledger.setup import restore_checkpoint
    from keyquorum_core.ledger.notes import MAX_NOTE
    from keyquorum_protos.wire.files import read_bytes

    with refusals(as_json):
        signed = restore_checkpoint(load_config(directory), read_bytes(checkpoint, "the checkpoint", MAX_NOTE))
        size, root = signed.checkpoint.size, signed.checkpoint.root.hex()
        typer.echo(json.dumps({"size": size, "root": root}) if as_json else f"checkpoint of {size} leaves, root {root}")
