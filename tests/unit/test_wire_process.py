"""A hardened process: no core dump, memory closed to others; where that cannot be had, an error and no secret."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_protos.wire import process

_LOOK = """
import ctypes, os, resource
from keyquorum_protos.wire.process import harden
harden()
harden()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), os.environ["HOME"] != "")
"""


def test_a_hardened_process_is_not_dumpable_and_leaves_no_core() -> None:
    done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, check=True)
    assert done.stdout == "0 (0, 0) True\n"


def test_elsewhere_than_on_linux_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(UnavailableError) as caught:
        process.harden()
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_kernel_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(UnavailableError) as caught:
        process.harden()
    assert caught.value.reason is Reason.SANDBOX
