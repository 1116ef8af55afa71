"""Keys under a passphrase: only that passphrase, that purpose and those bytes open them, at a bounded cost."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.keywrap import MAX_MEMLIMIT, MAX_OPSLIMIT, MIN_MEMLIMIT, load_keys, save_keys, unwrap, wrap
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity


def cheap(secret: bytes, passphrase: str, purpose: str = "test") -> bytes:
    rng = iter((b"\x01" * 16, b"\x02" * 12)).__next__
    return wrap(secret, passphrase, purpose=purpose, rng=lambda size: rng(), opslimit=1, memlimit=MIN_MEMLIMIT)


BLOB = cheap(b"secret", "correct horse")


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(BLOB), **changes}).encode()


def test_what_is_wrapped_unwraps() -> None:
    for secret in (b"", b"secret", bytes(5000)):
        assert unwrap(cheap(secret, "correct horse"), "correct horse", "test") == secret
    assert b"secret" not in BLOB


def test_layout_is_pinned() -> None:
    assert json.loads(BLOB) == {
        "aead": "aes-256-gcm",
        "ciphertext": json.loads(BLOB)["ciphertext"],
        "format": "keyquorum/v1/keywrap",
        "kdf": "argon2id",
        "memlimit": 8192,
        "nonce": "02" * 12,
        "opslimit": 1,
        "purpose": "test",
        "salt": "01" * 16,
    }
    assert hashlib.sha256(BLOB).hexdigest() == "d505a84e3547ccc6f73b3f58818b9c6d895ead9385ac314bc331db6e2577293d"


def test_defaults_cost_64_mib_and_three_passes() -> None:
    header = json.loads(wrap(b"x", "pass", purpose="test"))
    assert (header["opslimit"], header["memlimit"]) == (3, 64 << 20)


@pytest.mark.parametrize("passphrase", ["Correct horse", "correct horse ", "correct", "x" * 500])
def test_another_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(RefusedError) as caught:
        unwrap(BLOB, passphrase, "test")
    assert caught.value.reason is Reason.PASSPHRASE
    assert passphrase not in str(caught.value)


@pytest.mark.parametrize("passphrase", ["", "x" * 1025, "\ud800"])
def test_an_unusable_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(RefusedError) as caught:
        cheap(b"x", passphrase)
    assert caught.value.reason is Reason.PASSPHRASE
    with pytest.raises(RefusedError) as caught:
        unwrap(BLOB, passphrase, "test")
    assert caught.value.reason is Reason.PASSPHRASE


def test_unicode_passphrases_are_normalised() -> None:
    assert unwrap(cheap(b"x", "caf\u00e9"), "cafe\u0301", "test") == b"x"


@pytest.mark.parametrize(
    "changes",
    [{"salt": "03" * 16}, {"nonce": "03" * 12}, {"opslimit": 2}, {"memlimit": 16384}, {"ciphertext": "A" * 32}],
    ids=lambda c: next(iter(c)),
)
def test_every_header_member_is_authenticated(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        unwrap(edited(**changes), "correct horse", "test")
    assert caught.value.reason is Reason.PASSPHRASE


@pytest.mark.parametrize(
    "changes",
    [
        {"memlimit": MAX_MEMLIMIT + 1},
        {"memlimit": MIN_MEMLIMIT - 1},
        {"opslimit": MAX_OPSLIMIT + 1},
        {"opslimit": 0},
        {"kdf": "argon2i"},
        {"aead": "none"},
        {"format": "keyquorum/v2/keywrap"},
        {"purpose": "other"},
        {"salt": ""},
        {"ciphertext": ""},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_hostile_header_is_refused_before_any_work(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        unwrap(edited(**changes), "correct horse", "test")


@pytest.mark.parametrize(("opslimit", "memlimit"), [(0, 8192), (11, 8192), (1, 8191), (1, MAX_MEMLIMIT + 1)])
def test_parameters_out_of_bounds_are_not_written(opslimit: int, memlimit: int) -> None:
    with pytest.raises(MalformedError):
        wrap(b"x", "pass", purpose="test", opslimit=opslimit, memlimit=memlimit)


@given(st.integers(0, len(BLOB) - 1), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_no_bit_of_a_wrapped_key_may_change(at: int, bit: int) -> None:
    twin = BLOB[:at] + bytes([BLOB[at] ^ 1 << bit]) + BLOB[at + 1 :]
    with pytest.raises(KeyquorumError):
        unwrap(twin, "correct horse", "test")


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    with pytest.raises(KeyquorumError):
        unwrap(data, "correct horse", "test")


def test_key_file_round_trip() -> None:
    identity, recipient = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32), RecipientKey.generate()
    blob = save_keys(identity, recipient, "pass", "owner", "alice", opslimit=1, memlimit=MIN_MEMLIMIT)
    keys = load_keys(blob, "pass")
    assert (keys.name, keys.role) == ("alice", "owner")
    assert keys.identity.seeds() == identity.seeds()
    assert keys.recipient == recipient
    assert "0101" not in repr(keys)
    with pytest.raises(RefusedError):
        load_keys(blob, "wrong")
    with pytest.raises(MalformedError):
        load_keys(BLOB, "correct horse")
    with pytest.raises(MalformedError):
        save_keys(identity, recipient, "pass", "owner", "Not A Name", opslimit=1, memlimit=MIN_MEMLIMIT)


@given(st.binary(max_size=100) | st.dictionaries(st.text(), st.text() | st.integers()).map(
    lambda d: json.dumps(d).encode()))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_key_file_with_other_contents_is_malformed(secret: bytes) -> None:
    with pytest.raises(MalformedError):
        load_keys(cheap(secret, "pass", "keyquorum/v1/keys"), "pass")
