"""The public API changes only on purpose."""

from __future__ import annotations

import inspect
import subprocess
import sys

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum.sync import Client

NAMES = [
    "AsyncClient",
    "CeremonyRecord",
    "Client",
    "ClusterStatus",
    "CustodianHealth",
    "DataFile",
    "DataKey",
    "DrillReport",
    "Ended",
    "Finding",
    "Job",
    "JobEvent",
    "JobFailedError",
    "KeyHealth",
    "KeyPolicy",
    "KeyRecord",
    "KeyquorumError",
    "MalformedError",
    "Manifest",
    "Profile",
    "Progress",
    "ProgressCallback",
    "Reason",
    "RefusedError",
    "Resources",
    "Result",
    "ResultFiles",
    "ResultStatement",
    "Stage",
    "StateError",
    "SubmittedJob",
    "Telemetry",
    "TelemetryRecord",
    "UnavailableError",
    "__version__",
    "aio",
    "connect",
    "load_profile",
]
METHODS = [
    "cancel", "ceremonies", "ceremony_cancel", "close", "data_key", "decrypt", "derive_key", "drill_cancel",
    "drill_report", "drill_run", "drills", "encrypt", "job", "jobs", "key", "key_create", "key_destroy",
    "key_epochs", "key_repair", "key_rotate", "keys", "result", "revocations", "revoke", "rewrap", "status",
    "submit", "telemetry", "wait", "watch",
]  # fmt: skip


def public(of: type) -> list[str]:
    return sorted(name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_"))


def test_the_exported_names_are_these() -> None:
    assert keyquorum.__all__ == NAMES
    for name in NAMES:
        assert getattr(keyquorum, name) is not None
        assert name in dir(keyquorum)
    assert not hasattr(keyquorum, "nothing_of_the_sort")


def test_both_clients_have_these_methods_with_the_same_parameters() -> None:
    assert public(Client) == public(AsyncClient) == METHODS
    for name in METHODS:
        ours = inspect.signature(getattr(Client, name)).parameters
        theirs = inspect.signature(getattr(AsyncClient, name)).parameters
        assert list(ours.values()) == list(theirs.values()), name
    assert inspect.signature(keyquorum.connect).parameters == inspect.signature(keyquorum.aio.connect).parameters


def test_importing_the_package_and_asking_for_help_does_not_load_grpc() -> None:
    code = (
        "import sys, keyquorum, keyquorum.cli\n"
        "assert keyquorum.cli.run(['job', '--help']) == 0\n"
        "loaded = {'grpc', 'cryptography', 'numpy', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
