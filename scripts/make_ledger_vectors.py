"""Write docs/spec/vectors/ledger.json: leaves, trees, tiles, notes, checkpoints, cosignatures, proofs and policies.

    python scripts/make_ledger_vectors.py [--check]

Keys come from fixed seeds. ML-DSA-44 signing is randomised, so lines that stand in the present file and still verify
are used again: running twice changes nothing, and what earlier files held must verify for ever. ``data`` is text, or an
object: ``hex``, or a splice ``{"base": name, "at": i, "remove": n, "insert": …}``, the ``data`` of an earlier vector
with ``n`` bytes at offset ``i`` replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.add_checkpoint import AddCheckpoint
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import Cosigner, cosignature_message, subtree_message, verify_signature
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.merkle import EMPTY_ROOT, leaf_hash
from keyquorum_core.ledger.notes import Note, NoteSignature, parse_note
from keyquorum_core.ledger.proofs import consistency_proof, inclusion_proof, reader_of, tree_root
from keyquorum_core.ledger.tiles import Bundle, Tile, encode_bundle, encode_tile, tiles_between
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey
from keyquorum_core.ledger.witness_policy import witness_policy
from keyquorum_core.release import Leaf

TARGET = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors" / "ledger.json"
NOW = 1_800_000_000
ORIGIN = "log.example/keyquorum"
ABOUT = (
    "Formats: docs/spec/ledger.md. Seeds are 32 bytes, ML-DSA-44's that of FIPS 204 key generation. `expect` is `ok`,"
    " with the results beside it, or the reason code. `data` is text, or an object: `hex`, or a splice of the `data` of"
    " vector `base`, with `remove` bytes at `at` replaced by `insert` (text or `hex`). Hashes are hex."
)
Vector = dict[str, Any]


def seed(name: str) -> bytes:
    return hashlib.shake_256(b"keyquorum ledger vectors: " + name.encode()).digest(32)


def ed25519(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed(name + " ed25519"))


def ml_dsa_44(name: str) -> MLDSA44PrivateKey:
    return MLDSA44PrivateKey.from_seed_bytes(seed(name + " ml-dsa-44"))


def hexes(values: tuple[bytes, ...] | list[bytes]) -> list[str]:
    return [value.hex() for value in values]


class Kept:
    """ML-DSA-44 lines of the present file, so that a new run need not make others."""

    def __init__(self) -> None:
        self._lines: set[NoteSignature] = set()
        old = json.loads(TARGET.read_text("utf-8"))["vectors"] if TARGET.exists() else []
        for vector in old:
            for line in re.findall("— [^\\s+]+ [A-Za-z0-9+/]+=*", json.dumps(vector.get("data"), ensure_ascii=False)):
                try:
                    self._lines.add(NoteSignature.parse(line))
                except KeyquorumError:
                    continue

    def line(self, key: VerifierKey, checkpoint: Checkpoint, fresh: NoteSignature, now: int) -> NoteSignature:
        for line in sorted(self._lines, key=lambda known: known.signature):
            try:
                if verify_signature(key, checkpoint, line) == now:
                    return line
            except KeyquorumError:
                continue
        return fresh

    def sign(self, log: LogSigner, size: int, root: bytes, now: int = NOW) -> SignedCheckpoint:
        signed = log.sign(size, root, now)
        first, second = signed.note.signatures
        second = self.line(log.keys.ml_dsa_44, signed.checkpoint, second, now)
        return SignedCheckpoint(signed.checkpoint, Note(signed.note.text, (first, second)), now)

    def cosign(self, cosigner: Cosigner, checkpoint: Checkpoint, now: int = NOW) -> tuple[NoteSignature, NoteSignature]:
        first, second = cosigner.cosign(checkpoint, now)
        return first, self.line(cosigner.keys[1], checkpoint, second, now)


class Vectors:
    """The vectors so far; ``data`` that repeats an earlier one's is written as a splice of it."""

    def __init__(self) -> None:
        self.all: list[Vector] = []
        self._blobs: list[tuple[str, bytes]] = []

    def add(self, name: str, operation: str, expect: str = "ok", data: bytes | None = None, **members: object) -> None:
        if any(vector["name"] == name for vector in self.all):
            raise SystemExit(f"a vector name is used twice: {name}")
        vector: Vector = {"name": name, "operation": operation, "expect": expect}
        if data is not None:
            vector["data"] = self._write(name, data)
        self.all.append({**vector, **members})

    def _write(self, name: str, data: bytes) -> object:
        splices = [splice(base, old, data) for base, old in self._blobs]
        best = min(splices, key=lambda edit: len(str(edit)), default=None)
        if best is not None and len(str(best)) < len(data) // 2:
            return best
        if len(data) > 300:
            self._blobs.append((name, data))
        return text_or_hex(data)


