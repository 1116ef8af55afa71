"""``keyquorum ledger``: read the transparency log and believe none of it before it is verified."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import auditor, output
from keyquorum.cli.bars import bars
from keyquorum_core.errors import KeyquorumError

if TYPE_CHECKING:
    from keyquorum_core.ledger.log_keys import SignedCheckpoint
    from keyquorum_core.ledger.log_trust import LogTrust

__all__ = ["app"]

app = typer.Typer(
    name="ledger",
    help="The ledger: which keys were released, verified from scratch with nothing but the roster.",
    no_args_is_help=True,
)

MaxAgeOption = Annotated[
    int | None,
    typer.Option("--max-age", metavar="SECONDS", min=1, help="Refuse cosignatures older than this. Default: any age."),
]


def _oldest(max_age: int | None) -> int:
    return 0 if max_age is None else int(time.time()) - max_age


@app.command()
def checkpoint(
    out: Annotated[Path | None, typer.Option(help="Also keep the signed checkpoint in this file.")] = None,
    max_age: MaxAgeOption = None,
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Fetch the latest checkpoint; verify the log's two signatures and a quorum's cosignatures. Reads no leaf."""
    from keyquorum.atomic import replace_file
    from keyquorum.ledger.verification import latest_checkpoint

    who = auditor.auditor_of(profile, roster, operators, roster_sha256)
    oldest = _oldest(max_age)
    latest = auditor.read_log(
        who, log, ca, lambda source: latest_checkpoint(source, who.trust, oldest=oldest, patience=wait)
    )
    if out is not None:
        replace_file(out, latest.signed.encode())
    if as_json:
        output.emit(auditor.checkpoint_facts(latest))
    else:
        output.table("", ("", ""), auditor.checkpoint_rows(latest))


@app.command()
def verify(
    since: Annotated[
        Path | None,
        typer.Option(help="A signed checkpoint that was verified before: read only what was added, and that it was."),
    ] = None,
    proof: Annotated[
        list[Path] | None,
        typer.Option(help="Verify this .tlog-proof file instead of the log, which is not read; repeat for more."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the checkpoint in this file once all is verified: for the next --since.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Judge roster and cosignatures as of then, for copies of old logs."),
    ] = None,
    max_age: MaxAgeOption = None,
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Verify the whole log: every leaf hashed, every tile recomputed, the root that of the cosigned checkpoint.

    With --proof verify single leaves, offline.
    """
    from keyquorum.atomic import replace_file
    from keyquorum.ledger.verification import verify_log

    now = int(time.time())
    moment = now if at is None else auditor.moment(at, now, "--at")
    who = auditor.auditor_of(profile, roster, operators, roster_sha256, moment)
    if proof:
        if since is not None or save is not None or max_age is not None:
            raise typer.BadParameter("--proof goes without --since, --save and --max-age")
        _verify_proofs(who.trust, proof, moment, as_json)
        return
    past = None if since is None else _saved(who.trust, since)
    oldest, started = 0 if max_age is None else moment - max_age, time.monotonic()
    with bars() as report:
        done = auditor.read_log(
            who,
            log,
            ca,
            lambda source: verify_log(
                source,
                who.trust,
                None if past is None else past.checkpoint,
                now=None if at is None else moment,
                oldest=oldest,
                progress=report,
                patience=wait,
            ),
        )
    if save is not None:
        replace_file(save, done.latest.signed.encode())
    seconds = time.monotonic() - started
    if as_json:
        facts = {"verified": True, "first_leaf": done.begin, "leaves_read": done.size - done.begin}
        output.emit({**auditor.checkpoint_facts(done.latest), **facts, "seconds": round(seconds, 3)})
        return
    read = f"{done.size - done.begin} leaves" + (f", after the {done.begin} of {since}" if done.begin else "")
    output.table("", ("", ""), [*auditor.checkpoint_rows(done.latest), ("verified", f"{read}, in {seconds:.1f} s")])


def _verify_proofs(trust: LogTrust, files: list[Path], now: int, as_json: bool) -> None:
    from keyquorum.ledger.proving import verify_proof_file
    from keyquorum_core.ledger.tlog_proof import MAX_TLOG_PROOF
    from keyquorum_protos.wire.files import read_bytes

    found = []
    for path in files:
        data = read_bytes(path, "proof", max_bytes=MAX_TLOG_PROOF)
        try:
            found.append((path, *verify_proof_file(data, trust, now)))
        except KeyquorumError as error:
            error.details["file"] = str(path)
            raise
    if as_json:
        proofs = [
            {
                "file": str(path),
                "index": leaf.index,
                "leaf": leaf.leaf.decode("utf-8", "replace"),
                "size": at.checkpoint.size,
            }
            for path, leaf, at in found
        ]
        output.emit({"verified": True, "proofs": proofs})
        return
    for path, leaf, at in found:
        when = output.when(at.quorum_time)
        output.line(
            f"{path}: leaf {leaf.index} of {at.checkpoint.size}, cosigned by {', '.join(sorted(at.times))}, {when}"
        )
        output.line(f"  {leaf.leaf.decode('utf-8', 'replace')}")


def _saved(trust: LogTrust, path: Path) -> SignedCheckpoint:
    from keyquorum_core.ledger.notes import MAX_NOTE
    from keyquorum_protos.wire.files import read_bytes

    return trust.open(read_bytes(path, "saved checkpoint", max_bytes=MAX_NOTE))


@app.command()
def prove(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the proofs, made if missing. Default: JOB-proofs.", show_default=False),
    ] = None,
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Write a proof file (C2SP tlog-proof) for every leaf about a job, each verified, after verifying the whole log."""
    from keyquorum.ledger.jobs import prove_job
    from keyquorum_core.names import JOB_ID, check

    check(JOB_ID, job, "job id")
    who = auditor.auditor_of(profile, roster, operators, roster_sha256)
    folder = Path(f"{job}-proofs") if out is None else out
    with bars() as report:
        found = auditor.read_log(
            who, log, ca, lambda source: prove_job(source, who.trust, job, folder, progress=report, patience=wait)
        )
    if as_json:
        proofs = [{"index": each.index, "type": each.type, "file": str(each.file)} for each in found.proofs]
        output.emit({**auditor.checkpoint_facts(found.latest), "job_id": job, "proofs": proofs})
        return
    output.table(
        f"Leaves about {job}",
        ("leaf", "type", "proof"),
        [(each.index, each.type, each.file) for each in found.proofs],
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the copy goes; made, continued or updated.")],
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Copy the log into a folder, verified on the way, that 'verify --log DIR' reads offline. It can be resumed."""
    from keyquorum.ledger.export import export as copy

    who = auditor.auditor_of(profile, roster, operators, roster_sha256)
    with bars() as report:
        done = auditor.read_log(
            who, log, ca, lambda source: copy(source, who.trust, folder, progress=report, patience=wait)
        )
    if as_json:
        output.emit({**auditor.checkpoint_facts(done.latest), "folder": str(done.folder), "files_fetched": done.files})
        return
    rows = [*auditor.checkpoint_rows(done.latest), ("copied to", done.folder), ("files fetched", done.files)]
    output.table("", ("", ""), rows)
