"""Reads the signed vectors of docs/spec/vectors: base64 members as bytes, splices put together."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

__all__ = ["Vector", "load"]

Vector = dict[str, Any]
_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "spec" / "vectors"
_BLOBS = ("envelope", "payload", "sealed", "public", "private", "identity", "signer", "owner", "leaf", "recipient")


def load(name: str) -> dict[str, Any]:
    """The document, with ``vectors`` ready to use. Keys of ``identities``, where there are any, are bytes too."""
    document: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text())
    done: dict[str, Vector] = {}
    for vector in document["vectors"]:
        for member in set(_BLOBS) & set(vector):
            value = vector[member]
            if isinstance(value, dict):
                base: bytes = done[value["base"]][member]
                end = value["at"] + value["remove"]
                vector[member] = base[: value["at"]] + base64.b64decode(value["insert"]) + base[end:]
            else:
                vector[member] = base64.b64decode(value)
        assert vector["name"] not in done
        done[vector["name"]] = vector
    for identity in document.get("identities", {}).values():
        identity["public"] = base64.b64decode(identity["public"])
    return document
