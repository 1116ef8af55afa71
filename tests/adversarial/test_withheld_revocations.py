"""A coordinator that does not pass on what the operators revoked, or passes on something else (G2).

Each twin speaks to a real custodian process over mTLS, as the coordinator that the roster names. The operator
has the signed document as a file; whatever the coordinator does, what it lists is refused from then on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire.errors import from_rpc_error, from_status
from tests.support.custodian import Committee, CustodianProcess, build_committee, start_custodian_process
from tests.support.vendor import bulletin, reference_json

NAME = "ch-1"


def document(committee: Committee, version: int, *jobs: str, signer: Identity | None = None) -> bytes:
    owner = {
        "target": "owner",
        "subject": committee.owner.identity.public.fingerprint,
        "reason": "left the project",
        "at": 1_800_000_000,
    }
    entries = [owner, *({**owner, "target": "job", "subject": job} for job in jobs)]
    made = bulletin("revocations", {"revoked": entries if version > 1 else [], "lifted": []}, version)
    return sign_bulletin(made, [signer or committee.operator.identity])


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    built = build_committee(tmp_path_factory.mktemp("withheld"))
    built.generate()
    built.close()
    yield built
    built.close()


@pytest.fixture
def process(committee: Committee) -> Iterator[CustodianProcess]:
    started = start_custodian_process(committee.directory(NAME))
    yield started
    assert started.stop() == 0


def take(committee: Committee, folder: Path, version: int, *arguments: str) -> dict[str, object]:
    """The custodian's operator runs the command on the file that the operators sent."""
    path = folder / f"revocations-{version}.json"
    path.write_bytes(document(committee, version))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "keyquorum_custodian",
            "revoke",
            str(path),
            "--dir",
            str(committee.directory(NAME)),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    out: dict[str, object] = json.loads(done.stdout)
    assert done.returncode == (1 if "error" in out else 0)
    return out


class Coordinator:
    """Holds the TLS key that the roster names, and does as it likes."""

    def __init__(self, committee: Committee, process: CustodianProcess) -> None:
        self.committee = committee
        self.process = process

    async def relay(self, envelope: bytes) -> tuple[int, str]:
        async with self.committee.channel(NAME, self.process.address) as channel:
            try:
                answer = await rpc.CustodianStub(channel).Revoke(pb.RevokeRequest(document=envelope), timeout=10)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, NAME) from None
            return answer.version, answer.digest

    async def release(self) -> KeyquorumError | None:
        """Ask for the owner's share; the reason it is refused for."""
        async with self.committee.channel(NAME, self.process.address) as channel:
            call = rpc.CustodianStub(channel).Release()
            await call.write(self.committee.message(NAME, self.committee.owner_request()))
            await call.done_writing()
            (answer,) = [each async for each in call]
        return None if answer.HasField("share") else from_status(answer.refusal)


async def refused(coordinator: Coordinator, envelope: bytes) -> Reason:
    with pytest.raises(KeyquorumError) as caught:
        await coordinator.relay(envelope)
    return caught.value.reason


async def test_a_coordinator_that_relays_something_else_or_nothing(
    committee: Committee, process: CustodianProcess, tmp_path: Path
) -> None:
    coordinator = Coordinator(committee, process)
    assert await coordinator.release() is None
    # It never relays: the custodian's operator takes the document in by itself.
    accepted = take(committee, tmp_path, 2)
    assert (accepted["kind"], accepted["version"], accepted["accepted"]) == ("revocations", 2, True)
    error = await coordinator.release()
    assert error is not None
    assert (error.reason, error.details["check"]) == (Reason.REVOKED, "revocation")
    # It relays the version before, one of its own making, one with an entry more, or a document of another kind.
    assert await refused(coordinator, document(committee, 1)) is Reason.ROLLBACK
    stranger = Identity.generate()
    assert await refused(coordinator, document(committee, 3, signer=stranger)) is Reason.SIGNATURE
    envelope = json.loads(document(committee, 3))
    envelope["payload"] = json.loads(document(committee, 3, "a" * 26))["payload"]
    assert await refused(coordinator, json.dumps(envelope).encode()) is Reason.SIGNATURE
    other = sign_bulletin(bulletin("reference-values", reference_json(), 9), [committee.operator.identity])
    assert await refused(coordinator, other) is Reason.BULLETIN
    assert await refused(coordinator, b"{}") is Reason.MALFORMED
    again = await coordinator.release()
    assert again is not None
    assert again.reason is Reason.REVOKED
    # What is genuine it may relay, twice too.
    assert (await coordinator.relay(document(committee, 2)))[0] == 2
    assert (await coordinator.relay(document(committee, 2)))[0] == 2


async def test_killed_after_accepting_it_still_refuses_and_one_that_is_down_takes_it_at_its_start(
    committee: Committee, tmp_path: Path
) -> None:
    process = start_custodian_process(committee.directory(NAME))
    take(committee, tmp_path, 3)
    process.kill()
    (committee.directory(NAME) / "bulletins" / "revocations.json").unlink()
    left = take(committee, tmp_path, 4)
    assert (left["version"], left["accepted"]) == (4, False)
    process = start_custodian_process(committee.directory(NAME))
    try:
        error = await Coordinator(committee, process).release()
        assert error is not None
        assert error.reason is Reason.REVOKED
        assert error.details["revocations_version"] == "4"
    finally:
        assert process.stop() == 0
