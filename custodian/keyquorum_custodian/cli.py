"""The ``keyquorum-custodian`` command. Exit status: 0 done, 1 refused (with the reason code), 2 usage."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

# Before grpc is imported: its C core would write to standard error by itself.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError, printable
from keyquorum_custodian.cli_backup import backup_app, restore
from keyquorum_custodian.cli_parts import Directory as _Directory
from keyquorum_custodian.cli_parts import Json as _Json
from keyquorum_custodian.cli_parts import PassphraseFile as _PassphraseFile
from keyquorum_custodian.cli_parts import passphrase_from as _passphrase
from keyquorum_custodian.cli_sealing import (
    Module,
    PinFile,
    Sealing,
    ShareDirectory,
    Shares,
    TokenLabel,
    choose_wrapping,
    say_void,
    sealing_app,
)
from keyquorum_protos.wire.refusals import refusals as _refusals
from keyquorum_protos.wire.refusals import refuse

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A keyquorum custodian: holds seeds, and decides for itself what to release them for.",
)
app.add_typer(sealing_app)
owner_app = typer.Typer(no_args_is_help=True, help="The owners whose manifests this custodian accepts.")
app.add_typer(owner_app, name="owner")
bulletin_app = typer.Typer(no_args_is_help=True, help="The documents that the cluster's operators sign together.")
app.add_typer(bulletin_app, name="bulletin")
policy_app = typer.Typer(no_args_is_help=True, help="What this custodian releases keys by: its policies and lists.")
app.add_typer(policy_app, name="policy")

ledger_app = typer.Typer(no_args_is_help=True, help="What this custodian saw of the ledger, and what stops releases.")
app.add_typer(ledger_app, name="ledger")

quarantine_app = typer.Typer(
    no_args_is_help=True, help="Workers that get nothing here since their attestation failed anew."
)
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(backup_app, name="backup")
app.command()(restore)


@app.command()
def init(
    directory: _Directory,
    custodian_id: Annotated[str, typer.Option("--id", help="Up to 32 of a-z, 0-9 and inner hyphens, as ch-1.")],
    jurisdiction: Annotated[str, typer.Option(help="ISO 3166-1 alpha-2 code of the law it sits under, as CH.")],
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    listen: Annotated[str, typer.Option(help="host:port for coordinators; port 0 chooses a free one now.")],
    address: Annotated[str, typer.Option(help="host:port that others reach it at; by default as --listen.")] = "",
    admin_listen: Annotated[str, typer.Option(help="host:port for this custodian's operator.")] = "127.0.0.1:0",
    metrics_listen: Annotated[str, typer.Option(help="host:port for Prometheus; empty serves none.")] = "",
    witness_listen: Annotated[
        str, typer.Option(help="host:port for add-checkpoint by C2SP tlog-witness, plain HTTP; empty serves none.")
    ] = "",
    suite: Annotated[str, typer.Option(help="HPKE suite of the custodian's own key.")] = "MLKEM768_X25519",
    sealing: Sealing = "passphrase",
    passphrase_file: _PassphraseFile = None,
    shares: Shares = "",
    share_dir: ShareDirectory = None,
    token: TokenLabel = "",
    module: Module = "",
    pin_file: PinFile = None,
    as_json: _Json = False,
) -> None:
    """Make a new custodian: identity, keystore, TLS certificates, enrolment card. Never overwrites."""
    from keyquorum_custodian.config import CustodianConfig, check_module
    from keyquorum_custodian.init import CARD, initialise
    from keyquorum_protos.wire.process import harden

    with _refusals(as_json):
        harden()
        config = CustodianConfig(
            directory.absolute(),
            custodian_id,
            jurisdiction,
            cluster,
            listen,
            admin_listen,
            metrics_listen,
            witness_listen,
            pkcs11_module=check_module(module),
        )
        wrapping = choose_wrapping(
            sealing,
            custodian_id,
            passphrase_file=passphrase_file,
            shares=shares,
            share_dir=share_dir,
            token=token,
            module=module,
            pin_file=pin_file,
        )
        try:
            card = initialise(config, wrapping, now=int(time.time()), address=address, suite=suite)
        except BaseException:
            say_void(sealing)
            raise
        fingerprint = card.custodian.identity.fingerprint
        out = {
            "custodian": custodian_id,
            "directory": str(config.directory),
            "address": card.custodian.address,
            "fingerprint": fingerprint,
            "card": str(config.path(CARD)),
        }
        if as_json:
            typer.echo(json.dumps(out))
        else:
            typer.echo(f"Custodian {custodian_id} made in {config.directory}")
            typer.echo(f"  reached at   {card.custodian.address}")
            typer.echo(f"  fingerprint  {fingerprint}")
            typer.echo(f"Give {out['card']} to the operators; read them the fingerprint by another channel.")


@app.command()
def card(directory: _Directory) -> None:
    """Print the enrolment card: what the operators put this custodian into the roster with."""
    from keyquorum_custodian.init import CARD
    from keyquorum_protos.wire.files import read_bytes

    with _refusals():
        typer.echo(read_bytes(directory / CARD, "the enrolment card", 1 << 20).decode("utf-8"))


@app.command()
def serve(
    directory: _Directory,
    passphrase_file: _PassphraseFile = None,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Ask for nothing: serve status only until unsealed.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve until SIGTERM. Checks everything on disk first; prints one line of JSON when it can be reached.

    A keystore under officers' shares is always served sealed first; each of them then runs `unseal`.
    """
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter("must be debug, info, warning or error", param_hint="--log-level")
    from keyquorum_custodian.config import load_config
    from keyquorum_custodian.sealed_keystore import peek_scheme
    from keyquorum_custodian.sealing.record import Scheme
    from keyquorum_custodian.serving import become
    from keyquorum_protos.wire.process import harden

    with _refusals():
        harden()
        with contextlib.suppress(KeyquorumError):  # what is wrong is said by whoever opens it in earnest
            sealed = sealed or peek_scheme(load_config(directory).keystore) is Scheme.SLIP39
        become(directory, None if sealed else _passphrase(passphrase_file), log_level)


