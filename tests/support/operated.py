"""A local cluster with two operators, run as they would: by the commands, and by files put where they belong."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from keyquorum.keyfiles import create_keys
from keyquorum_core.bulletin import peek_bulletin, sign_bulletin
from keyquorum_core.keywrap import load_keys
from keyquorum_core.roster import ROSTER_TYPE, Operator, Roster, sign_roster
from keyquorum_core.signing import Identity, peek_payload
from keyquorum_custodian.admin import fetch_approvals
from keyquorum_local import layout as local
from keyquorum_local.cluster import Cluster, Process
from keyquorum_local.layout import CLUSTER, Layout, program
from keyquorum_protos.wire.ports import choose_port
from tests.support.cluster import Running, eventually

__all__ = ["Operated", "operated"]

Json = dict[str, Any]


class Operated(Running):
    """A running cluster whose roster takes two operators, ``ops`` and ``per``."""

    @property
    def operator_keys(self) -> tuple[Path, Path]:
        return self.layout.root / "ops.key.json", self.layout.root / "per.key.json"

    # -- commands -----------------------------------------------------------------------------------------------------

    def client(self, *arguments: str, status: int = 0, profile: bool = True) -> Json:
        """``keyquorum … --json`` as a process of its own."""
        options = ["--json", *(["--profile", str(self.layout.profile)] if profile else [])]
        passphrase = self.layout.owner_passphrase.read_text()
        return _answer([*program("keyquorum"), *arguments, *options], status, KEYQUORUM_PASSPHRASE=passphrase)

    def later(self, *arguments: str, status: int = 0) -> Future[Json]:
        """The same, for a command that waits for somebody."""
        pool = ThreadPoolExecutor(1)
        found = pool.submit(lambda: self.client(*arguments, status=status))
        pool.shutdown(wait=False)
        return found

    def custodian(self, name: str, *arguments: str, status: int = 0) -> Json:
        """``keyquorum-custodian … --dir … --json``, without a terminal."""
        where = ["--dir", str(self.layout.custodian(name)), "--json"]
        return _answer([*program("keyquorum-custodian"), *arguments, *where], status)

    def pending(self, name: str) -> list[Json]:
        found: list[Json] = self.custodian(name, "approve")["pending"]
        return found

    def wait_asked(self, name: str) -> None:
        """Until one request waits for the custodian's operator."""
        where = self.layout.custodian(name)
        eventually(lambda: len(asyncio.run(fetch_approvals(where))) == 1, f"{name} is asked")

    def approve(self, *names: str) -> None:
        """The operators of these custodians see one request each, and say yes."""
        for name in names:
            self.wait_asked(name)
            (request,) = self.pending(name)
            assert self.custodian(name, "approve", request["request_id"], "--yes")["decision"] == "approved"

    # -- the roster ---------------------------------------------------------------------------------------------------

    def change_roster(self, *arguments: str) -> Path:
        """``roster change`` by one operator, ``roster sign`` by the other."""
        current, (ops, per) = self.layout.coordinator / "roster.json", self.operator_keys
        made = self.layout.root / f"made-{time.monotonic_ns()}.json"
        signed = made.with_suffix(".signed.json")
        self.client("roster", "change", str(current), "--operator-key", str(ops), "--out", str(made), *arguments,
                    profile=False)  # fmt: skip
        self.client("roster", "sign", str(made), "--operator-key", str(per), "--out", str(signed), profile=False)
        return signed

    def install_roster(self, file: Path, *also: str) -> None:
        """Where everybody reads it; the one before goes to the folder of earlier ones."""
        names = [name for name, _ in self.layout.custodians]
        for place in (self.layout.coordinator, self.layout.worker, *map(self.layout.custodian, (*names, *also))):
            shutil.copy(file, place / "roster.json")

    def restart(self, *processes: Process) -> None:
        chosen = list(processes)
        for process in chosen:
            process.stop()
        self.cluster.start(chosen)

    # -- custodians ---------------------------------------------------------------------------------------------------

    def enrol(self, name: str, jurisdiction: str, like: str, operator: Identity) -> Path:
        """A new custodian's folder, as its operator would set it up; returns its card."""
        where = self.layout.custodian(name)
        ports = [choose_port() for _ in range(3)]
        local._init_custodian(self.layout, name, jurisdiction, ports)
        template = self.layout.custodian(like)
        for folder in ("bulletins", "owners"):
            shutil.copytree(template / folder, where / folder, dirs_exist_ok=True)
        shutil.copy(template / "operators.json", where / "operators.json")
        policy = peek_bulletin((where / "bulletins" / "policy.json").read_bytes())
        body = {**policy.body, "custodians": [name]}
        (where / "bulletins" / "policy.json").write_bytes(sign_bulletin(replace(policy, body=body), [operator]))
        return where / "card.json"


def _answer(command: list[str], status: int, **further: str) -> Json:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")} | further
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, (command[1:4], done.stdout[-2000:], done.stderr[-2000:])
    found: Json = json.loads(done.stdout)
    return found


@contextmanager
def operated(root: Path) -> Iterator[Operated]:
    layout = local.create(root)
    _second_operator(layout)
    with Cluster(layout) as cluster:
        yield Operated(layout, cluster)


def _second_operator(layout: Layout) -> None:
    """As if two operators had made the first roster together, and asked for both of them from then on."""
    passphrase = layout.owner_passphrase.read_text()
    create_keys(layout.root, "per", "operator", passphrase)
    ops, per = (
        load_keys((layout.root / f"{name}.key.json").read_bytes(), passphrase).identity for name in ("ops", "per")
    )
    before = Roster.parse(peek_payload((layout.root / "roster.json").read_bytes(), ROSTER_TYPE, "roster"))
    operators = (Operator("ops", ops.public), Operator("per", per.public))
    roster = replace(before, operators=operators, operator_threshold=2)
    envelope = sign_roster(roster, [ops, per])
    pinned = {each.name: base64.b64encode(each.identity.to_bytes()).decode() for each in operators}
    document = json.dumps({"threshold": 1, "operators": pinned}).encode()
    custodians = [layout.custodian(name) for name, _ in layout.custodians]
    for place in (layout.root, layout.coordinator, layout.worker, *custodians):
        (place / "roster.json").write_bytes(envelope)
        (place / "operators.json").write_bytes(document)
    for place in custodians:
        for kind in ("reference-values", "inventory"):
            file = place / "bulletins" / f"{kind}.json"
            file.write_bytes(sign_bulletin(peek_bulletin(file.read_bytes()), [ops, per]))
    profile = layout.profile.read_text()
    layout.profile.write_text(profile.replace(before.digest, roster.digest))
    assert roster.cluster == CLUSTER
