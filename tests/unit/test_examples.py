"""The example jobs: run as a worker runs them, and checked against answers found by other means."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from examples.basket_option import main as basket_option
from examples.h2_vqe import main as h2_vqe
from keyquorum_core.bundle import read_bundle, write_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["basket_option", "h2_vqe"]


def load(example: str, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EXAMPLES / example / file).read_text("utf-8"))
    return loaded


def run_as_a_job(example: str, tmp_path: Path, **params: Any) -> dict[str, Any]:
    """Bundle the folder, unpack it elsewhere, and run its entrypoint with nothing but the output folder named."""
    sources = [p for p in (EXAMPLES / example).iterdir() if p.is_file() and p.name != "job.toml"]
    packed = io.BytesIO()
    write_bundle([(p.name, p.stat().st_size, io.BytesIO(p.read_bytes())) for p in sources], packed)
    packed.seek(0)
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    output.mkdir()
    for file in read_bundle(packed):
        with (work / file.name).open("wb") as target:
            shutil.copyfileobj(file.reader, target)
    (work / "params.json").write_text(json.dumps({**load(example, "params.json"), **params}), "utf-8")
    subprocess.run(
        [sys.executable, "main.py"],
        cwd=work,
        env={"KEYQUORUM_OUTPUT": str(output)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert [p.name for p in output.iterdir()] == ["result.json"]
    result: dict[str, Any] = json.loads((output / "result.json").read_text("utf-8"))
    return result


@pytest.mark.parametrize("example", NAMES)
def test_an_example_declares_how_it_is_submitted(example: str) -> None:
    job = tomllib.loads((EXAMPLES / example / "job.toml").read_text("utf-8"))
    assert set(job) == {"entrypoint", "classification", "evidence", "resources"}
    assert job["entrypoint"] == ["python", "main.py"]
    assert set(job["resources"]) == {"cpus", "memory_mib", "gpus", "wall_seconds", "output_mib"}


# -- the hydrogen molecule --------------------------------------------------------------------------------------------


def h2_by_diagonalisation() -> float:
    """The lowest eigenvalue from Kronecker products, without the example's code."""
    hamiltonian = load("h2_vqe", "hamiltonian.json")
    letters = {
        "I": np.eye(2),
        "X": np.array([[0, 1], [1, 0]]),
        "Z": np.array([[1, 0], [0, -1]]),
    }
    matrix = sum(
        weight * np.kron(letters[label[0]], letters[label[1]]) for label, weight in hamiltonian["terms"].items()
    )
    return float(np.linalg.eigvalsh(matrix)[0]) + float(hamiltonian["nuclear_repulsion_hartree"])


def test_vqe_finds_the_literature_energy(tmp_path: Path) -> None:
    result = run_as_a_job("h2_vqe", tmp_path, descents=3)
    assert result["energy_hartree"] == pytest.approx(result["literature_hartree"], abs=1e-10)
    assert result["energy_hartree"] == pytest.approx(h2_by_diagonalisation(), abs=1e-10)
    assert result["exact_hartree"] == pytest.approx(h2_by_diagonalisation(), abs=1e-12)
    assert result["difference_hartree"] == result["energy_hartree"] - result["literature_hartree"]
    assert result["hartree_fock_hartree"] == pytest.approx(-1.116998996754, abs=1e-10)
    assert result["descents"] == result["descents_agreeing"] == 3
    assert 0 < result["iterations"] < 100


def test_the_nuclear_repulsion_is_one_over_the_distance() -> None:
    bohr = 0.529177210903
    assert load("h2_vqe", "hamiltonian.json")["nuclear_repulsion_hartree"] == pytest.approx(bohr / 0.735, abs=1e-7)


