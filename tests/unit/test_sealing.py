"""HPKE sealing: opens for the right key and info only, in both suites and in the nested layout."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import hmac
import importlib
import pickle
from ctypes.util import find_library

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.outer_kem import OuterKEM, liboqs_kem
from keyquorum_core.sealing import MAX_PLAINTEXT, RecipientKey, Suite, check_public, seal, suite_available, suite_of
from tests.support import signed_vectors

INFO = b"\x11" * 32
XWING = b"\x00\x0fMLKEM768_X25519"
KEYS = {
    "MLKEM768_X25519": RecipientKey.from_seed_bytes(XWING + bytes(range(32))),
    "MLKEM1024_P384": RecipientKey.from_seed_bytes(b"\x00\x0eMLKEM1024_P384" + bytes(range(64)) + b"\x01" * 48),
}


class FakeKEM:
    """A real KEM behind the outer interface: ML-KEM-1024, where the product would have another family."""

    public_size = 1568
    private_size = 64
    ciphertext_size = 1568

    def generate(self) -> tuple[bytes, bytes]:
        key = MLKEM1024PrivateKey.generate()
        return key.public_key().public_bytes_raw(), key.private_bytes_raw()

    def encapsulate(self, public: bytes) -> tuple[bytes, bytes]:
        return MLKEM1024PublicKey.from_public_bytes(public).encapsulate()

    def decapsulate(self, private: bytes, ciphertext: bytes) -> bytes:
        return MLKEM1024PrivateKey.from_seed_bytes(private).decapsulate(ciphertext)


_FAKE = FakeKEM()


def fakes(name: str) -> OuterKEM:
    return _FAKE if name == "HQC-Fake" else liboqs_kem(name)


@pytest.mark.parametrize("vector", signed_vectors.load("sealing")["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    def act() -> object:
        match vector["operation"]:
            case "open":
                key = RecipientKey.from_seed_bytes(vector["private"])
                return key.open(vector["sealed"], bytes.fromhex(vector["info"])).hex()
            case "public":
                return RecipientKey.from_seed_bytes(vector["private"]).public
            case "check_public":
                check_public(vector["public"])
                return vector["public"]
        raise AssertionError(vector["operation"])

    if vector["expect"] == "ok":
        assert act() == vector.get("plaintext", vector.get("public"))
    else:
        with pytest.raises(KeyquorumError) as caught:
            act()
        assert caught.value.reason == vector["expect"]


@pytest.mark.parametrize("suite", list(Suite))
def test_what_is_sealed_opens(suite: Suite) -> None:
    key = RecipientKey.generate(suite)
    assert key.suite == suite_of(key.public) == suite
    for plaintext in (b"", b"x", b"s" * 5000):
        assert key.open(seal(key.public, plaintext, INFO), INFO) == plaintext
    assert seal(key.public, b"x", INFO) != seal(key.public, b"x", INFO)
    again = RecipientKey.from_seed_bytes(key.to_seed_bytes())
    assert again == key
    assert again.open(seal(key.public, b"x", INFO), INFO) == b"x"


def test_layouts_are_pinned() -> None:
    xwing, p384 = KEYS["MLKEM768_X25519"], KEYS["MLKEM1024_P384"]
    assert xwing.to_seed_bytes() == XWING + bytes(range(32))
    assert p384.to_seed_bytes() == b"\x00\x0eMLKEM1024_P384" + bytes(range(64)) + b"\x01" * 48
    assert xwing.public[:17] == XWING
    assert len(xwing.public) == 17 + 1184 + 32
    assert len(p384.public) == 16 + 1568 + 97
    assert (
        hashlib.sha256(xwing.public).hexdigest() == "2db40a3f0094357659a8a84c4b24d5b70db8461cd595b42a2f8c8ada7d5e3643"
    )
    assert hashlib.sha256(p384.public).hexdigest() == "bfc6cbca852a85f0eade41bb605478e5b6da1293e3800c5a5d5625ddd4083835"
    assert len(seal(xwing.public, b"x" * 36, INFO)) == 17 + 1088 + 32 + 36 + 16
    assert len(seal(p384.public, b"x" * 36, INFO)) == 16 + 1568 + 97 + 36 + 16


def test_x_wing_key_expansion_is_the_draft_s() -> None:
    """draft-connolly-cfrg-xwing-kem, appendix "Test vectors", first one."""
    seed = bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26")
    public = RecipientKey.from_seed_bytes(XWING + seed).public[17:]
    assert public[:32].hex() == "e2236b35a8c24b39b10aa1323a96a919a2ced88400633a7b07131713fc14b2b5"


def open_from_primitives(kem_id: int, shared: bytes, info: bytes, ciphertext: bytes) -> bytes:
    """RFC 9180 §5.1 and §5.2, base mode, HKDF-SHA-256 and AES-256-GCM, from a KEM's shared secret."""
    suite_id = b"HPKE" + kem_id.to_bytes(2, "big") + b"\x00\x01\x00\x02"

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm, "sha256")

    def expand(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
        text = size.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + context
        return hmac.digest(secret, text + b"\x01", "sha256")[:size]

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    nonce = expand(secret, b"base_nonce", context, 12)
    return AESGCM(expand(secret, b"key", context, 32)).decrypt(nonce, ciphertext, b"")


def test_x_wing_blobs_open_as_the_specification_says() -> None:
    key = KEYS["MLKEM768_X25519"]
    kem, share, ciphertext = split(seal(key.public, b"secret", INFO)[17:], 1088, 32)
    expanded = hashlib.shake_256(bytes(range(32))).digest(96)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64]).decapsulate(kem)
    curve = X25519PrivateKey.from_private_bytes(expanded[64:]).exchange(X25519PublicKey.from_public_bytes(share))
    shared = hashlib.sha3_256(mlkem + curve + share + key.public[-32:] + b"\\.//^\\").digest()
    assert open_from_primitives(0x647A, shared, INFO, ciphertext) == b"secret"


