"""A software PKCS#11 token (Debian's SoftHSM2) in a folder of its own, for tests that use one as a real module."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["MODULE", "PIN", "SoftToken", "a_token", "needs_softhsm"]

_PLACES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
MODULE = next((place for place in _PLACES if Path(place).exists()), "")
PIN = "1234-5678"
_SO_PIN = "0000-0000"
_TOKENS = 24
_pool: list[SoftToken] = []


def _missing() -> str:
    if importlib.util.find_spec("pkcs11") is None:
        return "python-pkcs11 is not installed"
    if not MODULE or shutil.which("softhsm2-util") is None:
        return "softhsm2 is not installed: scripts/system_packages.sh"
    return ""


needs_softhsm = pytest.mark.skipif(bool(_missing()), reason=_missing() or "there")


@dataclass(frozen=True)
class SoftToken:
    """A token set up with :data:`PIN`; ``environment`` is what a process needs to find it."""

    label: str
    environment: dict[str, str]


def a_token() -> SoftToken:
    """One that no other test uses. The library looks once a process where tokens are and which, so all are there from
    the first call on."""
    if not _pool:
        folder = Path(tempfile.mkdtemp(prefix="keyquorum-softhsm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "tokens").mkdir()
        path = folder / "softhsm2.conf"
        path.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
        os.environ["SOFTHSM2_CONF"] = str(path)
        _pool.extend(_new_token(f"token-{number}", {"SOFTHSM2_CONF": str(path)}) for number in range(_TOKENS))
    return _pool.pop()


def _new_token(label: str, environment: dict[str, str]) -> SoftToken:
    program = shutil.which("softhsm2-util")
    assert program is not None
    subprocess.run(
        [program, "--init-token", "--free", "--label", label, "--so-pin", _SO_PIN, "--pin", PIN],
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=30,
    )
    return SoftToken(label, environment)
