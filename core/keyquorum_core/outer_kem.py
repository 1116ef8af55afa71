"""The outer layer of a nested sealing suite: a KEM of another family than ML-KEM, through liboqs (DESIGN §5).

The layer is optional and its library is native: it is looked for once, never fetched, and its absence is an error with
a next step. Tests put a KEM of their own behind :class:`OuterKEM`, so that the nested layout is covered everywhere.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, Protocol

from keyquorum_core.errors import Reason, RefusedError, UnavailableError

__all__ = ["OuterKEM", "OuterKEMs", "liboqs_kem"]

# Another family than ML-KEM, or the second layer would fall with the first.
_OUTER_FAMILIES: Final = ("FrodoKEM-", "HQC-", "Classic-McEliece-")


class OuterKEM(Protocol):
    """A KEM for the outer layer of a nested suite. Sizes in bytes; failures raise :class:`KeyquorumError` kinds."""

    public_size: int
    private_size: int
    ciphertext_size: int

    def generate(self) -> tuple[bytes, bytes]:
        """``(public, private)``."""

    def encapsulate(self, public: bytes) -> tuple[bytes, bytes]:
        """``(shared secret, ciphertext)``."""

    def decapsulate(self, private: bytes, ciphertext: bytes) -> bytes:
        """The shared secret; a wrong ciphertext may give a pseudorandom one (implicit rejection)."""


OuterKEMs = Callable[[str], OuterKEM]
"""Finds an outer KEM by name or raises; :func:`liboqs_kem` outside tests."""


class _LibOQS:
    """One liboqs mechanism through liboqs-python."""

    def __init__(self, oqs: Any, name: str) -> None:
        self._oqs = oqs
        self._name = name
        with oqs.KeyEncapsulation(name) as kem:
            self.public_size: int = kem.details["length_public_key"]
            self.private_size: int = kem.details["length_secret_key"]
            self.ciphertext_size: int = kem.details["length_ciphertext"]

    def generate(self) -> tuple[bytes, bytes]:
        with self._oqs.KeyEncapsulation(self._name) as kem:
            public = kem.generate_keypair()
            return self._checked(public), self._checked(kem.export_secret_key())

    def encapsulate(self, public: bytes) -> tuple[bytes, bytes]:
        with self._oqs.KeyEncapsulation(self._name) as kem:
            ciphertext, secret = kem.encap_secret(public)
            return self._checked(secret), self._checked(ciphertext)

    def decapsulate(self, private: bytes, ciphertext: bytes) -> bytes:
        with self._oqs.KeyEncapsulation(self._name, private) as kem:
            return self._checked(kem.decap_secret(ciphertext))

    def _checked(self, value: object) -> bytes:
        # Older bindings return 0 where the C library reports an error.
        if not isinstance(value, bytes) or not value:
            raise UnavailableError(Reason.UNAVAILABLE, f"liboqs failed in {self._name}")
        return value


@lru_cache(maxsize=1)
def _load_oqs() -> Any:
    """The ``oqs`` module, or None. Looked for once: a request naming a nested suite must not start a search."""
    # `import oqs` downloads and compiles the C library if it is missing: make sure first that it is here and loads.
    path = ctypes.util.find_library("oqs")
    if not path:
        return None
    # On import it logs to standard output, which belongs to our callers (`--json`).
    logging.getLogger("oqs.oqs").disabled = True
    try:
        ctypes.CDLL(path)
        module = importlib.import_module("oqs")
        # An unrelated package is published under this import name.
        return module if hasattr(module, "KeyEncapsulation") else None
    except (ImportError, OSError, RuntimeError, KeyError, SystemExit, Warning):
        return None


def liboqs_kem(name: str) -> OuterKEM:
    """The liboqs mechanism ``name``. Raises :class:`UnavailableError`, :class:`RefusedError`: ``UNSUPPORTED``."""
    if not name.startswith(_OUTER_FAMILIES):
        raise RefusedError(
            Reason.UNSUPPORTED,
            "this KEM is not accepted as an outer layer",
            expected="a name starting with " + ", ".join(_OUTER_FAMILIES),
            actual=name[:64],
        )
    oqs = _load_oqs()
    if oqs is None:
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "a nested suite needs liboqs, which is not installed here",
            expected="the liboqs C library and the liboqs-python package",
            actual="at least one of them missing",
            next_step="Install the liboqs C library and keyquorum-core[liboqs], or choose a suite without '+'.",
        )
    if name not in oqs.get_enabled_kem_mechanisms():
        raise RefusedError(
            Reason.UNSUPPORTED,
            "the installed liboqs does not offer this KEM",
            expected="a KEM enabled in liboqs",
            actual=name[:64],
            next_step="Use a liboqs build that enables it, or choose another outer KEM.",
        )
    return _LibOQS(oqs, name)
