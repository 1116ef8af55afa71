#!/usr/bin/env python3
"""Write docs/spec/vectors/data.json: data files put together from JSON, AES-GCM-SIV and HKDF alone.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyquorum_core.transcript import transcript
from vector_files import keep

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "data.json"
DATA_KEY = bytes(range(32))
FILE_KEY = bytes(range(64, 96))
LASTING = {
    "cipher": "AES256-GCM-HKDF-1MB",
    "classification": "personal",
    "cluster": "demo",
    "export_control": "EAR99",
    "file_id": "0f" * 32,
    "key_id": "chem-2027",
    "name": "patients",
    "owner": "alice",
    "purpose": "data",
}


def canonical(members: dict[str, object]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def artifact(plaintext: bytes) -> bytes:
    salt, prefix = b"\x11" * 32, b"\x22" * 7
    bound = transcript("keyquorum/v1/data", canonical(dict(LASTING)))
    key = HKDF(SHA256(), 32, salt=salt, info=bound).derive(FILE_KEY)
    return bytes([40]) + salt + prefix + AESGCM(key).encrypt(prefix + bytes(4) + b"\x01", plaintext, None)


def front(header: bytes, data_key: bytes, *, bound: bytes | None = None) -> bytes:
    nonce = b"\x33" * 12
    aad = transcript("keyquorum/v1/data-wrap", header if bound is None else bound)
    wrapped = nonce + AESGCMSIV(data_key).encrypt(nonce, FILE_KEY, aad)
    return (b"keyquorum-data-v1\n" + len(header).to_bytes(2, "big") + header + wrapped).ljust(4096, b"\0")


def header(epoch: int, check: str, **changes: object) -> bytes:
    changing = {"epoch": epoch, "key_check": check, "wrap": "AES-256-GCM-SIV"}
    return canonical({**LASTING, **changing, **changes})


def render() -> str:
    first, second = header(1, "aa" * 16), header(2, "bb" * 16)
    whole = artifact(b"a record")
    other_key = bytes(32)
    cases: list[tuple[str, str, bytes, bytes]] = [
        ("epoch 1", "ok", DATA_KEY, front(first, DATA_KEY) + whole),
        ("rewrapped to epoch 2", "ok", other_key, front(second, other_key) + whole),
        ("another key", "UNSEAL", other_key, front(first, DATA_KEY) + whole),
        ("an epoch it was not wrapped for", "UNSEAL", DATA_KEY, front(second, DATA_KEY, bound=first) + whole),
        ("cut short", "ARTIFACT", DATA_KEY, front(first, DATA_KEY) + whole[:-1]),
        ("no artifact", "ARTIFACT", DATA_KEY, front(first, DATA_KEY)),
        ("another classification", "ARTIFACT", DATA_KEY,
         front(header(1, "aa" * 16, classification="public"), DATA_KEY) + whole),
        ("epoch 0", "MALFORMED", DATA_KEY, front(header(0, "aa" * 16), DATA_KEY) + whole),
        ("another purpose", "MALFORMED", DATA_KEY, front(header(1, "aa" * 16, purpose="tokenize"), DATA_KEY) + whole),
        ("another cipher", "MALFORMED", DATA_KEY, front(header(1, "aa" * 16, cipher="none"), DATA_KEY) + whole),
        ("an unknown member", "MALFORMED", DATA_KEY, front(header(1, "aa" * 16, more=1), DATA_KEY) + whole),
        ("not canonical", "MALFORMED", DATA_KEY, front(first.replace(b",", b", ", 1), DATA_KEY) + whole),
        ("a byte in the zeros", "MALFORMED", DATA_KEY, front(first, DATA_KEY)[:-1] + b"\1" + whole),
        ("half a preamble", "MALFORMED", DATA_KEY, front(first, DATA_KEY)[:2048]),
        ("a header that is too long", "TOO_LARGE", DATA_KEY,
         b"keyquorum-data-v1\n\xff\xff" + front(first, DATA_KEY)[20:]),
        ("something else", "MALFORMED", DATA_KEY, b"a record"),
    ]  # fmt: skip
    vectors = []
    for name, expect, key, file in cases:
        vector = {"name": name, "expect": expect, "data_key": key.hex(), "file": base64.b64encode(file).decode()}
        if expect == "ok":
            of = first if name == "epoch 1" else second
            vector["plaintext"] = b"a record".hex()
            vector["wrapping"] = transcript("keyquorum/v1/data-wrap", of).hex()
            vector["binding"] = transcript("keyquorum/v1/data", canonical(dict(LASTING))).hex()
        vectors.append(vector)
    return json.dumps({"about": "Data files; docs/spec/data.md", "vectors": vectors}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(keep(PATH, render))