def test_p384_blobs_open_as_the_specification_says() -> None:
    key = KEYS["MLKEM1024_P384"]
    kem, share, ciphertext = split(seal(key.public, b"secret", INFO)[16:], 1568, 97)
    mlkem = MLKEM1024PrivateKey.from_seed_bytes(bytes(range(64))).decapsulate(kem)
    scalar = ec.derive_private_key(int.from_bytes(b"\x01" * 48, "big"), ec.SECP384R1())
    curve = scalar.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), share))
    shared = hashlib.sha3_256(mlkem + curve + share + key.public[-97:] + b"MLKEM1024-P384").digest()
    assert open_from_primitives(0x0051, shared, INFO, ciphertext) == b"secret"


def split(blob: bytes, first: int, second: int) -> tuple[bytes, bytes, bytes]:
    return blob[:first], blob[first : first + second], blob[first + second :]


@pytest.mark.parametrize(("suite", "step"), [("MLKEM768_X25519", 1), ("MLKEM1024_P384", 29)])
def test_every_bit_of_a_sealed_blob_counts(suite: str, step: int) -> None:
    key = KEYS[suite]
    sealed = seal(key.public, b"\x42" * 36, INFO)
    for bit in range(0, 8 * len(sealed), step):
        twin = bytearray(sealed)
        twin[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError) as caught:
            key.open(bytes(twin), INFO)
        assert caught.value.reason is Reason.UNSEAL


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    key = KEYS["MLKEM768_X25519"]
    for act in (check_public, suite_of, RecipientKey.from_seed_bytes):
        for head in (b"", XWING, b"\x00\x14MLKEM1024_P384+HQC-1"):
            with contextlib.suppress(MalformedError, RefusedError, UnavailableError):
                act(head + data)
    with pytest.raises(RefusedError):
        key.open(XWING + data, INFO)


