"""``keyquorum key``: keys that the custodians generate together, and their certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars
from keyquorum.cli.durations import duration, in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from keyquorum.ceremonies import CeremonyRecord
    from keyquorum.keys import KeyRecord
    from keyquorum_core.key_policy import KeyPolicy

__all__ = ["KeyArgument", "app", "show_ceremonies", "show_epoch", "show_record"]

app = typer.Typer(name="key", help="Keys of the cluster.", no_args_is_help=True)

_LEASE = "1h"
_REATTEST = "30m"
_RETAIN = "30d"

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key's id.")]


@app.command()
def create(
    key: KeyArgument,
    suite: Annotated[
        str, typer.Option(help="Sealing suite: MLKEM768_X25519 or MLKEM1024_P384, with an optional +KEM.")
    ] = "MLKEM768_X25519",
    lease: Annotated[
        str, typer.Option(help="How long a worker may hold a released key without renewing: 5s to 7d.")
    ] = _LEASE,
    reattest: Annotated[
        str, typer.Option(help="How old the evidence may be that a lease is renewed on: at most the lease.")
    ] = _REATTEST,
    rotate_after: Annotated[
        str, typer.Option(help="Rotate by itself once an epoch is this old: never, or 60s and more.")
    ] = "never",
    retain: Annotated[
        str, typer.Option(help="How long a retired epoch is kept for jobs that run on it; then it is destroyed.")
    ] = _RETAIN,
    absent_at_most: Annotated[
        int, typer.Option(min=0, max=64, help="How many custodians may be missing from a rotation.")
    ] = 1,
    canary: Annotated[bool, typer.Option("--canary", help="A key for drills only: faults may be injected.")] = False,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Have the custodians generate a key by a dealerless ceremony. Needs an operator's profile."""
    from keyquorum_core.key_policy import KeyPolicy

    policy = KeyPolicy(
        lease_seconds=duration(lease),
        reattest_seconds=duration(reattest),
        rotate_after_seconds=duration(rotate_after),
        retain_seconds=duration(retain),
        absent_at_most=absent_at_most,
        canary=canary,
    )
    with output.client_of(profile, passphrase_file) as client, bars() as report:
        record = client.key_create(key, suite=suite, policy=policy, progress=report)
    show_record(record, as_json)


@app.command("list")
def list_keys(
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """List the cluster's keys, each with the certificate of its newest epoch verified."""
    with output.client_of(profile, passphrase_file) as client:
        records = client.keys()
    if as_json:
        output.emit({"keys": [record.as_dict() for record in records]})
        return
    output.table(
        "",
        ("key", "epoch", "state", "suite", "created", "seeds", "stale"),
        [
            (r.key_id, r.epoch, r.state, r.suite, output.when(r.created_at), r.seed_count, ", ".join(r.stale) or "-")
            for r in records
        ],
    )


@app.command()
def show(
    key: KeyArgument,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show one key: who certified its newest epoch, what became of the older ones, who lacks any.

    With an operator's profile also its ceremonies that did not end well, with custodian, step and cause.
    """
    with output.client_of(profile, passphrase_file) as client:
        epochs = client.key_epochs(key)
        operator = client.profile.operator is not None
        ceremonies = [each for each in client.ceremonies(key) if each.step != "done"] if operator else []
    if as_json:
        listed = {"epochs": [each.as_dict() for each in epochs], "ceremonies": [each.as_dict() for each in ceremonies]}
        output.emit(epochs[0].as_dict() | listed)
        return
    show_epoch(epochs[0])
    output.table(
        "Epochs",
        ("epoch", "state", "created", "retired", "destroyed", "certified by", "absent", "stale"),
        [
            (
                each.epoch,
                each.state,
                output.when(each.created_at),
                output.when(each.retired_at),
                output.when(each.ended_at),
                ", ".join(each.custodians),
                ", ".join(each.absent) or "-",
                ", ".join(each.stale) or "-",
            )
            for each in epochs
        ],
    )
    show_ceremonies(ceremonies)


def show_ceremonies(ceremonies: Sequence[CeremonyRecord]) -> None:
    """Where ceremonies are, and what stopped them."""
    if ceremonies:
        output.table(
            "Ceremonies",
            ("ceremony", "kind", "key", "epoch", "step", "when", "waits for", "what stopped it"),
            [
                (
                    each.ceremony_id,
                    each.kind,
                    each.key_id,
                    each.epoch,
                    each.step,
                    output.when(each.updated_at),
                    ", ".join(each.waiting) or "-",
                    f"{each.error.reason}: {each.error.message}" if each.error is not None else "-",
                )
                for each in ceremonies
            ],
        )


def show_record(record: KeyRecord, as_json: bool) -> None:
    """One epoch, for scripts or people."""
    if as_json:
        output.emit(record.as_dict())
    else:
        show_epoch(record)


def show_epoch(record: KeyRecord) -> None:
    """One epoch, for people."""
    rows = [
        ("key", record.key_id),
        ("epoch", record.epoch),
        ("state", f"{record.state} (the coordinator's word)"),
        ("suite", record.suite),
        ("quorum", record.quorum.words()),
        ("ceremony", record.ceremony_id),
        ("created", output.when(record.created_at)),
        ("seeds", record.seed_count),
        *_policy_rows(record.policy),
        ("certified by", ", ".join(record.custodians)),
        ("certificate", f"sha256:{record.certificate_sha256}"),
    ]
    if record.absent:
        rows.append(("made without", ", ".join(record.absent)))
    if record.stale:
        rows.append(("stale, to be repaired", ", ".join(record.stale)))
    output.table("", ("", ""), rows)


def _policy_rows(policy: KeyPolicy) -> list[tuple[str, str]]:
    rows = [
        (
            "lease",
            f"{in_words(policy.lease_seconds)}, renewed on evidence of at most {in_words(policy.reattest_seconds)}",
        ),
        ("rotates after", in_words(policy.rotate_after_seconds)),
        ("keeps retired epochs", in_words(policy.retain_seconds) if policy.retain_seconds else "no longer than needed"),
        ("may miss a rotation", f"{policy.absent_at_most} custodian{'s' if policy.absent_at_most != 1 else ''}"),
    ]
    return [*rows, ("canary", "yes: for drills only")] if policy.canary else rows
