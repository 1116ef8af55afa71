"""Write docs/spec/vectors/{signatures,sealing,bulletin}.json from fixed seeds: name those to write.

Each vector says what to do (``operation``), with what, and ``expect``: ``ok`` or the reason code. Short values are hex,
blobs are base64 or, where most of it repeats an earlier vector's, a splice. See :mod:`vector_files` before running it:
what is signed or sealed comes out differently each time.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import rfc8785

from keyquorum_core import bulletin as b
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.signing import merge, pae, sign, sign_many
from vector_files import NOW, Vector, b64, edited, fixed, flip, identity, make_named, recipient, write


def signatures() -> None:
    kind, payload = "application/vnd.keyquorum.example+json", b'{"hello":"world"}'
    people = {name: identity(name) for name in ("alice", "bob", "carol", "mallory")}
    alice, bob, mallory = people["alice"], people["bob"], people["mallory"]
    good = sign(alice, kind, payload)
    first, second = json.loads(good)["signatures"]
    evil = json.loads(sign(mallory, kind, payload))["signatures"]
    both = sign_many((alice, bob), kind, payload)
    pairs = json.loads(both)["signatures"]
    vectors: list[Vector] = []

    def one(name: str, envelope: bytes, expect: str, by: str = "alice", payload_type: str = kind) -> None:
        vector: Vector = {"name": name, "operation": "open_envelope", "by": by, "payload_type": payload_type}
        vector |= {"envelope": b64(envelope), "expect": expect}
        vectors.append(vector | ({"payload": b64(payload)} if expect == "ok" else {}))

    def swap(entry: dict[str, str], sig: bytes) -> dict[str, str]:
        return {**entry, "sig": b64(sig)}

    ed, ml = base64.b64decode(first["sig"]), base64.b64decode(second["sig"])
    one("both signatures", good, "ok")
    one("keyid decides nothing", edited(good, signatures=[{**first, "keyid": "x"}, {**second, "keyid": ""}]), "ok")
    one("keyid absent", edited(good, signatures=[{"sig": first["sig"]}, {"sig": second["sig"]}]), "ok")
    one("another signer", good, "SIGNATURE", by="bob")
    one("another payload type", good, "MALFORMED", payload_type=kind + "2")
    one(
        "payload type changed in the envelope",
        edited(good, payloadType=kind + "2"),
        "SIGNATURE",
        payload_type=kind + "2",
    )
    one("one bit of the payload", edited(good, payload=b64(flip(payload, 3))), "SIGNATURE")
    one("payload emptied", edited(good, payload=""), "SIGNATURE")
    one("one bit of the Ed25519 signature", edited(good, signatures=[swap(first, flip(ed, 0)), second]), "SIGNATURE")
    one("one bit of Ed25519's S", edited(good, signatures=[swap(first, flip(ed, 40)), second]), "SIGNATURE")
    one("one bit of the ML-DSA-65 signature", edited(good, signatures=[first, swap(second, flip(ml, 99))]), "SIGNATURE")
    one("ML-DSA-65 signature truncated", edited(good, signatures=[first, swap(second, ml[:-1])]), "SIGNATURE")
    one("ML-DSA-65 signature too long", edited(good, signatures=[first, swap(second, ml + b"\0")]), "MALFORMED")
    one("ML-DSA-65 signature empty", edited(good, signatures=[first, swap(second, b"")]), "SIGNATURE")
    bare = alice._ml_dsa.sign(pae(kind, payload))
    one("ML-DSA-65 without the context string", edited(good, signatures=[first, swap(second, bare)]), "SIGNATURE")
    over_payload = alice.sign_pair(payload)
    pair = [swap(first, over_payload[0]), swap(second, over_payload[1])]
    one("signatures over the payload instead of its PAE", edited(good, signatures=pair), "SIGNATURE")
    one("signatures swapped", edited(good, signatures=[second, first]), "SIGNATURE")
    one("Ed25519 alone", edited(good, signatures=[first]), "SIGNATURE_MISSING")
    one("ML-DSA-65 alone", edited(good, signatures=[second]), "SIGNATURE_MISSING")
    one("no signature", edited(good, signatures=[]), "SIGNATURE_MISSING")
    one("an extra signature", edited(good, signatures=[first, second, evil[0]]), "SIGNATURE_EXTRA")
    one("the pair twice", edited(good, signatures=[first, second, first, second]), "SIGNATURE_EXTRA")
    one("Ed25519 twice", edited(good, signatures=[first, first]), "SIGNATURE")
    one("Ed25519 half of another", edited(good, signatures=[evil[0], second]), "SIGNATURE")
    one("ML-DSA-65 half of another", edited(good, signatures=[first, evil[1]]), "SIGNATURE")
    one("unknown member", edited(good, extra=1), "MALFORMED")
    one("unknown member of a signature", edited(good, signatures=[{**first, "x": "y"}, second]), "MALFORMED")
    one("duplicate member", good.replace(b'{"payload":', b'{"payload":"","payload":', 1), "MALFORMED")
    one("member missing", json.dumps({"payload": "", "signatures": []}).encode(), "MALFORMED")
    one("URL-safe base64", edited(good, payload=base64.urlsafe_b64encode(b"\xfb\xff").decode()), "MALFORMED")
    one("unpadded base64", edited(good, payload=b64(payload).rstrip("=")), "MALFORMED")
    one("non-zero trailing bits in base64", edited(good, payload="eyJoZWxsbyI6IndvcmxkIn1="), "MALFORMED")
    one("truncated", good[:-1], "MALFORMED")
    one("trailing bytes", good + b"x", "MALFORMED")
    one("not JSON", b"\xff\xfe", "MALFORMED")
    one("empty", b"", "MALFORMED")

    trusted = ["alice", "bob", "carol"]

    def many(name: str, envelope: bytes, expect: str, signed: list[str], threshold: int = 2) -> None:
        vector: Vector = {"name": name, "operation": "open_multi", "signers": trusted, "threshold": threshold}
        vector |= {"payload_type": kind, "envelope": b64(envelope), "expect": expect}
        vectors.append(vector | ({"payload": b64(payload), "signed": signed} if expect == "ok" else {}))

    many("two of three", both, "ok", ["alice", "bob"])
    many("in any order", edited(both, signatures=pairs[2:] + pairs[:2]), "ok", ["alice", "bob"])
    many("merged", merge((sign(people["carol"], kind, payload), good)), "ok", ["alice", "carol"])
    many("too few", good, "SIGNATURE_MISSING", [])
    many("none", edited(both, signatures=[]), "SIGNATURE_MISSING", [], 1)
    many("half a pair", edited(both, signatures=pairs[:3]), "SIGNATURE_MISSING", [])
    many("one signer twice", merge((good, good))[:-2] + b"," + json.dumps([first, second])[1:].encode() + b"}",
         "SIGNATURE_EXTRA", [], 1)  # fmt: skip
    many("an unknown signer beside enough", edited(both, signatures=pairs + evil), "SIGNATURE", [])
    many("halves of two signers", edited(both, signatures=[pairs[0], pairs[3]]), "SIGNATURE", [], 1)
    many("pair reversed", edited(both, signatures=[pairs[1], pairs[0]]), "SIGNATURE", [], 1)
    many("more pairs than signers", edited(both, signatures=pairs * 2), "SIGNATURE_EXTRA", [])

    def public(name: str, raw: bytes, expect: str) -> None:
        vectors.append({"name": name, "operation": "parse_identity", "public": b64(raw), "expect": expect})

    raw = alice.public.to_bytes()
    public("a public identity", raw, "ok")
    vectors[-1]["fingerprint"] = alice.public.fingerprint
    public("identity truncated", raw[:-1], "MALFORMED")
    public("identity with a trailing byte", raw + b"\0", "MALFORMED")
    public("identity with the Ed25519 identity point", b"\x01" + bytes(31) + raw[32:], "MALFORMED")
    y8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
    public("identity with a point of order 8", bytes.fromhex(y8) + raw[32:], "MALFORMED")
    public("identity with a non-canonical Ed25519 key", b"\xee" + b"\xff" * 30 + b"\x7f" + raw[32:], "MALFORMED")
    identities = {
        name: {
            "ed25519_seed": p.seeds()[0].hex(),
            "ml_dsa_seed": p.seeds()[1].hex(),
            "public": b64(p.public.to_bytes()),
        }
        for name, p in people.items()
    }
    write(
        "signatures", "DSSE envelopes with hybrid signatures; docs/spec/signatures.md", vectors, identities=identities
    )


def sealing() -> None:
    vectors: list[Vector] = []
    info, plaintext = fixed("info"), b"a share of thirty-two bytes, yes"
    keys = {suite: recipient("recipient", suite) for suite in ("MLKEM768_X25519", "MLKEM1024_P384")}
    for suite, key in keys.items():
        other = recipient("another recipient", suite)
        private, sealed = key.to_seed_bytes(), seal(key.public, plaintext, info)
        rival = keys["MLKEM1024_P384" if suite == "MLKEM768_X25519" else "MLKEM768_X25519"]
        head = 2 + len(suite)
        kem = 1088 if suite == "MLKEM768_X25519" else 1568

        def opens(
            name: str, blob: bytes, expect: str, by: bytes = private, bound: bytes = info, s: str = suite
        ) -> None:
            vector = {"name": f"{s}: {name}", "operation": "open", "private": b64(by), "info": bound.hex()}
            vector |= {"sealed": b64(blob), "expect": expect}
            vectors.append(vector | ({"plaintext": plaintext.hex()} if expect == "ok" else {}))

        def checks(name: str, public: bytes, expect: str, s: str = suite) -> None:
            vectors.append(
                {"name": f"{s}: {name}", "operation": "check_public", "public": b64(public), "expect": expect}
            )

        derive = {"name": f"{suite}: public from private", "operation": "public", "private": b64(private)}
        vectors.append(derive | {"public": b64(key.public), "expect": "ok"})
        opens("opens", sealed, "ok")
        opens("another info", sealed, "UNSEAL", bound=fixed("other info"))
        opens("empty info", sealed, "UNSEAL", bound=b"")
        opens("another key", sealed, "UNSEAL", by=other.to_seed_bytes())
        opens("key of the other suite", sealed, "UNSEAL", by=rival.to_seed_bytes())
        opens("other suite's prefix", rival.public[: 2 + len(rival.suite)] + sealed[head:], "UNSEAL")
        opens("no prefix", sealed[head:], "UNSEAL")
        opens("one bit of the prefix", flip(sealed, 4), "UNSEAL")
        opens("one bit of the ML-KEM ciphertext", flip(sealed, head + 7), "UNSEAL")
        opens("one bit of the elliptic-curve share", flip(sealed, head + kem + 9), "UNSEAL")
        opens("one bit of the ciphertext", flip(sealed, -20), "UNSEAL")
        opens("one bit of the tag", flip(sealed, -1), "UNSEAL")
        opens("truncated by one", sealed[:-1], "UNSEAL")
        opens("truncated within the KEM", sealed[:100], "UNSEAL")
        opens("trailing byte", sealed + b"\0", "UNSEAL")
        opens("empty", b"", "UNSEAL")
        raw = key.public[head:]
        checks("public key", key.public, "ok")
        checks("public key truncated", key.public[:-1], "MALFORMED")
        checks("public key with a trailing byte", key.public + b"\0", "MALFORMED")
        checks("public key without its name", raw, "MALFORMED")
        checks("public key under an unknown suite", b"\x00\x06X25519" + raw, "UNSUPPORTED")
        checks("public key under the other suite", rival.public[: 2 + len(rival.suite)] + raw, "MALFORMED")
        checks("ML-KEM coefficients out of range", key.public[:head] + b"\xff" * 1152 + raw[1152:], "MALFORMED")
        bad_point = bytes(32) if suite == "MLKEM768_X25519" else b"\x04" + bytes(96)
        checks("bad elliptic-curve share", key.public[: -len(bad_point)] + bad_point, "MALFORMED")
        vectors.append(
            {"name": f"{suite}: private key truncated", "operation": "public", "private": b64(private[:-1]),
             "expect": "MALFORMED"})  # fmt: skip
    xwing = "7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26"
    known = RecipientKey.from_seed_bytes(b"\x00\x0fMLKEM768_X25519" + bytes.fromhex(xwing))
    derive = {"name": "X-Wing draft seed", "operation": "public", "private": b64(known.to_seed_bytes())}
    vectors.append(derive | {"public": b64(known.public), "expect": "ok"})
    write("sealing", "HPKE sealing; docs/spec/sealing.md", vectors)


def bulletin() -> None:
    people = {name: identity(name) for name in ("ann", "ben", "cleo", "mallory")}
    made = b.Bulletin("demo", "reference-values", 3, NOW, NOW + 1000, {"list": ["a", "é"], "number": 1})
    good = b.sign_bulletin(made, (people["ann"], people["ben"]))
    payload = made.payload()
    vectors: list[Vector] = []

    def one(name: str, envelope: bytes, expect: str, **changes: Any) -> None:
        vector: Vector = {"name": name, "operation": "open_bulletin", "kind": "reference-values", "cluster": "demo"}
        vector |= {"signers": ["ann", "ben", "cleo"], "threshold": 2, "now": NOW, "minimum_version": 3}
        vector |= {"last_digest": "", **changes, "envelope": b64(envelope), "expect": expect}
        vectors.append(vector | ({"payload": b64(payload)} if expect == "ok" else {}))

    def signed(payload: bytes, by: tuple[str, ...] = ("ann", "ben"), kind: str = b.BULLETIN_TYPE) -> bytes:
        return sign_many((people[name] for name in by), kind, payload)

    def changed(**members: Any) -> bytes:
        return signed(rfc8785.dumps({**json.loads(payload), **members}))

    one("two of three", good, "ok")
    one("the last second", good, "ok", now=NOW + 999)
    one("the same again", good, "ok", last_digest=made.digest)
    one("one operator is enough", signed(payload, ("cleo",)), "ok", threshold=1)
    one("one of two", signed(payload, ("ann",)), "SIGNATURE_MISSING")
    one("one operator twice", signed(payload, ("ann", "ann")), "SIGNATURE_EXTRA")
    one("nobody", signed(payload, ()), "SIGNATURE_MISSING")
    one("two and a stranger", signed(payload, ("ann", "ben", "mallory")), "SIGNATURE")
    one("one byte of the payload", edited(good, payload=b64(payload.replace(b'"a"', b'"b"'))), "SIGNATURE")
    one("another payload type", signed(payload, kind=b.BULLETIN_TYPE.replace("v1", "v2")), "MALFORMED")
    one("another kind", good, "BULLETIN", kind="inventory")
    one("another cluster", good, "BULLETIN", cluster="prod")
    one("an older version", good, "ROLLBACK", minimum_version=4)
    one("the same version, other bytes", changed(body={"number": 2}), "ROLLBACK", last_digest=made.digest)
    one("too early", good, "NOT_YET_VALID", now=NOW - 1)
    one("expired", good, "EXPIRED", now=NOW + 1000)
    one("version 0", changed(version=0), "MALFORMED")
    one("ends before it begins", changed(expires_at=NOW), "MALFORMED")
    one("a bad kind", changed(kind="Reference"), "MALFORMED")
    one("body is a list", changed(body=[]), "MALFORMED")
    one("unknown member", changed(extra=1), "MALFORMED")
    one("a member is missing", signed(payload.replace(b',"version":3', b"")), "MALFORMED")
    one("a member twice", signed(payload.replace(b'"version":3', b'"version":3,"version":3')), "MALFORMED")
    one("a float in the body", signed(payload.replace(b'"number":1', b'"number":1.5')), "MALFORMED")
    one("not canonical", signed(payload + b" "), "MALFORMED")
    identities = {
        name: {
            "ed25519_seed": each.seeds()[0].hex(),
            "ml_dsa_seed": each.seeds()[1].hex(),
            "public": b64(each.public.to_bytes()),
        }
        for name, each in people.items()
    }
    write("bulletin", "Signed operator documents; docs/spec/bulletin.md", vectors, identities=identities)


if __name__ == "__main__":
    make_named(signatures, sealing, bulletin)
