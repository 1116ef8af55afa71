"""``keyquorum roster``: the signed document that says who the custodians are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum_core.errors import MalformedError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from keyquorum_core.roster import Roster
    from keyquorum_core.signing import PublicIdentity

__all__ = ["app", "further_operators", "show_roster"]

app = typer.Typer(name="roster", help="Rosters.", no_args_is_help=True)


@app.command()
def create(
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    card: Annotated[list[Path], typer.Option(help="A custodian's enrolment card (card.json); once for each.")],
    quorum: Annotated[Path, typer.Option(help="YAML or JSON with the quorum rule.")],
    operator_key: Annotated[list[Path], typer.Option(help="Private key file of an operator that signs.")],
    coordinator_cert: Annotated[list[Path], typer.Option(help="A coordinator's TLS certificate (PEM).")],
    out: Annotated[Path, typer.Option(help="Where to write the roster; never replaced.")],
    log_key: Annotated[
        Path | None,
        typer.Option(help="The coordinator's log.vkey. Without it the roster's custodians release nothing."),
    ] = None,
    log_url: Annotated[
        str, typer.Option(help="Where the ledger is read: http or https URL, without a slash at its end.")
    ] = "",
    operator_pub: Annotated[
        list[Path] | None, typer.Option(help="Public key file of a further operator, that doesn't sign now.")
    ] = None,
    operator_threshold: Annotated[int, typer.Option(help="Operators that must sign the next roster.")] = 1,
    operators_out: Annotated[Path | None, typer.Option(help="Also write operators.json, for pinning.")] = None,
    committee: Annotated[str, typer.Option(help="The committee's name.")] = "main",
    days: Annotated[int, typer.Option(help="Days until the roster expires.")] = 365,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Assemble enrolment cards, a quorum rule and operators into a cluster's first signed roster."""
    from keyquorum.documents import load_document
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum.rosters import assemble_roster, operators_file, rule_of
    from keyquorum_protos.wire.files import read_bytes

    ask = output.passphrase_source(passphrase_file)
    signers = [unlock(path, "operator", None, ask) for path in operator_key]
    operators = further_operators({each.name: each.identity.public for each in signers}, operator_pub or ())
    now = int(time.time())
    made = assemble_roster(
        cluster=cluster,
        committee=committee,
        issued_at=now,
        expires_at=now + days * 86400,
        cards=[read_bytes(path, "enrolment card") for path in card],
        rule=rule_of(load_document(read_bytes(quorum, "quorum file"), "quorum file")),
        operators=operators,
        operator_threshold=operator_threshold,
        signers=[each.identity for each in signers],
        coordinator_tls=[
            read_bytes(path, "coordinator's certificate").decode("ascii", "replace") for path in coordinator_cert
        ],
        log_key=read_bytes(log_key, "ledger's keys").decode("utf-8", "replace").strip() if log_key is not None else "",
        log_url=log_url,
    )
    write_new(out, made.envelope, private=False)
    if operators_out is not None:
        write_new(operators_out, operators_file(operators, operator_threshold), private=False)
    show_roster(made.roster, sorted(each.name for each in signers), as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="The roster.")],
    operators: Annotated[
        Path | None, typer.Option(help="operators.json with the operators you trust; without it nothing is verified.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show a roster: who the custodians are, what a quorum is, who signed."""
    from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster, open_roster, parse_operators
    from keyquorum_core.signing import open_multi, peek_payload
    from keyquorum_protos.wire.files import read_bytes

    envelope = read_bytes(file, "roster")
    if operators is None:
        roster = Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER))
        output.note("NOT VERIFIED: give --operators to check who signed it.")
        show_roster(roster, None, as_json)
        return
    trusted, threshold = parse_operators(read_bytes(operators, "operators file"))
    roster = open_roster(envelope, trusted, threshold, int(time.time()))
    _, signed = open_multi(envelope, ROSTER_TYPE, trusted, threshold, "roster", max_bytes=2 * MAX_ROSTER)
    show_roster(roster, list(signed), as_json)


def further_operators(known: dict[str, PublicIdentity], files: Iterable[Path]) -> dict[str, PublicIdentity]:
    """``known`` and those in public key files. Raises ``ROLE`` for a file that is not a further operator's."""
    from keyquorum.keyfiles import read_public_keys

    operators = dict(known)
    for path in files:
        public = read_public_keys(path)
        if public.role != "operator" or operators.get(public.name, public.identity) != public.identity:
            raise MalformedError(
                Reason.ROLE,
                f"{path} is not a further operator's",
                expected="role operator, another name",
                actual=f"{public.role} {public.name}",
            )
        operators[public.name] = public.identity
    return operators


def show_roster(roster: Roster, signed: list[str] | None, as_json: bool) -> None:
    quorum = roster.quorum_of()
    facts = {
        "cluster": roster.cluster,
        "committee": roster.committee,
        "version": roster.version,
        "issued_at": roster.issued_at,
        "expires_at": roster.expires_at,
        "sha256": roster.digest,
        "verified": signed is not None,
        "signed_by": signed or [],
        "operators": [each.name for each in roster.operators],
        "operator_threshold": roster.operator_threshold,
        "quorum": quorum.rule,
        "quorum_words": quorum.words(),
        "log": roster.log_key.origin if roster.log_key is not None else "",
        "log_key": roster.log_key.encode() if roster.log_key is not None else "",
        "log_url": roster.log_url,
        "custodians": [
            {
                "id": each.id,
                "jurisdiction": each.jurisdiction,
                "address": each.address,
                "fingerprint": each.identity.fingerprint,
            }
            for each in roster.custodians
        ],
    }
    if as_json:
        output.emit(facts)
        return
    output.table(
        "",
        ("", ""),
        (
            ("cluster", f"{roster.cluster}, committee {roster.committee}, version {roster.version}"),
            ("valid", f"{output.when(roster.issued_at)} to {output.when(roster.expires_at)}"),
            ("sha256", roster.digest),
            ("signed by", ", ".join(signed) if signed else "NOT VERIFIED"),
            ("next one signed by", f"{roster.operator_threshold} of {', '.join(o.name for o in roster.operators)}"),
            ("quorum", quorum.words()),
            ("ledger", _ledger(roster)),
        ),
    )
    output.table(
        "Custodians",
        ("custodian", "jurisdiction", "address", "fingerprint"),
        [(each.id, each.jurisdiction, each.address, each.identity.fingerprint[:32]) for each in roster.custodians],
    )


def _ledger(roster: Roster) -> str:
    if roster.log_key is None:
        return "NONE: custodians release nothing under this roster"
    where = f" at {roster.log_url}" if roster.log_url else ""
    return f"{roster.log_key.origin}, key {roster.log_key.ed25519.key_id.hex()}{where}"
