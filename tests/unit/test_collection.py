"""A worker's evidence as a whole: what worker.toml may say, GPUs first, and ``keyquorum-worker attest``."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from keyquorum_core.attestation.binding import gpu_digest, gpu_nonce, report_data
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.release import challenge
from keyquorum_gpu_worker.attest import parse_nonce, shown, write_files
from keyquorum_gpu_worker.cli import app
from keyquorum_gpu_worker.config import load_config, load_sources
from keyquorum_gpu_worker.evidence import Binding, Collection
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm
from tests.support.vendor import MEASUREMENT, development_chip

NONCES = (WindowNonce("de-1", 2, b"\x02" * 32), WindowNonce("ch-1", 1, b"\x01" * 32))


@dataclass
class Source:
    """Evidence that says what it was bound to."""

    type: str
    development: bool = False
    asked: list[Binding] = field(default_factory=list)

    def collect(self, binding: Binding) -> EvidenceItem:
        self.asked.append(binding)
        return EvidenceItem(self.type, self.type.encode() + binding.challenge, ())


def test_gpus_come_first_and_everything_else_commits_to_them() -> None:
    cpu, tpm, gpu = Source("sev-snp"), Source("tpm2"), Source("nvidia-gpu")
    collection = Collection([cpu, gpu, tpm])
    assert collection.types == ("nvidia-gpu", "sev-snp", "tpm2")
    document = collection.document(NONCES, b"hpke", b"\x05" * 1984)
    assert [item.type for item in document.items] == ["nvidia-gpu", "sev-snp", "tpm2"]
    assert EvidenceDocument.parse(document.to_bytes()) == document
    asked = challenge({each.custodian: each.nonce for each in NONCES})
    assert gpu.asked == [Binding(b"hpke", b"\x05" * 1984, asked)]
    assert gpu.asked[0].gpu_nonce == gpu_nonce(asked, b"hpke") == document.gpu_nonce()
    digest = gpu_digest([document.items[0].evidence])
    for source in (cpu, tpm):
        assert source.asked[0].report_data == report_data(b"hpke", b"\x05" * 1984, asked, digest)
        assert source.asked[0].report_data == document.report_data()


def test_without_gpus_there_is_nothing_to_commit_to() -> None:
    cpu = Source("sev-snp")
    document = Collection([cpu]).document(NONCES, b"hpke", b"\x05" * 1984)
    assert cpu.asked[0].gpu_digest == b""
    assert document.report_data() == cpu.asked[0].report_data
    assert [each.custodian for each in document.nonces] == ["ch-1", "de-1"]


@pytest.mark.parametrize("types", [[], ["nvidia-gpu"], ["sev-snp", "sev-snp"], ["tdx", "nvidia-gpu", "nvidia-gpu"]])
def test_sources_that_make_no_workers_evidence_are_refused(types: list[str]) -> None:
    with pytest.raises(MalformedError, match="do not make a worker's evidence"):
        Collection([Source(each) for each in types])


# worker.toml

HEAD = """
name = "gpu-1"
cluster = "demo"
coordinator = "127.0.0.1:7400"
coordinator_name = "main"
roster = "roster.json"
operators = "operators.json"
tls_certificate = "cert.pem"
tls_key = "key.pem"
"""
TPM = '[tpm2]\nak_handle = "0x81010100"\npcrs = [0, 7]\n'
GPU = '[nvidia-gpu]\nendorsements = "gpu"\n'


def configured(folder: Path, sections: str) -> Collection:
    (folder / "worker.toml").write_text(HEAD + sections)
    return load_sources(load_config(folder))


@pytest.mark.parametrize(
    ("sections", "types"),
    [
        ("[sev-snp]\n", ("sev-snp",)),
        ('[sev-snp]\nreport_dir = "r"\ndevice = "d"\nendorsements = "e"\nvmpl = 3\n', ("sev-snp",)),
        ('[tdx]\ncollateral = "c"\n', ("tdx",)),
        ('[tdx]\ncollateral = "c"\nreport_dir = "r"\ndevice = "d"\nevent_log = "l"\nquoting_port = 4050\n', ("tdx",)),
        (TPM, ("tpm2",)),
        ("[nitro]\n", ("nitro",)),
        ('[nitro]\ndevice = "d"\n', ("nitro",)),
        (f"[sev-snp]\n{TPM}{GPU}", ("nvidia-gpu", "sev-snp", "tpm2")),
    ],
)
def test_each_section_gives_its_type(tmp_path: Path, sections: str, types: tuple[str, ...]) -> None:
    collection = configured(tmp_path, sections)
    assert collection.types == types
    assert not collection.development
    assert collection.name == ", ".join(types)


@pytest.mark.parametrize(
    "sections",
    [
        "",
        GPU,
        '[sev-snp]\n[development]\ndir = "platform"\n',
        "[sev-snp]\nvmpl = 4\n",
        '[sev-snp]\nextra = "x"\n',
        "[tdx]\n",
        '[tdx]\ncollateral = "c"\nquoting_port = 0\n',
        "[nvidia-gpu]\n[nitro]\n",
        "[nitro]\nextra = 1\n",
        '[development]\ndir = "platform"\nextra = 1\n',
        "[sgx]\n[nitro]\n",
    ],
)
def test_sections_that_say_less_or_other_are_refused(tmp_path: Path, sections: str) -> None:
    with pytest.raises(MalformedError):
        configured(tmp_path, sections)


# keyquorum-worker attest


@dataclass
class Genuine:
    """Evidence of a type as its hardware shapes it, bound to what is asked."""

    type: str
    development: ClassVar[bool] = False

    def collect(self, binding: Binding) -> EvidenceItem:
        return EvidenceItem(self.type, self._made(binding), (b"endorsement",))

    def _made(self, binding: Binding) -> bytes:
        if self.type == "sev-snp":
            return development_chip().sign_report(binding.report_data, MEASUREMENT)
        if self.type == "tdx":
            return intel_vendor.intel_vendor().quote(report_data=binding.report_data)
        if self.type == "tpm2":
            fields = soft_tpm.QuoteFields(extra_data=binding.report_data[:32])
            return soft_tpm.evidence(fields=fields).to_bytes()
        if self.type == "nitro":
            return nitro_vendor.nitro_vendor().document(public_key=binding.report_data, nonce=binding.challenge)
        return nvidia.evidence(0, 1, nonce=binding.gpu_nonce)


EVERY_TYPE = ("nvidia-gpu", "sev-snp", "tdx", "tpm2", "nitro")


def test_every_type_is_shown_with_whether_it_is_bound(tmp_path: Path) -> None:
    document = Collection([Genuine(each) for each in EVERY_TYPE]).document(NONCES, b"hpke", b"\x05" * 1984)
    found: dict[str, Any] = shown(document, development=False)
    assert found["types"] == list(EVERY_TYPE)
    assert [item["bound"] for item in found["items"]] == [True] * 5
    moved: dict[str, Any] = shown(replace(document, hpke_key=b"another key"), development=False)
    assert [item["bound"] for item in moved["items"]] == [False] * 5
    written = write_files(document, tmp_path / "out")
    assert EvidenceDocument.parse((tmp_path / "out" / "document.json").read_bytes()) == document
    names = {path.name for path in written}
    assert {"sev-snp", "tdx", "tpm2", "nitro", "nvidia-gpu-0", "nvidia-gpu-1.certificate-4.der"} <= names
    assert (tmp_path / "out" / "tdx").read_bytes() == document.items[2].evidence


@pytest.mark.parametrize(
    "text", ["", "ch-1", "ch-1:1", "ch-1:1:aa", "ch-1:x:" + "00" * 32, ":1:" + "00" * 32, "a:-1:0"]
)
def test_a_nonce_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_nonce(text)


@pytest.fixture
def worker_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "worker"
    platform = folder / "platform"
    platform.mkdir(parents=True)
    for name, data in {**development_chip().to_files(), "measurement": MEASUREMENT.hex().encode()}.items():
        (platform / name).write_bytes(data)
    (folder / "worker.toml").write_text(HEAD + '[development]\ndir = "platform"\n')
    return folder


def test_attest_answers_given_nonces_and_writes_files(worker_dir: Path, tmp_path: Path) -> None:
    nonce = "11" * 32
    command = ["attest", "--dir", str(worker_dir), "--nonce", f"ch-1:7:{nonce}", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["challenge"] == challenge({"ch-1": bytes.fromhex(nonce)}).hex()
    assert found["development"]
    assert found["items"][0]["measurement"] == MEASUREMENT.hex()
    report = base64.b64decode(found["items"][0]["evidence"])
    assert report[0x50:0x90].hex() == found["report_data"]
    document = EvidenceDocument.parse((tmp_path / "out" / "document.json").read_bytes())
    assert document.nonces == (WindowNonce("ch-1", 7, bytes.fromhex(nonce)),)
    people = CliRunner().invoke(app, command[:3])
    assert people.exit_code == 0
    assert "measurement" in people.stdout


def test_attest_says_what_is_missing(worker_dir: Path) -> None:
    (worker_dir / "worker.toml").write_text(HEAD + "[nitro]\ndevice = 'nsm'\n")
    done = CliRunner().invoke(app, ["attest", "--dir", str(worker_dir), "--json"])
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["reason"] == "EVIDENCE_TYPE"
    assert str(worker_dir / "nsm") in error["expected"]
    done = CliRunner().invoke(app, ["attest", "--dir", str(worker_dir), "--nonce", "ch-1"])
    assert done.exit_code == 1
    assert Reason.MALFORMED in done.stderr
