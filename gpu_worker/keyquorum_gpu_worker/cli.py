"""The ``keyquorum-worker`` command. What it needs is imported when a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from keyquorum_core.errors import KeyquorumError
    from keyquorum_gpu_worker.ending import JobEnd

__all__ = ["app", "main"]

app = typer.Typer(
    help="The GPU worker: runs one job after another inside an attested enclave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Dir = Annotated[Path, typer.Option("--dir", help="Folder with worker.toml and what it names.", file_okay=False)]
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

    from keyquorum_core.errors import KeyquorumError
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
        code = _refuse(error, as_json)
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
def attest(directory: Dir, as_json: AsJson = False) -> None:
    """Make and show what evidence this machine can give, over a challenge of its own that nobody else will accept."""
    from keyquorum_core.errors import KeyquorumError

    try:
        shown = _attest(directory)
    except KeyquorumError as error:
        raise typer.Exit(_refuse(error, as_json)) from None
    if as_json:
        _print_json(shown)
        return
    for name, value in shown.items():
        text = ", ".join(str(each)[:64] for each in value) if isinstance(value, list) else str(value)
        print(f"{name:>14}  {text[:96]}")


def _attest(directory: Path) -> dict[str, object]:
    import base64
    import secrets

    from keyquorum_core.attestation.binding import report_data
    from keyquorum_core.attestation.snp_report import parse_report
    from keyquorum_core.sealing import Suite
    from keyquorum_gpu_worker.config import load_config, load_source
    from keyquorum_gpu_worker.keys import JobKeys

    source = load_source(load_config(directory))
    keys = JobKeys.generate(Suite.MLKEM768_X25519)
    challenge = secrets.token_bytes(32)
    bound = report_data(keys.recipient.public, keys.identity.public.to_bytes(), challenge)
    item = source.collect(bound)
    report = parse_report(item.evidence)
    return {
        "type": item.type,
        "source": source.kind,
        "development": source.kind == "development",
        "measurement": report.measurement.hex(),
        "chip_id": report.chip_id.hex(),
        "reported_tcb": report.reported_tcb.hex(),
        "debug": report.debug_allowed,
        "vmpl": report.vmpl,
        "report_data": report.report_data.hex(),
        "bound": report.report_data == bound,
        "evidence": base64.b64encode(item.evidence).decode(),
        "endorsements": [base64.b64encode(each).decode() for each in item.endorsements],
    }


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


if __name__ == "__main__":
    main()