def text_or_hex(data: bytes) -> object:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return {"hex": data.hex()}
    return text if all(character >= " " or character == "\n" for character in text) else {"hex": data.hex()}


def splice(base: str, old: bytes, new: bytes) -> Vector:
    def common(a: bytes, b: bytes) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    head = common(old, new)
    tail = common(old[head:][::-1], new[head:][::-1])
    insert = text_or_hex(new[head : len(new) - tail])
    return {"base": base, "at": head, "remove": len(old) - head - tail, "insert": insert}


def trees(out: Vectors) -> tuple[list[bytes], dict[tuple[int, int], bytes]]:
    inputs = [
        b"", b"\0", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43", bytes(range(0x50, 0x58)),
        bytes(range(0x60, 0x70)),
    ]  # fmt: skip
    for size in range(len(inputs) + 1):
        tree = CompactRange()
        for data in inputs[:size]:
            tree.append(leaf_hash(data))
        out.add(f"root of {size} leaves", "root", leaves=hexes(inputs[:size]), root=tree.root().hex())

    leaves = []
    for number in range(7):
        digests = [hashlib.sha256(f"{what} {number}".encode()).hexdigest() for what in ("manifest", "key", "evidence")]
        recipient = "owner" if number % 2 == 0 else "worker"
        evidence = Leaf.NO_EVIDENCE if recipient == "owner" else digests[2]
        job = "abcdefghijklmnopqrstuvwxy" + "abcdefg"[number]
        leaves.append(Leaf(job, digests[0], digests[1], evidence, "demo", 1, NOW - 70 + number, recipient).to_bytes())
    nodes: dict[tuple[int, int], bytes] = {}
    tree = CompactRange()
    for number, data in enumerate(leaves):
        tree.append(leaf_hash(data), lambda level, index, value: nodes.__setitem__((level, index), value))
        out.add(f"leaf {number}", "leaf", data=data, hash=leaf_hash(data).hex(), root=tree.root().hex())
    return leaves, nodes


def proofs(out: Vectors, leaves: list[bytes], nodes: dict[tuple[int, int], bytes]) -> None:
    node, size = reader_of(nodes), len(leaves)
    root, roots = tree_root(size, node), [tree_root(n, node) for n in range(size + 1)]

    def inclusion(name: str, expect: str, index: int, size: int, proof: list[bytes], leaf: bytes, root: bytes) -> None:
        members: Vector = {
            "leaf_hash": leaf.hex(),
            "index": index,
            "size": size,
            "proof": hexes(proof),
            "root": root.hex(),
        }
        out.add(name, "inclusion", expect, **members)

    for index in range(size):
        proof = list(inclusion_proof(index, size, node))
        inclusion(f"leaf {index} of {size}", "ok", index, size, proof, leaf_hash(leaves[index]), root)
    proof, leaf = list(inclusion_proof(2, size, node)), leaf_hash(leaves[2])
    for name, changed in {
        "too short": proof[:-1],
        "too long": [*proof, root],
        "empty": [],
        "repeated hash": [proof[0], *proof],
        "swapped": [proof[1], proof[0], proof[2]],
        "changed": [bytes(32), *proof[1:]],
        "short hash": [proof[0][:-1], *proof[1:]],
    }.items():
        inclusion(f"inclusion proof {name}", "LEDGER_PROOF", 2, size, changed, leaf, root)
    for index, total in ((3, size), (6, size), (7, size), (-1, size), (2, 3), (2, 2), (2, 0), (0, 0), (2, 2**63)):
        inclusion(f"inclusion at {index} of {total}", "LEDGER_PROOF", index, total, proof, leaf, root)
    inclusion("inclusion of another leaf", "LEDGER_PROOF", 2, size, proof, leaf_hash(leaves[3]), root)
    inclusion("inclusion under another root", "LEDGER_PROOF", 2, size, proof, leaf, roots[6])

    def consistency(name: str, expect: str, *sizes: int, proof: list[bytes], first: bytes, second: bytes) -> None:
        members: Vector = {"size1": sizes[0], "root1": first.hex(), "size2": sizes[1], "root2": second.hex()}
        out.add(name, "consistency", expect, **members, proof=hexes(proof))

    for old, new in ((0, 7), (1, 7), (2, 7), (3, 7), (4, 7), (6, 7), (7, 7), (3, 4), (0, 0)):
        extends = list(consistency_proof(old, new, node))
        consistency(f"{old} to {new}", "ok", old, new, proof=extends, first=roots[old], second=roots[new])
    extends = list(consistency_proof(3, 7, node))
    for name, changed in {
        "too short": extends[:-1],
        "too long": [*extends, root],
        "empty": [],
        "swapped": [extends[1], extends[0], *extends[2:]],
        "changed": [*extends[:-1], bytes(32)],
    }.items():
        name = f"consistency proof {name}"
        consistency(name, "LEDGER_PROOF", 3, 7, proof=changed, first=roots[3], second=root)
    bad = "LEDGER_PROOF"
    consistency("from another old root", bad, 3, 7, proof=extends, first=roots[2], second=root)
    consistency("to another new root", bad, 3, 7, proof=extends, first=roots[3], second=roots[6])
    consistency("from another old size", bad, 2, 7, proof=extends, first=roots[3], second=root)
    consistency("backwards", bad, 7, 3, proof=extends, first=root, second=roots[3])
    consistency("a proof from nothing", bad, 0, 7, proof=[root], first=EMPTY_ROOT, second=root)
    consistency("nothing with a root", bad, 0, 7, proof=[], first=roots[1], second=root)
    consistency("a proof to itself", bad, 7, 7, proof=[root], first=root, second=root)
    consistency("two roots of one size", "LEDGER_FORK", 7, 7, proof=[], first=root, second=roots[6])


