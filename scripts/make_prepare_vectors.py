#!/usr/bin/env python3
"""Write docs/spec/vectors/prepare.json: tokens and projections, from HMAC alone, to hold the module to the text.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import hmac
import json
import sys
from pathlib import Path

from keyquorum_core.transcript import transcript
from vector_files import keep

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "prepare.json"
KEY = bytes(range(32))
CASES = (("person", "Ada"), ("person", ""), ("patient", "Ada"), ("person", "Zoë 4711"), ("n", "-7"))


def token(key: bytes, domain: str, value: str) -> str:
    of_domain = hmac.digest(key, transcript("keyquorum/v1/token-domain", domain.encode()), "sha256")
    return hmac.digest(of_domain, value.encode(), "sha256")[:16].hex()


def signs(key: bytes, name: str, column: str, dimensions: int) -> list[int]:
    seed = transcript("keyquorum/v1/projection", name.encode(), column.encode())
    blocks = range(-(-dimensions // 256))
    stream = b"".join(hmac.digest(key, seed + block.to_bytes(4, "big"), "sha256") for block in blocks)
    return [1 if stream[i // 8] >> i % 8 & 1 else -1 for i in range(dimensions)]


def render() -> str:
    tokens = [
        {"key": KEY.hex(), "domain": domain, "value": value, "token": token(KEY, domain, value)}
        for domain, value in (
            ("person", "Ada"),
            ("person", ""),
            ("patient", "Ada"),
            ("person", "Zoë 4711"),
            ("n", "-7"),
        )
    ]
    projections = [
        {"key": KEY.hex(), "name": name, "column": column, "dimensions": size, "signs": signs(KEY, name, column, size)}
        for name, column, size in (("p", "a", 4), ("p", "b", 4), ("q", "a", 4), ("wide", "a", 300))
    ]
    return json.dumps({"tokens": tokens, "projections": projections}, indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    sys.exit(keep(PATH, render))