@app.command()
def status(directory: _Directory, as_json: _Json = False) -> None:
    """Ask the running custodian how it is, over its operator's listener."""
    import asyncio

    from keyquorum_custodian.admin import fetch_status, show_status

    with _refusals(as_json):
        found = asyncio.run(fetch_status(directory))
        typer.echo(json.dumps(found) if as_json else printable(show_status(found)))


@app.command()
def approve(
    directory: _Directory,
    request: Annotated[
        str, typer.Argument(metavar="[ID]", help="The request; without it, what waits is listed.", show_default=False)
    ] = "",
    reject: Annotated[bool, typer.Option("--reject", help="Say no instead.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask again; the difference is still shown.")] = False,
    as_json: _Json = False,
) -> None:
    """Decide what waits for this custodian's operator: committee changes, destruction, and what custodian.toml says.

    Shows what would change and who asked, and asks before it decides. A decision is final.
    """
    import asyncio

    from keyquorum_custodian.admin import decide, fetch_approvals, show_approval

    with _refusals(as_json):
        pending = asyncio.run(fetch_approvals(directory))
        if not request:
            if as_json:
                typer.echo(json.dumps({"pending": pending}))
            for each in () if as_json else pending:
                typer.echo(printable(show_approval(each)))
            if not pending and not as_json:
                typer.echo("Nothing waits for you.")
            return
        found = next((each for each in pending if each["request_id"] == request), None)
        if found is None:
            waiting = ", ".join(each["request_id"] for each in pending) or "nothing"
            raise StateError(Reason.NOT_FOUND, "no such request waits", expected=waiting, actual=ascii(request[:64]))
        if not as_json:
            typer.echo(printable(show_approval(found)))
        if not yes:
            if not sys.stdin.isatty():
                raise RefusedError(
                    Reason.APPROVAL, "nobody is at a terminal to confirm", next_step="Run at a terminal, or use --yes."
                )
            typer.confirm("Reject this?" if reject else "Approve this?", abort=True, err=True)
        decided = asyncio.run(decide(directory, request, found["subject"], approve=not reject))
        if as_json:
            typer.echo(json.dumps({**decided, "decision": "rejected" if reject else "approved"}))
        else:
            typer.echo("Rejected." if reject else "Approved. The ceremony goes on by itself.")


@owner_app.command("add")
def owner_add(
    file: Annotated[Path, typer.Argument(help="The owner's NAME.pub.json.")],
    directory: _Directory,
    canary: Annotated[bool, typer.Option("--canary", help="For drills: it gets canary keys, and no other.")] = False,
    as_json: _Json = False,
) -> None:
    """Accept an owner's manifests from now on; a running custodian notices by itself."""
    from keyquorum_custodian.config import load_config
    from keyquorum_custodian.trust import add_owner
    from keyquorum_protos.wire.files import read_bytes

    with _refusals(as_json):
        config = load_config(directory)
        public = read_bytes(file, "the owner's public identity")
        name, identity = add_owner(config.path(config.owners), public, canary=canary)
        if as_json:
            typer.echo(json.dumps({"owner": name, "fingerprint": identity.fingerprint, "canary": canary}))
        else:
            drills = ", for drills only" if canary else ""
            typer.echo(f"Owner {name} is known by fingerprint {identity.fingerprint}{drills}")


