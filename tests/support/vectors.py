"""Real evidence, which is never committed: in ``KEYQUORUM_VECTORS``, or ``../shared/vectors`` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["VECTORS", "vector", "vectors_folder"]

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
VECTORS = Path(os.environ.get("KEYQUORUM_VECTORS") or _BESIDE)
"""The folder, which may not be there."""


def vectors_folder() -> Path:
    """Where the vectors are; skips the test, saying why, where the folder is absent."""
    if not VECTORS.is_dir():
        pytest.skip(f"no evidence vectors: set KEYQUORUM_VECTORS (looked for {VECTORS.name} in {VECTORS.parent.name})")
    return VECTORS


def vector(name: str) -> bytes:
    """The bytes of one vector; skips as :func:`vectors_folder`."""
    return (vectors_folder() / name).read_bytes()
