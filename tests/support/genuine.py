"""Genuine evidence of every type in named parts, and how it is judged: what bit flips and fuzzers start from.

Each exists as made by the tests' own vendors and, where the folder of vectors is there, by real hardware.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keyquorum_core.attestation.cbor import item_size
from keyquorum_core.attestation.nitro_reference import NitroReferenceValues
from keyquorum_core.attestation.nitro_verdict import judge_nitro
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.nvidia_verdict import judge_nvidia_gpu
from keyquorum_core.attestation.snp_report import read_report
from keyquorum_core.attestation.tdx_reference import TdxReferenceValues
from keyquorum_core.attestation.tdx_verdict import judge_tdx
from keyquorum_core.attestation.tpm2 import Tpm2Evidence
from keyquorum_core.attestation.tpm2_keys import read_key
from keyquorum_core.attestation.tpm2_verdict import judge_tpm2
from keyquorum_core.attestation.verdict import Verdict, judge_sev_snp
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm, vendor
from tests.support.vectors import vector

__all__ = ["OWN", "REAL", "Genuine", "nitro_reference", "nitro_reference_json", "tdx_reference", "tdx_reference_json"]

Parts = Mapping[str, bytes]


@dataclass(frozen=True)
class Genuine:
    """Evidence that is genuine as it stands."""

    type: str
    parts: Parts
    judge_then: Callable[[Parts, int], Verdict]
    """Judges parts at a moment (unix seconds)."""
    now: int
    """When it is acceptable."""
    unsigned: Mapping[str, Sequence[range]] = field(default_factory=dict)
    """Bytes of a part that no signature or digest covers; a part that is not here is covered whole."""

    def judge(self, parts: Parts) -> Verdict:
        return self.judge_then(parts, self.now)

    def with_part(self, name: str, data: bytes) -> Verdict:
        """The verdict with one part replaced."""
        return self.judge({**self.parts, name: data})


def _moment(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def _snp(parts: Parts, now: int, *, own: bool) -> Verdict:
    endorsements = [parts[each] for each in ("vek", "intermediate", "root") if each in parts]
    reference = vendor.reference_values().sev_snp if own else None
    return judge_sev_snp(parts["report"], endorsements, now=now, reference=reference)


@cache
def own_sev_snp() -> Genuine:
    chip = vendor.development_chip()
    names = ("vek", "intermediate", "root")
    parts = {"report": chip.sign_report(bytes(range(64)), vendor.MEASUREMENT)}
    parts |= dict(zip(names, chip.endorsements, strict=True))
    return Genuine("sev-snp", parts, partial(_snp, own=True), vendor.CREATED_AT + 1000)


@cache
def real_sev_snp() -> Genuine:
    parts = {
        "report": read_report(vector("sev_snp/report_milan.hex")),
        "vek": vector("sev_snp/vcek_milan.der"),
        **dict(zip(("intermediate", "root"), _ders(vector("sev_snp/ask_ark_milan.pem")), strict=True)),
    }
    return Genuine("sev-snp", parts, partial(_snp, own=False), _moment("2024-06-01"))


def _ders(pem: bytes) -> list[bytes]:
    return [each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem)]


def tdx_reference_json() -> dict[str, object]:
    """What accepts :func:`own_tdx`."""
    registers = {f"rtmr{index}": [bytes([0xB0 + index] * 48).hex()] for index in range(4)}
    image = {"name": "worker", "mrtd": "a1" * 48, "mrconfigid": ["c0" * 48], **registers}
    return {
        "roots": [],
        "development_roots": [intel_vendor.intel_vendor().fingerprint],
        "images": [image],
        "minimum_tcb_evaluation_data_number": 18,
        "max_collateral_age": 864_000,
        "tcb_exceptions": [],
    }


def _tdx(parts: Parts, now: int, *, own: bool) -> Verdict:
    return judge_tdx(parts["quote"], parts["collateral"], now=now, reference=tdx_reference() if own else None)


def tdx_reference() -> TdxReferenceValues:
    return TdxReferenceValues.parse(tdx_reference_json())


@cache
def own_tdx() -> Genuine:
    parts = {"quote": intel_vendor.intel_vendor().quote(), "collateral": intel_vendor.good_collateral()}
    return Genuine("tdx", parts, partial(_tdx, own=True), intel_vendor.NOW, _around_strings(parts["collateral"]))


@cache
def real_tdx() -> Genuine:
    parts = {"quote": vector("tdx/tdx_quote"), "collateral": vector("tdx/tdx_quote_collateral.json")}
    return Genuine("tdx", parts, partial(_tdx, own=False), _moment("2025-07-01"), _around_strings(parts["collateral"]))


def _around_strings(collateral: bytes) -> Mapping[str, Sequence[range]]:
    """What is not the content of a value: the JSON around the values, which nobody signs."""
    ranges, at = [], 0
    for value in json.loads(collateral).values():
        for text in {json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]}:
            start = collateral.find(text.encode(), at)
            if start >= 0:
                ranges.append(range(at, start))
                at = start + len(text.encode())
                break
        else:
            raise AssertionError("a value of the collateral was not found in its bytes")
    return {"collateral": (*ranges, range(at, len(collateral)))}


def _tpm2(parts: Parts, now: int, *, template: Tpm2Evidence, enrolled: frozenset[str]) -> Verdict:
    bank, size = template.bank, len(next(iter(template.pcrs.values())))
    values = [parts["pcrs"][at : at + size] for at in range(0, len(parts["pcrs"]), size)]
    evidence = Tpm2Evidence(
        base64.b64encode(parts["ak"]).decode(),
        parts["quote"],
        parts["signature"],
        bank,
        dict(zip(sorted(template.pcrs), values, strict=True)),
        parts.get("event_log", b""),
    )
    return judge_tpm2(evidence.to_bytes(), now=0, enrolled_aks=enrolled)


def _tpm_parts(evidence: Tpm2Evidence) -> dict[str, bytes]:
    parts = {
        "ak": read_key(evidence.ak_public).spki,
        "quote": evidence.quote,
        "signature": evidence.signature,
        "pcrs": b"".join(value for _, value in sorted(evidence.pcrs.items())),
    }
    return parts | ({"event_log": evidence.event_log} if evidence.event_log else {})


@cache
def own_tpm2() -> Genuine:
    """With an event log, which no signature covers: only what it replays to is signed."""
    log, pcrs = soft_tpm.secure_boot_log()
    evidence = soft_tpm.evidence(fields=soft_tpm.QuoteFields(pcrs=pcrs), event_log=log)
    judge = partial(_tpm2, template=evidence, enrolled=frozenset({soft_tpm.soft_key().fingerprint}))
    return Genuine("tpm2", _tpm_parts(evidence), judge, 0, {"event_log": (range(len(log)),)})


@cache
def real_tpm2() -> Genuine:
    document = json.loads(vector("tpm/tpm_evidence.json"))
    quote = document["tpm_quote"]
    evidence = Tpm2Evidence(
        document["ak_public"],
        base64.b64decode(quote["message"]),
        base64.b64decode(quote["signature"]),
        "sha256",
        {index: bytes.fromhex(value) for index, value in enumerate(quote["pcrs"])},
    )
    enrolled = frozenset({read_key(evidence.ak_public).fingerprint})
    return Genuine("tpm2", _tpm_parts(evidence), partial(_tpm2, template=evidence, enrolled=enrolled), 0)


def _gpu(parts: Parts, now: int, *, own: bool) -> Verdict:
    endorsements = [data for name, data in parts.items() if name != "report"]
    reference = NvidiaReferenceValues.parse(nvidia.reference_json()) if own else None
    return judge_nvidia_gpu(parts["report"], endorsements, now=now, reference=reference)


@cache
def own_nvidia_gpu() -> Genuine:
    chain = nvidia.gpu().chain
    parts = {"report": nvidia.gpu().report()}
    parts |= {f"certificate {index}": der for index, der in enumerate(chain.ders)}
    parts |= {"driver RIM": nvidia.rim_maker().driver, "VBIOS RIM": nvidia.rim_maker().vbios}
    parts["OCSP response"] = nvidia.ocsp_response(chain.links[1], chain.links[2])
    return Genuine(
        "nvidia-gpu",
        parts,
        partial(_gpu, own=True),
        nvidia.CREATED_AT + 2000,
        {name: _outside_signature(parts[name]) for name in ("driver RIM", "VBIOS RIM")},
    )


@cache
def real_nvidia_gpu() -> Genuine:
    chain = _ders(vector("nvidia/hopper_535.86.09_chain.txt"))
    rim = vector("nvidia/vbios_1010_0200_882_96005E0001.swidtag")
    parts = {"report": bytes.fromhex(vector("nvidia/hopper_535.86.09_report.txt").decode().strip())}
    parts |= {f"certificate {index}": der for index, der in enumerate(chain)}
    parts["VBIOS RIM"] = rim
    judge = partial(_gpu, own=False)
    return Genuine("nvidia-gpu", parts, judge, _moment("2025-01-15"), {"VBIOS RIM": _outside_signature(rim)})


_SIGNATURE = re.compile(rb"<(?:\w+:)?Signature[ >]")


def _outside_signature(rim: bytes) -> Sequence[range]:
    """The prolog, and the signature's own markup, of which only ``SignedInfo`` is signed."""
    signature = _SIGNATURE.search(rim)
    assert signature is not None
    signed_info = rim.index(b"SignedInfo", signature.start())
    end = rim.index(b"SignedInfo", signed_info + 1)
    return range(rim.index(b"<SoftwareIdentity")), range(signature.start(), signed_info), range(end, len(rim))


