"""Ground state of the hydrogen molecule by a variational quantum eigensolver (VQE), on a simulated state vector.

A quantum-classical job: a parametrised quantum state is prepared, its energy taken, and a classical optimiser turns the
parameters downhill. Reads ``hamiltonian.json`` and ``params.json`` beside it, writes ``result.json`` into the folder
named by ``KEYQUORUM_OUTPUT`` (or here). The same file runs on NumPy, and on CuPy where there is a GPU.

Paulis are written with the highest qubit first, and amplitude *k* of the state belongs to the bits of *k*: ``IZ`` acts
with Z on qubit 0, the lowest bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import array_api_compat
import numpy

HERE = Path(__file__).resolve().parent
Array = Any
"""An array of whichever namespace is in use: the array API standard has no type of its own to name here."""


def namespace() -> tuple[Any, str]:
    """The array namespace to compute with, and the device's name: CuPy if it finds a GPU, else NumPy."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
            return array_api_compat.array_namespace(cupy.empty(0)), f"gpu: {name}"
    except Exception:  # noqa: S110 - no CuPy, no driver or no device: each has its own exception, all mean the CPU
        pass
    return array_api_compat.array_namespace(numpy.empty(0)), "cpu"


class Pauli:
    """A tensor product of I, X, Y, Z as a permutation and a phase: (Pψ)[k] = phase[k] · ψ[k xor flip]."""

    def __init__(self, xp: Any, label: str) -> None:
        qubits = len(label)
        flip = 0
        phases = [1 + 0j] * 2**qubits
        for qubit, letter in enumerate(reversed(label)):
            if letter in "XY":
                flip |= 1 << qubit
            for k in range(2**qubits):
                bit = k >> qubit & 1
                phases[k] *= {"I": 1, "X": 1, "Y": 1j if bit else -1j, "Z": -1 if bit else 1}[letter]
        self._xp = xp
        self._index = xp.asarray([k ^ flip for k in range(2**qubits)])
        self._phase = xp.asarray(phases, dtype=xp.complex128)

    def apply(self, state: Array) -> Array:
        return self._phase * self._xp.take(state, self._index)


class Problem:
    """Energy and exact gradient of the ansatz exp(-iθₘPₘ/2) … exp(-iθ₁P₁/2)|reference⟩."""

    def __init__(self, xp: Any, hamiltonian: dict[str, Any], generators: Sequence[str]) -> None:
        self._xp = xp
        self._terms = [(float(weight), Pauli(xp, label)) for label, weight in hamiltonian["terms"].items()]
        self._offset = float(hamiltonian["nuclear_repulsion_hartree"])
        self._generators = [Pauli(xp, label) for label in generators]
        reference = int(hamiltonian["reference"], 2)
        size = 2 ** len(hamiltonian["reference"])
        self._reference = xp.asarray([1.0 if k == reference else 0.0 for k in range(size)], dtype=xp.complex128)
        self.evaluations = 0

    def state(self, angles: Sequence[float]) -> Array:
        state = self._reference
        for angle, generator in zip(angles, self._generators, strict=True):
            state = math.cos(angle / 2) * state - 1j * math.sin(angle / 2) * generator.apply(state)
        return state

    def energy(self, angles: Sequence[float]) -> float:
        """⟨ψ|H|ψ⟩ with the nuclei's repulsion, hartree."""
        xp, state = self._xp, self.state(angles)
        image = xp.zeros_like(state)
        for weight, pauli in self._terms:
            image = image + weight * pauli.apply(state)
        self.evaluations += 1
        return float(xp.sum(xp.real(xp.conj(state) * image))) + self._offset

    def gradient(self, angles: Sequence[float]) -> list[float]:
        """By parameter shift, exact for Pauli generators (Schuld et al., Phys. Rev. A 99, 032331, 2019)."""
        out = []
        for i in range(len(angles)):
            up, down = list(angles), list(angles)
            up[i] += math.pi / 2
            down[i] -= math.pi / 2
            out.append((self.energy(up) - self.energy(down)) / 2)
        return out

    def exact(self) -> float:
        """The lowest eigenvalue of the same Hamiltonian, diagonalised on the CPU: what VQE is checked against."""
        size = self._reference.shape[0]
        columns = []
        for k in range(size):
            unit = self._xp.asarray([1.0 if j == k else 0.0 for j in range(size)], dtype=self._xp.complex128)
            column = self._xp.zeros_like(unit)
            for weight, pauli in self._terms:
                column = column + weight * pauli.apply(unit)
            columns.append(array_api_compat.to_device(column, "cpu"))
        matrix = numpy.stack([numpy.asarray(column) for column in columns], axis=1)
        return float(numpy.linalg.eigvalsh(matrix)[0]) + self._offset


def minimise(problem: Problem, start: Sequence[float], *, step: float, tolerance: float, limit: int) -> dict[str, Any]:
    """Gradient descent until the gradient's largest component is under ``tolerance`` (hartree per radian)."""
    angles = list(start)
    iterations, slope = 0, math.inf
    while iterations < limit:
        gradient = problem.gradient(angles)
        slope = max(map(abs, gradient))
        if slope < tolerance:
            break
        angles = [angle - step * g for angle, g in zip(angles, gradient, strict=True)]
        iterations += 1
    return {"energy": problem.energy(angles), "angles": angles, "iterations": iterations, "slope": slope}


def run(hamiltonian: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The lowest of several descents: the first from the reference state, the others from random angles."""
    began = time.monotonic()
    xp, device = namespace()
    generators = [str(label) for label in params["generators"]]
    problem = Problem(xp, hamiltonian, generators)
    rng = numpy.random.default_rng(int(params["seed"]))
    reference_energy = problem.energy([0.0] * len(generators))
    descents: list[dict[str, Any]] = []
    while len(descents) < int(params["descents"]) or time.monotonic() - began < float(params["seconds"]):
        start = (
            rng.normal(0.0, float(params["spread"]), len(generators)).tolist() if descents else [0.0] * len(generators)
        )
        descent = minimise(
            problem,
            start,
            step=float(params["step"]),
            tolerance=float(params["tolerance"]),
            limit=int(params["max_iterations"]),
        )
        descents.append(descent)
        start = rng.normal(0.0, float(params["spread"]), len(generators)).tolist()
    best = min(descents, key=lambda descent: float(descent["energy"]))
    literature = float(hamiltonian["literature_hartree"])
    return {
        "molecule": hamiltonian["molecule"],
        "energy_hartree": best["energy"],
        "literature_hartree": literature,
        "difference_hartree": best["energy"] - literature,
        "exact_hartree": problem.exact(),
        "hartree_fock_hartree": reference_energy,
        "angles": best["angles"],
        "gradient_hartree_per_radian": best["slope"],
        "iterations": best["iterations"],
        "descents": len(descents),
        "descents_agreeing": sum(abs(d["energy"] - best["energy"]) < 1e-8 for d in descents),
        "energy_evaluations": problem.evaluations,
        "device": device,
    }


def main() -> None:
    hamiltonian = json.loads((HERE / "hamiltonian.json").read_text("utf-8"))
    params = json.loads((HERE / "params.json").read_text("utf-8"))
    result = run(hamiltonian, params)
    output = Path(os.environ.get("KEYQUORUM_OUTPUT", "."))
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{result['molecule']}: {result['energy_hartree']:.9f} Ha by VQE on {result['device']}")
    print(f"literature {result['literature_hartree']:.9f} Ha, difference {result['difference_hartree']:+.1e} Ha")
    print(f"{result['descents']} descents, the best in {result['iterations']} iterations")


if __name__ == "__main__":
    main()
