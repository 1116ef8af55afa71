"""The log over HTTP, as C2SP tlog-tiles has it: paths, headers, and what is not there."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from keyquorum_coordinator.ledger.http import LedgerReader
from keyquorum_coordinator.ledger.log import Log
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import open_checkpoint
from keyquorum_core.ledger.merkle import leaf_hash, verify_inclusion
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import Bundle, Tile, decode_bundle
from keyquorum_protos.wire.tls import self_signed
from tests.support.ledger_log import NOW, add, leaf, make_log

LEAVES = 600
IMMUTABLE = "public, max-age=31536000, immutable"


class Served:
    def __init__(self, log: Log, sequencer: Sequencer, client: httpx.AsyncClient) -> None:
        self.log = log
        self.sequencer = sequencer
        self.client = client

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers=headers)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    _, log = make_log(tmp_path)
    add(log, *range(LEAVES))
    while log.seal():
        pass
    sequencer = Sequencer(log)
    reader = LedgerReader(sequencer)
    url = await reader.start("127.0.0.1:0")
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield Served(log, sequencer, client)
    await reader.stop()
    await sequencer.close()


async def test_a_reader_gets_everything_it_needs_to_verify_a_leaf(served: Served) -> None:
    answer = await served.get("/checkpoint")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    signed = open_checkpoint(answer.content, served.log.keys)
    size, root = signed.checkpoint.size, signed.checkpoint.root
    assert size == LEAVES
    names = [Tile(0, 0), Tile(0, 1), Tile(0, 2, 88), Tile(1, 0, 2)]
    tiles = {name: (await served.get(f"/{name.path}")).content for name in names}
    tree = TileTree(size, lambda tile: tiles[tile])
    for number in (0, 255, 256, 599):
        verify_inclusion(leaf_hash(leaf(number)), number, size, tree.inclusion_proof(number), root)
    bundle = await served.get("/tile/entries/002.p/88")
    assert decode_bundle(bundle.content, 88) == tuple(leaf(number) for number in range(512, 600))


async def test_tiles_are_immutable(served: Served) -> None:
    for path in ("/tile/0/000", "/tile/0/002.p/88", "/tile/1/000.p/2", "/tile/entries/001"):
        answer = await served.get(path, **{"Accept-Encoding": "identity"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["cache-control"] == IMMUTABLE
        assert "content-encoding" not in answer.headers
        head = await served.client.head(path, headers={"Accept-Encoding": "identity"})
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(answer.content)))


async def test_bundles_are_compressed_for_those_who_ask(served: Served) -> None:
    plain = await served.get("/tile/entries/000", **{"Accept-Encoding": "identity"})
    packed = await served.get("/tile/entries/000", **{"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert packed.content == plain.content  # unpacked by the client
    assert "content-encoding" not in (await served.get("/tile/0/000", **{"Accept-Encoding": "gzip"})).headers


PATHS = [
    ("/", 404),
    ("/checkpoint/", 404),
    ("/Checkpoint", 404),
    ("/tile", 404),
    ("/tile/", 400),
    ("/tile/0", 400),
    ("/tile/0/0", 400),
    ("/tile/0/000.p/256", 400),
    ("/tile/0/000.p/0", 400),
    ("/tile/0/000.p/01", 400),
    ("/tile/00/000", 400),
    ("/tile/64/000", 400),
    ("/tile/-1/000", 400),
    ("/tile/0/x000/000", 400),
    ("/tile/0/%30%30%30", 400),
    ("/tile/0/000/", 400),
    ("/tile/0//000", 400),
    ("/tile/../checkpoint", 200),  # which a client sends as /checkpoint
    ("/tile/%2e%2e/checkpoint", 400),
    ("/tile/0/..%2f..%2fledger.db", 400),
    ("/tile/entries/000?x=1", 400),
    ("/checkpoint?x=1", 400),
    ("/tile/0/" + "x000/" * 100 + "000", 400),
    ("/tile/0/002", 404),  # not full yet
    ("/tile/0/002.p/89", 404),
    ("/tile/0/003.p/1", 404),
    ("/tile/2/000.p/1", 404),
    ("/tile/63/000", 404),
    ("/tile/entries/002.p/89", 404),
    ("/tile/entries/x999/999", 404),
    ("/ledger.db", 404),
]


async def test_paths_are_strict(served: Served) -> None:
    for path, status in PATHS:
        answer = await served.get(path)
        assert answer.status_code == status, path
        if status != 200:
            assert "immutable" not in answer.headers.get("cache-control", ""), path
            assert len(answer.content) < 500, path


async def test_nothing_can_be_written(served: Served) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path in ("/checkpoint", "/tile/0/000"):
            assert (await served.client.request(method, path)).status_code == 405


async def test_the_checkpoint_follows_the_log_and_shows_what_is_cosigned(served: Served) -> None:
    entry = await served.sequencer.append(leaf(LEAVES), b"one more")
    assert (await served.get("/checkpoint")).content == entry.checkpoint.encode()
    assert (await served.get("/tile/0/002.p/89")).status_code == 200
    assert (await served.get("/tile/0/002.p/88")).status_code == 200, "what an older checkpoint calls for stays"
    witness = Cosigner.generate("demo/witness")
    kept = await served.sequencer.add_cosignatures(entry.checkpoint, witness.cosign(entry.checkpoint.checkpoint, NOW))
    assert (await served.get("/checkpoint")).content == kept.encode()
    assert len(kept.note.signatures) == 4


async def test_a_store_that_fails_is_a_503_and_not_cached(served: Served, tmp_path: Path) -> None:
    (tmp_path / "ledger" / "tile" / "0" / "000").unlink()
    answer = await served.get("/tile/0/000")
    assert (answer.status_code, answer.headers["cache-control"]) == (503, "no-store")
    assert str(tmp_path) not in answer.text
    assert (await served.get("/tile/0/001")).status_code == 200


async def test_tls_by_configuration(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    identity = self_signed("demo", "coordinator", "main", now=NOW)
    (tmp_path / "cert.pem").write_bytes(identity.certificate)
    (tmp_path / "key.pem").write_bytes(identity.key)
    reader = LedgerReader(sequencer)
    with pytest.raises(MalformedError):
        await reader.start("127.0.0.1:0", tmp_path / "cert.pem", tmp_path / "cert.pem")
    url = await reader.start("127.0.0.1:0", tmp_path / "cert.pem", tmp_path / "key.pem")
    assert url.startswith("https://127.0.0.1:")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False) as client:
        assert open_checkpoint((await client.get("/checkpoint")).content, log.keys).checkpoint.size == 0
    await reader.stop()
    await sequencer.close()


async def test_an_address_that_is_taken_is_an_error(tmp_path: Path) -> None:
    _, log = make_log(tmp_path)
    sequencer = Sequencer(log)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UnavailableError) as caught:
            await LedgerReader(sequencer).start(f"127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.reason is Reason.UNAVAILABLE
    await sequencer.close()


async def test_the_names_that_are_served_are_those_of_the_specification() -> None:
    assert (Tile(0, 1234067).path, Bundle(0, 3).path) == ("tile/0/x001/x234/067", "tile/entries/000.p/3")
