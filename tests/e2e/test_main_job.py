"""The main job, end to end, with real processes over mTLS."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_local.layout import CUSTODIANS, QUORUM, program
from tests.support.cluster import Running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_job_returns_its_result_and_its_log_to_the_owner(running: Running, job: Path) -> None:
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        states = [event.state for event in client.watch(submitted.id)]
        result = client.result(submitted.id)
    assert states[-1] == "completed"
    assert json.loads(result.files["result.json"]) == {"echo": "a secret of the owner 4711"}
    assert b"the input says a secret of the owner 4711" in result.log
    quorum = Quorum(dict(QUORUM), [Custodian(*each) for each in CUSTODIANS])
    assert quorum.is_qualified(result.custodians)
    assert result.confirmed


def test_the_hydrogen_molecule_has_the_published_energy(running: Running) -> None:
    with running.connect() as client:
        submitted = client.submit(EXAMPLES / "h2_vqe", key=running.key, regions=[running.region])
        result = client.result(submitted.id)
    facts = json.loads(result.files["result.json"])
    assert facts["energy_hartree"] == pytest.approx(-1.137306, abs=1e-5)
    assert facts["energy_hartree"] == pytest.approx(facts["literature_hartree"], abs=1e-6)


def test_the_basket_option_agrees_with_its_analytic_control(running: Running, tmp_path: Path) -> None:
    with running.connect() as client:
        submitted = client.submit(EXAMPLES / "basket_option", key=running.key, regions=[running.region])
        client.result(submitted.id).save(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert abs(facts["geometric_z_score"]) < 5


@pytest.mark.timeout(180)
def test_the_demo_prints_one_json_object() -> None:
    done = subprocess.run([*program("keyquorum"), "demo", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["job_id"]) == 26
    assert facts["quorum"] == QUORUM
    quorum = Quorum(facts["quorum"], [Custodian(*each) for each in CUSTODIANS])
    assert quorum.is_qualified(facts["custodians_answered"])
    assert facts["result"]["energy_hartree"] == pytest.approx(-1.137306, abs=1e-5)
    assert set(facts["timings_ms"]) >= {"set_up", "start", "key_ceremony", "submit", "run", "total"}
    assert all(isinstance(value, int) for value in facts["timings_ms"].values())
