"""keyquorum: run encrypted jobs on rented GPUs whose key no single party can get at.

::

    import keyquorum

    with keyquorum.connect("profile.toml", passphrase="…") as client:
        job = client.submit("examples/h2_vqe", key="demo", classification="research", regions=["eu"])
        for event in client.watch(job.id):
            print(event.state)
        with client.result(job.id) as result:
            print(result.files["result.json"], result.custodians)

:mod:`keyquorum.aio` has the same for asyncio. What is exported here is the public API; docs/client.md explains it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keyquorum import aio
    from keyquorum.aio import AsyncClient
    from keyquorum.ceremonies import CeremonyRecord, Ended
    from keyquorum.cluster import ClusterStatus
    from keyquorum.data_keys import DataFile, DataKey
    from keyquorum.findings import Finding
    from keyquorum.health import CustodianHealth, KeyHealth
    from keyquorum.jobs import Job, JobEvent
    from keyquorum.keys import KeyRecord
    from keyquorum.profile import Profile, load_profile
    from keyquorum.progress import Progress, ProgressCallback, Stage
    from keyquorum.results import JobFailedError, Result, ResultFiles
    from keyquorum.submission import SubmittedJob
    from keyquorum.sync import Client, connect
    from keyquorum.telemetry import Telemetry, TelemetryRecord
    from keyquorum_core.drill_report import DrillReport
    from keyquorum_core.errors import (
        KeyquorumError,
        MalformedError,
        Reason,
        RefusedError,
        StateError,
        UnavailableError,
    )
    from keyquorum_core.key_policy import KeyPolicy
    from keyquorum_core.manifest import Manifest, Resources, ResultStatement

__all__ = [
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

__version__ = "0.1.0"

# Before gRPC is first imported: its C core otherwise writes to standard error what typed errors say already.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Where each name lives. Imported on first use (PEP 562), so that `keyquorum --help` doesn't wait for gRPC.
_HOMES = {
    "keyquorum.aio": ("AsyncClient",),
    "keyquorum.ceremonies": ("CeremonyRecord", "Ended"),
    "keyquorum.cluster": ("ClusterStatus",),
    "keyquorum.data_keys": ("DataFile", "DataKey"),
    "keyquorum.findings": ("Finding",),
    "keyquorum.health": ("CustodianHealth", "KeyHealth"),
    "keyquorum.jobs": ("Job", "JobEvent"),
    "keyquorum.keys": ("KeyRecord",),
    "keyquorum.profile": ("Profile", "load_profile"),
    "keyquorum.progress": ("Progress", "ProgressCallback", "Stage"),
    "keyquorum.results": ("JobFailedError", "Result", "ResultFiles"),
    "keyquorum.submission": ("SubmittedJob",),
    "keyquorum.sync": ("Client", "connect"),
    "keyquorum_core.drill_report": ("DrillReport",),
    "keyquorum_core.errors": (
        "KeyquorumError",
        "MalformedError",
        "Reason",
        "RefusedError",
        "StateError",
        "UnavailableError",
    ),
    "keyquorum_core.key_policy": ("KeyPolicy",),
    "keyquorum.telemetry": ("Telemetry", "TelemetryRecord"),
    "keyquorum_core.manifest": ("Manifest", "Resources", "ResultStatement"),
}


def __getattr__(name: str) -> object:
    if name == "aio":
        return importlib.import_module("keyquorum.aio")
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'keyquorum' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
