"""``keyquorum attest``: judge a file of hardware evidence as a custodian would, offline; usable as a CI gate."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from keyquorum.cli import enrol, measure, output
from keyquorum.cli.operator import trusted
from keyquorum_core.errors import MalformedError, Reason

if TYPE_CHECKING:
    from keyquorum.bulletins import Trusted
    from keyquorum_core.attestation.inventory import Inventory
    from keyquorum_core.attestation.reference import ReferenceValues
    from keyquorum_core.attestation.verdict import Verdict

T = TypeVar("T")

__all__ = ["app"]

app = typer.Typer(name="attest", help="Hardware evidence.", no_args_is_help=True)
app.add_typer(enrol.app)
app.add_typer(measure.app)
TYPES = ("sev-snp", "tdx", "tpm2", "nvidia-gpu", "nitro")
_MAX_FILE = 16 << 20
_MAX_NITRO = 64 << 10


@app.callback()
def group() -> None:
    """Hardware evidence."""


@app.command()
def verify(
    kind: Annotated[str, typer.Argument(metavar="TYPE", help=" | ".join(TYPES))],
    evidence: Annotated[Path, typer.Argument(help="The evidence: raw, or as its type allows hex, base64 or JSON.")],
    endorsements: Annotated[
        list[Path] | None,
        typer.Option(help="Certificates, PEM or DER; for nvidia-gpu also RIM files and OCSP responses."),
    ] = None,
    collateral: Annotated[
        Path | None, typer.Option(help="tdx: collateral JSON, members named as Intel's PCS does.")
    ] = None,
    event_log: Annotated[
        Path | None, typer.Option(help="tdx: the event log, to be replayed against the RTMRs.")
    ] = None,
    reference_values: Annotated[
        Path | None, typer.Option(help="What is acceptable, signed or only its body; then all of it is required.")
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="Which hardware stands where; then this must be in it.")
    ] = None,
    operators: Annotated[
        Path | None, typer.Option(help="operators.json: those must have signed reference values and inventory.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="The cluster that they must be for, with --operators.")] = "",
    enrolled_ak: Annotated[
        list[Path] | None, typer.Option(help="tpm2: public key of an attestation key that was enrolled (PEM or DER).")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Judge as of then: unix seconds, or ISO 8601. Default: now.")
    ] = None,
    expect_report_data: Annotated[
        str | None, typer.Option(metavar="HEX", help="What the evidence must be bound to (nvidia-gpu: the nonce).")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every check with what it expected and what it found.")
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Exit 0 when the evidence is genuine and acceptable, 1 with a reason code when it is not."""
    if kind not in TYPES:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(TYPES)}", param_hint="TYPE")
    by = None if operators is None else trusted(operators, cluster)
    verdict = _judge(
        kind,
        _read(evidence, "evidence"),
        [_read(path, "endorsement") for path in endorsements or []],
        None if collateral is None else _read(collateral, "collateral"),
        None if event_log is None else _read(event_log, "event log"),
        _reference(reference_values, by),
        _inventory(inventory, by),
        [_read(path, "enrolled key") for path in enrolled_ak or []],
        _moment(at),
        None if expect_report_data is None else _hex(expect_report_data),
    )
    if as_json:
        output.emit(verdict.explained() if explain else verdict.as_dict())
    else:
        _print(verdict, explain)
    if not verdict.ok:
        raise typer.Exit(1)


def _print(verdict: Verdict, explain: bool) -> None:
    output.line(f"{verdict.type}: {'acceptable' if verdict.ok else 'refused'}")
    output.line(f"  genuine: {'yes' if verdict.verified else 'no'}")
    if verdict.reason:
        output.line(f"  reason: {verdict.detail}")
    if explain:
        output.table(
            "Checks",
            ("field", "met", "expected", "actual"),
            [
                (each.field, "yes" if each.refusal is None else each.refusal.reason, each.expected, each.actual)
                for each in verdict.checks
            ],
        )
        return
    for name, value in sorted(verdict.claims.items()):
        output.line(f"  {name}: {value}")


