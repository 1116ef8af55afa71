"""For every test: gRPC's C core says nothing by itself on standard error, as in every process of ours; and logs that a
command of ours set up inside a test do not outlive it (they would go on to a stream that is closed by then)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import structlog

os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@pytest.fixture(autouse=True)
def _logs_of_its_own() -> Iterator[None]:
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
