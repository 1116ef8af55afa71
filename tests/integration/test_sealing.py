"""Sealed custodians as real processes: officers unseal one by one, guesses are limited, and nothing else is served."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyquorum_core import keywrap
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.release import Answer, Leaf, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian.backup_files import RECIPIENT_PURPOSE
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore, open_keystore
from keyquorum_custodian.sealed_keystore import SealedKeystore
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.v1 import restoration_pb2 as restoration_pb
from keyquorum_protos.v1 import restoration_pb2_grpc as restoration_rpc
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.custodian import PASSPHRASE, Committee, CustodianProcess, build_committee, start_custodian_process
from tests.support.memory import can_read_memory, find_in_memory
from tests.support.softhsm import MODULE, PIN, a_token, needs_softhsm

NAME = "ch-1"


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    built = build_committee(tmp_path_factory.mktemp("sealing"))
    built.generate()
    built.close()
    yield built
    built.close()


@pytest.fixture(scope="module")
def shares(committee: Committee, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The custodian goes from its passphrase to two of three officers, by the command."""
    folder = tmp_path_factory.mktemp("officers")
    done = command(
        "reseal", "--dir", str(committee.directory(NAME)), "--to", "slip39", "--shares", "2/3",
        "--share-dir", str(folder), "--json", KEYQUORUM_PASSPHRASE=PASSPHRASE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"custodian": NAME, "before": "passphrase", "scheme": "slip39"}
    files = sorted(folder.iterdir())
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3
    assert not any(word_line(path) in done.stderr + done.stdout for path in files)
    return files


def word_line(path: Path) -> str:
    return path.read_text().splitlines()[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**{k: v for k, v in os.environ.items() if k != "KEYQUORUM_PASSPHRASE"}, **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def officer(committee: Committee, *arguments: str, name: str = NAME, **environment: str) -> dict[str, Any]:
    """One officer's own process; what it prints."""
    done = command("unseal", "--dir", str(committee.directory(name)), *arguments, "--json", **environment)
    out: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if "error" in out else 0)
    return out


def status(committee: Committee, name: str = NAME) -> dict[str, Any]:
    done = command("status", "--dir", str(committee.directory(name)), "--json")
    assert done.returncode == 0, done.stdout
    out: dict[str, Any] = json.loads(done.stdout)
    return out


async def refusals(committee: Committee, process: CustodianProcess) -> set[Reason]:
    """Why a coordinator gets nothing, by everything that it could ask."""
    found = set()
    async with committee.channel(NAME, process.address) as channel:
        custodian, ceremonies = rpc.CustodianStub(channel), rpc.CeremoniesStub(channel)
        vouching = restoration_rpc.RestorationStub(channel)
        calls: list[Any] = [
            custodian.GetWindow(pb.GetWindowRequest(), timeout=10),
            custodian.Revoke(pb.RevokeRequest(), timeout=10),
            ceremonies.Propose(pb.ProposeRequest(), timeout=10),
            ceremonies.Give(pb.GiveRequest(), timeout=10),
            ceremonies.Erase(pb.EraseRequest(), timeout=10),
            ceremonies.GetCertificate(pb.GetCertificateRequest(), timeout=10),
            vouching.Challenge(restoration_pb.ChallengeRequest(), timeout=10),
            vouching.Testify(restoration_pb.TestifyRequest(), timeout=10),
            vouching.Vouch(restoration_pb.VouchRequest(), timeout=10),
            # Read from the start, as a coordinator's lane does: gRPC's client reports INTERNAL, and not what the server
            # said, when it happens to be writing while the server ends the call.
            custodian.Release(timeout=10).read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            found.add(from_rpc_error(caught.value, NAME).reason)
    return found


async def described(committee: Committee, process: CustodianProcess) -> tuple[pb.DescribeResponse, int]:
    async with committee.channel(NAME, process.address) as channel:
        answer = await rpc.CustodianStub(channel).Describe(pb.DescribeRequest(), timeout=10, wait_for_ready=True)
        health = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="keyquorum.v1.Custodian"), timeout=10
        )
    return answer, health.status


