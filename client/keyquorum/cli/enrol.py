"""``keyquorum attest enrol``: prove that a TPM's attestation key lives in a genuine TPM, before the inventory lists it.

Two steps around one of the worker's: ``challenge`` makes a credential that only that TPM opens, ``confirm`` takes what
it held. Files go between the two people however they like; what must be kept to oneself is ``pending``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output
from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["app"]

app = typer.Typer(name="enrol", help="Enrol a worker's TPM.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Enrol a worker's TPM."""


@app.command()
def challenge(
    candidate: Annotated[Path, typer.Argument(help="What `keyquorum-worker tpm enrol` showed.")],
    root: Annotated[Path, typer.Option(help="Root certificate of the TPM's maker, which you trust; PEM or DER.")],
    out: Annotated[Path, typer.Option(help="Where to write the credential, for the worker; never replaced.")],
    pending: Annotated[Path, typer.Option(help="Where to keep what the answer must be; never replaced, private.")],
    issuer: Annotated[
        list[Path] | None, typer.Option(help="Certificates between the TPM's and the root; PEM or DER.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Check a candidate down to the TPM maker's root, and make the credential that proves it."""
    from keyquorum.keyfiles import write_new
    from keyquorum_core.attestation.tpm2_endorsement import root_fingerprint
    from keyquorum_core.attestation.tpm2_enrolment import ENROLMENT_SECONDS
    from keyquorum_core.attestation.tpm2_enrolment import challenge as make
    from keyquorum_core.attestation.tpm2_messages import credential_bytes, parse_candidate, pending_bytes
    from keyquorum_protos.wire.files import read_bytes

    trusted = read_bytes(root, "root certificate")
    given = parse_candidate(read_bytes(candidate, "candidate").strip())
    chain = (*given.ek_certificates, *(read_bytes(path, "issuer's certificate") for path in issuer or ()), trusted)
    found = type(given)(chain, given.ek_public, given.ak_public)
    credential, asked = make(found, pinned_roots={root_fingerprint(trusted)}, now=int(time.time()))
    write_new(pending, pending_bytes(asked) + b"\n", private=True)
    write_new(out, credential_bytes(credential) + b"\n", private=False)
    if as_json:
        said = {"ak": asked.ak_fingerprint, "ek": asked.ek.fingerprint, "seconds": ENROLMENT_SECONDS}
        output.emit(said | {"credential": str(out)})
        return
    output.line(f"TPM: {asked.ek.manufacturer} {asked.ek.model}, version {asked.ek.version}")
    output.line(f"attestation key: {asked.ak_fingerprint}")
    output.line(f"give {out} to the worker, and confirm its answer within {ENROLMENT_SECONDS} seconds")


@app.command()
def confirm(
    pending: Annotated[Path, typer.Argument(help="What `challenge` kept; removed, for it is good for one answer.")],
    answer: Annotated[Path, typer.Argument(help="What `keyquorum-worker tpm activate` showed.")],
    as_json: output.JsonOption = False,
) -> None:
    """Compare the answer, and show what the inventory is to list (`hardware`, as its machines have it)."""
    from keyquorum_core.attestation.tpm2_messages import parse_answer, parse_pending
    from keyquorum_protos.wire.files import read_bytes

    asked = parse_pending(read_bytes(pending, "pending enrolment").strip())
    said = parse_answer(read_bytes(answer, "answer").strip())
    try:
        pending.unlink()  # before it is compared: nobody gets a second try
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{pending} can't be removed", actual=error.strerror) from None
    enrolled = asked.confirm(said, now=int(time.time()))
    found: dict[str, object] = {
        "hardware": {"tpm2": [enrolled.ak_fingerprint]},
        "ak": enrolled.ak_fingerprint,
        "ak_name": enrolled.ak_name,
        "ek": enrolled.ek.fingerprint,
        "manufacturer": enrolled.ek.manufacturer,
        "model": enrolled.ek.model,
        "version": enrolled.ek.version,
        "enrolled_at": enrolled.enrolled_at,
    }
    if as_json:
        output.emit(found)
        return
    output.line(f"for the machine's entry in the inventory: tpm2 {enrolled.ak_fingerprint}")
    for name, value in found.items():
        if name != "hardware":
            output.line(f"{name}: {value}")