def tiles(out: Vectors, leaves: list[bytes]) -> None:
    for name in (Tile(0, 0), Tile(0, 0, 1), Tile(63, 999, 255), Tile(1, 1000), Tile(0, 1_234_067)):
        out.add(name.path, "path", level=name.level, index=name.index, width=name.width)
    for bundle in (Bundle(0), Bundle(1_234_067, 8)):
        out.add(bundle.path, "path", level="entries", index=bundle.index, width=bundle.width)
    for path in (
        "tile/0/0", "tile/0/x000/000", "tile/0/001/000", "tile/0/x001", "tile/00/000", "tile/64/000", "tile/0/000.p/0",
        "tile/0/000.p/256", "tile/0/000.p/01", "/tile/0/000", "tile/0/000\n", "tile/0/x999/x999/x999/x999/x999/999",
    ):  # fmt: skip
        out.add(path, "path", "MALFORMED")
    whole = encode_bundle(leaves[:2])
    out.add("a bundle of two leaves", "bundle", data=whole, width=2, entries=hexes(leaves[:2]))
    out.add("an empty leaf in a bundle", "bundle", data=b"\0\0", width=1, entries=[""])
    for title, data, width in (
        ("a bundle cut short", whole[:-1], 2),
        ("a bundle cut in a length", whole[: len(leaves[0]) + 3], 2),
        ("a bundle with a byte more", whole + b"\0", 2),
        ("a bundle with a leaf more than its width", whole, 1),
        ("a bundle with a leaf less than its width", whole, 3),
        ("a bundle of width 0", b"", 0),
        ("a bundle of width 257", b"\0\0" * 257, 257),
    ):
        out.add(title, "bundle", "MALFORMED", data, width=width)
    out.add("a tile of one hash", "tile", data=leaf_hash(leaves[0]), width=1, hashes=[leaf_hash(leaves[0]).hex()])
    for title, data, width in (
        ("a tile cut short", bytes(63), 2),
        ("a tile with a byte more", bytes(65), 2),
        ("a tile of another width", bytes(64), 3),
        ("an empty tile", b"", 0),
    ):
        out.add(title, "tile", "MALFORMED", data, width=width)