async def test_officers_unseal_one_by_one_and_the_operator_seals_again(
    committee: Committee, shares: list[Path], tmp_path: Path
) -> None:
    process = start_custodian_process(committee.directory(NAME), "not asked for")
    try:
        answer, health = await described(committee, process)
        assert (answer.sealed, answer.scheme, answer.custodian, len(answer.keys)) == (True, "slip39", NAME, 0)
        assert health == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await refusals(committee, process) == {Reason.SEALED}
        assert status(committee)["sealing"]["shares_needed"] == 2
        recipient = tmp_path / "vault.pub"
        key = base64.b64encode(RecipientKey.generate().public).decode()
        recipient.write_text(json.dumps({"format": RECIPIENT_PURPOSE, "hpke": key}, separators=(",", ":")))
        asked = ("--dir", str(committee.directory(NAME)), "--to", str(recipient), "--out", str(tmp_path / "backup"))
        assert json.loads(command("backup", *asked, "--json").stdout)["error"]["reason"] == "SEALED"
        assert not (tmp_path / "backup").exists()

        first = officer(committee, "--share-file", str(shares[2]))
        assert (first["open"], first["shares_held"], first["shares_needed"]) == (False, 1, 2)
        again = officer(committee, "--share-file", str(shares[2]))
        assert (again["error"]["reason"], again["error"]["kind"]) == ("EXISTS", "state")
        assert status(committee)["sealing"]["shares_held"] == 1
        last = officer(committee, "--share-file", str(shares[0]))
        assert last["open"]
        answer, health = await described(committee, process)
        assert (answer.sealed, answer.scheme, [key.key_id for key in answer.keys]) == (False, "slip39", ["key-1"])
        assert health == health_pb2.HealthCheckResponse.SERVING
        assert officer(committee, "--share-file", str(shares[0]))["error"]["reason"] == "STATE"

        done = command("seal", "--dir", str(committee.directory(NAME)), "--json")
        assert json.loads(done.stdout) == {"sealed": True}
        answer, health = await described(committee, process)
        assert answer.sealed
        assert await refusals(committee, process) == {Reason.SEALED}
        assert process.process.poll() is None  # the very same process all along
        for each in shares[:2]:
            last = officer(committee, "--share-file", str(each))
        assert last["open"]
    finally:
        assert process.stop() == 0


