"""A worker's machine with a TPM of its own, and whoever keeps the inventory: what both people do, in a test."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from keyquorum.cli import run
from keyquorum_gpu_worker.cli import app
from tests.support.swtpm import Manufacturer, Swtpm

__all__ = ["BOOT", "HANDLE", "Machine", "Registrar", "activate", "machine", "show"]

BOOT = {0: b"\x10" * 32, 4: b"\x14" * 32, 7: b"\x17" * 32}
"""What a machine's firmware measures, by PCR."""
HANDLE = "0x81010200"


@dataclass
class Machine:
    """A worker's folder, and the TPM of the machine that it is on."""

    folder: Path
    tpm: Swtpm

    def worker(self, *arguments: str, ok: bool = True) -> dict[str, Any]:
        done = CliRunner().invoke(app, [arguments[0], *arguments[1:], "--dir", str(self.folder), "--json"])
        assert (done.exit_code == 0) is ok, done.output
        return json.loads(done.stdout)  # type: ignore[no-any-return]


def machine(manufacturer: Manufacturer, name: str) -> Machine:
    tpm = manufacturer.make(name)
    tpm.boot(BOOT)
    folder = tpm.folder / "worker"
    folder.mkdir()
    (folder / "worker.toml").write_text(
        'name = "gpu-1"\ncluster = "demo"\ncoordinator = "127.0.0.1:7400"\ncoordinator_name = "main"\n'
        'roster = "roster.json"\noperators = "operators.json"\ntls_certificate = "cert.pem"\ntls_key = "key.pem"\n'
        f'[tpm2]\nak_handle = "{HANDLE}"\npcrs = [0, 4, 7]\ntcti = "swtpm:path={tpm.folder}/tpm"\n'
    )
    return Machine(folder, tpm)


class Registrar:
    """Who keeps the inventory, with the maker's certificates and a folder for each enrolment."""

    def __init__(self, manufacturer: Manufacturer, folder: Path) -> None:
        issuer, root = manufacturer.certificates
        self.folder = folder
        (folder / "issuer.pem").write_bytes(issuer)
        (folder / "root.pem").write_bytes(root)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def command(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = run(["attest", "enrol", *arguments, "--json"])
        return status, json.loads(said.getvalue())

    def challenge(self, root: str = "root.pem") -> tuple[int, dict[str, Any]]:
        files = ("--root", self.path(root), "--issuer", self.path("issuer.pem"), "--out", self.path("credential.json"))
        return self.command("challenge", self.path("candidate.json"), *files, "--pending", self.path("pending.json"))

    def confirm(self) -> tuple[int, dict[str, Any]]:
        return self.command("confirm", self.path("pending.json"), self.path("answer.json"))


def show(worker: Machine, registrar: Registrar, *options: str) -> None:
    done = CliRunner().invoke(
        app, ["tpm", "enrol", "--dir", str(worker.folder), "--out", registrar.path("candidate.json"), *options]
    )
    assert done.exit_code == 0, done.output


def activate(worker: Machine, registrar: Registrar, *options: str) -> int:
    arguments = [registrar.path("credential.json"), "--dir", str(worker.folder), "--out", registrar.path("answer.json")]
    return CliRunner().invoke(app, ["tpm", "activate", *arguments, *options]).exit_code
