"""docs/spec/vectors/ceremony.json, which another implementation can run as well, and the tables in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import ceremony
from keyquorum_core.ceremony import Commitments, EpochCertificate, PartsHeader
from keyquorum_core.ceremony_checks import check_present
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import FINAL, MOVES, PHASES, POSITIONS, Kind, State, Step, phase
from keyquorum_core.destruction import Consent, DestructionReceipt
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.parts import parts_info
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.rebuilding import Gift, RebuildReceipt, RebuildRequest, gift_info

ROOT = Path(__file__).parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "docs/spec/vectors/ceremony.json").read_text())
PARSERS: dict[str, Callable[[bytes], Any]] = {
    "plan": CeremonyPlan.parse,
    "header": PartsHeader.parse,
    "commitments": Commitments.parse,
    "certificate": EpochCertificate.parse,
    "rebuild-request": RebuildRequest.parse,
    "gift": Gift.parse,
    "rebuild-receipt": RebuildReceipt.parse,
    "consent": Consent.parse,
    "destruction-receipt": DestructionReceipt.parse,
}


def test_the_file_is_what_its_script_makes() -> None:
    script = ROOT / "scripts" / "make_ceremony_vectors.py"
    assert subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("vector", VECTORS["values"], ids=lambda vector: vector["value"])
def test_values(vector: dict[str, Any]) -> None:
    name = vector["value"]
    if name == "seed":
        parts = {custodian: bytes.fromhex(part) for custodian, part in vector["parts"].items()}
        before = bytes.fromhex(vector["before"]) or None
        made = ceremony.seed(vector["ceremony_id"], vector["index"], parts, before)
    elif name == "commitment":
        made = ceremony.commitment(vector["ceremony_id"], vector["index"], bytes.fromhex(vector["seed"]))
    else:
        info = {"parts_info": parts_info, "gift_info": gift_info}[name]
        made = info(vector["ceremony_id"], vector["from"], vector["to"], bytes.fromhex(vector["recipient"]))
    assert made.hex() == vector["result"]


@pytest.mark.parametrize("vector", VECTORS["documents"], ids=lambda vector: vector["name"])
def test_documents(vector: dict[str, Any]) -> None:
    parse, payload = PARSERS[vector["document"]], vector["payload"].encode()
    if vector["expect"] == "ok":
        assert parse(payload).to_payload() == payload
        return
    with pytest.raises(KeyquorumError) as caught:
        parse(payload)
    assert caught.value.reason == vector["expect"]


@pytest.mark.parametrize("vector", VECTORS["participation"], ids=lambda vector: vector["name"])
def test_participation(vector: dict[str, Any]) -> None:
    committee = [Custodian(each["id"], each["jurisdiction"]) for each in VECTORS["committee"]]
    quorum = Quorum(vector["quorum"], committee)
    plan = CeremonyPlan("00" * 16, "k", 1, "MLKEM768_X25519", "demo", "ab" * 32, quorum, 1)
    if vector["kind"] == "rotate":
        policy = KeyPolicy(absent_at_most=vector["absent_at_most"])
        plan = replace(plan, kind=Kind.ROTATE, epoch=2, certificate="ab" * 32, policy=policy)
    if vector["expect"] == "ok":
        assert set(check_present(plan, vector["present"])) == set(quorum.ids) - set(vector["present"])
        return
    with pytest.raises(KeyquorumError) as caught:
        check_present(plan, vector["present"])
    assert caught.value.reason == vector["expect"]


# The table of moves


def test_every_kind_begins_new_and_ends_somewhere() -> None:
    for kind, table in MOVES.items():
        reachable, pending = {State.NEW}, [State.NEW]
        while pending:
            for state in table.get(pending.pop(), ()):
                if state not in reachable:
                    reachable.add(state)
                    pending.append(state)
        assert reachable == set(table), kind
        dead_ends = {state for state, targets in table.items() if not targets}
        assert dead_ends <= FINAL | {State.CANCELLED}, kind
        assert FINAL & set(table) <= dead_ends, kind


def test_the_phases_walk_through_the_table() -> None:
    for kind, phases in PHASES.items():
        assert [each.step for each in phases] == list(POSITIONS[kind])
        for each in phases:
            assert each.reaches <= set(MOVES[kind])
            assert phase(kind, each.step) is each
            assert (Step.CANCELLED in POSITIONS[kind][each.step]) != each.binding
        assert Step.DONE in POSITIONS[kind][phases[-1].step]


def test_nothing_cancels_what_is_binding() -> None:
    for kind, table in MOVES.items():
        for state in FINAL | {State.ERASED}:
            assert State.CANCELLED not in table.get(state, ()), (kind, state)
    with pytest.raises(KeyError):
        phase(Kind.DESTROY, Step.DELIVER)
