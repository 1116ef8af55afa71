"""The ``keyquorum-coordinator`` command. Exit status: 0 done, 1 refused (with the reason code), 2 usage."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

# Before grpc is imported: its C core would write to standard error by itself.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer

from keyquorum_coordinator import ledger_cli, worker_cli
from keyquorum_coordinator.command import Directory, Json
from keyquorum_core.errors import Reason, UnavailableError, printable
from keyquorum_protos.wire.refusals import refusals, refuse

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A keyquorum coordinator: keeps jobs and ciphertext, and asks the custodians. It holds no key.",
)

policy_app = typer.Typer(no_args_is_help=True, help="What this coordinator takes jobs in by: its policies and lists.")
app.add_typer(policy_app, name="policy")
app.add_typer(ledger_cli.app, name="ledger")
app.add_typer(worker_cli.app, name="worker")


@app.command()
def init(
    directory: Directory,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    listen: Annotated[str, typer.Option(help="host:port for callers; port 0 chooses a free one now.")],
    name: Annotated[str, typer.Option(help="This coordinator's name in its certificate.")] = "main",
    metrics_listen: Annotated[str, typer.Option(help="host:port for Prometheus; empty serves none.")] = "",
    ledger_listen: Annotated[str, typer.Option(help="host:port for the ledger's readers; empty serves none.")] = "",
    ledger_origin: Annotated[str, typer.Option(help="The log's name, as a URL without scheme.")] = "",
    as_json: Json = False,
) -> None:
    """Make a new coordinator: TLS identity, the authority for its callers, an empty ledger with its keys,
    configuration. Never overwrites."""
    from keyquorum_coordinator.config import CoordinatorConfig
    from keyquorum_coordinator.init import initialise
    from keyquorum_coordinator.log_key import LOG_VKEY, log_origin
    from keyquorum_core.ledger.log_keys import LogSigner

    with refusals(as_json):
        signer = LogSigner.generate(ledger_origin or log_origin(cluster))
        config = initialise(
            CoordinatorConfig(directory.absolute(), name, cluster, listen, metrics_listen, ledger_listen=ledger_listen),
            now=int(time.time()),
            signer=signer,
        )
        out = {
            "name": name,
            "cluster": cluster,
            "directory": str(config.directory),
            "address": config.listen,
            "tls_certificate": str(config.path(config.tls_certificate)),
            "clients_ca": str(config.path(config.clients_ca)),
            "ledger": config.ledger_listen,
            "log_key": signer.keys.encode(),
        }
        if as_json:
            typer.echo(json.dumps(out))
        else:
            typer.echo(f"Coordinator {name} made in {config.directory}, listening at {config.listen}")
            typer.echo(f"Give the operators for the roster: {out['tls_certificate']}")
            typer.echo(f"  and the ledger's public keys: {config.path(LOG_VKEY)}")
            typer.echo(f"Put their {config.roster} and {config.operators} into the folder, then serve.")


@app.command("issue-cert")
def issue_cert(
    directory: Directory,
    role: Annotated[str, typer.Option(help="owner, worker or operator.")],
    name: Annotated[str, typer.Option(help="The caller's name; an owner's is the one in its manifests.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME-cert.pem and NAME-key.pem.")],
    days: Annotated[int, typer.Option(min=1, max=825, help="How long it is good for.")] = 365,
    as_json: Json = False,
) -> None:
    """Issue a caller's TLS certificate. Never overwrites."""
    from keyquorum_coordinator.init import issue_certificate

    with refusals(as_json):
        uri = issue_certificate(directory, role, name, out, now=int(time.time()), days=days)
        made = {
            "uri": uri,
            "certificate": str(out / f"{name}-cert.pem"),
            "key": str(out / f"{name}-key.pem"),
        }
        typer.echo(json.dumps(made) if as_json else f"{uri}\n  {made['certificate']}\n  {made['key']}")


@app.command("drill-key")
def drill_key(directory: Directory, as_json: Json = False) -> None:
    """Make a drill identity for a coordinator that was set up without one. Never overwrites; serve again then."""
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.drill_key import DRILL_PUBLIC, create_drill_key

    with refusals(as_json):
        config = load_config(directory)
        fingerprint = create_drill_key(config.directory).identity.public.fingerprint
        public = str(config.path(DRILL_PUBLIC))
        if as_json:
            typer.echo(json.dumps({"public": public, "fingerprint": fingerprint}))
        else:
            typer.echo(f"Made with fingerprint {fingerprint}; give custodians' operators and clients: {public}")


@app.command()
def serve(
    directory: Directory,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve until SIGTERM. Checks everything on disk first; prints one line of JSON when it can be reached."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter("must be debug, info, warning or error", param_hint="--log-level")
    import asyncio

    from keyquorum_coordinator import logs
    from keyquorum_coordinator.server import serve as run

    # Its memory is not closed to others as a custodian's is: it holds no secret of anybody's, and can be looked into.
    with refusals():
        logs.configure(log_level)
        asyncio.run(run(directory))


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """Ask the running coordinator how it and its custodians are."""
    import asyncio

    from keyquorum_coordinator.status import fetch_status

    with refusals(as_json):
        found = asyncio.run(fetch_status(directory))
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _show(found)


@policy_app.command("install")
def policy_install(
    file: Annotated[Path, typer.Argument(help="A bundle or list, as `keyquorum policy sign` or `sign-list` wrote it.")],
    directory: Directory,
    as_json: Json = False,
) -> None:
    """Verify a signed policy bundle, export list or sanctions list, and leave it where the coordinator looks for it."""
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.policy import install_document
    from keyquorum_protos.wire.files import read_bytes

    with refusals(as_json):
        left = install_document(load_config(directory), read_bytes(file, "the document"))
        out = {"kind": left.kind, "version": left.version, "digest": left.digest}
        typer.echo(json.dumps(out) if as_json else f"Installed {left.name}, {left.digest[:16]}")


def _show(found: dict[str, Any]) -> None:
    typer.echo(f"coordinator {found['name']} of {found['cluster']} at {found['address']}, version {found['version']}")
    for each in found["custodians"]:
        state = "reachable" if each["reachable"] else "NOT reachable"
        line = (
            f"  {each['custodian']:<16} {each['jurisdiction']}  {state}, circuit {each['circuit']}, "
            f"{each['latency_ms']:.1f} ms (p95 {each['latency_p95_ms']:.1f}), skew {each['clock_skew_ms']} ms"
            + (f"; {each['last_error']}" if each["last_error"] else "")
        )
        typer.echo(printable(line).replace("\n", " "))


def main() -> None:
    """Console entry point."""
    try:
        app()
    except OSError as error:
        refuse(
            UnavailableError(Reason.STORAGE, "a file could not be used", actual=error.strerror), "--json" in sys.argv
        )
