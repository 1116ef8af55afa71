"""``keyquorum operator``: the documents that a cluster's operators sign together, for custodians to act on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output

if TYPE_CHECKING:
    from keyquorum.bulletins import Trusted
    from keyquorum_core.bulletin import Bulletin

__all__ = ["app", "trusted"]

app = typer.Typer(name="operator", help="Documents that operators sign together.", no_args_is_help=True)

KeysOption = Annotated[list[Path], typer.Option("--operator-key", help="Private key file of an operator that signs.")]
OutOption = Annotated[Path, typer.Option(help="Where to write the signed document; never replaced.")]


@app.command()
def sign(
    kind: Annotated[str, typer.Argument(help="What it is: reference-values, inventory, …")],
    body: Annotated[Path, typer.Argument(help="YAML or JSON with what it says.")],
    cluster: Annotated[str, typer.Option(help="The cluster's name.")],
    version: Annotated[int, typer.Option(help="One more than the last one of this kind.")],
    operator_key: KeysOption,
    out: OutOption,
    days: Annotated[int, typer.Option(help="Days until it expires.")] = 90,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Make a document and sign it; nothing that custodians could not read is signed. Others add theirs with cosign."""
    from keyquorum.bulletins import make
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_protos.wire.files import read_bytes

    data = read_bytes(body, "body", max_bytes=MAX_BULLETIN_ENVELOPE)
    ask = output.passphrase_source(passphrase_file)
    signers = [unlock(path, "operator", None, ask) for path in operator_key]
    now = int(time.time())
    made, envelope = make(
        kind,
        data,
        cluster=cluster,
        version=version,
        issued_at=now,
        expires_at=now + days * 86400,
        signers=[each.identity for each in signers],
    )
    write_new(out, envelope, private=False)
    _show(made, [each.name for each in signers], as_json)


@app.command()
def cosign(
    file: Annotated[Path, typer.Argument(help="A document that another operator signed.")],
    operator_key: KeysOption,
    out: OutOption,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Add your signature to a document, once you have looked at it (``show``)."""
    from keyquorum.bulletins import cosign as add
    from keyquorum.keyfiles import unlock, write_new
    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE
    from keyquorum_protos.wire.files import read_bytes

    envelope = read_bytes(file, "document", max_bytes=MAX_BULLETIN_ENVELOPE)
    ask = output.passphrase_source(passphrase_file)
    signers = [unlock(path, "operator", None, ask) for path in operator_key]
    made, merged = add(envelope, [each.identity for each in signers])
    write_new(out, merged, private=False)
    _show(made, [each.name for each in signers], as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A signed document.")],
    operators: Annotated[
        Path | None, typer.Option(help="operators.json with the operators you trust; without it nothing is verified.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="The cluster it must be for, with --operators.")] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Show a document: of what kind and version, who signed it, and what it says."""
    from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE, peek_bulletin, verify_bulletin
    from keyquorum_protos.wire.files import read_bytes

    envelope = read_bytes(file, "document", max_bytes=MAX_BULLETIN_ENVELOPE)
    found = peek_bulletin(envelope)
    if operators is None:
        output.note("NOT VERIFIED: give --operators and --cluster to check who signed it.")
        _show(found, None, as_json, body=True)
        return
    by = trusted(operators, cluster)
    found = verify_bulletin(envelope, found.kind, by.operators, by.threshold, cluster=by.cluster)
    found.check_time(by.now)
    _show(found, list(found.signers), as_json, body=True)


def trusted(operators: Path, cluster: str) -> Trusted:
    """Whose signatures an ``operators.json`` trusts; wrong usage without a cluster's name."""
    from keyquorum.bulletins import Trusted
    from keyquorum_core.roster import parse_operators
    from keyquorum_protos.wire.files import read_bytes

    if not cluster:
        raise typer.BadParameter("--operators needs --cluster: documents are for one cluster")
    identities, threshold = parse_operators(read_bytes(operators, "operators file"))
    return Trusted(identities, threshold, cluster, int(time.time()))


def _show(made: Bulletin, signed: list[str] | None, as_json: bool, *, body: bool = False) -> None:
    facts: dict[str, object] = {
        "cluster": made.cluster,
        "kind": made.kind,
        "version": made.version,
        "issued_at": made.issued_at,
        "expires_at": made.expires_at,
        "sha256": made.digest,
        "verified": signed is not None,
        "signed_by": signed or [],
    }
    if body:
        facts["body"] = dict(made.body)
    if as_json:
        output.emit(facts)
        return
    output.table(
        "",
        ("", ""),
        (
            ("document", f"{made.name} for {made.cluster}"),
            ("valid", f"{output.when(made.issued_at)} to {output.when(made.expires_at)}"),
            ("sha256", made.digest),
            ("signed by", ", ".join(signed) if signed else "NOT VERIFIED"),
        ),
    )
    if body:
        import json

        output.line(json.dumps(made.body, indent=2, ensure_ascii=False, sort_keys=True))
