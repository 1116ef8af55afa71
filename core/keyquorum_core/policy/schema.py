"""The one schema that every policy is held to (``schema.cedarschema``), parsed once.

Cedar validates policies against it when they are loaded. Requests need no check of their own: they are only made by
:mod:`~keyquorum_core.policy.facts`, whose every form a test holds to this schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final

import cedarpy

__all__ = ["ACTIONS", "PRINCIPALS", "RESOURCES", "SCHEMA_TEXT", "schema", "schema_digest"]

SCHEMA_TEXT: Final = files(__package__).joinpath("schema.cedarschema").read_text("utf-8")

ACTIONS: Final = ("submit", "release", "enrol", "rotate", "destroy")

PRINCIPALS: Final[Mapping[str, tuple[str, ...]]] = {
    "submit": ("Owner",),
    "release": ("Owner", "Worker"),
    "enrol": ("Custodian", "Worker"),
    "rotate": ("Custodian",),
    "destroy": ("Custodian",),
}
RESOURCES: Final[Mapping[str, str]] = {
    "submit": "Job",
    "release": "Job",
    "enrol": "Cluster",
    "rotate": "Key",
    "destroy": "Key",
}


@cache
def schema() -> cedarpy.Schema:
    return cedarpy.Schema.from_str(SCHEMA_TEXT)


def schema_digest() -> str:
    """SHA-256 of the schema's text, hex."""
    return hashlib.sha256(SCHEMA_TEXT.encode()).hexdigest()
