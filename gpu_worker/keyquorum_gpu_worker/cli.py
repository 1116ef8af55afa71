"""The ``keyquorum-worker`` command. What it needs is imported when a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyquorum_core.errors import KeyquorumError
from keyquorum_gpu_worker import tpm_commands
from keyquorum_protos.wire.refusals import refuse

if TYPE_CHECKING:
    from keyquorum_gpu_worker.ending import JobEnd

__all__ = ["app", "main"]

app = typer.Typer(
    help="The GPU worker: runs one job after another inside an attested enclave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(tpm_commands.app, name="tpm")

Dir = Annotated[Path, typer.Option("--dir", help="Folder with worker.toml and what it names.", file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _print_json(value: object) -> None:
    print(json.dumps(value), flush=True)


@app.command()
def run(
    directory: Dir,
    job_id: Annotated[str, typer.Argument(help="Do this job and end; without it, take jobs from the queue.")] = "",
    once: Annotated[bool, typer.Option("--once", help="End after one job.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Take jobs from the queue (the default).")] = False,
    as_json: AsJson = False,
) -> None:
    """Do one job, or jobs as they come. Ends with status 0 when the (last) job completed, 1 when it did not."""
    if job_id and queue:
        raise typer.BadParameter("a job id and --queue exclude each other")
    import asyncio

    from keyquorum_gpu_worker import logs
    from keyquorum_gpu_worker.config import load_config
    from keyquorum_gpu_worker.worker import Worker
    from keyquorum_protos.wire.process import harden

    logs.configure()
    try:
        harden()
        worker = Worker(load_config(directory))
        _print_json(worker.prepare())
        code = asyncio.run(_run(worker, job_id, once or bool(job_id), as_json))
    except KeyquorumError as error:
        refuse(error, as_json)
    raise typer.Exit(code)


async def _run(worker: Any, job_id: str, once: bool, as_json: bool) -> int:
    """SIGTERM and SIGINT cancel what is under way; its plaintext is removed before this returns."""
    import asyncio
    import signal

    failed = False

    def ended(end: JobEnd) -> None:
        nonlocal failed
        failed = end.outcome != "completed"
        if as_json:
            _print_json(end.as_dict())

    async def work() -> None:
        if once:
            ended(await worker.one(job_id))
        else:
            await worker.serve(ended)

    task = asyncio.create_task(work())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        from keyquorum_gpu_worker.logs import logger

        logger().info("asked to end; plaintext and keys are gone")
        return 0 if not once else 1
    finally:
        await worker.close()
    return 1 if failed else 0


@app.command()
def attest(
    directory: Dir,
    nonce: Annotated[
        list[str] | None,
        typer.Option(metavar="CUSTODIAN:WINDOW:HEX", help="A nonce to answer; without one, of our own making."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for document.json and each item's files, as `keyquorum attest verify` reads them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make and show the evidence that this machine gives: over nonces of custodians, or one that nobody accepts."""
    try:
        from keyquorum_gpu_worker.attest import made_document, parse_nonce, shown, write_files
        from keyquorum_gpu_worker.config import load_config, load_sources

        sources = load_sources(load_config(directory))
        document = made_document(sources, [parse_nonce(each) for each in nonce or []])
        found = shown(document, development=sources.development)
        written = [] if out is None else write_files(document, out)
    except KeyquorumError as error:
        refuse(error, as_json)
    if as_json:
        _print_json(found | {"files": [str(path) for path in written]})
        return
    _print_evidence(found)
    for path in written:
        print(f"{'written':>16}  {path}")


def _print_evidence(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name != "items":
            print(f"{name:>16}  {', '.join(value) if isinstance(value, list) else value}")
    for item in found["items"]:
        print()
        for name, value in item.items():
            if name not in ("evidence", "endorsements"):
                print(f"{name:>16}  {str(value)[:160]}")
        print(f"{'endorsements':>16}  {len(item['endorsements'])}")


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


if __name__ == "__main__":
    main()