def vkeys(out: Vectors, log: LogSigner, witness: Cosigner) -> None:
    for key in (log.keys.ed25519, log.keys.ml_dsa_44, *witness.keys):
        members: Vector = {"key_name": key.name, "type": int(key.type), "key_id": key.key_id.hex()}
        out.add(f"vkey of {key.name}, type {key.type:#04x}", "vkey", data=key.encode().encode(), **members)
    good = log.keys.ed25519.encode()
    name, key_id, material = good.split("+", 2)
    as_cosigner = VerifierKey(name, SignatureType.ED25519_COSIGNATURE, log.keys.ed25519.public).key_id.hex()
    for title, text, expect in (
        ("vkey with another key's id", f"{name}+{witness.keys[0].key_id.hex()}+{material}", "DIGEST"),
        ("vkey with the id of another type", f"{name}+{as_cosigner}+{material}", "DIGEST"),
        ("vkey under another name", f"x{good}", "DIGEST"),
        ("vkey with an upper-case id", f"{name}+{key_id.upper()}+{material}", "MALFORMED"),
        ("vkey of an unknown type", f"{name}+{key_id}+AgAA", "UNSUPPORTED"),
        ("vkey cut short", good[:-4], "MALFORMED"),
        ("vkey with a space in its name", f"a {good}", "MALFORMED"),
        ("vkey without a name", good.removeprefix(name), "MALFORMED"),
        ("vkey with a newline", good + "\n", "MALFORMED"),
        ("vkey of small order", f"a+00000000+AQ{'A' * 42}", "MALFORMED"),
    ):
        out.add(title, "vkey", expect, text.encode())