@owner_app.command("list")
def owner_list(directory: _Directory, as_json: _Json = False) -> None:
    """The owners this custodian knows."""
    from keyquorum_custodian.config import load_config
    from keyquorum_custodian.trust import Owners

    with _refusals(as_json):
        config = load_config(directory)
        known = Owners(config.path(config.owners))
        owners = known.all()
        if as_json:
            listed = [
                {"owner": name, "fingerprint": owners[name].fingerprint, "canary": known.for_drills(name)}
                for name in sorted(owners)
            ]
            typer.echo(json.dumps({"owners": listed}))
        for name in () if as_json else sorted(owners):
            drills = "  for drills only" if known.for_drills(name) else ""
            typer.echo(f"{name}  {owners[name].fingerprint}{drills}")


@bulletin_app.command("accept")
def bulletin_accept(
    file: Annotated[Path, typer.Argument(help="The signed document, as `keyquorum operator sign` wrote it.")],
    directory: _Directory,
    as_json: _Json = False,
) -> None:
    """Have the running custodian verify a signed document and act on it from now on. Nothing older is taken again.

    A file KIND.json in the custodian's folder of bulletins does the same, also for one that isn't running.
    """
    import asyncio

    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_custodian.admin import accept_bulletin, show_bulletin
    from keyquorum_protos.wire.files import read_bytes

    with _refusals(as_json):
        accepted = asyncio.run(accept_bulletin(directory, read_bytes(file, "the document", MAX_BULLETIN_ENVELOPE)))
        typer.echo(json.dumps(accepted) if as_json else f"Accepted: {printable(show_bulletin(accepted))}")


@bulletin_app.command("list")
def bulletin_list(directory: _Directory, as_json: _Json = False) -> None:
    """The signed documents in force at the running custodian, and what is wrong with those that are not."""
    import asyncio

    from keyquorum_custodian.admin import fetch_status, show_bulletin

    with _refusals(as_json):
        found = asyncio.run(fetch_status(directory))["bulletins"]
        if as_json:
            typer.echo(json.dumps({"bulletins": found}))
        for each in () if as_json else found:
            typer.echo(printable(show_bulletin(each)))
            if each["problem"]:
                typer.echo(printable(f"  {each['problem']}"))


@app.command()
def revoke(
    file: Annotated[Path, typer.Argument(help="Signed revocations, as `keyquorum revoke … --out` wrote them.")],
    directory: _Directory,
    as_json: _Json = False,
) -> None:
    """Go by what the operators revoked, from the next request on, whatever the coordinator does.

    A running custodian takes it at once and says what it changes; for a stopped one it is left for the next start.
    """
    import asyncio

    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE, peek_bulletin
    from keyquorum_custodian.admin import accept_bulletin, show_bulletin
    from keyquorum_custodian.policy_files import leave_document
    from keyquorum_protos.wire.files import read_bytes

    with _refusals(as_json):
        envelope = read_bytes(file, "the document", MAX_BULLETIN_ENVELOPE)
        kind = peek_bulletin(envelope).kind
        if kind != "revocations":
            raise RefusedError(
                Reason.BULLETIN,
                "a document of another kind",
                expected="revocations",
                actual=kind,
                next_step="Use `keyquorum-custodian bulletin accept`.",
            )
        try:
            accepted = asyncio.run(accept_bulletin(directory, envelope))
        except UnavailableError as error:
            if error.reason is not Reason.UNAVAILABLE:
                raise
            left = leave_document(directory, envelope)
            out = {"kind": left.kind, "version": left.version, "digest": left.digest, "accepted": False}
            typer.echo(json.dumps(out) if as_json else f"Left for the next start: {left.name}, {left.digest[:16]}")
            return
        if as_json:
            typer.echo(json.dumps({**accepted, "accepted": True}))
            return
        typer.echo(f"Accepted: {printable(show_bulletin(accepted))}")
        for line in accepted["changes"] or ["nothing changes"]:
            typer.echo(f"  {printable(line)}")


@policy_app.command("install")
def policy_install(
    file: Annotated[Path, typer.Argument(help="A bundle or list, as `keyquorum policy sign` or `sign-list` wrote it.")],
    directory: _Directory,
    as_json: _Json = False,
) -> None:
    """Verify a signed policy bundle, export list or sanctions list, and have it decide from now on.

    A running custodian takes it at once; for a stopped one it is left for the next start.
    """
    import asyncio

    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_custodian.admin import accept_bulletin, show_bulletin
    from keyquorum_custodian.policy_files import leave_document
    from keyquorum_protos.wire.files import read_bytes

    with _refusals(as_json):
        envelope = read_bytes(file, "the document", MAX_BULLETIN_ENVELOPE)
        try:
            accepted = asyncio.run(accept_bulletin(directory, envelope))
        except UnavailableError as error:
            if error.reason is not Reason.UNAVAILABLE:
                raise
            left = leave_document(directory, envelope)
            out = {"kind": left.kind, "version": left.version, "digest": left.digest, "accepted": False}
            typer.echo(json.dumps(out) if as_json else f"Left for the next start: {left.name}, {left.digest[:16]}")
        else:
            shown = {**accepted, "accepted": True}
            typer.echo(json.dumps(shown) if as_json else f"Accepted: {printable(show_bulletin(accepted))}")


