"""A binding for collectors: keys and a challenge that are only bytes."""

from __future__ import annotations

from keyquorum_gpu_worker.evidence import Binding

__all__ = ["BINDING"]

BINDING = Binding(b"an encoded HPKE key", b"\x05" * 1984, bytes(range(32)))