def checkpoints(out: Vectors, kept: Kept, log: LogSigner, witnesses: list[Cosigner], root: bytes) -> SignedCheckpoint:
    signed = kept.sign(log, 7, root)
    text, (ed, ml) = signed.note.text, signed.note.signatures

    def one(title: str, expect: str, data: bytes) -> None:
        members = {"origin": ORIGIN, "size": 7, "root": root.hex(), "signed_at": NOW} if expect == "ok" else {}
        out.add(title, "checkpoint", expect, data, log=log.keys.encode(), **members)

    def lines(*signatures: NoteSignature, body: bytes = text) -> bytes:
        return body + b"\n" + "".join(signature.line() for signature in signatures).encode()

    def flipped(line: NoteSignature, at: int) -> NoteSignature:
        raw = bytearray(line.signature)
        raw[at] ^= 1
        return NoteSignature(line.name, line.key_id, bytes(raw))

    one("a checkpoint", "ok", lines(ed, ml))
    one("its lines the other way round", "ok", lines(ml, ed))
    strangers = [NoteSignature("stranger.example", bytes([0, 0, 0, n]), b"unknown") for n in range(15)]
    one("fourteen unknown lines", "ok", lines(ed, ml, *strangers[:14]))
    one("seventeen lines", "TOO_LARGE", lines(ed, ml, *strangers))
    one("Ed25519 alone", "SIGNATURE_MISSING", lines(ed))
    one("ML-DSA-44 alone", "SIGNATURE_MISSING", lines(ml))
    one("unknown lines alone", "SIGNATURE_MISSING", lines(*strangers[:2]))
    one("the log's key id under another name", "SIGNATURE_MISSING", lines(ml, NoteSignature("x", ed.key_id, b"x")))
    one("no lines", "SIGNATURE_MISSING", text + b"\n")
    one("no empty line", "SIGNATURE_MISSING", text + ed.line().encode() + ml.line().encode())
    one("a line repeated", "SIGNATURE_EXTRA", lines(ed, ml, ed))
    one("a line repeated with another signature", "SIGNATURE_EXTRA", lines(flipped(ed, 0), ed, ml))
    one("an unknown line repeated", "SIGNATURE_EXTRA", lines(ed, ml, strangers[0], strangers[0]))
    one("a bit of the Ed25519 signature", "SIGNATURE", lines(flipped(ed, 5), ml))
    one("a bit of the ML-DSA-44 signature", "SIGNATURE", lines(ed, flipped(ml, 500)))
    one("a bit of the ML-DSA-44 time", "SIGNATURE", lines(ed, flipped(ml, 7)))
    one("a time past 2^63", "SIGNATURE", lines(ed, NoteSignature(ORIGIN, ml.key_id, b"\xff" * 8 + ml.signature[8:])))
    one("a signature too long", "SIGNATURE", lines(NoteSignature(ORIGIN, ed.key_id, ed.signature + b"\0"), ml))
    one("a signature too short", "SIGNATURE", lines(ed, NoteSignature(ORIGIN, ml.key_id, ml.signature[:-1])))
    other = kept.sign(log, 6, root)
    one("another size", "SIGNATURE", lines(ed, ml, body=other.note.text))
    one("another root", "SIGNATURE", lines(ed, ml, body=Checkpoint(ORIGIN, 7, bytes(32)).text()))
    one("another origin", "LEDGER_ORIGIN", lines(ed, ml, body=Checkpoint("other.example", 7, root).text()))
    whole = lines(ed, ml)
    middle = text.split(b"\n")[1:]
    for title, expect, data in (
        ("a byte after the last line", "MALFORMED", whole + b"x"),
        ("a line after the last line", "MALFORMED", whole + b"trailing\n"),
        ("an empty line at the end", "SIGNATURE_MISSING", whole + b"\n"),
        ("no newline at the end", "MALFORMED", whole[:-1]),
        ("a hyphen for the dash", "MALFORMED", whole.replace("—".encode(), b"-", 1)),
        ("two spaces in a line", "MALFORMED", whole.replace("— ".encode(), "—  ".encode(), 1)),
        ("carriage returns", "MALFORMED", whole.replace(b"\n", b"\r\n")),
        ("a tab", "MALFORMED", whole.replace(b"7\n", b"7\t\n", 1)),
        ("a zero byte", "MALFORMED", whole.replace(b"7\n", b"7\0\n", 1)),
        ("not UTF-8", "MALFORMED", b"\xff" + whole),
        ("an overlong encoding", "MALFORMED", b"\xc0\xaf" + whole),
        ("an over-long line", "TOO_LARGE", b"x" * 8193 + whole),
        ("an over-long origin", "MALFORMED", b"x" * 240 + whole),
        ("an over-long text", "TOO_LARGE", b"x" * 600 + whole),
        ("an origin with a space", "MALFORMED", b"x " + whole),
        ("no origin", "MALFORMED", b"\n".join([b"", *middle]) + whole.removeprefix(text)),
        ("a leading zero", "MALFORMED", whole.replace(b"\n7\n", b"\n07\n", 1)),
        ("a sign", "MALFORMED", whole.replace(b"\n7\n", b"\n+7\n", 1)),
        ("a size of 2^63", "MALFORMED", whole.replace(b"\n7\n", b"\n9223372036854775808\n", 1)),
        ("no leaves under a root", "DIGEST", whole.replace(b"\n7\n", b"\n0\n", 1)),
        ("a root without padding", "MALFORMED", whole.replace(b"=\n\n", b"\n\n", 1)),
        ("a root of 31 bytes", "MALFORMED", whole.replace(text[-6:-1] + b"\n\n", b"=\n\n", 1)),
        ("an extension line", "UNSUPPORTED", whole.replace(b"=\n\n", b"=\nextension\n\n", 1)),
        ("a line missing", "MALFORMED", whole.replace(b"\n7\n", b"\n", 1)),
        ("nothing", "MALFORMED", b""),
    ):
        one(title, expect, data)

    policy = witness_policy(log.keys, {w.name.partition(".")[0]: w.keys for w in witnesses}, 2)
    key_id = witnesses[0].keys[0].key_id.hex().encode()
    out.add("a policy of two of three witnesses", "policy", data=policy, quorum="witnesses", witnesses=6)
    for title, expect, data in (
        ("no quorum", "MALFORMED", policy.replace(b"quorum witnesses\n", b"")),
        ("quorum none", "UNSUPPORTED", policy.replace(b"quorum witnesses", b"quorum none")),
        ("two quorums", "MALFORMED", policy + b"quorum witnesses\n"),
        ("an undefined quorum", "MALFORMED", policy.replace(b"quorum witnesses", b"quorum everyone")),
        ("a threshold over the members", "MALFORMED", policy.replace(b"witnesses 2 ", b"witnesses 4 ")),
        ("a threshold of none", "MALFORMED", policy.replace(b"witnesses 2 ", b"witnesses 0 ")),
        ("a member named twice", "MALFORMED", policy.replace(b"2 ch-1 de-1", b"2 ch-1 ch-1 de-1")),
        ("a witness under two names", "MALFORMED", policy + b"witness x %s\n" % vkey(witnesses[0].keys[0])),
        ("a log key as a witness", "MALFORMED", policy + b"witness x %s\n" % vkey(log.keys.ml_dsa_44)),
        ("an unknown line", "MALFORMED", policy + b"trust everyone\n"),
        ("a policy cut short", "MALFORMED", policy[:-1]),
        ("a policy with a carriage return", "MALFORMED", policy[:-1] + b"\r\n"),
        ("a witness's key id changed", "DIGEST", policy.replace(key_id, b"00000000")),
    ):
        out.add(f"policy: {title}", "policy", expect, data)

    cosigned = signed
    for witness in witnesses:
        cosigned = cosigned.with_signatures(*kept.cosign(witness, signed.checkpoint))
    for witness in witnesses[:1]:
        members: Vector = {"origin": ORIGIN, "size": 7, "root": root.hex(), "time": NOW, "cosigner": witness.name}
        members["message_0x04"] = cosignature_message(text, NOW).hex()
        members["message_0x06"] = subtree_message(witness.name, NOW, ORIGIN, 0, 7, root).hex()
        out.add("what a cosigner signs", "message", **members)
    everyone = cosigned.note.signatures

    def verified(title: str, expect: str, data: bytes, now: int = NOW, oldest: int = NOW - 600, n: int = 0) -> None:
        members: Vector = {"policy": "a policy of two of three witnesses", "now": now, "oldest": oldest}
        if expect == "ok":
            members["times"] = [NOW] * n
        out.add(title, "policy_verify", expect, data, **members)

    verified("cosigned by three", "ok", cosigned.encode(), n=6)
    verified("cosigned by two", "ok", lines(*everyone[:6]), n=4)
    verified("cosigned by one and a half", "NO_QUORUM", lines(*everyone[:5]))
    verified("cosigned by three under Ed25519 alone", "NO_QUORUM", lines(*everyone[:2], *everyone[2::2]))
    verified("cosigned by nobody", "NO_QUORUM", lines(ed, ml))
    verified("cosigned, without the log's ML-DSA-44 line", "SIGNATURE_MISSING", lines(ed, *everyone[2:]))
    verified("cosigned long ago", "STALE", cosigned.encode(), now=NOW + 601, oldest=NOW + 1)
    verified("cosigned in the future", "STALE", cosigned.encode(), now=NOW - 61)
    verified("any age will do", "ok", cosigned.encode(), now=NOW + 10**6, oldest=0, n=6)
    verified("a bit of a 0x04 cosignature", "SIGNATURE", lines(*everyone[:2], flipped(everyone[2], 9), *everyone[3:]))
    verified("a bit of a 0x06 cosignature", "SIGNATURE", lines(*everyone[:3], flipped(everyone[3], 9), *everyone[4:]))
    stamped = NoteSignature(everyone[2].name, everyone[2].key_id, bytes(8) + everyone[2].signature[8:])
    verified("a cosignature's time removed", "SIGNATURE", lines(*everyone[:2], stamped, *everyone[3:]))
    borrowed = NoteSignature(everyone[4].name, everyone[4].key_id, everyone[2].signature)
    verified("a cosignature in another's name", "SIGNATURE", lines(*everyone[:4], borrowed, *everyone[5:]))
    return cosigned


