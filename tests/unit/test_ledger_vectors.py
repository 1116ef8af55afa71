"""docs/spec/vectors/ledger.json, replayed: one runner, one test a vector."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.add_checkpoint import AddCheckpoint
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import cosignature_message, subtree_message
from keyquorum_core.ledger.log_keys import LogKeys, open_checkpoint
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.merkle import leaf_hash, verify_consistency, verify_inclusion
from keyquorum_core.ledger.replay import Replay, edge_tiles
from keyquorum_core.ledger.tiles import Bundle, decode_bundle, decode_tile, encode_bundle, parse_path
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.ledger.verifier_keys import VerifierKey
from keyquorum_core.ledger.witness_keys import WitnessKeys
from keyquorum_core.ledger.witness_policy import WitnessPolicy
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.release import Leaf
from tests.support.ledger_world import TestLog, World

Vector = dict[str, Any]
FILE = Path(__file__).resolve().parents[2] / "docs" / "spec" / "vectors" / "ledger.json"
DOCUMENT: Vector = json.loads(FILE.read_text("utf-8"))
DATA: dict[str, bytes] = {}


def resolve(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    assert isinstance(value, dict)
    if "hex" in value:
        return bytes.fromhex(value["hex"])
    base = DATA[value["base"]]
    return base[: value["at"]] + resolve(value["insert"]) + base[value["at"] + value["remove"] :]


for _vector in DOCUMENT["vectors"]:
    if "data" in _vector:
        assert _vector["name"] not in DATA
        DATA[_vector["name"]] = resolve(_vector["data"])


def unhex(values: list[str]) -> list[bytes]:
    return [bytes.fromhex(value) for value in values]


def replay(v: Vector) -> Vector:
    """What the vector's results should be, by name."""
    data = DATA.get(v["name"], b"")
    match v["operation"]:
        case "root":
            tree = CompactRange()
            for leaf in unhex(v["leaves"]):
                tree.append(leaf_hash(leaf))
            return {"root": tree.root().hex()}
        case "leaf":
            return {"hash": Leaf.parse(data).hash().hex()}
        case "inclusion":
            leaf, root = unhex([v["leaf_hash"], v["root"]])
            verify_inclusion(leaf, v["index"], v["size"], unhex(v["proof"]), root)
        case "consistency":
            root1, root2 = unhex([v["root1"], v["root2"]])
            verify_consistency(v["size1"], root1, v["size2"], root2, unhex(v["proof"]))
        case "path":
            name = parse_path(v["name"])
            level: object = "entries" if isinstance(name, Bundle) else name.level
            return {"level": level, "index": name.index, "width": name.width}
        case "bundle":
            entries = decode_bundle(data, v["width"])
            assert encode_bundle(entries) == data
            return {"entries": [entry.hex() for entry in entries]}
        case "tile":
            return {"hashes": [value.hex() for value in decode_tile(data, v["width"])]}
        case "vkey":
            key = VerifierKey.parse(data.decode())
            assert key.encode().encode() == data
            return {"key_name": key.name, "type": int(key.type), "key_id": key.key_id.hex()}
        case "checkpoint":
            signed = open_checkpoint(data, LogKeys.parse(DOCUMENT[v["log"]]))
            assert signed.encode() == data
            found = signed.checkpoint
            results = {"origin": found.origin, "size": found.size, "root": found.root.hex()}
            return {**results, "signed_at": signed.signed_at}
        case "message":
            checkpoint = Checkpoint(v["origin"], v["size"], bytes.fromhex(v["root"]))
            plain = cosignature_message(checkpoint.text(), v["time"])
            hybrid = subtree_message(v["cosigner"], v["time"], v["origin"], 0, v["size"], checkpoint.root)
            return {"message_0x04": plain.hex(), "message_0x06": hybrid.hex()}
        case "quorum":
            custodians = {name: WitnessKeys.parse(each["witness_key"]) for name, each in v["custodians"].items()}
            committee = [Custodian(name, each["jurisdiction"]) for name, each in v["custodians"].items()]
            witnesses = {name: keys.pair for name, keys in custodians.items()}
            trust = LogTrust(LogKeys.parse(DOCUMENT["log"]), witnesses, Quorum(v["rule"], committee))
            return {"quorum_time": trust.verify(data, now=v["now"], oldest=v["oldest"]).quorum_time}
        case "replay":
            replay_log(v)
        case "policy":
            policy = WitnessPolicy.parse(data)
            return {"quorum": policy.quorum, "witnesses": len(policy.witnesses)}
        case "policy_verify":
            policy = WitnessPolicy.parse(DATA[v["policy"]])
            return {"times": list(policy.verify(data, now=v["now"], oldest=v["oldest"]).times.values())}
        case "tlog_proof":
            proof = TlogProof.parse(data)
            assert proof.encode() == data
            proof.verify(leaf_hash(v["leaf"].encode()), LogKeys.parse(DOCUMENT["log"]))
            policy = WitnessPolicy.parse(DATA[v["policy"]])
            proof.verify_witnessed(leaf_hash(v["leaf"].encode()), policy, now=v["now"])
        case "add_checkpoint":
            request = AddCheckpoint.parse(data)
            assert request.encode() == data
            return {"old_size": request.old_size, "hashes": len(request.proof)}
        case other:
            raise AssertionError(other)
    return {}


