"""``keyquorum revoke``: operators withdraw something, or lift what they withdrew; custodians go by it at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keyquorum.cli import output
from keyquorum.cli.durations import duration
from keyquorum_core.errors import Reason, RefusedError

if TYPE_CHECKING:
    from keyquorum.revoking import Held
    from keyquorum_core.bulletin import Bulletin
    from keyquorum_core.revocations import Revocations

__all__ = ["app", "revoke_job"]

app = typer.Typer(name="revoke", help="Withdraw something, by the operators' signatures.", no_args_is_help=True)

_SUBJECTS: Final = {
    "job": ("JOB", "a job, by its id."),
    "owner": ("FINGERPRINT", "an owner, by its identity's fingerprint, whatever it calls itself."),
    "worker": ("SHA256", "a worker's key, by the SHA-256 of its recipient key, as in the ledger's leaves."),
    "hardware": ("KIND:ID", "a machine, as the inventory writes it: sev-snp:CHIP_ID, tpm2:…, nvidia-gpu:SERIAL …"),
    "measurement": ("TYPE:HEX", "whatever measures so: sev-snp:LAUNCH_MEASUREMENT …"),
    "policy": ("SHA256", "a policy bundle, by its digest."),
    "roster": ("SHA256", "a version of the roster, by its digest: nothing is released under it."),
}

_Reason = Annotated[str, typer.Option(help="Why: for the other operators, and for whom it refuses. Public.")]
_Lift = Annotated[bool, typer.Option("--lift", help="Lift the revocation instead.")]
_Expires = Annotated[str, typer.Option(help="Until when it counts (90d, 1y): past that, custodians release nothing.")]
_From = Annotated[
    Path | None, typer.Option("--from", help="The present document, instead of the coordinator's.", show_default=False)
]
_Offline = Annotated[
    bool,
    typer.Option("--offline", help="Leave the coordinator alone: begin from --from, or from nothing; needs --out."),
]
_Out = Annotated[Path | None, typer.Option(help="Write the signed document here; never replaced.", show_default=False)]
_Keys = Annotated[
    list[Path] | None,
    typer.Option(
        "--operator-key",
        help="Key file of a further operator who signs, where the roster asks for several.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the command line asks for."""

    target: str
    subject: str
    reason: str
    lift: bool
    expires: str
    base: Path | None
    offline: bool
    out: Path | None
    keys: tuple[Path, ...]


def _command(target: str, metavar: str, what: str) -> None:
    named = typer.Argument(metavar=metavar)

    def revoke(
        subject: str = named,
        *,
        reason: _Reason,
        lift: _Lift = False,
        expires: _Expires = "1y",
        base: _From = None,
        offline: _Offline = False,
        out: _Out = None,
        operator_key: _Keys = None,
        profile: output.ProfileOption = None,
        passphrase_file: output.PassphraseFileOption = None,
        as_json: output.JsonOption = False,
    ) -> None:
        wish = _Wish(target, subject, reason, lift, expires, base, offline, out, tuple(operator_key or ()))
        _revoke(wish, profile, passphrase_file, as_json)

    app.command(target, help=f"Revoke {what}")(revoke)


for _target, (_metavar, _what) in _SUBJECTS.items():
    _command(_target, _metavar, _what)