def vkey(key: VerifierKey) -> bytes:
    return key.encode().encode()


def files(out: Vectors, signed: SignedCheckpoint, leaves: list[bytes], nodes: dict[tuple[int, int], bytes]) -> None:
    whole = TlogProof(2, inclusion_proof(2, 7, reader_of(nodes)), signed.encode(), leaves[2]).encode()

    def proof(title: str, expect: str, data: bytes, leaf: bytes = leaves[2]) -> None:
        members: Vector = {"policy": "a policy of two of three witnesses", "now": NOW, "leaf": leaf.decode()}
        out.add(title, "tlog_proof", expect, data, **members)

    head, _, rest = whole.partition(b"\n\n")
    lines = head.split(b"\n")
    proof("a proof", "ok", whole)
    proof("a proof without extra data", "ok", b"\n".join([lines[0], *lines[2:]]) + b"\n\n" + rest)
    proof("a proof of another leaf", "LEDGER_PROOF", whole, leaves[3])
    proof("a proof at another index", "LEDGER_PROOF", whole.replace(b"index 2\n", b"index 3\n"))
    proof("a proof outside the tree", "LEDGER_PROOF", whole.replace(b"index 2\n", b"index 7\n"))
    proof("a proof one hash short", "LEDGER_PROOF", b"\n".join(lines[:-1]) + b"\n\n" + rest)
    proof("a proof one hash long", "LEDGER_PROOF", head + b"\n" + lines[-1] + b"\n\n" + rest)
    proof("a proof of version 2", "MALFORMED", whole.replace(b"proof@v1", b"proof@v2", 1))
    proof("a proof without an index", "MALFORMED", whole.replace(b"index 2\n", b""))
    proof("a proof with a padded index", "MALFORMED", whole.replace(b"index 2\n", b"index 02\n"))
    proof("a proof with two extras", "MALFORMED", whole.replace(b"index 2\n", b"extra AAAA\nindex 2\n"))
    proof("a proof with empty extra data", "MALFORMED", b"\n".join([lines[0], b"extra ", *lines[2:]]) + b"\n\n" + rest)
    proof("a proof without a checkpoint", "MALFORMED", head + b"\n\n")
    proof("a proof with bytes after it", "MALFORMED", whole + b"x")

    request = AddCheckpoint(3, consistency_proof(3, 7, reader_of(nodes)), signed.encode()).encode()
    proof_lines = request.partition(b"\n\n")[0].split(b"\n")[1:]
    out.add("a request", "add_checkpoint", data=request, old_size=3, hashes=len(proof_lines))
    first = b"old 0\n\n" + signed.encode()
    out.add("a first request", "add_checkpoint", data=first, old_size=0, hashes=0)
    for title, data in (
        ("no old size", request.removeprefix(b"old 3\n")),
        ("a padded old size", request.replace(b"old 3\n", b"old 03\n")),
        ("no empty line", request.replace(b"\n\n", b"\n")),
        ("a short hash", request.replace(b"old 3\n", b"old 3\nAAAA\n")),
        ("64 hashes", request.replace(b"old 3\n", b"old 3\n" + (b"A" * 43 + b"=\n") * (64 - len(proof_lines)))),
    ):
        out.add(f"request: {title}", "add_checkpoint", "MALFORMED", data)
    parse_note(signed.encode())


