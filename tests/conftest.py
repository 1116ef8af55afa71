"""For every test: gRPC's C core says nothing by itself on standard error, as in every process of ours; and logs that a
command of ours set up inside a test do not outlive it (they would go on to a stream that is closed by then). And each
of the processes that run tests chooses its ports in turn, from a part of the range of its own: committees are made
once, copied often and served later, so that a port chosen at random could be another committee's by then."""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import structlog

from keyquorum_protos.wire import ports

os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _ports_in_turn() -> Callable[[int], int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    turns = count(secrets.randbelow(1 << 16))  # another run of the tests may be under way

    def draw(below: int) -> int:
        share = below // workers
        return worker * share + next(turns) % share if share else secrets.randbelow(below)

    return draw


ports._draw = _ports_in_turn()


def pytest_collection_finish() -> None:
    """What was collected stays to the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logs_of_its_own() -> Iterator[None]:
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
