"""Typed errors as JSON in the database: :meth:`KeyquorumError.as_dict`, and back."""

from __future__ import annotations

import json

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError

__all__ = ["dump_error", "load_error"]

_KINDS: dict[str, type[KeyquorumError]] = {
    kind.kind: kind for kind in (MalformedError, RefusedError, UnavailableError, StateError, KeyquorumError)
}


def dump_error(error: KeyquorumError | None) -> str | None:
    return None if error is None else json.dumps(error.as_dict(), sort_keys=True)


def load_error(text: str | None) -> KeyquorumError | None:
    """The error that :func:`dump_error` stored. A reason this version does not know becomes ``INTERNAL``."""
    if text is None:
        return None
    stored = json.loads(text)
    reason = stored["reason"]
    return _KINDS.get(stored["kind"], KeyquorumError)(
        Reason(reason) if reason in Reason.__members__ else Reason.INTERNAL,
        stored["message"],
        expected=stored["expected"] or None,
        actual=stored["actual"] or None,
        next_step=stored["next_step"],
        details=stored["details"],
    )
