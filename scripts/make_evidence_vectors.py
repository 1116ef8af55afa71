"""Write docs/spec/vectors/evidence.json: evidence documents, and what their items must be bound to.

Every value follows from fixed inputs, so that a new run writes the same file. ``document`` is the JSON text whose UTF-8
bytes are the document; ``expect`` is ``ok``, with the values that follow from it, or the reason code.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import rfc8785

from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce

TARGET = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors" / "evidence.json"
NONCES = (WindowNonce("ch-1", 60_000_000, b"\x01" * 32), WindowNonce("de-1", 60_000_001, b"\x02" * 32))
CPU = EvidenceItem("sev-snp", b"report", (b"vcek", b"ask", b"ark"))
TPM = EvidenceItem("tpm2", b"{}", ())
GPUS = tuple(EvidenceItem("nvidia-gpu", f"gpu {number}".encode(), (b"<rim/>",)) for number in range(2))


def document(*items: EvidenceItem, nonces: tuple[WindowNonce, ...] = NONCES) -> EvidenceDocument:
    return EvidenceDocument(nonces, b"an encoded HPKE key", b"\x05" * 1984, items)


def good(name: str, made: EvidenceDocument) -> dict[str, Any]:
    return {
        "name": name,
        "document": made.to_bytes().decode(),
        "expect": "ok",
        "types": [item.type for item in made.items],
        "digest": made.digest().hex(),
        "challenge": made.challenge().hex(),
        "gpu_nonce": made.gpu_nonce().hex(),
        "report_data": made.report_data().hex(),
    }


def bad(name: str, reason: str = "MALFORMED", **changes: Any) -> dict[str, Any]:
    members = {**json.loads(document(CPU).to_bytes()), **changes}
    present = {key: value for key, value in members.items() if value is not None}
    return {"name": name, "document": rfc8785.dumps(present).decode(), "expect": reason}


def item(each: EvidenceItem) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(document(each).to_bytes())["items"][0]
    return members


def main() -> None:
    text = document(CPU).to_bytes().decode()
    nonce = json.loads(text)["nonces"]
    cpu, gpu = item(CPU), item(GPUS[0])
    vectors = [
        good("one item", document(CPU)),
        good("one custodian", document(CPU, nonces=NONCES[:1])),
        good("a GPU and a CPU", document(GPUS[0], CPU)),
        good("two GPUs, a CPU and a TPM", document(*GPUS, CPU, TPM)),
        good("the same two GPUs in another order", document(*reversed(GPUS), CPU, TPM)),
        bad("no item", items=[]),
        bad("a type twice", items=[cpu, cpu]),
        bad("a GPU after the CPU", items=[cpu, gpu]),
        bad("a GPU before and one after", items=[gpu, cpu, gpu]),
        bad("a type in capitals", items=[{**cpu, "type": "SEV-SNP"}]),
        bad("evidence that is empty", items=[{**cpu, "evidence": ""}]),
        bad("base64 without padding", items=[{**cpu, "evidence": "cmVwb3J0c"}]),
        bad("an item with a further member", items=[{**cpu, "region": "CH"}]),
        bad("no nonce", nonces=[]),
        bad("nonces not sorted", nonces=nonce[::-1]),
        bad("a custodian twice", nonces=[nonce[0], nonce[0]]),
        bad("a nonce of 31 bytes", nonces=[{**nonce[0], "nonce": "01" * 31}]),
        bad("a short signing key", signing_key=base64.b64encode(b"\x05" * 1983).decode()),
        bad("another version", v=2),
        bad("no version", v=None),
        bad("a further member", region="CH"),
        {"name": "not canonical", "document": text + "\n", "expect": "MALFORMED"},
        {"name": "a member twice", "document": text.replace('"v":1', '"v":1,"v":1'), "expect": "MALFORMED"},
    ]
    about = "Evidence documents and what their items are bound to; docs/spec/evidence.md"
    TARGET.write_text(json.dumps({"about": about, "vectors": vectors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
