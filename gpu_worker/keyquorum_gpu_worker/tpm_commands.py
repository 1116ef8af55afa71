"""``keyquorum-worker tpm``: make the attestation key, show it for enrolment, answer the credential."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from keyquorum_protos.wire.refusals import refusals

if TYPE_CHECKING:
    from keyquorum_gpu_worker.tss import Tss

__all__ = ["app"]

app = typer.Typer(help="Enrol this machine's TPM: once, before its quotes are worth anything.", no_args_is_help=True)

Dir = Annotated[Path, typer.Option("--dir", help="Folder with worker.toml, which has a section [tpm2].")]
Ek = Annotated[str, typer.Option(help="The endorsement key: rsa2048, ecc-p256 or ecc-p384.")]
Out = Annotated[Path | None, typer.Option(help="Write there, and not to standard output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, errors too.")]
_MAX_FILE = 128 << 10

Value = TypeVar("Value")


@app.command("create-ak")
def create_ak(
    directory: Dir,
    algorithm: Annotated[str, typer.Option(help="rsa2048 or ecc-p256.")] = "ecc-p256",
    ek: Ek = "rsa2048",
    as_json: AsJson = False,
) -> None:
    """Make an attestation key below the endorsement key, and keep it at `ak_handle` of worker.toml."""
    with refusals(as_json):
        from keyquorum_gpu_worker import enrolment

        chosen = _chosen(enrolment.AKS, algorithm, "--algorithm")
        tss, handle = _place(directory)
        enrolment.create_ak(tss, handle, _chosen(enrolment.EKS, ek, "--ek"), chosen)
        if as_json:
            print(json.dumps({"ak_handle": f"{handle:#010x}", "algorithm": algorithm, "ek": ek}))
        else:
            print(f"the TPM keeps an attestation key at {handle:#010x}; next: keyquorum-worker tpm enrol")


@app.command()
def enrol(
    directory: Dir,
    ek: Ek = "rsa2048",
    certificate: Annotated[
        Path | None, typer.Option(help="The endorsement key's certificate (DER or PEM), where the TPM holds none.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Show what `keyquorum attest enrol challenge` needs: both public areas and the endorsement key's certificate."""
    with refusals(as_json):
        from keyquorum_core.attestation.tpm2_messages import candidate_bytes
        from keyquorum_gpu_worker import enrolment

        chosen = _chosen(enrolment.EKS, ek, "--ek")
        tss, handle = _place(directory)
        given = b"" if certificate is None else _read(certificate, "the endorsement key's certificate")
        _emit(candidate_bytes(enrolment.candidate(tss, handle, chosen, given)), out)


@app.command()
def activate(
    directory: Dir,
    credential: Annotated[Path, typer.Argument(help="What `keyquorum attest enrol challenge` made.")],
    ek: Ek = "rsa2048",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Have the TPM open a credential, which only the one with both keys can. The answer is good for five minutes."""
    with refusals(as_json):
        from keyquorum_core.attestation.tpm2_messages import answer_bytes, parse_credential
        from keyquorum_gpu_worker import enrolment

        chosen = _chosen(enrolment.EKS, ek, "--ek")
        tss, handle = _place(directory)
        asked = parse_credential(_read(credential, "the credential").strip())
        _emit(answer_bytes(enrolment.activate(tss, handle, chosen, asked)), out)


def _chosen(table: Mapping[str, Value], name: str, option: str) -> Value:
    if name not in table:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(table)}", param_hint=option)
    return table[name]


def _place(directory: Path) -> tuple[Tss, int]:
    """Where ``[tpm2]`` says that the key is. Raises :class:`MalformedError` where there is no such section."""
    from keyquorum_core.errors import MalformedError, Reason
    from keyquorum_gpu_worker.config import load_config
    from keyquorum_gpu_worker.evidence.tpm2 import Tpm2

    for make in load_config(directory).sources:
        source = make()
        if isinstance(source, Tpm2):
            return source.tss, source.handle
    raise MalformedError(
        Reason.MALFORMED, "worker.toml says nothing of a TPM", expected="a section [tpm2] with ak_handle and pcrs"
    )


def _read(path: Path, what: str) -> bytes:
    from keyquorum_protos.wire.files import read_bytes

    return read_bytes(path, what, _MAX_FILE)


def _emit(data: bytes, out: Path | None) -> None:
    from keyquorum_core.errors import Reason, UnavailableError

    if out is None:
        print(data.decode("ascii"))
        return
    try:
        out.write_bytes(data + b"\n")
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, "the file cannot be written", expected=str(out), actual=error.strerror
        ) from None
