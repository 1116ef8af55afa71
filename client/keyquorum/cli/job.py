"""``keyquorum job``: submit a folder, see how it does, fetch and decrypt what it left."""

from __future__ import annotations

import logging
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars
from keyquorum_core.errors import printable

if TYPE_CHECKING:
    from keyquorum.jobs import Job
    from keyquorum.results import Result
    from keyquorum.submission import SubmittedJob
    from keyquorum.sync import Client

__all__ = ["app", "moment"]

app = typer.Typer(name="job", help="Jobs.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write the decrypted result to.")]
TimeoutOption = Annotated[float | None, typer.Option(help="Wait at most this many seconds for the job to end.")]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment(text: str | None, now: float) -> int | None:
    """A time from the command line in unix seconds: ISO 8601, or 90s, 30m, 12h, 2d from ``now``."""
    if text is None:
        return None
    relative = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if relative:
        return int(now) + int(relative[1]) * _UNITS[relative[2]]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a time (2026-01-31T12:00:00Z) nor a span (12h)") from None
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The job's folder.")],
    key: Annotated[str, typer.Option(help="The key to run it under.")],
    classification: Annotated[str | None, typer.Option(help="Data classification.")] = None,
    region: Annotated[list[str] | None, typer.Option(help="A region where it may run; repeat for more.")] = None,
    export_control: Annotated[str | None, typer.Option(help="Export control class, such as 5A002.")] = None,
    evidence: Annotated[list[str] | None, typer.Option(help="Evidence the worker must have; repeat for more.")] = None,
    purpose: Annotated[list[str] | None, typer.Option(help="What the job is for; repeat for more.")] = None,
    provenance: Annotated[
        list[Path] | None, typer.Option(help="Signed statement of how a file of the folder was prepared; repeatable.")
    ] = None,
    not_before: Annotated[str | None, typer.Option(help="Earliest start: ISO 8601, or a span such as 1h.")] = None,
    not_after: Annotated[str | None, typer.Option(help="Latest release of its key: ISO 8601, or 12h, 2d.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result.")] = False,
    out: OutOption = None,
    timeout: TimeoutOption = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Sign, encrypt and submit a folder. Its job.toml gives what the options don't. --out implies --wait."""
    warnings = logging.getLogger("keyquorum")
    if not warnings.handlers:
        warnings.addHandler(logging.NullHandler())  # what it warns of is shown below, in full
    now = time.time()
    with output.client_of(profile, passphrase_file) as client:
        with bars() as report:
            submitted = client.submit(
                folder,
                key=key,
                classification=classification,
                regions=region,
                export_control=export_control,
                evidence=evidence,
                purposes=purpose,
                provenance=provenance or (),
                not_before=moment(not_before, now),
                not_after=moment(not_after, now),
                progress=report,
            )
        _warn(submitted)
        if not (wait or out is not None):
            output.emit(submitted.as_dict()) if as_json else typer.echo(submitted.id)
            return
        if not as_json:
            output.note(f"job {submitted.id}")
        finished = _finish(client, submitted.id, out, timeout, as_json)
    if as_json:
        output.emit({**submitted.as_dict(), "state": "completed", "result": finished})


def _warn(submitted: SubmittedJob) -> None:
    if not submitted.confirmed:
        output.note(
            "warning: the job's key is NOT CONFIRMED: some seed was reported by one custodian only. If that one lied, "
            "no worker will be able to use the key; submit again when more custodians answer."
        )
    for name in submitted.blamed:
        output.note(f"warning: custodian {name} gave wrong contributions")
    for name in submitted.suspected:
        output.note(f"warning: custodian {name} may have given wrong contributions")
    for name, why in sorted(submitted.refused.items()):
        output.note(f"warning: custodian {name} did not contribute: {why}")