@given(st.integers(0, 17 + 1215), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_mutated_public_key_never_breaks_sealing(at: int, bit: int) -> None:
    twin = bytearray(KEYS["MLKEM768_X25519"].public)
    twin[at] ^= 1 << bit
    try:
        sealed = seal(bytes(twin), b"x", INFO)
    except (MalformedError, RefusedError):
        return
    with pytest.raises(RefusedError):
        KEYS["MLKEM768_X25519"].open(sealed, INFO)


def test_a_plaintext_has_a_bound() -> None:
    with pytest.raises(MalformedError) as caught:
        seal(KEYS["MLKEM768_X25519"].public, bytes(MAX_PLAINTEXT + 1), INFO)
    assert caught.value.reason is Reason.TOO_LARGE


def test_unknown_suites_are_refused() -> None:
    assert suite_available("MLKEM768_X25519")
    for name in ("", "X25519", "mlkem768_x25519", "MLKEM768_X25519+", "MLKEM768_X25519+ML-KEM-1024"):
        assert not suite_available(name)
        with pytest.raises(RefusedError) as caught:
            RecipientKey.generate(name)
        assert caught.value.reason is Reason.UNSUPPORTED


def test_private_keys_do_not_leak() -> None:
    for key in KEYS.values():
        assert repr(key).startswith(f"RecipientKey({key.suite}, ")
        assert key.to_seed_bytes()[-32:].hex() not in repr(key)
        assert str(key.to_seed_bytes()[-32:]) not in repr(key)
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                act(key)


def test_nested_suite_seals_twice() -> None:
    key = RecipientKey.generate("MLKEM768_X25519+HQC-Fake", kems=fakes)
    prefix = b"\x00\x18MLKEM768_X25519+HQC-Fake"
    assert suite_of(key.public) == "MLKEM768_X25519+HQC-Fake"
    assert key.public.startswith(prefix + (1184 + 32).to_bytes(4, "big"))
    assert len(key.public) == len(prefix) + 4 + 1216 + FakeKEM.public_size
    sealed = seal(key.public, b"secret", INFO, kems=fakes)
    assert len(sealed) == len(prefix) + FakeKEM.ciphertext_size + (1120 + 6 + 16) + 16
    assert key.open(sealed, INFO) == b"secret"
    again = RecipientKey.from_seed_bytes(key.to_seed_bytes(), kems=fakes)
    assert again.public == key.public
    assert again.open(sealed, INFO) == b"secret"


def test_nested_suite_needs_both_layers() -> None:
    key = RecipientKey.generate("MLKEM768_X25519+HQC-Fake", kems=fakes)
    other = RecipientKey.generate("MLKEM768_X25519+HQC-Fake", kems=fakes)
    sealed = seal(key.public, b"secret", INFO, kems=fakes)
    twins = [sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in range(0, len(sealed), 40)]
    for blob, info in [(twin, INFO) for twin in twins] + [(sealed, b""), (sealed[:-1], INFO), (sealed[:100], INFO)]:
        with pytest.raises(RefusedError) as caught:
            key.open(blob, info)
        assert caught.value.reason is Reason.UNSEAL
    with pytest.raises(RefusedError):
        other.open(sealed, INFO)


def test_halves_of_a_nested_private_key_must_belong_together() -> None:
    key = RecipientKey.generate("MLKEM768_X25519+HQC-Fake", kems=fakes)
    other = RecipientKey.generate("MLKEM768_X25519+HQC-Fake", kems=fakes)
    mixed = key.to_seed_bytes()[: -FakeKEM.public_size] + other.to_seed_bytes()[-FakeKEM.public_size :]
    for twin in (mixed, key.to_seed_bytes()[:-1], key.to_seed_bytes() + b"\0", key.to_seed_bytes()[:40]):
        with pytest.raises(MalformedError):
            RecipientKey.from_seed_bytes(twin, kems=fakes)


@pytest.mark.skipif(bool(find_library("oqs")), reason="the liboqs C library is installed")
def test_without_liboqs_a_nested_suite_says_what_to_install() -> None:
    with pytest.raises(UnavailableError) as caught:
        RecipientKey.generate("MLKEM768_X25519+FrodoKEM-976-SHAKE")
    assert caught.value.reason is Reason.UNSUPPORTED
    assert "liboqs" in caught.value.next_step


@pytest.mark.skipif(not find_library("oqs"), reason="the liboqs C library is not installed (liboqs-python is)")
def test_liboqs_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite_available("MLKEM768_X25519+FrodoKEM-976-SHAKE")
    assert capsys.readouterr().out == ""
    enabled = importlib.import_module("oqs").get_enabled_kem_mechanisms()
    families = {name.partition("-")[0]: name for name in sorted(enabled, reverse=True)}
    for family in ("FrodoKEM", "HQC", "Classic"):
        if family not in families:
            continue  # a library built without it
        key = RecipientKey.generate(f"MLKEM768_X25519+{families[family]}")
        sealed = seal(key.public, b"secret", INFO)
        assert RecipientKey.from_seed_bytes(key.to_seed_bytes()).open(sealed, INFO) == b"secret"
        with pytest.raises(RefusedError):
            key.open(sealed, b"")
        with pytest.raises(RefusedError):
            key.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), INFO)