def revoke_job(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    reason: _Reason,
    out: _Out = None,
    operator_key: _Keys = None,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Have the operators revoke a job: it stops, and nobody gets its key any more. Same as `keyquorum revoke job`."""
    wish = _Wish("job", job, reason, False, "1y", None, False, out, tuple(operator_key or ()))
    _revoke(wish, profile, passphrase_file, as_json)


@app.command("send")
def send(
    file: Annotated[Path, typer.Argument(help="A document that enough operators signed.")],
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Hand a document to the coordinator, which hands it to every custodian."""
    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_protos.wire.files import read_bytes

    envelope = read_bytes(file, "document", max_bytes=MAX_BULLETIN_ENVELOPE)
    with output.client_of(profile, passphrase_file) as client:
        before = client.revocations().revocations
        held = client.revoke(envelope)
    _show_sent(before, held, as_json)


@app.command("list")
def show(
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """What is revoked by the document that the coordinator has, and which custodians lack that version."""
    with output.client_of(profile, passphrase_file) as client:
        held = client.revocations()
    if as_json:
        output.emit(_facts(held))
        return
    _show_document(held.document)
    entries = sorted(held.revocations.revoked.values(), key=lambda each: each.name)
    if entries:
        output.table(
            "",
            ("revoked", "subject", "reason", "since"),
            [(each.target, each.subject, each.reason, output.when(each.at)) for each in entries],
        )
    _show_custodians(held)


def _revoke(wish: _Wish, profile: Path | None, passphrase_file: Path | None, as_json: bool) -> None:
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum.profile import load_profile
    from keyquorum.revoking import open_revocations, successor
    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_core.revocations import NOTHING, Revocation, Revocations
    from keyquorum_protos.wire.files import read_bytes

    if wish.offline and wish.out is None:
        raise typer.BadParameter("--offline needs --out: the document goes nowhere else")
    seconds = duration(wish.expires)
    if seconds == 0:
        raise typer.BadParameter("--expires: no document counts for ever")
    found = load_profile(output.needs_profile(profile))
    previous: Bulletin | None = None
    if wish.base is not None:
        previous = open_revocations(read_bytes(wish.base, "present document", MAX_BULLETIN_ENVELOPE), found)
    elif not wish.offline:
        with output.client_of(profile, passphrase_file) as client:
            previous = client.revocations().document
    ask = output.passphrase_source(passphrase_file)
    me = found.principal("operator")
    signers = [unlock(me.key_file, "operator", me.name, ask)]
    signers += [unlock(path, "operator", None, ask) for path in wish.keys]
    now = int(time.time())
    made, envelope = successor(
        previous,
        found.cluster,
        Revocation(wish.target, wish.subject, wish.reason, now),
        lift=wish.lift,
        now=now,
        expires_at=now + seconds,
        signers=[each.identity for each in signers],
    )
    missing = found.roster.operator_threshold - len({each.identity.public for each in signers})
    if missing > 0 and wish.out is None:
        raise RefusedError(
            Reason.SIGNATURE_MISSING,
            "the roster asks for more operators' signatures",
            expected=f"{found.roster.operator_threshold} operators",
            actual=", ".join(each.name for each in signers),
            next_step="Give --operator-key; or --out FILE, have another add theirs with `keyquorum operator cosign`,"
            " then `keyquorum revoke send FILE`.",
        )
    if wish.out is not None:
        write_new(wish.out, envelope, private=False)
    before = Revocations.read(previous) if previous is not None else NOTHING
    if wish.offline or missing > 0:
        _show_unsent(before, made, max(0, missing), as_json)
        return
    with output.client_of(profile, passphrase_file) as client:
        held = client.revoke(envelope)
    _show_sent(before, held, as_json)


def _facts(held: Held) -> dict[str, object]:
    document, revocations = held.document, held.revocations
    return {
        "version": document.version if document is not None else 0,
        "sha256": document.digest if document is not None else "",
        "expires_at": document.expires_at if document is not None else 0,
        "signed_by": list(document.signers) if document is not None else [],
        "revoked": [entry.as_json() for _, entry in sorted(revocations.revoked.items())],
        "lifted": [entry.as_json() for _, entry in sorted(revocations.lifted.items())],
        "custodians": [each.as_dict() for each in held.custodians],
    }


def _show_unsent(before: Revocations, made: Bulletin, missing: int, as_json: bool) -> None:
    from keyquorum_core.revocations import Revocations, changes

    changed = changes(before, Revocations.read(made))
    if as_json:
        output.emit(
            {"version": made.version, "sha256": made.digest, "changes": changed, "sent": False, "missing": missing}
        )
        return
    _show_document(made)
    for each in changed:
        output.line(f"  {each}")
    if missing:
        output.note(f"NOT IN FORCE: {missing} more operators sign it with `keyquorum operator cosign`.")
    else:
        output.note("Not sent. Custodians take it with `keyquorum-custodian revoke FILE --dir DIR`.")


def _show_sent(before: Revocations, held: Held, as_json: bool) -> None:
    from keyquorum_core.revocations import changes

    changed = changes(before, held.revocations)
    if as_json:
        output.emit({**_facts(held), "changes": changed, "sent": True, "jobs": list(held.jobs)})
        return
    _show_document(held.document)
    for each in changed or ("nothing changes",):
        output.line(f"  {each}")
    for job in held.jobs:
        output.line(f"  job {job} was stopped or taken from its worker")
    _show_custodians(held)


def _show_document(document: Bulletin | None) -> None:
    if document is None:
        output.line("Nothing was ever revoked.")
        return
    output.line(f"{document.name} for {document.cluster}, until {output.when(document.expires_at)}")
    output.line(f"  sha256 {document.digest}")


def _show_custodians(held: Held) -> None:
    rows = [
        (each.custodian, each.version or "none", each.problem)
        for each in held.custodians
        if held.document is not None and each.digest != held.document.digest
    ]
    if rows:
        output.table("Without this version, as the coordinator says:", ("custodian", "has", "why"), rows)
