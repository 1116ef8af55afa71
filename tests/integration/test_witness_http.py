"""``add-checkpoint`` by C2SP tlog-witness over HTTP: the status codes of the specification, on a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from keyquorum_core.errors import UnavailableError
from keyquorum_core.ledger.add_checkpoint import MAX_ADD_CHECKPOINT, AddCheckpoint
from keyquorum_core.ledger.cosignatures import witnessed
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.notes import Note, parse_signature_lines
from keyquorum_custodian.witness_http import WitnessListener
from tests.support.ledger import MemoryLog
from tests.support.witness_scene import COSIGNERS, ME, START, Scene, make_scene


class Listening:
    """A witness that listens, and a client of it."""

    def __init__(self, scene: Scene, listener: WitnessListener, client: httpx.AsyncClient) -> None:
        self.scene = scene
        self.log = scene.log
        self.listener = listener
        self.client = client

    async def post(self, body: bytes) -> httpx.Response:
        return await self.client.post("/add-checkpoint", content=body)

    async def ask(self, old: int, signed: SignedCheckpoint, proof: tuple[bytes, ...] | None = None) -> httpx.Response:
        if proof is None:
            size = signed.checkpoint.size
            proof = self.log.consistency(old, size) if old <= size <= self.log.size else ()
        return await self.post(AddCheckpoint(old, proof, signed.encode()).encode())


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[Listening]:
    scene = make_scene(tmp_path)
    reports: list[BaseException] = []
    listener = WitnessListener(scene.witness, lambda method, reference, error: reports.append(error))
    address = await listener.start("127.0.0.1:0")
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
        yield Listening(scene, listener, client)
    await listener.stop()
    scene.keystore.close()
    assert reports == []


async def test_a_checkpoint_that_extends_is_cosigned_with_both_keys(listening: Listening) -> None:
    log = listening.log
    for old, size in ((0, 0), (0, 3), (3, 3), (3, 10)):
        log.fill(size - log.size)
        signed = log.checkpoint()
        answer = await listening.ask(old, signed)
        assert answer.status_code == 200
        lines = parse_signature_lines(answer.content)
        note = Note(signed.note.text, lines)
        seen = witnessed(note, signed.checkpoint, {ME: COSIGNERS[ME].keys}, now=START, oldest=START)
        assert seen.current == {ME: START}
        assert listening.scene.witness.size == size
        stored = listening.scene.keystore.select("SELECT size FROM ledgers")
        assert stored == [(size,)], "on the disk before it is answered"


async def test_old_sizes_conflict_and_are_told_the_newest(listening: Listening) -> None:
    log = listening.log
    log.fill(5)
    assert (await listening.ask(0, log.checkpoint())).status_code == 200
    log.fill(3)
    for old, size in ((0, 8), (3, 8), (0, 5), (2, 4)):
        answer = await listening.ask(old, log.checkpoint(size))
        assert (answer.status_code, answer.text) == (409, "5\n")
        assert answer.headers["content-type"] == "text/x.tlog.size"
    assert (await listening.ask(5, log.checkpoint())).status_code == 200


async def test_an_old_size_above_the_checkpoint_s_is_a_bad_request(listening: Listening) -> None:
    listening.log.fill(5)
    assert (await listening.ask(6, listening.log.checkpoint(), ())).status_code == 400


async def test_another_origin_is_not_found_and_other_keys_are_forbidden(listening: Listening) -> None:
    for origin, status in (("demo/other", 404), ("demo/ledger", 403)):
        other = MemoryLog(LogSigner.generate(origin), listening.scene.clock)
        other.fill(2)
        assert (await listening.ask(0, other.checkpoint(), ())).status_code == status


async def test_one_key_alone_is_forbidden(listening: Listening) -> None:
    listening.log.fill(2)
    signed = listening.log.checkpoint()
    for line in signed.note.signatures:
        alone = dataclasses.replace(signed, note=Note(signed.note.text, (line,)))
        assert (await listening.ask(0, alone)).status_code == 403


async def test_bad_proofs_are_unprocessable(listening: Listening) -> None:
    log = listening.log
    log.fill(5)
    assert (await listening.ask(0, log.checkpoint(), (bytes(32),))).status_code == 422
    assert (await listening.ask(0, log.checkpoint())).status_code == 200
    log.fill(4)
    good = log.consistency(5)
    for proof in (good[:-1], (*good, bytes(32)), good[::-1]):
        assert (await listening.ask(5, log.checkpoint(), proof)).status_code == 422
    assert (await listening.ask(5, log.checkpoint())).status_code == 200


async def test_a_fork_conflicts_without_a_size_and_then_nothing_is_cosigned(listening: Listening) -> None:
    log = listening.log
    log.fill(5)
    assert (await listening.ask(0, log.checkpoint())).status_code == 200
    fork = log.fork(4)
    answer = await listening.ask(5, fork.checkpoint(), ())
    assert answer.status_code == 409
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("LEDGER_FORK")
    assert [alarm.kind for alarm in listening.scene.heard] == ["fork"]
    assert (await listening.ask(5, log.checkpoint())).status_code == 503


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"old 0\n\n",
        b"old 00\n\nx",
        b"old -1\n\nx",
        b"new 0\n\nx",
        b"old 0\nnot base64\n\nx",
        b"old 0\n" + b"AAAA\n" * 3 + b"\nx",
        b"old 0\n\nno checkpoint",
        b"\xff" * 100,
        b"old 0\n\n" + b"x" * MAX_ADD_CHECKPOINT,
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_malformed_requests_are_bad_requests(listening: Listening, body: bytes) -> None:
    answer = await listening.post(body)
    assert answer.status_code == 400
    assert listening.scene.witness.size == 0


async def test_trailing_bytes_after_the_checkpoint_are_refused(listening: Listening) -> None:
    listening.log.fill(1)
    body = AddCheckpoint(0, (), listening.log.checkpoint().encode()).encode()
    assert (await listening.post(body + b"x")).status_code == 400
    assert (await listening.post(body + b"\n")).status_code == 400
    assert (await listening.post(body)).status_code == 200


async def test_only_this_one_path_and_method(listening: Listening) -> None:
    assert (await listening.client.get("/add-checkpoint")).status_code == 405
    assert (await listening.client.post("/")).status_code == 404


async def test_many_at_once_leave_one_history(listening: Listening) -> None:
    """Whoever comes first moves the witness on; the others conflict, and nobody gets a cosignature of two histories."""
    log = listening.log
    log.fill(1)
    assert (await listening.ask(0, log.checkpoint())).status_code == 200
    log.fill(30)
    answers = await asyncio.gather(*(listening.ask(1, log.checkpoint(size)) for size in range(2, 32)))
    assert sorted({answer.status_code for answer in answers}) == [200, 409]
    assert sum(answer.status_code == 200 for answer in answers) == 1


async def test_an_address_that_is_taken_is_a_typed_error(listening: Listening) -> None:
    address = f"127.0.0.1:{listening.client.base_url.port}"
    with pytest.raises(UnavailableError):
        await WitnessListener(listening.scene.witness, lambda *_: None).start(address)
