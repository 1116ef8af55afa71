"""Workers of several pieces of hardware: documents of any set of the five types, and what accepts all of them.

One machine (``zrh-1``) has a development SEV-SNP chip, a TDX platform, a TPM, two GPUs and a Nitro instance; nobody
builds such a thing, and every check sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keyquorum_core.attestation.binding import gpu_digest, gpu_nonce, report_data
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.attestation.tpm2 import qualifying_data
from keyquorum_core.release import challenge
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm, vendor
from tests.support.genuine import nitro_reference_json, tdx_reference_json

__all__ = ["ALL", "NOW", "NVIDIA", "TYPES", "hardware", "inventory_body", "reference_body", "worker_document"]

NOW = intel_vendor.NOW
NVIDIA = "nvidia-gpu"
TYPES = ("sev-snp", "tdx", "tpm2", "nitro")
ALL = (NVIDIA, *TYPES)
PCRS = soft_tpm.PCRS


def reference_body(**changes: Any) -> dict[str, Any]:
    """Reference values for all five types; ``changes`` replace sections, by name with underscores."""
    body = vendor.reference_json() | {
        "tdx": tdx_reference_json(),
        "tpm2": {
            "bank": "sha256",
            "pcrs": {str(index): [value.hex()] for index, value in PCRS.items()},
            "firmware_versions": ["2019102300163636"],
            "grace": [],
            "event_log_required": False,
            "secure_boot_required": False,
        },
        NVIDIA: nvidia.reference_json(),
        "nitro": nitro_reference_json() | {"max_document_age": 3 * 3600},
    }
    return body | {name.replace("_", "-"): value for name, value in changes.items()}


def hardware() -> dict[str, list[str]]:
    """What the one machine is known by."""
    return {
        "sev-snp": [vendor.development_chip().chip_id.hex()],
        "tdx": [intel_vendor.PPID.hex()],
        "tpm2": [soft_tpm.soft_key().fingerprint],
        NVIDIA: [nvidia.serial(number) for number in range(2)],
        "nitro": [nitro_vendor.INSTANCE],
    }


def inventory_body(*machines: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, and further ones: ``hardware`` of theirs is taken from it."""
    own = hardware()
    for each in machines:
        for kind, ids in each["hardware"].items():
            own[kind] = [one for one in own.get(kind, []) if one not in ids]
    first = {**vendor.MACHINE, "hardware": {kind: ids for kind, ids in own.items() if ids}}
    return {"machines": [first, *({**vendor.MACHINE, **each} for each in machines)]}


def worker_document(
    types: Sequence[str],
    nonces: Mapping[str, tuple[int, bytes]],
    *,
    gpus: Sequence[Sequence[int]] = ((0,), (1,)),
    hpke_key: bytes = b"an encoded HPKE key",
    signing_key: bytes = b"\x05" * 1984,
    made_at: int = NOW,
    change: Callable[[EvidenceItem], EvidenceItem] = lambda item: item,
    quote: Mapping[str, Any] | None = None,
    bound: bytes | None = None,
) -> bytes:
    """A document of ``types``; GPUs as one item for each of ``gpus``. ``change`` alters each item once all is bound;
    ``quote`` are fields of the TPM's; ``bound`` replaces what everything but the GPUs is bound to."""
    asked = challenge({name: nonce for name, (_, nonce) in nonces.items()})
    items = []
    if NVIDIA in types:
        nonce = gpu_nonce(asked, hpke_key)
        shown = [nvidia.evidence(*numbers, nonce=nonce) for numbers in gpus]
        rims = (nvidia.rim_maker().driver, nvidia.rim_maker().vbios)
        items = [EvidenceItem(NVIDIA, each, rims if number == 0 else ()) for number, each in enumerate(shown)]
    digest = gpu_digest([each.evidence for each in items])
    data = report_data(hpke_key, signing_key, asked, digest) if bound is None else bound
    for kind in types:
        if kind == "sev-snp":
            chip = vendor.development_chip()
            items.append(EvidenceItem(kind, chip.sign_report(data, vendor.MEASUREMENT), chip.endorsements))
        elif kind == "tdx":
            made = intel_vendor.intel_vendor().quote(report_data=data)
            items.append(EvidenceItem(kind, made, (intel_vendor.good_collateral(),)))
        elif kind == "tpm2":
            fields = soft_tpm.QuoteFields(extra_data=qualifying_data(data), **(quote or {}))
            items.append(EvidenceItem(kind, soft_tpm.evidence(fields=fields).to_bytes(), ()))
        elif kind == "nitro":
            document = nitro_vendor.nitro_vendor().document(public_key=data, nonce=asked, timestamp=made_at * 1000)
            items.append(EvidenceItem(kind, document, ()))
    return EvidenceDocument(
        nonces=tuple(WindowNonce(name, window, nonce) for name, (window, nonce) in sorted(nonces.items())),
        hpke_key=hpke_key,
        signing_key=signing_key,
        items=tuple(change(each) for each in items),
    ).to_bytes()
