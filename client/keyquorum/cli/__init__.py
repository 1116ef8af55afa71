"""The ``keyquorum`` command. One file per group of commands; other distributions add theirs by entry point.

An entry point of the group ``keyquorum.commands`` is a callable ``register(app: typer.Typer) -> None``. Exit status: 0
done, 1 refused (with a reason code), 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer

from keyquorum.cli import (
    attest,
    audit,
    ceremony,
    cluster,
    data,
    drill,
    identity,
    job,
    ledger,
    operator,
    output,
    policy,
    prepare,
    quorum,
    revoke,
    roster_change,
    version,
)
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError

__all__ = ["build", "main", "run"]

PLUGINS = "keyquorum.commands"
# Commands of another distribution, which this one knows by name to say what to install.
_ELSEWHERE = {
    "demo": "A whole cluster on this machine runs a real encrypted job, then stops.",
    "up": "The same cluster, kept running; prints the client profile.",
}


def build() -> typer.Typer:
    """The command tree: our own groups, then what is installed beside them."""
    app = typer.Typer(
        name="keyquorum",
        help="Threshold key custody for jobs that leave home.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.add_typer(_jobs())
    app.add_typer(ceremony.app)  # key's, with what operators order after a key was made
    app.add_typer(cluster.app)
    app.add_typer(quorum.app)
    app.add_typer(attest.app)
    app.add_typer(ledger.app)
    app.add_typer(audit.app)
    app.add_typer(identity.app)
    app.add_typer(roster_change.app)  # roster's, with how one becomes the next
    app.add_typer(policy.app)
    app.add_typer(prepare.app)
    app.add_typer(data.app)
    app.add_typer(operator.app)
    app.add_typer(drill.app)
    app.add_typer(revoke.app)
    app.command("version")(version.version)
    broken = ""
    for point in sorted(entry_points(group=PLUGINS), key=lambda each: each.name):
        try:
            point.load()(app)
        except (ImportError, AttributeError) as error:
            broken = f"{point.name} can't be loaded: {error}"
    known = {info.name for info in app.registered_commands}
    for name, text in _ELSEWHERE.items():
        if name not in known:
            app.command(name, help=text, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
                _not_installed(name, broken)
            )
    return app


def _jobs() -> typer.Typer:
    """What owners do with jobs, and the one thing that operators do."""
    if not any(each.name == "revoke" for each in job.app.registered_commands):
        job.app.command("revoke")(revoke.revoke_job)
    return job.app


def _not_installed(name: str, broken: str) -> output.Command:
    def command(context: typer.Context) -> None:
        raise UnavailableError(
            Reason.UNSUPPORTED,
            f"'keyquorum {name}' comes with the distribution keyquorum-local",
            expected="keyquorum-local installed beside keyquorum",
            actual=broken or "not installed",
            next_step="Install it with: python -m pip install keyquorum-local",
        )

    return command


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status. Never raises for what a user can cause."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        build()(given, prog_name="keyquorum")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyquorumError as error:
        output.show_error(error, as_json="--json" in given)
        return 1
    return 0


def main() -> None:
    """The console script."""
    output.take_process()
    sys.exit(run())