def served_files(count: int) -> tuple[dict[str, bytes], list[bytes]]:
    """The files of a log whose leaves are ``leaf 0``, ``leaf 1`` …, and its root at every size."""
    leaves = [b"leaf %d" % number for number in range(count)]
    nodes: dict[tuple[int, int], bytes] = {}
    tree, roots = CompactRange(), [EMPTY_ROOT]
    for leaf in leaves:
        tree.append(leaf_hash(leaf), lambda level, index, value: nodes.__setitem__((level, index), value))
        roots.append(tree.root())
    out = {}
    for tile in tiles_between(0, count):
        first = 256 * tile.index
        out[tile.path] = encode_tile([nodes[8 * tile.level, first + n] for n in range(tile.width)])
        if tile.level == 0:
            bundle = Bundle(tile.index, tile.width)
            out[bundle.path] = encode_bundle(leaves[first : first + tile.width])
    return out, roots


def whole_logs(out: Vectors) -> None:
    """What is served of a log of 600 leaves: as it should be, or with files exchanged, cut, or changed."""
    served, roots = served_files(600)

    def log(title: str, expect: str = "ok", past: int | None = None, resume: bool = False, **members: object) -> None:
        vector: Vector = {"leaves": 600, "root": roots[600].hex(), "changes": {}, "resume": resume}
        if past is not None:
            vector["past"] = {"size": past, "root": roots[past].hex()}
        out.add(f"served: {title}", "replay", expect, **{**vector, **members})

    def change(base: str, at: int = 0, remove: int = 0, insert: bytes = b"") -> Vector:
        return {"base": base, "at": at, "remove": remove, "insert": {"hex": insert.hex()}}

    def flip(path: str, at: int) -> dict[str, Vector]:
        return {path: change(path, at, 1, bytes([served[path][at] ^ 1]))}

    leaves, tile, above = "tile/entries/001", "tile/0/001", "tile/1/000.p/2"
    last = "tile/0/002.p/88"
    log("whole")
    log("whole, after 300 leaves", past=300, resume=True)
    log("whole, after 512 leaves", past=512, resume=True)
    log("whole, after itself", past=600, resume=True)
    log("whole, compared with 300 leaves", past=300)
    log("a bit of a leaf", "LEDGER_PROOF", changes=flip(leaves, 2))
    log("a bit of a tile", "LEDGER_PROOF", changes=flip(tile, 8191))
    log("a bit of a tile above", "LEDGER_PROOF", changes=flip(above, 40))
    log("a bit of a tile above, after 300 leaves", "LEDGER_PROOF", past=300, resume=True, changes=flip(above, 0))
    log("a bit of an old leaf, after 300 leaves", "LEDGER_PROOF", past=300, resume=True, changes=flip(leaves, 3))
    log("a bundle cut short", "MALFORMED", changes={leaves: change(leaves, len(served[leaves]) - 1, 1)})
    log("a tile cut short", "MALFORMED", changes={tile: change(tile, 8160, 32)})
    log("a tile with a hash more", "MALFORMED", changes={last: change(last, 0, 0, bytes(32))})
    log("an empty tile", "MALFORMED", changes={tile: change(tile, 0, 8192)})
    log("tiles exchanged", "LEDGER_PROOF", changes={tile: change("tile/0/000"), "tile/0/000": change(tile)})
    both = {"tile/entries/000": change(leaves), leaves: change("tile/entries/000")}
    log("bundles exchanged", "LEDGER_PROOF", changes=both)
    both |= {tile: change("tile/0/000"), "tile/0/000": change(tile)}
    log("bundles and tiles exchanged", "LEDGER_PROOF", changes=both)
    twice = {tile: change("tile/0/000"), leaves: change("tile/entries/000")}
    log("a tile and its leaves twice", "LEDGER_PROOF", changes=twice)
    log("under another root", "LEDGER_PROOF", root=roots[599].hex())
    roots[300] = roots[299]
    log("a fork, after it", "LEDGER_PROOF", past=300, resume=True)
    log("a fork, from the first leaf", "LEDGER_FORK", past=300)
    log("a fork that is not proven", "LEDGER_PROOF", past=300, root=roots[599].hex())


