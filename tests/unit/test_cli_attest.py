"""``keyquorum attest verify`` as a script calls it: one JSON object, exit status 0, 1 or 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyquorum.cli import run
from keyquorum.rosters import operators_file
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.signing import Identity
from tests.support.composite import reference_body
from tests.support.vectors import vectors_folder
from tests.support.vendor import MEASUREMENT, bulletin, development_chip, inventory_json, reference_json

AT = "1750000000"


def judge(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = run(["attest", "verify", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def snp(tmp_path: Path) -> list[str]:
    """Development evidence, its endorsements and the reference values that accept it, as files."""
    chip = development_chip()
    (tmp_path / "report.bin").write_bytes(chip.sign_report(b"\x05" * 64, MEASUREMENT))
    (tmp_path / "reference.json").write_text(json.dumps(reference_json()))
    (tmp_path / "inventory.json").write_text(json.dumps(inventory_json()))
    arguments = ["sev-snp", str(tmp_path / "report.bin"), "--inventory", str(tmp_path / "inventory.json")]
    arguments += ["--reference-values", str(tmp_path / "reference.json")]
    for number, certificate in enumerate(chip.endorsements):
        (tmp_path / f"{number}.der").write_bytes(certificate)
        arguments += ["--endorsements", str(tmp_path / f"{number}.der")]
    return [*arguments, "--at", AT]


def test_acceptable_evidence_exits_0(snp: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, verdict = judge(capsys, *snp, "--expect-report-data", "05" * 64)
    assert (status, verdict["type"], verdict["ok"], verdict["verified"], verdict["reason"]) == (
        0,
        "sev-snp",
        True,
        True,
        "",
    )
    assert verdict["claims"]["measurement"] == MEASUREMENT.hex()
    assert verdict["claims"]["region"] == "CH"
    assert sorted(verdict) == ["claims", "detail", "ok", "reason", "type", "verified"]


def test_every_check_is_explained_not_only_the_first_that_failed(
    snp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = reference_json()
    values["sev-snp"]["images"][0] |= {"host_data": ["01" * 32], "minimum_guest_svn": 7}
    values["sev-snp"]["vmpl"] = [1]
    (tmp_path / "reference.json").write_text(json.dumps(values))
    status, verdict = judge(capsys, *snp, "--explain", "--expect-report-data", "06" * 64)
    assert (status, verdict["reason"]) == (1, "VMPL")
    wrong = {each["field"]: each for each in verdict["checks"] if not each["ok"]}
    assert {field: each["reason"] for field, each in wrong.items()} == {
        "vmpl": "VMPL",
        "host_data": "MEASUREMENT",
        "guest_svn": "MEASUREMENT",
        "report_data": "BINDING",
    }
    assert (wrong["host_data"]["expected"], wrong["host_data"]["actual"]) == ("01" * 32, "00" * 32)
    met = {each["field"] for each in verdict["checks"] if each["ok"]}
    assert {"genuine", "policy.debug", "measurement", "tcb.reported.snp", "inventory"} <= met
    assert all(each["expected"] and each["actual"] for each in verdict["checks"])
    assert run(["attest", "verify", *snp, "--explain"]) == 1
    assert "host_data" in capsys.readouterr().out


def test_what_is_not_genuine_is_explained_by_that_alone(snp: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(snp[1]).write_bytes(bytes(1184))
    _, verdict = judge(capsys, *snp, "--explain")
    (check,) = verdict["checks"]
    assert (check["field"], check["ok"], check["reason"]) == ("genuine", False, "MALFORMED")


def test_reference_values_may_have_to_be_signed(
    snp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three operators; each file as one of them left it."""
    people = {name: Identity.generate() for name in ("ann", "ben", "cleo")}
    operators = tmp_path / "operators.json"
    operators.write_bytes(operators_file({name: each.public for name, each in people.items()}, 2))
    options = ["--operators", str(operators), "--cluster", "demo"]
    assert run(["attest", "verify", *snp, *options[:2]]) == 2
    assert run(["attest", "verify", *snp, *options, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "SIGNATURE_MISSING"

    def sign(signers: int, cluster: str = "demo") -> None:
        for kind, body in (("reference-values", reference_json()), ("inventory", inventory_json())):
            name = "reference.json" if kind == "reference-values" else "inventory.json"
            made = bulletin(kind, body, cluster=cluster)
            (tmp_path / name).write_bytes(sign_bulletin(made, list(people.values())[:signers]))

    for signers, cluster, reason in ((1, "demo", "SIGNATURE_MISSING"), (2, "prod", "BULLETIN")):
        sign(signers, cluster)
        assert run(["attest", "verify", *snp, *options, "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]["reason"] == reason
    sign(2)
    assert judge(capsys, *snp, *options)[1]["ok"]
    assert judge(capsys, *snp)[1]["ok"], "without operators the signatures are not looked at"


def test_reference_values_without_a_section_for_the_type_judge_nothing(
    snp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = reference_body()
    del body["sev-snp"]
    (tmp_path / "reference.json").write_text(json.dumps(body))
    assert run(["attest", "verify", *snp, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "EVIDENCE_TYPE"


def test_refused_evidence_exits_1_with_a_reason(snp: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, verdict = judge(capsys, *snp, "--expect-report-data", "06" * 64)
    assert (status, verdict["ok"], verdict["verified"], verdict["reason"]) == (1, False, True, "BINDING")
    Path(snp[1]).write_bytes(Path(snp[1]).read_bytes()[:-1])
    status, verdict = judge(capsys, *snp)
    assert (status, verdict["verified"], verdict["reason"]) == (1, False, "MALFORMED")


def test_without_reference_values_the_root_must_be_a_vendor_s(
    snp: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    at = snp.index("--reference-values")
    status, verdict = judge(capsys, *snp[:at], *snp[at + 2 :])
    assert (status, verdict["reason"]) == (1, "ROOT_NOT_PINNED")


def test_wrong_usage_exits_2(snp: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attest", "verify", "sgx", snp[1]]) == 2
    assert run(["attest", "verify", "tdx", snp[1]]) == 2
    assert run(["attest", "verify", "sev-snp", snp[1], "--at", "yesterday"]) == 2
    capsys.readouterr()


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attest", "verify", "sev-snp", "no/such/report"]) == 1
    assert "no/such/report" in capsys.readouterr().err


SNP, TDX, NVIDIA = "sev_snp", "tdx", "nvidia"
MILAN = [f"--endorsements={SNP}/ask_ark_milan.pem"]
HOPPER = [f"--endorsements={NVIDIA}/hopper_535.86.09_chain.txt", "--at=2025-01-15"]
REAL: list[tuple[str, list[str], tuple[bool, bool, str]]] = [
    ("milan", ["sev-snp", f"{SNP}/report_milan.hex", f"--endorsements={SNP}/vcek_milan.der", *MILAN, "--at=2024-06-01"],
     (True, True, "")),
    ("debug", ["sev-snp", f"{SNP}/debug_milan.bin", f"--endorsements={SNP}/debug_milan_vcek.der", *MILAN,
               "--at=2024-06-01"], (False, True, "DEBUG_ENABLED")),
    ("vlek", ["sev-snp", f"{SNP}/vlek_milan.bin", f"--endorsements={SNP}/vlek_milan.der",
              f"--endorsements={SNP}/ask_ark_milan_vlek.pem", "--at=2025-06-01"], (True, True, "")),
    ("tdx", ["tdx", f"{TDX}/tdx_quote", f"--collateral={TDX}/tdx_quote_collateral.json", "--at=2025-07-01"],
     (True, True, "")),
    ("tdx late", ["tdx", f"{TDX}/tdx_quote", f"--collateral={TDX}/tdx_quote_collateral.json", "--at=2025-08-01"],
     (False, False, "EXPIRED")),
    ("tdx outdated", ["tdx", f"{TDX}/tdx_quote_outdated", f"--collateral={TDX}/tdx_quote_outdated_collateral.json",
                      "--at=2026-03-01"], (False, True, "TCB")),
    ("gpu", ["nvidia-gpu", f"{NVIDIA}/hopper_535.86.09_report.txt", *HOPPER], (True, True, "")),
    ("gpu with RIM", ["nvidia-gpu", f"{NVIDIA}/hopper_535.86.09_report.txt", *HOPPER,
                      f"--endorsements={NVIDIA}/vbios_1010_0200_882_96005E0001.swidtag"], (True, True, "")),
    ("gpu forged", ["nvidia-gpu", f"{NVIDIA}/hopper_invalid_signature_report.txt", *HOPPER],
     (False, False, "SIGNATURE")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), [each[1:] for each in REAL], ids=[each[0] for each in REAL])
def test_real_evidence_gives_the_outcome_of_its_table(
    arguments: list[str],
    expected: tuple[bool, bool, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(vectors_folder())
    status, verdict = judge(capsys, *arguments)
    assert (verdict["ok"], verdict["verified"], verdict["reason"]) == expected
    assert status == (0 if expected[0] else 1)


def test_a_real_nitro_document_is_genuine_and_binds_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "document"
    document.write_bytes((vectors_folder() / "nitro/nitro_attestation.bin").read_bytes()[4:])
    status, verdict = judge(capsys, "nitro", str(document), "--at=2025-12-25T13:15:37Z")
    assert (status, verdict["ok"], verdict["verified"], verdict["reason"]) == (1, False, True, "BINDING")


def test_a_real_tpm_quote_needs_an_enrolled_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((vectors_folder() / "tpm/tpm_evidence.json").read_text())
    quote = raw["tpm_quote"]
    evidence, key = tmp_path / "evidence.json", tmp_path / "ak"
    evidence.write_text(
        json.dumps(
            {
                "ak_public": raw["ak_public"],
                "quote": quote["message"],
                "signature": quote["signature"],
                "pcrs": {"sha256": {str(number): value for number, value in enumerate(quote["pcrs"])}},
            }
        )
    )
    status, verdict = judge(capsys, "tpm2", str(evidence))
    assert (status, verdict["verified"], verdict["reason"]) == (1, True, "PROVENANCE")
    key.write_text(raw["ak_public"] + "\n")
    status, verdict = judge(capsys, "tpm2", str(evidence), "--enrolled-ak", str(key))
    assert (status, verdict["ok"]) == (0, True)


def test_the_options_documented_are_those_there_are() -> None:
    from keyquorum.cli.attest import TYPES, verify

    text = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
    documented = text.split("### Judging evidence offline")[1].split("Exit status")[0]
    names = set(verify.__annotations__) - {"kind", "evidence", "as_json", "return"}
    for option in {f"--{name.replace('_', '-')}" for name in names} | {"--json"} | set(TYPES):
        assert f"`{option}" in documented, option
