"""A keyquorum custodian: a node that holds seeds and decides for itself what to release them for."""

from __future__ import annotations

__version__ = "0.1.0"
