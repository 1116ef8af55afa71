"""``keyquorum roster change | sign | follow``: from one roster to the next, signed by the rule of both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.roster import app, further_operators, show_roster

__all__ = ["app"]

_Signers = Annotated[list[Path], typer.Option(help="Private key file of an operator that signs; once for each.")]
_Out = Annotated[Path, typer.Option(help="Where to write it; never replaced.")]


@app.command()
def change(
    current: Annotated[Path, typer.Argument(help="The roster in force.")],
    operator_key: _Signers,
    out: _Out,
    card: Annotated[
        list[Path] | None,
        typer.Option(help="A custodian's enrolment card: of a known id it takes that one's place, else it joins."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A custodian that leaves.")] = None,
    quorum: Annotated[Path | None, typer.Option(help="YAML or JSON with another quorum rule.")] = None,
    operator_pub: Annotated[list[Path] | None, typer.Option(help="Public key file of a new operator.")] = None,
    drop_operator: Annotated[list[str] | None, typer.Option(help="An operator that leaves.")] = None,
    operator_threshold: Annotated[int | None, typer.Option(help="Operators that must sign the next roster.")] = None,
    coordinator_cert: Annotated[
        list[Path] | None, typer.Option(help="Coordinators' TLS certificates, in place of the present ones.")
    ] = None,
    days: Annotated[int, typer.Option(help="Days until the roster expires.")] = 365,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Make the next version of a roster: replace, add or drop custodians and operators, change the quorum rule.

    It counts once enough operators of the old version and of the new one have signed: the others add their signatures
    with ``roster sign``. Keys made under the old committee or rule go on; then `key repair --replace` for a custodian
    in another's place, and `key rotate`, or `key rotate --renew` where committee or rule changed.
    """
    from keyquorum.documents import load_document
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum.rosters import change_roster, rule_of
    from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
    from keyquorum_core.signing import peek_payload
    from keyquorum_protos.wire.files import read_bytes

    known = Roster.parse(peek_payload(read_bytes(current, "roster"), ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER))
    ask = output.passphrase_source(passphrase_file)
    signers = [unlock(path, "operator", None, ask) for path in operator_key]
    leaving = set(drop_operator or ())
    staying = {name: each for name, each in known.operator_identities().items() if name not in leaving}
    now = int(time.time())
    made = change_roster(
        known,
        issued_at=now,
        expires_at=now + days * 86400,
        cards=[read_bytes(path, "enrolment card") for path in card or ()],
        drop=drop or (),
        rule=None if quorum is None else rule_of(load_document(read_bytes(quorum, "quorum file"), "quorum file")),
        operators=further_operators(staying, operator_pub or ()),
        operator_threshold=operator_threshold,
        coordinator_tls=None
        if coordinator_cert is None
        else [read_bytes(path, "coordinator's certificate").decode("ascii", "replace") for path in coordinator_cert],
        signers=[each.identity for each in signers],
    )
    write_new(out, made.envelope, private=False)
    show_roster(made.roster, sorted(each.name for each in signers), as_json)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="The roster, as another operator signed it.")],
    operator_key: _Signers,
    out: _Out,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Add signatures to a roster. Look at it first: `keyquorum roster show`."""
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum.rosters import cosign_roster
    from keyquorum_protos.wire.files import read_bytes

    ask = output.passphrase_source(passphrase_file)
    signers = [unlock(path, "operator", None, ask) for path in operator_key]
    made = cosign_roster(read_bytes(file, "roster"), [each.identity for each in signers])
    write_new(out, made.envelope, private=False)
    show_roster(made.roster, sorted(each.name for each in signers), as_json)


@app.command()
def follow(
    files: Annotated[list[Path], typer.Argument(metavar="ROSTER…", help="The rosters that follow, in order.")],
    current: Annotated[
        Path | None, typer.Option("--from", help="Only check that they follow this roster; change nothing.")
    ] = None,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Go from the roster that a profile pins to a later one, by nobody's word but the operators' own.

    Each must be signed by the rule of the one before and by its own. Custodians do the same by themselves when their
    roster.json is replaced.
    """
    from keyquorum.profile import load_profile
    from keyquorum.rosters import follow_profile
    from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
    from keyquorum_core.signing import peek_payload
    from keyquorum_core.succession import follow as follow_chain
    from keyquorum_core.succession import signed_by
    from keyquorum_protos.wire.files import read_bytes

    envelopes = [read_bytes(path, "roster") for path in files]
    if current is not None:
        payload = peek_payload(read_bytes(current, "roster"), ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER)
        known = Roster.parse(payload)
        newest = follow_chain(known, envelopes)
    else:
        path = output.needs_profile(profile)
        known = load_profile(path).roster
        newest = follow_profile(path, envelopes)
    before = follow_chain(known, envelopes[:-1])
    show_roster(newest, list(signed_by(envelopes[-1], before)), as_json)
