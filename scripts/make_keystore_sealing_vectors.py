#!/usr/bin/env python3
"""Write docs/spec/vectors/keystore-sealing.json: sealing records put together from JSON, HKDF and AES-GCM alone, and
shares that were made once.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyquorum_core.transcript import H, transcript
from vector_files import keep

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "keystore-sealing.json"
FORMAT = "keyquorum/v1/keystore-sealing"
KEK = bytes(range(32))
SECRET = bytes(range(100, 132))
SHARES = [
    "climate dramatic academic acid august swing display trend inmate timber plains "
    "jewelry machine lecture born spider amazing example dance deploy budget cowboy "
    "smug spark genre divorce result lily downtown alpha traffic zero darkness",
    "climate dramatic academic agency admit peaceful wrist desert helpful injury alto "
    "receiver ceiling elephant chubby capture revenue soldier mineral picture decent webcam "
    "acquire shaped capacity upstairs equation drink venture express alarm legs fraction",
    "climate dramatic academic always alive picture prepare false flavor aide universe "
    "marathon junk scout laser emperor speak intimate evening bulge fumes entrance "
    "headset member dish hospital exclude obesity require firm human pupal threaten",
]
HEADER = {
    "custodian": "ch-1",
    "format": FORMAT,
    "identifier": 4711,
    "nonce": bytes(range(12)).hex(),
    "salt": bytes(range(16)).hex(),
    "scheme": "slip39",
    "shares": 3,
    "threshold": 2,
}


def canonical(members: dict[str, object]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def record(header: dict[str, object], associated: dict[str, object] | None = None) -> bytes:
    info = H("keyquorum/v1/keystore-shares", str(header["custodian"]).encode())
    key = HKDF(SHA256(), 32, bytes.fromhex(str(HEADER["salt"])), info).derive(SECRET)
    bound = transcript(FORMAT, canonical(associated or header))
    sealed = AESGCM(key).encrypt(bytes.fromhex(str(HEADER["nonce"])), KEK, bound)
    return canonical({**header, "ciphertext": base64.b64encode(sealed).decode()})


def without(header: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in header.items() if name not in names}


def vectors() -> list[dict[str, object]]:
    token = without(HEADER, "identifier", "salt", "shares", "threshold")
    token |= {"key": bytes(16).hex(), "scheme": "pkcs11", "token_label": "vault", "token_serial": "abff1fe6"}
    good = record(dict(HEADER))

    def opened(name: str, data: bytes, shares: list[str], expect: str, custodian: str = "ch-1") -> dict[str, object]:
        out: dict[str, object] = {"name": name, "record": base64.b64encode(data).decode(), "custodian": custodian}
        return {**out, "shares": shares, "expect": expect} | ({"kek": KEK.hex()} if expect == "ok" else {})

    def read(name: str, data: bytes, expect: str) -> dict[str, object]:
        return {"name": name, "record": base64.b64encode(data).decode(), "expect": expect}

    changed = dict(HEADER)
    return [
        opened("two of three", good, SHARES[:2], "ok"),
        opened("another two of three", good, SHARES[1:], "ok"),
        opened("one of three", good, SHARES[:1], "SEALED"),
        opened("one of three, twice", good, [SHARES[0], SHARES[0]], "EXISTS"),
        opened("two words swapped", good, [SHARES[0], " ".join(SHARES[1].split()[::-1])], "MALFORMED"),
        opened("another custodian's", good, SHARES[:2], "UNSEAL", "is-1"),
        opened("bound to another nonce", record(changed, {**changed, "nonce": bytes(12).hex()}), SHARES[:2], "UNSEAL"),
        opened("another identifier", record({**changed, "identifier": 4712}), SHARES[:2], "UNSEAL"),
        read("a token's key", record(token), "ok"),
        read("a token's key, and seeds in it", record({**token, "scheme": "pkcs11-seeds"}), "ok"),
        read("a token without a serial number", record({**token, "token_serial": ""}), "ok"),
        read("a token without a label", record({**token, "token_label": ""}), "MALFORMED"),
        read("a threshold of one", record({**changed, "threshold": 1}), "MALFORMED"),
        read("a threshold above the number of shares", record({**changed, "threshold": 4}), "MALFORMED"),
        read("seventeen shares", record({**changed, "shares": 17}), "MALFORMED"),
        read("an unknown scheme", record({**changed, "scheme": "shamir"}), "UNSUPPORTED"),
        read("members of two schemes", record({**changed, "token_label": "vault"}), "MALFORMED"),
        read("a member missing", record(without(changed, "identifier")), "MALFORMED"),
        read("an unknown member", record({**changed, "extra": 1}), "MALFORMED"),
        read("not canonical", good.replace(b":", b": ", 1), "MALFORMED"),
        read("another version", record({**changed, "format": "keyquorum/v2/keystore-sealing"}), "MALFORMED"),
    ]


def render() -> str:
    return json.dumps({"vectors": vectors()}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(keep(PATH, render))