@app.command()
def status(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print events until the job is over.")] = False,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show where a job is."""
    with output.client_of(profile, passphrase_file) as client:
        if follow:
            for event in client.watch(job):
                if not as_json:
                    why = f"  {event.error}" if event.error is not None else ""
                    output.line(f"{output.when(event.time)}  {event.state:<10}  {event.detail}{why}")
        found = client.job(job)
    if as_json:
        output.emit(found.as_dict())
    elif not follow:
        _show_job(found)


def _show_job(job: Job) -> None:
    rows = [
        ("job", job.id),
        ("state", job.state),
        ("key", f"{job.key_id}, epoch {job.epoch}"),
        ("classification", job.manifest.classification),
        ("regions", ", ".join(job.manifest.regions)),
        ("worker", job.worker or "-"),
        ("created", output.when(job.created_at)),
        ("updated", output.when(job.updated_at)),
        ("may run until", output.when(job.manifest.not_after)),
    ]
    if job.error is not None:
        rows.append(("error", str(job.error)))
    output.table("", ("", ""), rows)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 50,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """List your jobs, latest first."""
    with output.client_of(profile, passphrase_file) as client:
        found = client.jobs(limit=limit)
    if as_json:
        output.emit({"jobs": [each.as_dict() for each in found]})
        return
    output.table(
        "",
        ("job", "state", "key", "worker", "updated"),
        [(each.id, each.state, each.key_id, each.worker or "-", output.when(each.updated_at)) for each in found],
    )


@app.command()
def cancel(
    job: JobArgument,
    why: Annotated[str, typer.Option(help="A reason, kept with the job.")] = "",
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Stop a job that isn't over."""
    with output.client_of(profile, passphrase_file) as client:
        found = client.cancel(job, why=why)
    output.emit(found.as_dict()) if as_json else typer.echo(f"{found.id} {found.state}")


@app.command()
def result(
    job: JobArgument,
    out: OutOption = None,
    timeout: TimeoutOption = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Wait for a job's end, then fetch, verify and decrypt its result."""
    with output.client_of(profile, passphrase_file) as client:
        finished = _finish(client, job, out, timeout, as_json)
    if as_json:
        output.emit(finished)


def _finish(client: Client, job: str, out: Path | None, timeout: float | None, as_json: bool) -> dict[str, object]:
    from keyquorum.results import JobFailedError

    try:
        with bars() as report:
            found = client.result(job, timeout=timeout, progress=report)
    except JobFailedError as error:
        with error.result as failed:
            _warn_of_development(failed)
            if out is not None:
                failed.save(out)
            elif not as_json:
                output.note(failed.log[-4096:].decode("utf-8", "replace").rstrip())
        raise
    with found:
        _warn_of_development(found)
        saved = [str(path) for path in found.save(out)] if out is not None else []
        if not as_json:
            _show_result(found, saved)
        return {
            "job_id": found.job_id,
            "outcome": found.statement.outcome,
            "exit_code": found.exit_code,
            "custodians": list(found.custodians),
            "evidence": list(found.evidence),
            "development": found.development,
            "confirmed": found.confirmed,
            "doubts": found.doubts,
            "started_at": found.statement.started_at,
            "finished_at": found.statement.finished_at,
            "files": {name: found.files.size(name) for name in found.files},
            "saved": saved,
        }


def _warn_of_development(found: Result) -> None:
    if found.development:
        output.note(
            "WARNING: this job ran on DEVELOPMENT HARDWARE. Its evidence proves nothing: whoever runs the worker can "
            "have read the data and the result, and can have changed the result."
        )


def _show_result(found: Result, saved: list[str]) -> None:
    rows: list[tuple[str, object]] = [
        ("job", found.job_id),
        ("outcome", f"{found.statement.outcome}, exit code {found.exit_code}"),
        ("ran", f"{output.when(found.statement.started_at)} to {output.when(found.statement.finished_at)}"),
        ("key released by", ", ".join(found.custodians)),
        ("worker's evidence", ", ".join(found.evidence)),
    ]
    rows += [("file", f"{name} ({found.files.size(name)} bytes)") for name in found.files]
    rows += [("doubt", f"{name}: {why}") for name, why in found.doubts.items()]
    output.table("", ("", ""), rows)
    if saved:
        output.note(f"written: {', '.join(saved)}")
    else:
        output.note("give --out DIR to write the files")


@app.command()
def logs(
    job: JobArgument,
    timeout: TimeoutOption = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Print the decrypted log of a job that is over, whether it succeeded or failed.

    Byte for byte to a file or pipe; on a terminal, control characters are shown as U+FFFD.
    """
    from keyquorum.results import JobFailedError

    with output.client_of(profile, passphrase_file) as client, bars() as report:
        try:
            found = client.result(job, timeout=timeout, progress=report)
        except JobFailedError as error:
            found = error.result
    with found:
        if as_json:
            output.emit({"job_id": found.job_id, "log": found.log.decode("utf-8", "replace")})
        else:
            _print_log(found.log)


@app.command()
def telemetry(
    job: JobArgument,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show what the worker says of itself: progress, resources, renewals of its lease, and how it ended or wiped.

    Each record is of a batch that the worker signed with its attested key, in a chain without a gap; also while the
    job runs, and after one that no worker's statement ended.
    """
    with output.client_of(profile, passphrase_file) as client:
        found = client.telemetry(job)
    if as_json:
        output.emit(found.as_dict())
        return
    output.table(
        "",
        ("when", "event", "values", "batch", "logged"),
        [
            (
                output.when(record.time),
                record.event,
                ", ".join(f"{name} {value}" for name, value in sorted(record.values.items())),
                record.batch,
                "yes" if record.logged else "not yet",
            )
            for record in found.records
        ],
    )
    end = "complete" if found.complete else "more may follow"
    typer.echo(f"{found.batches} batches by worker key {found.worker_sha256[:16]}, {end}")
    if found.reason:
        typer.echo(f"The worker gave the key up and wiped: {found.reason}")


def _print_log(log: bytes) -> None:
    """As it is to a file or pipe; to a terminal without what would drive it: the job's programs wrote it, not we."""
    if not sys.stdout.isatty():
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()
        return
    text = log.decode("utf-8", "replace").replace("\r\n", "\n")
    typer.echo(printable(text), nl=not text.endswith("\n"))
