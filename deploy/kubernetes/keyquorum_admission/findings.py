"""Why something is refused: one code per rule, and where in the object, in words that its author can act on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Rule"]


class Rule(StrEnum):
    """Stable codes, part of the API: what a pod that must attest has to meet."""

    MARK = "MARK"
    """The mark's value, its contradiction, its removal."""
    RUNTIME_CLASS = "RUNTIME_CLASS"
    NODE_SELECTOR = "NODE_SELECTOR"
    NODE_NAME = "NODE_NAME"
    IMAGE = "IMAGE"
    SECRET = "SECRET"  # noqa: S105 - a code
    HOST = "HOST"
    """A namespace or a file of the host, or of another container."""
    PRIVILEGE = "PRIVILEGE"
    VOLUME = "VOLUME"
    EPHEMERAL_CONTAINER = "EPHEMERAL_CONTAINER"
    RUNTIME_ANNOTATION = "RUNTIME_ANNOTATION"
    WORKER = "WORKER"
    """The worker's container or one of its volumes is missing or is not as configured."""
    SESSION = "SESSION"
    """Somebody wants into a running pod."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``actual`` is shown to people and logged: never the value of a variable."""

    rule: Rule
    field: str
    message: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message} (field {self.field}, expected {self.expected}, got {self.actual})"

    def as_dict(self) -> dict[str, str]:
        return {
            "rule": str(self.rule),
            "field": self.field,
            "message": self.message,
            "expected": self.expected,
            "actual": self.actual,
        }