@pytest.mark.parametrize("label", ["IZ", "ZI", "XX", "XY", "YX", "YY", "IY"])
def test_a_pauli_acts_as_its_matrix(label: str) -> None:
    matrices = {
        "I": np.eye(2, dtype=complex),
        "X": np.array([[0, 1], [1, 0]], dtype=complex),
        "Y": np.array([[0, -1j], [1j, 0]]),
        "Z": np.array([[1, 0], [0, -1]], dtype=complex),
    }
    state = np.array([0.1, 0.2j, -0.3, 0.4 + 0.5j])
    expected = np.kron(matrices[label[0]], matrices[label[1]]) @ state
    assert np.allclose(h2_vqe.Pauli(h2_vqe.namespace()[0], label).apply(state), expected)


def test_the_parameter_shift_gradient_is_the_derivative() -> None:
    xp, _ = h2_vqe.namespace()
    problem = h2_vqe.Problem(xp, load("h2_vqe", "hamiltonian.json"), ["XY", "IY", "YI"])
    angles, h = [0.3, -0.7, 1.1], 1e-6
    for i, slope in enumerate(problem.gradient(angles)):
        up, down = list(angles), list(angles)
        up[i] += h
        down[i] -= h
        assert slope == pytest.approx((problem.energy(up) - problem.energy(down)) / (2 * h), abs=1e-8)


def test_a_job_can_be_made_to_last(tmp_path: Path) -> None:
    params = load("h2_vqe", "params.json") | {"descents": 1, "seconds": 0.3}
    assert h2_vqe.run(load("h2_vqe", "hamiltonian.json"), params)["descents"] > 1
    params = load("basket_option", "params.json") | {"paths": 10, "chunk_paths": 1000, "seconds": 0.1}
    assert basket_option.run(params)["paths"] > 1000


# -- the basket -------------------------------------------------------------------------------------------------------


def black_scholes(spot: float, strike: float, rate: float, dividend: float, sigma: float, years: float) -> float:
    total = sigma * math.sqrt(years)
    d1 = (math.log(spot / strike) + (rate - dividend + sigma**2 / 2) * years) / total
    phi = NormalDist().cdf
    return spot * math.exp(-dividend * years) * phi(d1) - strike * math.exp(-rate * years) * phi(d1 - total)


def test_the_basket_agrees_with_its_analytic_control(tmp_path: Path) -> None:
    result = run_as_a_job("basket_option", tmp_path, paths=200_000)
    assert abs(result["geometric_z_score"]) < 4
    assert result["price"] == pytest.approx(result["plain_price"], abs=4 * result["plain_standard_error"])
    assert result["price"] == pytest.approx(10.1405, abs=5 * result["standard_error"])  # from 2 million paths
    assert result["price"] > result["geometric_analytic"]  # the arithmetic average is never below the geometric
    assert result["variance_reduction"] > 50
    assert result["paths"] == 200_000


def test_one_asset_is_black_scholes() -> None:
    basket = basket_option.Basket((100.0,), (1.0,), (0.25,), (0.01,), 0.0, 0.03, 2.0, 105.0)
    assert basket.geometric_price() == pytest.approx(black_scholes(100, 105, 0.03, 0.01, 0.25, 2), abs=1e-10)


def test_equal_perfectly_correlated_assets_are_one_asset() -> None:
    basket = basket_option.Basket((100.0,) * 3, (0.5, 0.3, 0.2), (0.2,) * 3, (0.0,) * 3, 1.0, 0.05, 1.0, 100.0)
    assert basket.geometric_price() == pytest.approx(black_scholes(100, 100, 0.05, 0, 0.2, 1), abs=1e-10)


def test_chunks_do_not_change_the_price() -> None:
    params = load("basket_option", "params.json") | {"paths": 5000}
    whole = basket_option.run(params | {"chunk_paths": 5000})
    pieces = basket_option.run(params | {"chunk_paths": 777})
    assert pieces["paths"] == whole["paths"] == 5000
    assert pieces["price"] == pytest.approx(whole["price"], rel=1e-12)
    assert pieces["standard_error"] == pytest.approx(whole["standard_error"], rel=1e-9)


@pytest.mark.parametrize("changes", [{"weights": [1.0]}, {"weights": [0.5] * 5}, {"spots": []}])
def test_a_badly_described_basket_ends_with_a_reason(changes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match=r"params\.json"):
        basket_option.run(load("basket_option", "params.json") | changes)
