"""The local cluster as tests see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import keyquorum
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import REGION, Layout

KEY = "e2e"


@dataclass(frozen=True)
class Running:
    """The cluster, and how a test submits to it."""

    layout: Layout
    cluster: Cluster
    key: str = KEY
    region: str = REGION

    def connect(self) -> keyquorum.Client:
        return keyquorum.connect(self.layout.profile, passphrase=self.layout.owner_passphrase.read_text())


def eventually(check: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait until ``check`` holds; fails naming ``what``."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