def _nitro(parts: Parts, now: int, *, own: bool) -> Verdict:
    return judge_nitro(parts["document"], now=now, reference=nitro_reference() if own else None)


def nitro_reference() -> NitroReferenceValues:
    return NitroReferenceValues.parse(nitro_reference_json())


def nitro_reference_json() -> dict[str, object]:
    """What accepts :func:`own_nitro`."""
    pcrs = {str(index): bytes([0xD0 + index] * 48).hex() for index in range(3)}
    return {
        "roots": [],
        "development_roots": [nitro_vendor.nitro_vendor().fingerprint],
        "images": [{"name": "worker", "pcrs": pcrs}],
        "max_document_age": 300,
    }


@cache
def own_nitro() -> Genuine:
    document = nitro_vendor.nitro_vendor().document()
    return Genuine("nitro", {"document": document}, partial(_nitro, own=True), nitro_vendor.NOW + 60)


@cache
def real_nitro() -> Genuine:
    """It binds no key, so it is genuine and not acceptable."""
    captured = vector("nitro/nitro_attestation.bin")
    document = captured[4 : 4 + item_size(captured[4:], "document", max_depth=3)]
    return Genuine("nitro", {"document": document}, partial(_nitro, own=False), _moment("2025-12-25T13:15:37"))


OWN: Mapping[str, Callable[[], Genuine]] = {
    "sev-snp": own_sev_snp,
    "tdx": own_tdx,
    "tpm2": own_tpm2,
    "nvidia-gpu": own_nvidia_gpu,
    "nitro": own_nitro,
}
"""By type; made here, so that a fresh clone tests every check."""
REAL: Mapping[str, Callable[[], Genuine]] = {
    "sev-snp": real_sev_snp,
    "tdx": real_tdx,
    "tpm2": real_tpm2,
    "nvidia-gpu": real_nvidia_gpu,
    "nitro": real_nitro,
}
"""By type; each skips the test where the vectors are not there."""
