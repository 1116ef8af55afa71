"""What the tests of the release gate have in common: its clock, and how a refusal is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import manifest
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from tests.support.custodian import Committee, build_committee

START = 1_800_000_000


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@contextmanager
def gates(folder: Path) -> Iterator[tuple[Committee, Clock]]:
    """Custodians in this process that hold key-1, and their clock."""
    clock = Clock()
    committee = build_committee(folder, clock=clock)
    committee.open_all()
    committee.generate()
    yield committee, clock
    committee.close()


def refused(node: Node, request: ReleaseRequest, check: str, reason: Reason) -> KeyquorumError:
    """``request`` is refused by ``check``, with ``reason``, and the custodian's state is as it was (G8)."""
    before = node.keystore.release_count()
    with pytest.raises(KeyquorumError) as caught:
        node.gate.release(request)
    assert (caught.value.details["check"], caught.value.reason) == (check, reason)
    assert caught.value.details["custodian"] == "ch-1"
    assert node.keystore.release_count() == before
    return caught.value


def evidence_refused(
    committee: Committee, node: Node, evidence: bytes, reason: Reason, envelope: bytes | None = None
) -> KeyquorumError:
    return refused(node, committee.worker_request(evidence, envelope), "recipient", reason)


def signed(committee: Committee, **changes: Any) -> bytes:
    return manifest.sign_manifest(committee.manifest(**changes), committee.owner.identity)
