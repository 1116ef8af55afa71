"""A log and its read side for tests: built with core, kept as the files of C2SP tlog-tiles, served as they are."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.proofs import tree_root
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import Bundle, encode_bundle, encode_tile, tiles_between
from keyquorum_core.quorum import Custodian, Quorum

__all__ = ["CUSTODIANS", "ORIGIN", "LogServer", "TestLog", "World", "log_signer", "serve"]

ORIGIN = "log.example/keyquorum"
CUSTODIANS = {"ch-1": "CH", "de-1": "DE", "de-2": "DE", "fr-1": "FR", "is-1": "IS"}
QUORUM = ("ch-1", "de-1", "fr-1")
NOW = 1_800_000_000


def _seed(name: str) -> bytes:
    return hashlib.shake_256(b"keyquorum ledger world: " + name.encode()).digest(32)


def _keys(name: str) -> tuple[Ed25519PrivateKey, MLDSA44PrivateKey]:
    return (
        Ed25519PrivateKey.from_private_bytes(_seed(name + " ed25519")),
        MLDSA44PrivateKey.from_seed_bytes(_seed(name + " ml-dsa-44")),
    )


def log_signer(origin: str = ORIGIN, keys: str = "log") -> LogSigner:
    return LogSigner(origin, *_keys(keys))


class World:
    """A log's keys, five custodians as witnesses, and the quorum: three of them."""

    def __init__(
        self,
        signer: LogSigner | None = None,
        witnesses: Mapping[str, Cosigner] | None = None,
        quorum: Quorum | None = None,
    ) -> None:
        self.signer = signer or log_signer()
        self.witnesses = witnesses or {name: Cosigner(f"test/{name}", *_keys(name)) for name in CUSTODIANS}
        self.quorum = quorum or Quorum({"at_least": 3}, [Custodian(name, law) for name, law in CUSTODIANS.items()])
        self.trust = LogTrust(
            self.signer.keys, {name: cosigner.keys for name, cosigner in self.witnesses.items()}, self.quorum
        )

    def cosigned(self, size: int, root: bytes, now: int = NOW, by: Sequence[str] = QUORUM) -> bytes:
        signed = self.signer.sign(size, root, now)
        return self.cosign(signed, now, by).encode()

    def cosign(self, signed: SignedCheckpoint, now: int, by: Sequence[str]) -> SignedCheckpoint:
        return signed.with_signatures(
            *(line for name in by for line in self.witnesses[name].cosign(signed.checkpoint, now))
        )


class TestLog:
    """The files of a growing log, by path. Old partial tiles stay, as they do on a real read side."""

    __test__ = False

    def __init__(self, world: World, leaves: Iterable[bytes] = (), now: int = NOW) -> None:
        self.world = world
        self.leaves: list[bytes] = []
        self.files: dict[str, bytes] = {}
        self._nodes: dict[tuple[int, int], bytes] = {}
        self._range = CompactRange()
        self.publish(leaves, now)

    @property
    def size(self) -> int:
        return len(self.leaves)

    def root(self, size: int | None = None) -> bytes:
        return tree_root(self.size if size is None else size, lambda level, index: self._nodes[level, index])

    def grow(self, leaves: Iterable[bytes]) -> None:
        """Add leaves and their tiles, without a checkpoint."""
        old = self.size
        for leaf in leaves:
            self.leaves.append(leaf)
            self._range.append(leaf_hash(leaf), self._visit)
        for tile in tiles_between(old, self.size):
            first = tile.index * 256
            self.files[tile.path] = encode_tile(
                [self._nodes[8 * tile.level, first + number] for number in range(tile.width)]
            )
            if tile.level == 0:
                bundle = Bundle(tile.index, tile.width)
                self.files[bundle.path] = encode_bundle(self.leaves[first : first + tile.width])

    def _visit(self, level: int, index: int, value: bytes) -> None:
        self._nodes[level, index] = value

    def checkpoint(self, now: int = NOW, by: Sequence[str] = QUORUM, size: int | None = None) -> bytes:
        size = self.size if size is None else size
        return self.world.cosigned(size, self.root(size), now, by)

    def publish(self, leaves: Iterable[bytes] = (), now: int = NOW, by: Sequence[str] = QUORUM) -> bytes:
        """Grow, and show a checkpoint of it; the signed note."""
        self.grow(leaves)
        self.files["checkpoint"] = self.checkpoint(now, by)
        return self.files["checkpoint"]

    def tree(self) -> TileTree:
        return TileTree(self.size, lambda tile: self.files[tile.path])

    def write(self, folder: Path) -> Path:
        """The files below a folder, as an export has them."""
        for path, data in self.files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return folder


@dataclass
class LogServer:
    """Where the files are served, what was asked for, and a hook that may answer in the server's place."""

    url: str
    requests: list[str]
    answer: Callable[[BaseHTTPRequestHandler, str], bool] | None = None


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[LogServer]:
    """The read side over HTTP on loopback. ``server.answer(handler, path)`` answers itself and returns true, or lets
    the file be served by returning false."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            server.requests.append(path)
            if server.answer is not None and server.answer(self, path):
                return
            body = files.get(path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments: object) -> None:
            """Tests read ``requests`` instead."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """A client that hung up is no news."""

    http = Server(("127.0.0.1", 0), Handler)
    server = LogServer(f"http://127.0.0.1:{http.server_address[1]}", [])
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
