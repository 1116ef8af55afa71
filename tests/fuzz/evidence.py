"""The parsers of evidence: reports, quotes, certificates, collateral, logs, manifests, responses."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial

from keyquorum_core.attestation import cbor, nvidia_rim, tdx_events, tpm2_events
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.firmware_image import parse_firmware
from keyquorum_core.attestation.inventory import Inventory
from keyquorum_core.attestation.nitro_document import parse_document
from keyquorum_core.attestation.nitro_reference import NitroReferenceValues
from keyquorum_core.attestation.nvidia_certificates import read_certificates
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.nvidia_report import parse_report as parse_gpu_report
from keyquorum_core.attestation.nvidia_report import read_report as read_gpu_report
from keyquorum_core.attestation.pe_image import authenticode_sha384
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.snp_measure import DirectBoot, snp_measurement
from keyquorum_core.attestation.snp_reference import SnpReferenceValues
from keyquorum_core.attestation.snp_report import parse_report, read_report
from keyquorum_core.attestation.tdx_collateral import parse_collateral, parse_pck_chain
from keyquorum_core.attestation.tdx_measure import tdx_mrtd
from keyquorum_core.attestation.tdx_quote import parse_quote as parse_tdx_quote
from keyquorum_core.attestation.tdx_reference import TdxReferenceValues
from keyquorum_core.attestation.tpm2 import Tpm2Evidence
from keyquorum_core.attestation.tpm2 import verify as verify_tpm2
from keyquorum_core.attestation.tpm2_endorsement import verify_ek_certificates
from keyquorum_core.attestation.tpm2_enrolment import challenge
from keyquorum_core.attestation.tpm2_keys import read_key, read_spki, verify_signature
from keyquorum_core.attestation.tpm2_messages import (
    answer_bytes,
    candidate_bytes,
    credential_bytes,
    parse_answer,
    parse_candidate,
    parse_credential,
    parse_pending,
    pending_bytes,
)
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.attestation.tpm2_structures import hash_by_name, parse_public, parse_quote, parse_signature
from keyquorum_core.bulletin import Bulletin
from keyquorum_core.strictjson import Fields, loads
from tests.fuzz.target import Target, of_genuine, one_of
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm, tpm_maker, vendor
from tests.support.firmware import firmware, pe_image
from tests.support.genuine import OWN, REAL, Genuine, nitro_reference_json, tdx_reference_json
from tests.support.vectors import VECTORS

__all__ = ["EVIDENCE"]


def both(kind: str) -> Sequence[Callable[[], Genuine]]:
    """Of our making, and of real hardware where it is there."""
    return [OWN[kind], REAL[kind]] if VECTORS.is_dir() else [OWN[kind]]


def parts(kind: str, *names: str) -> list[bytes]:
    return [data for make in both(kind) for name, data in make().parts.items() if not names or name in names]


def event_log(bank: str, data: bytes) -> object:
    chosen = hash_by_name(bank)
    assert chosen is not None
    return tpm2_events.secure_boot(tuple(tpm2_events.parse_event_log(data, chosen).events))


def ek_certificates(which: int, data: bytes) -> object:
    """One of a chain of three is fuzzed."""
    chain = list(tpm_maker.maker().certificates())
    chain[which] = data
    return verify_ek_certificates(chain, pinned_roots={tpm_maker.maker().root}, now=tpm_maker.NOW)


def tpm_signature(data: bytes) -> object:
    return verify_signature(read_spki(soft_tpm.soft_key().spki), b"a quote", data)


def tpm_structures() -> list[tuple[int, bytes]]:
    rsa, ecc = soft_tpm.soft_key(), soft_tpm.soft_key("p384")
    ek = soft_tpm.soft_key().area(soft_tpm.EK_ATTRIBUTES, scheme=None, symmetric=(6, 128, 0x43))
    found = [(0, data) for data in parts("tpm2", "quote")]
    found += [(1, rsa.sign(b"a quote")), (1, ecc.sign(b"a quote", hash_name="sha384"))]
    return [*found, (2, rsa.area()), (2, ecc.area()), (2, ek)]


def tpm_keys() -> list[tuple[int, bytes]]:
    rsa, ecc = soft_tpm.soft_key(), soft_tpm.soft_key("p256")
    found = [(0, rsa.pem.encode()), (0, ecc.pem.encode()), (0, base64.b64encode(rsa.spki))]
    return [*found, (1, rsa.spki), (1, ecc.spki), (2, rsa.sign(b"a quote")), (2, rsa.sign(b"a quote", form="plain"))]


def tpm_messages() -> list[tuple[int, bytes]]:
    maker = tpm_maker.maker()
    credential, pending = challenge(maker.candidate(), pinned_roots={maker.root}, now=tpm_maker.NOW)
    made = (candidate_bytes(maker.candidate()), credential_bytes(credential), answer_bytes(bytes(32)))
    return list(enumerate((*made, pending_bytes(pending))))


def tpm_evidence() -> list[bytes]:
    log, pcrs = soft_tpm.secure_boot_log()
    with_log = soft_tpm.evidence(fields=soft_tpm.QuoteFields(pcrs=pcrs), event_log=log)
    return [with_log.to_bytes(), soft_tpm.evidence(soft_tpm.soft_key("p256")).to_bytes()]


def tdx_logs() -> list[bytes]:
    """In the form that is read, with events of every kind that has a rule of its own."""
    first = b"Spec ID Event03\0" + bytes(4) + b"\0\x02\0\x02\x01\0\0\0\x0c\0\x30\0\0"
    out = b"".join(each.to_bytes(4, "little") for each in (1, 3)) + bytes(20) + len(first).to_bytes(4, "little") + first
    for kind in (0x4, 0x5, 0x80000001, 0x80000002, 0x80000003, 0x800000E0, 0x3):
        data = soft_tpm.variable("SecureBoot", b"\x01") if kind >> 31 else bytes(4)
        digest = bytes(48) if kind == 3 else hashlib.sha384(data).digest()
        out += b"".join(each.to_bytes(4, "little") for each in (1, kind, 1)) + b"\x0c\0" + digest
        out += len(data).to_bytes(4, "little") + data
    return [out, out + b"\xff" * 64]


def signed_nitro(payload: bytes) -> object:
    """What stands behind the signature: a payload is signed, whatever it is."""
    signed = nitro_vendor.nitro_vendor().sign(payload)
    return OWN["nitro"]().judge({"document": signed})


def nitro_payloads() -> list[bytes]:
    made = nitro_vendor.nitro_vendor()
    return [nitro_vendor.payload_of(made.members()), nitro_vendor.payload_of(made.members(user_data=b"u" * 9))]


def signed_rim(data: bytes) -> object:
    """The same for a RIM: the manifest is signed where XML can be read from it at all."""
    try:
        signed = nvidia.rim_maker().sign(data.decode("utf-8"))
    except Exception:  # what lxml, decoding and splitting say of bytes that cannot be signed is none of ours
        return None
    root = nvidia.rim_maker().chain.root
    return nvidia_rim.verify_rim(signed, pinned_roots={root}, now=nvidia.CREATED_AT + 1000)


def is_certificate(name: str) -> bool:
    return name in ("vek", "intermediate", "root") or name.startswith("certificate")


MEMBERS: Sequence[Callable[[object], object]] = (
    TdxReferenceValues.parse, Tpm2ReferenceValues.parse, NvidiaReferenceValues.parse, NitroReferenceValues.parse,
    SnpReferenceValues.parse,
)  # fmt: skip


def member(parse: Callable[[object], object]) -> Callable[[bytes], object]:
    return lambda data: parse(loads(data, "reference values"))


def snp_image(data: bytes) -> bytes:
    return snp_measurement(data, cpus=2, signature=0x00A00F11, boot=DirectBoot(b"kernel"))


def _object(data: bytes) -> dict[str, object]:
    fields = Fields(loads(data, "body"), "body")
    return {name: fields.raw(name) for name in fields.names()}


def body(read: Callable[[Bulletin], object]) -> Callable[[bytes], object]:
    """Read bytes as a bulletin's body."""
    return lambda data: read(Bulletin("demo", "any", 1, 0, 1, _object(data)))


