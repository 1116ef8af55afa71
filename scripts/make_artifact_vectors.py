"""Write docs/spec/vectors/artifact.json: artifacts under fixed salts and nonce prefixes, and what must be refused.

    python scripts/make_artifact_vectors.py [--check]

Plaintexts are long, so a vector gives the plaintext's size (byte *i* is *i* mod 251) and the ciphertext's SHA-256;
short ciphertexts stand in full. A negative vector names a positive one and the single thing changed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

from keyquorum_core import artifact

TARGET = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors" / "artifact.json"
FIRST = artifact.SEGMENT_BYTES - artifact.HEADER_BYTES - 16
FULL = artifact.SEGMENT_BYTES - 16
IN_FULL = 256  # bytes of ciphertext up to which it is written out

SIZES = {
    "empty": 0,
    "one byte": 1,
    "short": 100,
    "one byte less than the first segment": FIRST - 1,
    "the first segment exactly": FIRST,
    "one byte more than the first segment": FIRST + 1,
    "two segments exactly": FIRST + FULL,
    "three segments": FIRST + FULL + 12345,
}

NEGATIVE: list[dict[str, object]] = [
    {"name": "nothing at all", "of": "short", "keep": 0},
    {"name": "cut off in the header", "of": "short", "keep": 39},
    {"name": "cut off after the header", "of": "short", "keep": 40},
    {"name": "cut off in the tag", "of": "empty", "keep": 55},
    {"name": "cut off in the only segment", "of": "short", "keep": 155},
    {"name": "cut off after the first segment", "of": "three segments", "keep": 1 << 20},
    {"name": "cut off after the second segment", "of": "three segments", "keep": 2 << 20},
    {"name": "cut off one byte into the last segment", "of": "three segments", "keep": (2 << 20) + 1},
    {"name": "one byte appended", "of": "short", "append": "00"},
    {"name": "one byte appended at a segment boundary", "of": "two segments exactly", "append": "00"},
    {"name": "another header length", "of": "short", "flip": {"offset": 0, "mask": 1}},
    {"name": "a changed salt", "of": "short", "flip": {"offset": 1, "mask": 128}},
    {"name": "a changed nonce prefix", "of": "short", "flip": {"offset": 39, "mask": 1}},
    {"name": "a changed ciphertext", "of": "short", "flip": {"offset": 40, "mask": 1}},
    {"name": "a changed tag", "of": "short", "flip": {"offset": 155, "mask": 1}},
    {"name": "a change in the second segment", "of": "three segments", "flip": {"offset": 1 << 20, "mask": 1}},
    {"name": "segments 1 and 2 swapped", "of": "three segments", "segments": [0, 2, 1]},
    {"name": "segment 1 left out", "of": "three segments", "segments": [0, 2]},
    {"name": "segment 1 repeated", "of": "three segments", "segments": [0, 1, 1, 2]},
    {"name": "the last segment repeated", "of": "two segments exactly", "segments": [0, 1, 1]},
    {"name": "another key", "of": "short", "key": "01" * 32},
    {"name": "other associated data", "of": "short", "associated_data": "00"},
    {"name": "no associated data", "of": "short", "associated_data": ""},
]


def plaintext(size: int) -> bytes:
    """``size`` bytes, byte *i* being *i* mod 251."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def fixed(salt: bytes, prefix: bytes) -> Callable[[int], bytes]:
    """A random source that gives out a known salt and nonce prefix."""
    return lambda size: {len(salt): salt, len(prefix): prefix}[size]


def build() -> str:
    positive: list[dict[str, object]] = []
    for number, (name, size) in enumerate(SIZES.items()):
        key = hashlib.sha256(f"key {number}".encode()).digest()
        salt = hashlib.sha256(f"salt {number}".encode()).digest()
        prefix = hashlib.sha256(f"prefix {number}".encode()).digest()[:7]
        bound = artifact.binding("abcdefghijklmnopqrstuvwxyz", "bundle")
        sink = io.BytesIO()
        data = plaintext(size)
        artifact.encrypt_stream(key, io.BytesIO(data), sink, bound, rng=fixed(salt, prefix))
        sealed = sink.getvalue()
        vector: dict[str, object] = {
            "name": name,
            "key": key.hex(),
            "associated_data": bound.hex(),
            "salt": salt.hex(),
            "nonce_prefix": prefix.hex(),
            "plaintext_bytes": size,
            "plaintext_sha256": hashlib.sha256(data).hexdigest(),
            "ciphertext_bytes": len(sealed),
            "ciphertext_sha256": hashlib.sha256(sealed).hexdigest(),
        }
        if len(sealed) <= IN_FULL:
            vector["ciphertext"] = sealed.hex()
        positive.append(vector)
    return json.dumps({"vectors": positive, "refused": NEGATIVE}, indent=1, ensure_ascii=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the file is not what this script writes")
    built = build()
    if parser.parse_args().check:
        return 0 if TARGET.read_text("utf-8") == built else 1
    TARGET.write_text(built, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