@cache
def served(count: int) -> dict[str, bytes]:
    """The files of a log whose leaves are ``leaf 0``, ``leaf 1`` …"""
    return TestLog(World(), [b"leaf %d" % number for number in range(count)]).files


def replay_log(v: Vector) -> None:
    files = dict(served(v["leaves"]))
    for path, edit in v["changes"].items():
        base = served(v["leaves"])[edit["base"]]
        files[path] = base[: edit["at"]] + resolve(edit["insert"]) + base[edit["at"] + edit["remove"] :]
    past = None if "past" not in v else Checkpoint("log", v["past"]["size"], bytes.fromhex(v["past"]["root"]))
    edge = None
    if past is not None and v["resume"]:
        edge = {tile: files[tile.path] for tile in edge_tiles(past.size, v["leaves"])}
    run = Replay(v["leaves"], past, edge)
    while (name := run.expected) is not None:
        run.accept(name, files[name.path])
    run.finish(bytes.fromhex(v["root"]))


@pytest.mark.parametrize("vector", DOCUMENT["vectors"], ids=lambda vector: ascii(vector["name"]))
def test_vector(vector: Vector) -> None:
    if vector["expect"] == "ok":
        for name, value in replay(vector).items():
            assert vector[name] == value
    else:
        with pytest.raises(KeyquorumError) as caught:
            replay(vector)
        assert caught.value.reason == vector["expect"]


def test_the_leaves_are_those_of_the_checkpoint() -> None:
    tree, root = CompactRange(), ""
    for vector in DOCUMENT["vectors"]:
        if vector["operation"] == "leaf":
            tree.append(bytes.fromhex(vector["hash"]))
            assert tree.root().hex() == vector["root"]
            root = vector["root"]
    assert Checkpoint.parse(DATA["a checkpoint"].split(b"\n\n")[0] + b"\n").root.hex() == root


def test_the_seeds_give_the_keys() -> None:
    keys = LogKeys.parse(DOCUMENT["log"])
    seeds = DOCUMENT["seeds"]["log"]
    first = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seeds["ed25519_seed"])).public_key()
    second = MLDSA44PrivateKey.from_seed_bytes(bytes.fromhex(seeds["ml_dsa_44_seed"])).public_key()
    assert (keys.ed25519.public, keys.ml_dsa_44.public) == (first.public_bytes_raw(), second.public_bytes_raw())


def test_most_vectors_are_negative() -> None:
    refused = [vector for vector in DOCUMENT["vectors"] if vector["expect"] != "ok"]
    assert len(refused) > len(DOCUMENT["vectors"]) // 2
