"""The ``keyquorum-admission`` command. What it needs is imported when a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from keyquorum_admission.manifests import Verdict
    from keyquorum_core.errors import KeyquorumError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Kubernetes admission: what must attest runs confidentially, pinned and without plain keys, or not at all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Option("--config", help="admission.toml.", dir_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _print_json(value: object) -> None:
    print(json.dumps(value), flush=True)


def _refuse(error: KeyquorumError, as_json: bool) -> int:
    if as_json:
        _print_json({"error": error.as_dict()})
    else:
        print(error.for_people(), file=sys.stderr)
    return 1


@app.command()
def serve(
    config: Config,
    level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    as_json: AsJson = False,
) -> None:
    """Serve the webhook over HTTPS until SIGTERM, then finish what is being answered."""
    if level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter("one of debug, info, warning, error", param_hint="--log-level")
    import asyncio

    from keyquorum_admission import logs, server
    from keyquorum_admission.config import load_config
    from keyquorum_core.errors import KeyquorumError

    def ready(url: str) -> None:
        if as_json:
            _print_json({"url": url})
        else:
            print(f"serving {url}", flush=True)

    logs.configure(level)
    try:
        listen, settings = load_config(config)
        asyncio.run(server.serve(listen, settings, ready))
    except KeyquorumError as error:
        raise typer.Exit(_refuse(error, as_json)) from None


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Manifests, YAML or JSON.", dir_okay=False)],
    config: Config,
    namespace_requires: Annotated[
        bool, typer.Option("--namespace-requires", help="Judge as in a namespace whose label requires attestation.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Also print each object as the webhook completes it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge manifests as the cluster would: completed, then validated. Exit status 1 when one is refused."""
    from keyquorum_admission.config import load_config, read_file
    from keyquorum_admission.manifests import MAX_MANIFEST, judge_manifest, read_manifests
    from keyquorum_core.errors import KeyquorumError

    found: list[tuple[Path, Verdict]] = []
    try:
        _, settings = load_config(config)
        for path in files:
            documents = read_manifests(read_file(path, str(path), MAX_MANIFEST), str(path))
            found += [(path, judge_manifest(settings, document, namespace_requires)) for document in documents]
    except KeyquorumError as error:
        raise typer.Exit(_refuse(error, as_json)) from None
    refused = any(each.outcome == "refused" for _, each in found)
    if as_json:
        _print_json({"refused": refused, "objects": [_shown(path, each, show) for path, each in found]})
    else:
        for path, each in found:
            _print(path, each, show)
    raise typer.Exit(int(refused))


def _shown(path: Path, verdict: Verdict, show: bool) -> dict[str, Any]:
    completed = {"completed": verdict.completed} if show and verdict.completed is not None else {}
    return {"file": str(path), **verdict.as_dict(), **completed}


def _print(path: Path, verdict: Verdict, show: bool) -> None:
    from keyquorum_core.errors import printable

    print(printable(f"{verdict.outcome:<12}  {verdict.kind or 'object'} {verdict.name}  {path}"))
    for finding in verdict.findings:
        print(printable(f"    {finding}"))
    if show and verdict.completed is not None:
        import yaml

        print("---\n" + yaml.safe_dump(verdict.completed, sort_keys=False), end="")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
