"""The local cluster as tests see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keyquorum
from keyquorum.policies import compile_set
from keyquorum_core.bulletin import Bulletin, peek_bulletin, sign_bulletin
from keyquorum_core.keywrap import load_keys
from keyquorum_core.policy.bundle import POLICY_KIND, PolicyBundle
from keyquorum_core.signing import Identity
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import CLUSTER, CONTROLS, REGION, Layout

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


def operator_of(running: Running) -> Identity:
    """The operator that signs the cluster's policies."""
    passphrase = running.layout.owner_passphrase.read_text()
    return load_keys((running.layout.root / "ops.key.json").read_bytes(), passphrase).identity


@contextmanager
def deciding(running: Running, operator: Identity, text: str, *names: str) -> Iterator[None]:
    """These custodians decide by ``text`` on top of the cluster's controls; afterwards by the controls alone again."""

    def put(extra: dict[str, str]) -> None:
        for name in names:
            file = running.layout.custodian(name) / "bulletins" / "policy.json"
            version = peek_bulletin(file.read_bytes()).version + 1
            body = PolicyBundle.make("custodian", (name,), {**compile_set(CONTROLS), **extra}).body()
            now = int(time.time())
            bulletin = Bulletin(CLUSTER, POLICY_KIND, version, now - 5, now + 86400, body)
            partial = file.with_suffix(".partial")
            partial.write_bytes(sign_bulletin(bulletin, [operator]))
            partial.replace(file)

    put({"own.cedar": text})
    try:
        yield
    finally:
        put({})
