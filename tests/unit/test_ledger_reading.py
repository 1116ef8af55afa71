"""Reading a log from outside: bounded, patient, deaf to redirects; verified, proven, copied."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from keyquorum.ledger.export import export
from keyquorum.ledger.http import HttpSource
from keyquorum.ledger.jobs import belongs_to, prove_job
from keyquorum.ledger.proving import LoggedLeaf, prove
from keyquorum.ledger.source import DirectorySource, LogSource
from keyquorum.ledger.verification import latest_checkpoint, verify_log
from keyquorum.progress import Progress
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tlog_proof import TlogProof
from tests.support.ledger_world import NOW, ORIGIN, LogServer, TestLog, World, serve

WORLD = World()
JOB = "a" * 26
OTHER = "b" * 26


def leaf(number: int) -> bytes:
    job = JOB if number in (0, 1, 255, 256, 599) else OTHER
    return b'{"job_id":"%s","n":%d,"type":"release.intent"}' % (job.encode(), number)


LEAVES = [leaf(number) for number in range(600)]


@pytest.fixture
def log() -> TestLog:
    return TestLog(WORLD, LEAVES, int(time.time()))


@pytest.fixture
def server(log: TestLog) -> Iterator[LogServer]:
    with serve(log.files) as running:
        yield running


async def refused(call: Coroutine[object, object, object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        await call
    return caught.value


async def test_a_log_is_verified_over_http(log: TestLog, server: LogServer) -> None:
    source = HttpSource(server.url)
    seen: list[bytes] = []
    steps: list[Progress] = []
    done = await verify_log(
        source, WORLD.trust, leaves=lambda first, leaves: seen.extend(leaves), progress=steps.append
    )
    await source.close()
    assert (done.size, done.begin, seen) == (600, 0, LEAVES)
    assert [step.done for step in steps] == [0, 256, 512, 600]
    assert set(server.requests) == {path for path in log.files if ".p/" not in path or path.endswith(("88", "2"))}


async def test_only_new_files_are_read_after_a_saved_checkpoint(log: TestLog, server: LogServer) -> None:
    past = Checkpoint(ORIGIN, 600, log.root())
    log.publish([leaf(n) for n in range(600, 700)], int(time.time()))
    seen: list[tuple[int, int]] = []
    source = HttpSource(server.url)
    done = await verify_log(source, WORLD.trust, past, leaves=lambda first, leaves: seen.append((first, len(leaves))))
    await source.close()
    assert (done.size, done.begin, seen) == (700, 600, [(600, 100)])
    assert not {"tile/0/000", "tile/entries/000", "tile/0/001"} & set(server.requests)


async def test_a_checkpoint_is_waited_for_until_custodians_cosigned_it(log: TestLog, server: LogServer) -> None:
    whole = log.files["checkpoint"]
    log.files["checkpoint"] = log.checkpoint(int(time.time()), by=["ch-1"])

    def answer(handler: BaseHTTPRequestHandler, path: str) -> bool:
        log.files["checkpoint"] = log.files["checkpoint"] if len(server.requests) < 2 else whole
        return False

    server.answer = answer
    source = HttpSource(server.url)
    latest = await latest_checkpoint(source, WORLD.trust)
    assert (latest.checkpoint.size, len(server.requests)) == (600, 2)
    log.files["checkpoint"] = whole = log.checkpoint(int(time.time()), by=["ch-1", "de-1"])
    error = await refused(latest_checkpoint(source, WORLD.trust, patience=0))
    assert error.reason is Reason.NO_QUORUM
    assert "ch-1" in error.actual
    await source.close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def packed(handler: BaseHTTPRequestHandler, body: bytes, cut: int = 0, more: bytes = b"") -> bool:
    data = gzip.compress(body)
    return reply(handler, 200, data[: len(data) - cut] + more, Content_Encoding="gzip")


def drip(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.02)
    return True


def drip_headers(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100):
        handler.wfile.write(b"X-%d: y\r\n" % number)
        time.sleep(0.02)
    return True


def endless(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
    return True


def cut(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.close_connection = True
    return reply(handler, 200, b"half", Content_Length="1000")


def silent(handler: BaseHTTPRequestHandler, path: str) -> bool:
    time.sleep(0.5)
    handler.close_connection = True
    return True


def nonsense(handler: BaseHTTPRequestHandler, path: str) -> bool:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")
    handler.close_connection = True
    return True


Answer = Callable[[BaseHTTPRequestHandler, str], bool]
HOSTILE: dict[str, tuple[Answer, type[KeyquorumError], Reason]] = {
    "a file that drips": (drip, UnavailableError, Reason.TIMEOUT),
    "headers that drip": (drip_headers, UnavailableError, Reason.TIMEOUT),
    "no answer": (silent, UnavailableError, Reason.TIMEOUT),
    "a huge file": (endless, MalformedError, Reason.TOO_LARGE),
    "a huge declared file": (lambda h, p: reply(h, 200, bytes(1 << 20)), MalformedError, Reason.TOO_LARGE),
    "half a file": (cut, UnavailableError, Reason.UNAVAILABLE),
    "not HTTP": (nonsense, UnavailableError, Reason.UNAVAILABLE),
    "a redirect": (lambda h, p: reply(h, 302, Location="http://127.0.0.1:1/"), RefusedError, Reason.UNAVAILABLE),
    "another coding": (lambda h, p: reply(h, 200, b"x", Content_Encoding="br"), MalformedError, Reason.UNSUPPORTED),
    "no gzip": (lambda h, p: reply(h, 200, b"x", Content_Encoding="gzip"), MalformedError, Reason.MALFORMED),
    "half a gzip": (lambda h, p: packed(h, b"x" * 99, cut=3), MalformedError, Reason.MALFORMED),
    "more than a gzip": (lambda h, p: packed(h, b"x", more=b"x"), MalformedError, Reason.MALFORMED),
    "a gzip bomb": (lambda h, p: packed(h, bytes(5 << 20)), MalformedError, Reason.TOO_LARGE),
    "no such file": (lambda h, p: reply(h, 404), UnavailableError, Reason.NOT_FOUND),
    "a forbidden file": (lambda h, p: reply(h, 403), UnavailableError, Reason.UNAVAILABLE),
    "a server out of order": (lambda h, p: reply(h, 503), UnavailableError, Reason.UNAVAILABLE),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_server_is_held_off(server: LogServer, name: str) -> None:
    server.answer, kind, reason = HOSTILE[name]
    source = HttpSource(server.url, file_seconds=0.3 if reason is Reason.TIMEOUT else 30.0, patience=0.3)
    error = await refused(latest_checkpoint(source, WORLD.trust))
    await source.close()
    assert (type(error), error.reason) == (kind, reason)
    assert error.expected


async def test_compressed_files_are_read_as_others_are(log: TestLog, server: LogServer) -> None:
    server.answer = lambda handler, path: path in log.files and packed(handler, log.files[path])
    source = HttpSource(server.url)
    assert (await verify_log(source, WORLD.trust)).size == 600
    await source.close()


async def test_what_passes_is_waited_for(log: TestLog, server: LogServer) -> None:
    def sometimes(handler: BaseHTTPRequestHandler, path: str) -> bool:
        return len(server.requests) % 3 == 0 and (cut(handler, path) or reply(handler, 503))

    server.answer = sometimes
    source = HttpSource(server.url)
    assert (await verify_log(source, WORLD.trust)).size == 600
    await source.close()


async def test_a_closed_kept_connection_is_nothing_to_wait_for(server: LogServer) -> None:
    source = HttpSource(server.url, patience=0.0)
    await source.read("tile/0/000", 8192)

    def hang_up(handler: BaseHTTPRequestHandler, path: str) -> bool:
        handler.close_connection = True
        return len(server.requests) == 2

    server.answer = hang_up
    assert len(await source.read("tile/0/000", 8192)) == 8192
    assert len(server.requests) == 3
    await source.close()


async def test_a_partial_tile_that_is_gone_is_cut_from_the_full_one(log: TestLog, server: LogServer) -> None:
    old = log.files["checkpoint"]
    log.publish([leaf(n) for n in range(600, 800)], int(time.time()))
    log.files["checkpoint"] = old
    for path in [path for path in log.files if path.endswith(".p/88")]:
        del log.files[path]
    source = HttpSource(server.url)
    seen: list[bytes] = []
    assert (await verify_log(source, WORLD.trust, leaves=lambda first, leaves: seen.extend(leaves))).size == 600
    assert seen == LEAVES
    del log.files["tile/0/002"]
    assert "tile/0/002.p/88" in (await refused(verify_log(source, WORLD.trust))).message
    await source.close()


async def test_nobody_there_is_said_with_the_address() -> None:
    source = HttpSource("http://127.0.0.1:1", patience=0.1)
    error = await refused(source.read("checkpoint", 100))
    assert error.reason is Reason.UNAVAILABLE
    assert "http://127.0.0.1:1/checkpoint" in error.message


@pytest.mark.parametrize(
    "url", ["ftp://log.example", "http://", "http://log.example/?a=b", "http://user:pass@log.example", "http://a:b"]
)
def test_what_is_no_url_of_a_log(url: str) -> None:
    with pytest.raises(MalformedError):
        HttpSource(url)


async def test_every_leaf_is_proven(log: TestLog, tmp_path: Path) -> None:
    source = DirectorySource(log.write(tmp_path))
    checkpoint = Checkpoint(ORIGIN, 600, log.root())
    given = [LoggedLeaf(number, LEAVES[number]) for number in range(600)]
    proven = [each.index async for each, proof in prove(source, checkpoint, given)]
    assert proven == list(range(600))
    error = await refused(anext(prove(source, checkpoint, [LoggedLeaf(3, LEAVES[4])])))
    assert error.reason is Reason.LEDGER_PROOF


async def test_a_jobs_leaves_become_files_that_verify_alone(log: TestLog, tmp_path: Path) -> None:
    source = DirectorySource(log.write(tmp_path / "log"))
    found = await prove_job(source, WORLD.trust, JOB, tmp_path / "proofs")
    assert [each.index for each in found.proofs] == [0, 1, 255, 256, 599]
    for each in found.proofs:
        proof = TlogProof.parse(each.file.read_bytes())
        assert proof.extra == LEAVES[each.index]
        proof.verify(leaf_hash(proof.extra), WORLD.trust.log)
    error = await refused(prove_job(source, WORLD.trust, "c" * 26, tmp_path / "none"))
    assert error.reason is Reason.NOT_FOUND
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"job_id":1}', b'{"x":"aaa"}', b"\xff", b'{"a":"' + b"a" * 26 + b'"}'])
def test_a_leaf_of_no_job(text: bytes) -> None:
    assert belongs_to(text, JOB) is None


async def test_a_copy_verifies_offline_and_grows(log: TestLog, server: LogServer, tmp_path: Path) -> None:
    source = HttpSource(server.url)
    folder = tmp_path / "copy"
    first = await export(source, WORLD.trust, folder)
    assert first.files == len(log.files) - 1
    assert (await verify_log(DirectorySource(folder), WORLD.trust)).size == 600
    again = await export(source, WORLD.trust, folder)
    assert again.files == 0
    log.publish([leaf(n) for n in range(600, 900)], int(time.time()))
    await export(source, WORLD.trust, folder)
    await source.close()
    assert (await verify_log(DirectorySource(folder), WORLD.trust)).size == 900
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("tile/**/*.p/*")) == [
        "tile/0/003.p/132", "tile/1/000.p/3", "tile/entries/003.p/132"
    ]  # fmt: skip


async def test_a_copy_goes_on_where_it_stopped(log: TestLog, server: LogServer, tmp_path: Path) -> None:
    def stop(handler: BaseHTTPRequestHandler, path: str) -> bool:
        return path == "tile/0/001" and reply(handler, 404)

    server.answer = stop
    source = HttpSource(server.url)
    assert (await refused(export(source, WORLD.trust, tmp_path))).reason is Reason.NOT_FOUND
    assert not (tmp_path / "checkpoint").exists()
    assert (await refused(verify_log(DirectorySource(tmp_path), WORLD.trust))).reason is Reason.NOT_FOUND
    server.answer = None
    before = len(server.requests)
    await export(source, WORLD.trust, tmp_path)
    await source.close()
    assert "tile/0/000" not in server.requests[before:]
    assert (await verify_log(DirectorySource(tmp_path), WORLD.trust)).size == 600


def test_a_copy_that_was_killed_goes_on_and_leaves_nothing_behind(
    log: TestLog, server: LogServer, tmp_path: Path
) -> None:

    def slowly(handler: BaseHTTPRequestHandler, path: str) -> bool:
        time.sleep(0.02)
        return False

    server.answer = slowly
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom keyquorum.ledger.export import export\n"
        "from keyquorum.ledger.http import HttpSource\nfrom tests.support.ledger_world import World\n"
        "asyncio.run(export(HttpSource(sys.argv[1]), World().trust, Path(sys.argv[2])))\n"
    )
    for files in range(1, 8, 2):
        process = subprocess.Popen([sys.executable, "-c", script, server.url, str(tmp_path / "copy")])
        deadline = time.monotonic() + 20
        while sum(each.is_file() for each in (tmp_path / "copy").rglob("*")) < files and process.poll() is None:
            assert time.monotonic() < deadline
        process.kill()
        process.wait()

    async def finish() -> None:
        source = HttpSource(server.url)
        await export(source, WORLD.trust, tmp_path / "copy")
        await source.close()

    asyncio.run(finish())
    assert asyncio.run(verify_log(DirectorySource(tmp_path / "copy"), WORLD.trust)).size == 600
    assert not list((tmp_path / "copy").rglob(".*"))


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 9000])
async def test_a_damaged_copy_is_refused_and_mended(log: TestLog, tmp_path: Path, damage: bytes) -> None:
    log.write(tmp_path / "log")
    source = DirectorySource(tmp_path / "log")
    folder = tmp_path / "copy"
    await export(source, WORLD.trust, folder)
    (folder / "tile/0/001").write_bytes(damage)
    assert (await refused(verify_log(DirectorySource(folder), WORLD.trust))).reason in (
        Reason.MALFORMED, Reason.TOO_LARGE
    )  # fmt: skip
    for _ in range(2):
        try:
            await export(source, WORLD.trust, folder)
        except MalformedError:
            assert not (folder / "tile/0/001").exists()
    assert (await verify_log(DirectorySource(folder), WORLD.trust)).size == 600


async def test_a_copy_is_never_turned_into_that_of_a_fork(log: TestLog, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    await export(DirectorySource(log.write(tmp_path / "log")), WORLD.trust, folder)
    kept = (folder / "checkpoint").read_bytes()
    fork = TestLog(WORLD, [b"another", *LEAVES[1:], b"more"], int(time.time()))
    error = await refused(export(DirectorySource(fork.write(tmp_path / "fork")), WORLD.trust, folder))
    assert error.reason in (Reason.LEDGER_PROOF, Reason.LEDGER_FORK)
    shorter = TestLog(WORLD, LEAVES[:500], int(time.time()))
    error = await refused(export(DirectorySource(shorter.write(tmp_path / "short")), WORLD.trust, folder))
    assert error.reason is Reason.LEDGER_ROLLBACK
    assert (folder / "checkpoint").read_bytes() == kept


async def test_what_is_ahead_is_let_go_when_a_file_is_refused(log: TestLog, server: LogServer) -> None:
    log.files["tile/entries/000"] = bytes(100)
    source = HttpSource(server.url)
    error = await refused(verify_log(source, WORLD.trust))
    assert (error.reason, error.details["file"]) == (Reason.MALFORMED, "tile/entries/000")
    await source.close()
    assert len(asyncio.all_tasks()) == 1


async def test_a_folder_is_a_source_like_any_other(tmp_path: Path) -> None:
    source: LogSource = DirectorySource(tmp_path)
    assert (await refused(source.read("checkpoint", 10))).reason is Reason.NOT_FOUND
    (tmp_path / "checkpoint").write_bytes(bytes(11))
    assert (await refused(source.read("checkpoint", 10))).reason is Reason.TOO_LARGE
    (tmp_path / "tile").mkdir()
    assert (await refused(source.read("tile", 10))).reason is Reason.STORAGE
    assert source.where == str(tmp_path)


async def test_cosignatures_from_the_future_are_not_waited_for(log: TestLog, tmp_path: Path) -> None:
    source = DirectorySource(log.write(tmp_path))
    assert (await refused(latest_checkpoint(source, WORLD.trust, now=NOW - 10**9))).reason is Reason.STALE
