"""A worker and its TPM: a real one in software, through tpm2-pytss, from a fresh machine to quotes that are accepted.

Two people take part, each with their own commands: the worker's operator (``keyquorum-worker tpm …``) and whoever keeps
the inventory (``keyquorum attest enrol …``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.attestation.tpm2 import qualifying_data, verify
from keyquorum_core.attestation.tpm2_enrolment import ENROLMENT_SECONDS
from keyquorum_core.attestation.tpm2_messages import parse_pending, pending_bytes
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_gpu_worker.evidence.tpm2 import Tpm2
from keyquorum_gpu_worker.tss import Tss
from tests.support.bindings import BINDING
from tests.support.swtpm import Manufacturer, require_pytss
from tests.support.tpm_worker import HANDLE, Machine, Registrar, activate, machine, show


@pytest.fixture(scope="module")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    require_pytss()
    return Manufacturer(tmp_path_factory.mktemp("tpm"))


@pytest.fixture(scope="module")
def one(manufacturer: Manufacturer) -> Iterator[Machine]:
    made = machine(manufacturer, "one")
    try:
        yield made
    finally:
        made.tpm.stop()


@pytest.fixture(scope="module")
def other(manufacturer: Manufacturer, one: Machine) -> Iterator[Machine]:
    made = machine(manufacturer, "other")
    try:
        made.worker("tpm", "create-ak")
        yield made
    finally:
        made.tpm.stop()


@pytest.fixture
def registrar(manufacturer: Manufacturer, tmp_path: Path) -> Registrar:
    return Registrar(manufacturer, tmp_path)


@pytest.mark.parametrize("ek", ["rsa2048", "ecc-p384"])
def test_a_fresh_machine_is_enrolled_and_its_quotes_are_accepted(one: Machine, registrar: Registrar, ek: str) -> None:
    handle = HANDLE if ek == "rsa2048" else "0x81010201"
    settings = (one.folder / "worker.toml").read_text()
    (one.folder / "worker.toml").write_text(settings.replace(HANDLE, handle))
    try:
        made = one.worker("tpm", "create-ak", "--ek", ek)
        assert made["ak_handle"] == handle
        show(one, registrar, "--ek", ek)
        status, challenged = registrar.challenge()
        assert status == 0, challenged
        assert (registrar.folder / "pending.json").stat().st_mode & 0o777 == 0o600
        assert activate(one, registrar, "--ek", ek) == 0
        status, enrolled = registrar.confirm()
        assert status == 0
        assert enrolled["ak"] == challenged["ak"]
        assert enrolled["model"] == "swtpm"
        assert enrolled["hardware"] == {"tpm2": [enrolled["ak"]]}
        attested = one.worker("attest", "--out", str(registrar.folder / "out"))
        (item,) = attested["items"]
        assert item["bound"]
        evidence = (registrar.folder / "out" / "tpm2").read_bytes()
        assert verify(evidence).ak.fingerprint == enrolled["ak"]
    finally:
        (one.folder / "worker.toml").write_text(settings)


def test_there_is_one_key_at_a_handle(other: Machine) -> None:
    error = other.worker("tpm", "create-ak", ok=False)["error"]
    assert error["reason"] == "EXISTS"


def test_another_tpm_cannot_answer_and_nobody_gets_a_second_try(
    one: Machine, other: Machine, registrar: Registrar
) -> None:
    show(other, registrar)
    assert registrar.challenge()[0] == 0
    assert activate(one, registrar) == 1
    (registrar.folder / "answer.json").write_text('{"kind":"tpm2-answer","secret":"' + "00" * 32 + '","v":1}')
    status, said = registrar.confirm()
    assert (status, said["error"]["reason"]) == (1, "PROVENANCE")
    assert activate(other, registrar) == 0
    status, said = registrar.confirm()
    assert (status, said["error"]["reason"]) == (1, "NOT_FOUND")


def test_a_late_answer_is_refused(other: Machine, registrar: Registrar) -> None:
    show(other, registrar)
    assert registrar.challenge()[0] == 0
    assert activate(other, registrar) == 0
    path = registrar.folder / "pending.json"
    pending = parse_pending(path.read_bytes().strip())
    late = type(pending)(
        pending.ak_fingerprint, pending.ak_name, pending.ek, pending.secret, int(time.time()) - ENROLMENT_SECONDS - 1
    )
    path.write_bytes(pending_bytes(late))
    status, said = registrar.confirm()
    assert (status, said["error"]["reason"]) == (1, "STALE")


def test_a_maker_that_is_not_trusted_gets_no_credential(other: Machine, registrar: Registrar) -> None:
    show(other, registrar)
    status, said = registrar.challenge(root="issuer.pem")
    assert (status, said["error"]["reason"]) == (1, "CHAIN")
    assert not (registrar.folder / "credential.json").exists()


def test_the_collector_follows_a_pcr_that_moves(other: Machine) -> None:
    tss = Tss(f"swtpm:path={other.tpm.folder}/tpm")
    before = verify(Tpm2(tss, int(HANDLE, 16), [16]).collect(BINDING).evidence)
    other.tpm.extend(16, b"\x01" * 32)
    after = verify(Tpm2(tss, int(HANDLE, 16), [16]).collect(BINDING).evidence)
    assert before.pcrs != after.pcrs
    assert after.quote.extra_data == qualifying_data(BINDING.report_data)


def test_a_bank_that_the_tpm_does_not_keep_is_named(other: Machine) -> None:
    from keyquorum_core.attestation.tpm2_structures import hash_by_name

    bank = hash_by_name("sha512")
    assert bank is not None
    with pytest.raises(KeyquorumError) as caught:
        Tpm2(Tss(f"swtpm:path={other.tpm.folder}/tpm"), int(HANDLE, 16), [0], bank=bank).collect(BINDING)
    assert caught.value.reason is Reason.MALFORMED
    assert "sha512" in caught.value.message