@policy_app.command("forget-time")
def policy_forget_time(directory: _Directory, passphrase_file: _PassphraseFile = None, as_json: _Json = False) -> None:
    """Take the machine's clock as right although it once showed a later time. Only for a clock that was ahead: what
    expired in between counts again. The custodian must be stopped."""
    from keyquorum_custodian.policy_files import forget_time
    from keyquorum_protos.wire.process import harden

    with _refusals(as_json):
        harden()
        before, now = forget_time(directory, _passphrase(passphrase_file))
        if as_json:
            typer.echo(json.dumps({"highest_before": before, "now": now}))
        else:
            typer.echo(f"The latest time known was {before}; it is {now} now.")


_Offline = Annotated[bool, typer.Option(help="Open the keystore of a custodian that isn't running.")]


@ledger_app.command("alarms")
def ledger_alarms(
    directory: _Directory,
    offline: _Offline = False,
    passphrase_file: _PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Proof of forks and rollbacks that this custodian holds, each with both signed checkpoints. Exit status 1 while
    one is open."""
    import asyncio

    from keyquorum_custodian import ledger_alarms as alarms

    with _refusals(as_json):
        if offline:
            found = alarms.read_offline(directory, _passphrase(passphrase_file))
        else:
            found = asyncio.run(alarms.fetch(directory))
        typer.echo(json.dumps({"alarms": found}) if as_json else printable(alarms.show(found)))
    if any(not alarm["cleared_at"] for alarm in found):
        raise typer.Exit(1)


@ledger_app.command("clear")
def ledger_clear(
    number: Annotated[int, typer.Argument(help="The alarm's number.")],
    why: Annotated[str, typer.Option(help="What you found out; it is kept with the alarm.")],
    directory: _Directory,
    offline: _Offline = False,
    passphrase_file: _PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Let releases go on after an alarm. Both checkpoints stay, with your reason and the time."""
    import asyncio

    from keyquorum_custodian import ledger_alarms as alarms

    with _refusals(as_json):
        if offline:
            found = alarms.clear_offline(directory, _passphrase(passphrase_file), number, why, int(time.time()))
        else:
            found = asyncio.run(alarms.clear(directory, number, why))
        typer.echo(json.dumps({"alarms": found}) if as_json else printable(alarms.show(found)))


@quarantine_app.command("list")
def quarantine_list(
    directory: _Directory,
    evidence: Annotated[Path | None, typer.Option(help="A folder to write each entry's evidence document to.")] = None,
    offline: _Offline = False,
    passphrase_file: _PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Quarantined hardware and worker keys, why, and the evidence kept. Exit status 1 while an entry is in force."""
    import asyncio

    from keyquorum_custodian import quarantine_admin

    with _refusals(as_json):
        if offline:
            found = quarantine_admin.read_offline(directory, _passphrase(passphrase_file))
        else:
            found = asyncio.run(quarantine_admin.fetch(directory, evidence=evidence is not None))
        if evidence is not None:
            quarantine_admin.write_evidence(found, evidence)
        shown = {"entries": [entry.as_dict() for entry in found]}
        typer.echo(json.dumps(shown) if as_json else printable(quarantine_admin.show(found)))
    if any(not entry.lifted_at for entry in found):
        raise typer.Exit(1)


@quarantine_app.command("lift")
def quarantine_lift(
    number: Annotated[int, typer.Argument(help="The entry's number.")],
    why: Annotated[str, typer.Option(help="What you found out; it is kept with the entry.")],
    directory: _Directory,
    offline: _Offline = False,
    passphrase_file: _PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Let a worker ask for keys again. Its old leases stay revoked; entry and evidence stay, with your reason."""
    import asyncio

    from keyquorum_custodian import quarantine_admin

    with _refusals(as_json):
        if offline:
            passphrase = _passphrase(passphrase_file)
            found = quarantine_admin.lift_offline(directory, passphrase, number, why, int(time.time()))
        else:
            found = asyncio.run(quarantine_admin.lift(directory, number, why))
        shown = {"entries": [entry.as_dict() for entry in found]}
        typer.echo(json.dumps(shown) if as_json else printable(quarantine_admin.show(found)))


def main() -> None:
    """Console entry point."""
    try:
        app()
    except OSError as error:
        refuse(
            UnavailableError(Reason.STORAGE, "a file could not be used", actual=error.strerror), "--json" in sys.argv
        )