def _judge(
    kind: str,
    evidence: bytes,
    endorsements: list[bytes],
    collateral: bytes | None,
    event_log: bytes | None,
    reference: ReferenceValues | None,
    inventory: Inventory | None,
    enrolled: list[bytes],
    now: int,
    expected: bytes | None,
) -> Verdict:
    # One import each, so that judging one type loads one vendor's code.
    if kind == "sev-snp":
        from keyquorum_core.attestation.verdict import judge_sev_snp

        return judge_sev_snp(
            evidence,
            endorsements,
            now=now,
            reference=None if reference is None else _section(reference.sev_snp, kind),
            inventory=inventory,
            expected_report_data=expected,
        )
    if kind == "tdx":
        from keyquorum_core.attestation.tdx_verdict import judge_tdx

        if collateral is None:
            raise typer.BadParameter("tdx evidence is judged with --collateral FILE")
        return judge_tdx(
            evidence,
            collateral,
            now=now,
            reference=None if reference is None else _section(reference.tdx, kind),
            inventory=inventory,
            event_log=event_log,
            expected_report_data=expected,
        )
    if kind == "nitro":
        from keyquorum_core.attestation.nitro_verdict import judge_nitro

        return judge_nitro(
            _nitro_document(evidence),
            now=now,
            reference=None if reference is None else _section(reference.nitro, kind),
            inventory=inventory,
            expected_report_data=expected,
        )
    if kind == "nvidia-gpu":
        from keyquorum_core.attestation.nvidia_verdict import judge_nvidia_gpu

        return judge_nvidia_gpu(
            evidence,
            endorsements,
            now=now,
            reference=None if reference is None else _section(reference.nvidia_gpu, kind),
            inventory=inventory,
            expected_nonce=expected,
        )
    from keyquorum_core.attestation.tpm2_verdict import judge_tpm2

    return judge_tpm2(
        evidence,
        now=now,
        enrolled_aks=[_fingerprint(each) for each in enrolled],
        reference=None if reference is None else _section(reference.tpm2, kind),
        inventory=inventory,
        expected_report_data=expected,
    )


def _section(section: T | None, kind: str) -> T:
    """A type's part of the reference values. Without one they accept no such evidence; that is no way to judge it."""
    if section is None:
        raise MalformedError(
            Reason.EVIDENCE_TYPE,
            f"the reference values say nothing about {kind}",
            expected=f"a section {kind!r}",
            actual="none",
        )
    return section


def _reference(path: Path | None, by: Trusted | None) -> ReferenceValues | None:
    if path is None:
        return None
    from keyquorum.bulletins import read_as
    from keyquorum_core.attestation.reference import REFERENCE_VALUES

    return read_as(REFERENCE_VALUES, _read(path, "reference values"), by)


def _inventory(path: Path | None, by: Trusted | None) -> Inventory | None:
    if path is None:
        return None
    from keyquorum.bulletins import read_as
    from keyquorum_core.attestation.inventory import INVENTORY

    return read_as(INVENTORY, _read(path, "inventory"), by)


def _fingerprint(key: bytes) -> str:
    """SHA-256 of an attestation key's SubjectPublicKeyInfo, hex, from PEM, DER or base64."""
    from keyquorum_core.attestation.tpm2_keys import read_key, read_spki

    try:
        return read_key(key.decode("ascii").strip()).fingerprint
    except UnicodeDecodeError:
        return read_spki(key).fingerprint


def _nitro_document(data: bytes) -> bytes:
    """The COSE_Sign1 structure at the start of a capture. What follows it is in no signature and is read by nobody;
    a custodian, which gets the document alone, refuses it."""
    from keyquorum_core.attestation.cbor import item_size

    try:
        size = item_size(data[:_MAX_NITRO], "Nitro document", max_depth=3)
    except MalformedError:
        return data  # judged, and refused, as it stands
    if size < len(data):
        output.note(f"note: {len(data) - size} bytes after the COSE_Sign1 structure are left out of the judgement")
    return data[:size]


def _read(path: Path, what: str) -> bytes:
    from keyquorum_protos.wire.files import read_bytes

    return read_bytes(path, what, max_bytes=_MAX_FILE)


def _moment(text: str | None) -> int:
    if text is None:
        return int(time.time())
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither unix seconds nor ISO 8601", param_hint="--at") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise MalformedError(
            Reason.MALFORMED, "--expect-report-data is not hex", expected="hex digits", actual=text[:40]
        ) from None
