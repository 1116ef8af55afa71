"""The optional parts: PyArrow and NumPy for data, OpenDP for noise. Absent, they are asked for by name."""

from __future__ import annotations

from importlib.util import find_spec

from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["require"]


def require(*modules: str) -> None:
    """Raise :class:`UnavailableError` (``UNSUPPORTED``) unless all are installed."""
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "preparing data needs parts that are not installed",
            expected=", ".join(modules),
            actual=f"without {', '.join(absent)}",
            next_step="Install them with: python -m pip install 'keyquorum[prepare]'",
        )
