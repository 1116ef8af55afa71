"""``keyquorum-worker attest``: what evidence this machine gives, made over nonces that are given and shown to people.

Nothing here is judged. What custodians will say of it, ``keyquorum attest verify`` says, from the files that ``--out``
leaves.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keyquorum_core.attestation.binding import gpu_digest
from keyquorum_core.attestation.evidence import NVIDIA_GPU, EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.attestation.nitro_document import parse_document
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence
from keyquorum_core.attestation.nvidia_report import parse_report as parse_gpu_report
from keyquorum_core.attestation.snp_report import parse_report
from keyquorum_core.attestation.tdx_quote import parse_quote
from keyquorum_core.attestation.tpm2 import Tpm2Evidence, qualifying_data
from keyquorum_core.attestation.tpm2_structures import parse_quote as parse_tpm_quote
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.sealing import Suite
from keyquorum_gpu_worker.evidence import Binding, Collection
from keyquorum_gpu_worker.keys import JobKeys

__all__ = ["SELF", "made_document", "parse_nonce", "shown", "write_files"]

SELF = "self"
"""Whose nonce it is where none is given: no custodian's, so that nobody else will accept it."""

Facts = dict[str, object]


def parse_nonce(text: str) -> WindowNonce:
    """``CUSTODIAN:WINDOW:HEX``. Raises :class:`MalformedError`."""
    name, _, rest = text.partition(":")
    window, _, nonce = rest.partition(":")
    try:
        found = WindowNonce(name, int(window) if window.isascii() and window.isdigit() else -1, bytes.fromhex(nonce))
    except ValueError:
        found = WindowNonce("", -1, b"")
    if not found.custodian or found.window < 0 or len(found.nonce) != 32:
        raise MalformedError(
            Reason.MALFORMED, "bad nonce", expected="CUSTODIAN:WINDOW:HEX, 32 bytes in hex", actual=text[:100]
        )
    return found


def made_document(sources: Collection, nonces: Sequence[WindowNonce]) -> EvidenceDocument:
    """Evidence over these nonces, or one of our own, and keys that are forgotten. Raises what the sources raise."""
    keys = JobKeys.generate(Suite.MLKEM768_X25519)
    given = nonces or (WindowNonce(SELF, 0, secrets.token_bytes(32)),)
    return sources.document(given, keys.recipient.public, keys.identity.public.to_bytes())


def shown(document: EvidenceDocument, *, development: bool) -> Facts:
    """What ``--json`` prints: the document as a whole, and what each item says of itself."""
    data = document.to_bytes()
    gpus = [item.evidence for item in document.items if item.type == NVIDIA_GPU]
    binding = Binding(document.hpke_key, document.signing_key, document.challenge(), gpu_digest(gpus))
    return {
        "types": [item.type for item in document.items],
        "development": development,
        "challenge": binding.challenge.hex(),
        "report_data": binding.report_data.hex(),
        "gpu_nonce": binding.gpu_nonce.hex(),
        "sha256": document.digest().hex(),
        "size": len(data),
        "items": [
            {
                "type": item.type,
                **_FACTS[item.type](item.evidence, binding),
                "evidence": base64.b64encode(item.evidence).decode("ascii"),
                "endorsements": [base64.b64encode(each).decode("ascii") for each in item.endorsements],
            }
            for item in document.items
        ],
    }


def write_files(document: EvidenceDocument, folder: Path) -> list[Path]:
    """``document.json``, and each item's evidence and endorsements, as ``keyquorum attest verify`` reads them.

    Raises :class:`UnavailableError` (``STORAGE``)."""
    files = {"document.json": document.to_bytes()}
    for item in document.items:
        files |= _files(item)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, "the evidence cannot be written", expected=f"a folder {folder}", actual=error.strerror
        ) from None
    return [folder / name for name in files]


def _files(item: EvidenceItem) -> Mapping[str, bytes]:
    files: dict[str, bytes] = {}
    if item.type == NVIDIA_GPU:  # the command judges one GPU's bare report with its chain
        for number, gpu in enumerate(GpuEvidence.parse(item.evidence).gpus):
            files[f"{item.type}-{number}"] = gpu.report
            files |= {f"{item.type}-{number}.certificate-{at}.der": der for at, der in enumerate(gpu.chain)}
    else:
        files[item.type] = item.evidence
    return files | {f"{item.type}.endorsement-{at}": each for at, each in enumerate(item.endorsements)}


def _sev_snp(evidence: bytes, binding: Binding) -> Facts:
    report = parse_report(evidence)
    return {
        "bound": report.report_data == binding.report_data,
        "measurement": report.measurement.hex(),
        "chip_id": report.chip_id.hex(),
        "reported_tcb": report.reported_tcb.hex(),
        "debug": report.debug_allowed,
        "vmpl": report.vmpl,
    }


def _tdx(evidence: bytes, binding: Binding) -> Facts:
    quote = parse_quote(evidence)
    return {
        "bound": quote.report_data == binding.report_data,
        "mrtd": quote.mrtd.hex(),
        "rtmrs": [each.hex() for each in quote.rtmrs],
        "mrconfigid": quote.mrconfigid.hex(),
        "attributes": list(quote.names_of_attributes()),
    }


def _tpm2(evidence: bytes, binding: Binding) -> Facts:
    parsed = Tpm2Evidence.parse(evidence)
    quote = parse_tpm_quote(parsed.quote)
    return {
        "bound": quote.extra_data == qualifying_data(binding.report_data),
        "bank": parsed.bank,
        "pcrs": {str(index): value.hex() for index, value in sorted(parsed.pcrs.items())},
        "firmware_version": f"{quote.firmware_version:016x}",
        "event_log": bool(parsed.event_log),
    }


def _nitro(evidence: bytes, binding: Binding) -> Facts:
    document = parse_document(evidence)
    return {
        "bound": (document.public_key, document.nonce) == (binding.report_data, binding.challenge),
        "instance_id": document.instance_id,
        "pcrs": {str(index): value.hex() for index, value in sorted(document.pcrs.items()) if any(value)},
    }


def _nvidia_gpu(evidence: bytes, binding: Binding) -> Facts:
    found = GpuEvidence.parse(evidence)
    reports = [parse_gpu_report(gpu.report) for gpu in found.gpus]
    return {
        "bound": all(each.nonce == binding.gpu_nonce for each in reports),
        "environment": found.settings.environment,
        "cc_feature": found.settings.cc_feature,
        "developer_tools": found.settings.developer_tools,
        "gpus": [{"driver": each.driver_version, "vbios": each.vbios_version} for each in reports],
    }


_FACTS: Mapping[str, Callable[[bytes, Binding], Facts]] = {
    "sev-snp": _sev_snp,
    "tdx": _tdx,
    "tpm2": _tpm2,
    "nitro": _nitro,
    NVIDIA_GPU: _nvidia_gpu,
}