def test_wrong_guesses_wait_and_killing_the_process_does_not_shorten_it(
    committee: Committee, shares: list[Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    from shamir_mnemonic.share import Share

    forged = tmp_path / "forged"
    real = Share.from_mnemonic(word_line(shares[1]))
    forged.write_text(replace(real, value=bytes(32)).mnemonic() + "\n")
    forged.chmod(0o600)
    process = start_custodian_process(committee.directory(NAME))
    for number in range(1, 4):
        assert officer(committee, "--share-file", str(forged))["shares_held"] == 1
        wrong = officer(committee, "--share-file", str(shares[0]))["error"]
        assert (wrong["reason"], wrong["details"]["failed_attempts"]) == ("UNSEAL", str(number))
        assert status(committee)["sealing"]["shares_held"] == 0
        process.kill()
        process = start_custodian_process(committee.directory(NAME))
    found = status(committee)
    assert found["sealing"]["failed_attempts"] == 3
    assert found["sealing"]["next_attempt_at"] > found["now"]
    assert any("3 wrong attempts" in warning for warning in found["warnings"])
    for each in shares[:2]:  # the right ones wait too
        assert officer(committee, "--share-file", str(each))["error"]["reason"] == "ATTEMPTS"
    assert process.stop() == 0
    sealed = SealedKeystore.open(committee.directory(NAME) / "keystore.db")
    assert sealed.attempts().failed == 3
    sealed.save_attempts(replace(sealed.attempts(), last=0))  # long ago
    sealed.close()


def test_a_thief_with_the_file_and_one_share_too_few_gets_nothing(committee: Committee, shares: list[Path]) -> None:
    path = committee.directory(NAME) / "keystore.db"
    with pytest.raises(StateError) as caught:
        Keystore.open(path, [word_line(shares[0])])
    assert caught.value.reason is Reason.SEALED
    for guess in (PASSPHRASE, word_line(shares[0]), ""):
        with pytest.raises(KeyquorumError):
            Keystore.open(path, guess)
    store = Keystore.open(path, [word_line(each) for each in shares[:2]])
    secrets = [*store.identity().seeds(), *store.seeds(store.epochs()[0]).values()]
    store.close()
    held = b"".join(each.read_bytes() for each in path.parent.iterdir() if each.is_file())
    words = [word_line(each).encode() for each in shares]
    assert not [secret for secret in [*secrets, *words, PASSPHRASE.encode()] if secret in held]


def test_a_passphrase_custodian_starts_sealed_and_forgets_when_sealed(committee: Committee) -> None:
    name = "is-1"
    store = Keystore.open(committee.directory(name) / "keystore.db", PASSPHRASE)
    ed25519, ml_dsa = store.identity().seeds()
    secrets = {"ed25519": ed25519, "ml-dsa": ml_dsa, "hpke": store.recipient().to_seed_bytes()[-32:]}
    secrets |= {f"seed {index}": seed for index, seed in store.seeds(store.epochs()[0]).items()}
    secrets |= {
        "kek": keywrap.unwrap(store.sealing_record(), PASSPHRASE, "keyquorum/v1/keystore"),
        "passphrase": PASSPHRASE.encode(),
    }
    store.close()
    process = start_custodian_process(committee.directory(name), "wrong", arguments=["--sealed"])
    try:
        wrong = officer(committee, name=name, KEYQUORUM_PASSPHRASE="wrong")
        assert (wrong["error"]["reason"], wrong["error"]["details"]["failed_attempts"]) == ("PASSPHRASE", "1")
        assert officer(committee, name=name, KEYQUORUM_PASSPHRASE=PASSPHRASE)["open"]
        assert status(committee, name)["sealed"] is False
        if can_read_memory(process.pid):
            assert {"ed25519", "kek"} <= find_in_memory(process.pid, secrets)
        assert command("seal", "--dir", str(committee.directory(name))).returncode == 0
        found = status(committee, name)
        assert (found["sealed"], found["sealing"]["failed_attempts"]) == (True, 0)
        if can_read_memory(process.pid):  # nothing of it at all, not even what an interpreter forgets to overwrite
            assert find_in_memory(process.pid, secrets) == set()
        assert officer(committee, name=name, KEYQUORUM_PASSPHRASE=PASSPHRASE)["open"]
    finally:
        assert process.stop() == 0


@needs_softhsm
async def test_a_process_with_its_seeds_in_a_token_is_unsealed_by_the_pin_and_serves(
    committee: Committee, tmp_path: Path
) -> None:
    name, token = "no-1", a_token()
    folder = committee.directory(name)
    config = folder / "custodian.toml"
    config.write_text(config.read_text().replace('pkcs11_module = ""', f'pkcs11_module = "{MODULE}"'))
    pin = tmp_path / "pin"
    pin.write_text(PIN + "\n")
    pin.chmod(0o600)
    arguments = ["--to", "pkcs11-seeds", "--token", token.label, "--pin-file", str(pin)]
    done = command("reseal", "--dir", str(folder), *arguments, "--json", KEYQUORUM_PASSPHRASE=PASSPHRASE)
    assert json.loads(done.stdout)["scheme"] == "pkcs11-seeds"
    peer = committee.open("is-1")
    process = start_custodian_process(folder, "", arguments=["--sealed"])
    try:
        wrong = officer(committee, name=name, KEYQUORUM_PASSPHRASE="not-the-pin")["error"]
        assert (wrong["reason"], wrong["details"]["failed_attempts"]) == ("PASSPHRASE", "1")
        assert officer(committee, "--passphrase-file", str(pin), name=name)["open"]
        request = committee.owner_request()
        async with committee.channel(name, process.address) as channel:
            call = rpc.CustodianStub(channel).Release()
            await call.write(committee.message(name, request))
            await call.done_writing()
            (answer,) = [each async for each in call]
        assert answer.WhichOneof("outcome") == "share", answer.refusal
        share = answer.share
        received = Answer(name, share.key_id, share.epoch, share.window, share.sealed, share.signature)
        leaf = Leaf.parse(request.leaf).hash()
        mine = open_share(received, committee.owner.recipient, leaf, committee.quorum).contributions
        theirs = open_share(peer.gate.release(request), committee.owner.recipient, leaf, committee.quorum).contributions
        common = mine.keys() & theirs.keys()
        assert common
        assert all(mine[index] == theirs[index] for index in common)
        assert len(mine.keys() | theirs.keys()) == committee.quorum.seed_count  # the two of them are a quorum
    finally:
        assert process.stop() == 0
        committee.close()


@pytest.mark.parametrize("scheme", ["slip39", pytest.param("pkcs11-seeds", marks=needs_softhsm)])
def test_init_seals_by_the_scheme_it_is_told_from_the_start(scheme: str, tmp_path: Path) -> None:
    folder, out, pin = tmp_path / "ch-9", tmp_path / "shares", tmp_path / "pin"
    pin.write_text(PIN + "\n")
    pin.chmod(0o600)
    arguments = ["--shares", "2/2", "--share-dir", str(out)]
    if scheme != "slip39":
        arguments = ["--module", MODULE, "--token", a_token().label, "--pin-file", str(pin)]
    done = command(
        "init", "--dir", str(folder), "--id", "ch-9", "--jurisdiction", "CH", "--cluster", "demo",
        "--listen", "127.0.0.1:0", "--sealing", scheme, *arguments, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    secret = [word_line(path) for path in sorted(out.iterdir())] if scheme == "slip39" else PIN
    store = open_keystore(load_config(folder), secret)
    assert store.scheme == scheme
    assert len(store.identity().seeds()) == 2
    store.close()