def quorums(out: Vectors, signed: SignedCheckpoint, witnesses: list[Cosigner]) -> None:
    """A reader by the roster: its quorum rule, over custodians both of whose keys cosigned."""
    laws = ("CH", "DE", "FR")
    custodians = {
        each.name.partition(".")[0]: {"jurisdiction": law, "witness_key": each.witness_key.encode()}
        for law, each in zip(laws, witnesses, strict=True)
    }
    log, lines = signed.note.signatures[:2], signed.note.signatures[2:]
    two: Vector = {"at_least": 2}
    home: Vector = {"at_least": 2, "include": {"jurisdiction": "FR"}}
    for title, expect, rule, cosigned, now, oldest in (
        ("three", "ok", two, lines, NOW, 0),
        ("two", "ok", two, lines[:4], NOW, 0),
        ("one and a half", "NO_QUORUM", two, lines[:3], NOW, 0),
        ("two of another law than the rule asks for", "NO_QUORUM", home, lines[:4], NOW, 0),
        ("two, one by the law that the rule asks for", "ok", home, lines[2:], NOW, 0),
        ("nobody", "NO_QUORUM", two, (), NOW, 0),
        ("three, too long ago", "STALE", two, lines, NOW + 601, NOW + 1),
        ("three, in the future", "STALE", two, lines, NOW - 61, 0),
    ):
        note = Note(signed.note.text, (*log, *cosigned)).encode()
        members: Vector = {"rule": rule, "custodians": custodians, "now": now, "oldest": oldest}
        if expect == "ok":
            members["quorum_time"] = NOW
        out.add(f"a quorum by the roster: {title}", "quorum", expect, note, **members)


def build() -> str:
    out, kept = Vectors(), Kept()
    log = LogSigner(ORIGIN, ed25519("log"), ml_dsa_44("log"))
    names = ("ch-1", "de-1", "fr-1")
    witnesses = [Cosigner(f"{name}.custodian.example", ed25519(name), ml_dsa_44(name)) for name in names]
    leaves, nodes = trees(out)
    proofs(out, leaves, nodes)
    tiles(out, leaves)
    vkeys(out, log, witnesses[0])
    signed = checkpoints(out, kept, log, witnesses, tree_root(len(leaves), reader_of(nodes)))
    quorums(out, signed, witnesses)
    files(out, signed, leaves, nodes)
    whole_logs(out)
    seeds = {
        name: {"ed25519_seed": seed(name + " ed25519").hex(), "ml_dsa_44_seed": seed(name + " ml-dsa-44").hex()}
        for name in ("log", *names)
    }
    for vector in out.all:
        if vector.get("log") == log.keys.encode():
            vector["log"] = "log"
    document = {"about": ABOUT, "log": log.keys.encode(), "seeds": seeds, "vectors": out.all}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the file is not what this script writes")
    built = build()
    if parser.parse_args().check:
        return 0 if TARGET.read_text("utf-8") == built else 1
    TARGET.write_text(built, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
