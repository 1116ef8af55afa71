"""What the scripts that write docs/spec/vectors share: fixed keys, edits, splices, and files that can be checked.

A splice is ``{"base": name, "at": i, "remove": n, "insert": base64}``: the same member of vector ``base`` with ``n``
bytes at offset ``i`` replaced. Keys are fixed, but HPKE encryption and ML-DSA signing are randomised: where they are
used a new run writes other, equally valid bytes. So run it only to add vectors, and keep old files in mind: what they
hold must open for ever.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity

VECTORS = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors"
NOW = 1_800_000_000
BLOBS = {"envelope", "payload", "sealed", "public", "private", "identity", "signer", "owner"}
Vector = dict[str, Any]


def keep(path: Path, render: Callable[[], str]) -> int:
    """The exit status of a script whose bytes are always the same: it writes them, or, asked to ``--check``, says 1
    where the file has others."""
    if "--check" not in sys.argv[1:]:
        path.write_text(render(), encoding="utf-8")
        return 0
    return int(path.read_text(encoding="utf-8") != render())


def make_named(*known: Callable[[], None]) -> None:
    """Run those whose names, as files have them, were given."""
    for make in known:
        if make.__name__.replace("_", "-") in sys.argv[1:]:
            make()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def fixed(name: str, size: int = 32) -> bytes:
    return hashlib.shake_256(b"keyquorum vectors: " + name.encode()).digest(size)


def identity(name: str) -> Identity:
    return Identity.from_seeds(fixed(name + " ed25519"), fixed(name + " ml-dsa"))


def recipient(name: str, suite: str) -> RecipientKey:
    raw = fixed(name) if suite == "MLKEM768_X25519" else fixed(name, 64) + b"\x00" + fixed(name + " p384", 47)
    return RecipientKey.from_seed_bytes(len(suite).to_bytes(2, "big") + suite.encode() + raw)


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    out = bytearray(data)
    out[position] ^= 1 << bit
    return bytes(out)


def edited(envelope: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(envelope), **changes}, separators=(",", ":")).encode()


def common(a: bytes, b: bytes) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def splice(base: str, old: bytes, new: bytes) -> Vector:
    """``new`` as the smallest single edit of ``old``."""
    head = common(old, new)
    tail = common(old[head:][::-1], new[head:][::-1])
    return {"base": base, "at": head, "remove": len(old) - head - tail, "insert": b64(new[head : len(new) - tail])}


def compact(vectors: list[Vector]) -> None:
    """Replace blobs that nearly repeat the same member of an earlier vector by a splice of it."""
    seen: dict[str, list[tuple[str, bytes]]] = {}
    for vector in vectors:
        for member in BLOBS & set(vector):
            blob = base64.b64decode(vector[member])
            bases = seen.setdefault(member, [])
            edits = [splice(base, old, blob) for base, old in bases]
            best = min(edits, key=lambda edit: len(edit["insert"]), default=None)
            if best is not None and len(best["insert"]) + 80 < len(vector[member]) // 2:
                vector[member] = best
            elif len(blob) > 256:
                bases.append((vector["name"], blob))


def write(name: str, about: str, vectors: list[Vector], **shared: Any) -> None:
    names = [vector["name"] for vector in vectors]
    if len(set(names)) != len(names):
        raise SystemExit(f"{name}: a vector name is used twice")
    compact(vectors)
    document = {"about": about, **shared, "vectors": vectors}
    (VECTORS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=True) + "\n")