def reference_values() -> list[tuple[int, bytes]]:
    found: list[tuple[int, object]] = [
        (0, vendor.reference_json()), (1, tdx_reference_json()),
        (3, nvidia.reference_json()), (4, nitro_reference_json()),
        (2, {"bank": "sha256", "pcrs": {"0": ["11" * 32]}, "firmware_versions": ["2019102300163636"],
             "event_log_required": False, "secure_boot_required": False, "grace": []}),
        (5, vendor.reference_json()["sev-snp"]), (6, vendor.inventory_json()),
    ]  # fmt: skip
    return [(which, json.dumps(value).encode()) for which, value in found]


EVIDENCE: Sequence[Target] = (
    one_of("snp-report", [parse_report, lambda data: parse_report(read_report(data))],
           lambda: [(0, each) for each in parts("sev-snp", "report")]
           + [(1, each.hex().encode()) for each in parts("sev-snp", "report")], 4096),
    of_genuine("snp-certificates", both("sev-snp"), is_certificate, 4096),
    of_genuine("snp-evidence", both("sev-snp"), lambda name: name == "report", 1300),
    Target("tdx-quote", parse_tdx_quote, lambda: parts("tdx", "quote")),
    of_genuine("tdx-evidence", both("tdx"), lambda name: True, 1 << 15),
    one_of("tdx-collateral", [parse_collateral, parse_pck_chain],
           lambda: [(0, each) for each in parts("tdx", "collateral")] + [(1, intel_vendor.intel_vendor().pck_chain())],
           1 << 15),
    Target("tdx-event-log", lambda data: tdx_events.replay(tdx_events.parse_event_log(data)), tdx_logs),
    one_of("tpm2-structures", [parse_quote, parse_signature, parse_public], tpm_structures, 1100),
    one_of("tpm2-keys", [lambda data: read_key(data.decode("latin-1")), read_spki, tpm_signature], tpm_keys, 2048),
    one_of("tpm2-evidence", [Tpm2Evidence.parse, verify_tpm2],
           lambda: [(which, each) for each in tpm_evidence() for which in range(2)]),
    one_of("tpm2-event-log", [partial(event_log, bank) for bank in ("sha256", "sha384")],
           lambda: [(0, soft_tpm.secure_boot_log()[0]),
                    (1, soft_tpm.secure_boot_log(banks=("sha256", "sha384"))[0])]),
    one_of("tpm2-messages", [parse_candidate, parse_credential, parse_answer, parse_pending], tpm_messages, 4096),
    one_of("tpm2-endorsement", [partial(ek_certificates, which) for which in range(3)],
           lambda: enumerate(tpm_maker.maker().certificates()), 4096),
    one_of("nvidia-report", [parse_gpu_report, lambda data: parse_gpu_report(read_gpu_report(data))],
           lambda: [(0, each) for each in parts("nvidia-gpu", "report")]
           + [(1, base64.b64encode(each)) for each in parts("nvidia-gpu", "report")]),
    one_of("nvidia-certificates", [lambda data: read_certificates([data])],
           lambda: [(0, nvidia.gpu().chain.pem), *((0, each) for each in nvidia.gpu().chain.ders)], 8192),
    of_genuine("nvidia-evidence", both("nvidia-gpu"), lambda name: name == "report" or is_certificate(name), 8192),
    of_genuine("nvidia-rim", both("nvidia-gpu"), lambda name: name.endswith("RIM"), 1 << 15),
    Target("nvidia-signed-rim", signed_rim, lambda: [nvidia.rim_maker().xml(nvidia.VBIOS, range(3)).encode()]),
    of_genuine("nvidia-ocsp", [OWN["nvidia-gpu"]], lambda name: name.startswith("OCSP"), 4096),
    Target("nvidia-document", GpuEvidence.parse, lambda: [nvidia.evidence(0, 1)], 1 << 15),
    one_of("cbor", [partial(cbor.loads, what="fuzz", max_bytes=1 << 14, max_depth=4),
                    partial(cbor.loads, what="fuzz", max_bytes=1 << 14, max_depth=4, indefinite_maps=True)],
           lambda: [(which, each) for each in nitro_payloads() for which in (1, 0)]),
    Target("nitro-document", parse_document, lambda: parts("nitro"), 8192),
    of_genuine("nitro-evidence", both("nitro"), lambda name: True, 8192),
    Target("nitro-signed-payload", signed_nitro, nitro_payloads, 8192),
    Target("evidence-document", EvidenceDocument.parse,
           lambda: [vendor.evidence_document({"ch-1": (1, bytes(32)), "de-1": (2, bytes([7]) * 32)})], 1 << 15),
    one_of("reference-values",
           [body(ReferenceValues.read), *map(member, MEMBERS), body(Inventory.read)], reference_values),
    one_of("images", [parse_firmware, tdx_mrtd, snp_image, authenticode_sha384],
           lambda: [*((which, firmware()) for which in range(3)), (3, pe_image(b"c" * 16))], 1 << 17),
    Target("bulletin", Bulletin.parse, lambda: [vendor.bulletin("inventory", vendor.inventory_json()).payload()]),
)  # fmt: skip
