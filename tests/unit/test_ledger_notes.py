"""Signed notes and verifier keys: one spelling each, and nothing in them is believed before it is verified."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.ledger.notes import (
    MAX_LINE,
    MAX_NOTE,
    MAX_SIGNATURES,
    Note,
    NoteSignature,
    parse_note,
    parse_signature_lines,
)
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey

ED25519 = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
ED25519_PUBLIC = ED25519.public_key().public_bytes_raw()
ML_DSA_PUBLIC = MLDSA44PrivateKey.from_seed_bytes(b"\x02" * 32).public_key().public_bytes_raw()
KEY = VerifierKey("example.org/log", SignatureType.ED25519, ED25519_PUBLIC)
TEXT = b"one\n\ntwo\n"
GOOD = Note(TEXT, (NoteSignature(KEY.name, KEY.key_id, ED25519.sign(TEXT)),)).encode()
LINE = NoteSignature(KEY.name, KEY.key_id, b"s" * 64).line()


def line(name: str = "a", key_id: bytes = b"\0\0\0\1", signature: bytes = b"x") -> str:
    return f"— {name} {base64.b64encode(key_id + signature).decode()}\n"


def refused(data: bytes) -> Reason:
    with pytest.raises(MalformedError) as caught:
        parse_note(data)
    return caught.value.reason


# Verifier keys


def test_key_ids_and_vkeys_are_pinned() -> None:
    for signature_type, public in ((1, ED25519_PUBLIC), (4, ED25519_PUBLIC), (6, ML_DSA_PUBLIC)):
        key = VerifierKey("example.org/log", SignatureType(signature_type), public)
        key_id = hashlib.sha256(b"example.org/log\n" + bytes([signature_type]) + public).digest()[:4]
        assert key.key_id == key_id
        material = base64.b64encode(bytes([signature_type]) + public).decode()
        assert key.encode() == f"example.org/log+{key_id.hex()}+{material}"
        assert VerifierKey.parse(key.encode()) == key


def test_a_claimed_key_id_is_recomputed() -> None:
    name, key_id, material = KEY.encode().split("+", 2)
    for claim in ("00000000", key_id[::-1], VerifierKey(name, SignatureType(4), ED25519_PUBLIC).key_id.hex()):
        with pytest.raises(MalformedError) as caught:
            VerifierKey.parse(f"{name}+{claim}+{material}")
        assert caught.value.reason is Reason.DIGEST


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, key_id, key: f"{name}+{key_id.upper()}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}0+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"+{key_id}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"a b+{key_id}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"a\u2003b+{key_id}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"a\udc80b+{key_id}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}+{key}=", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}+{key[:-4]}", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}+{key}\n", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}", Reason.MALFORMED),
        (lambda name, key_id, key: "", Reason.MALFORMED),
        (lambda name, key_id, key: f"{name}+{key_id}+Ag==", Reason.UNSUPPORTED),
        (lambda name, key_id, key: f"{name}+{key_id}+/w==", Reason.UNSUPPORTED),
        (lambda name, key_id, key: f"{'a' * 256}+{key_id}+{key}", Reason.MALFORMED),
        (lambda name, key_id, key: f"{'a' * 2400}+{key_id}+{key}", Reason.TOO_LARGE),
    ],
)
def test_malformed_vkeys(change: object, reason: Reason) -> None:
    assert callable(change)
    with pytest.raises(MalformedError) as caught:
        VerifierKey.parse(change(*KEY.encode().split("+", 2)))
    assert caught.value.reason is reason


def test_a_key_of_small_order_is_refused() -> None:
    for raw in (b"\0" * 32, b"\1" + b"\0" * 31, b"\xff" * 32):
        with pytest.raises(MalformedError):
            VerifierKey("a", SignatureType.ED25519, raw)


@given(st.text(max_size=80) | st.builds("{}+{}+{}".format, st.text(max_size=9), st.text(max_size=9), st.text()))
@settings(max_examples=80, deadline=None)
def test_any_vkey_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(MalformedError):
        assert VerifierKey.parse(text).encode() == text


# Notes


def test_the_text_ends_at_the_last_empty_line() -> None:
    note = parse_note(GOOD)
    assert note.text == TEXT
    assert note.encode() == GOOD
    signature = note.signature_of(KEY)
    assert signature is not None
    assert KEY.verifies(note.text, signature.signature)


def test_layout_of_a_note_is_pinned() -> None:
    note = Note(b"text\n", (NoteSignature("a", b"\1\2\3\4", b"\5"), NoteSignature("é", b"\0" * 4, b"\6")))
    assert note.encode() == "text\n\n— a AQIDBAU=\n— é AAAAAAY=\n".encode()


def test_a_line_counts_for_a_key_only_by_name_and_id() -> None:
    other = VerifierKey("example.org/other", SignatureType.ED25519, ED25519_PUBLIC)
    lines = (NoteSignature(KEY.name, other.key_id, b"x"), NoteSignature(other.name, KEY.key_id, b"y"))
    assert Note(TEXT, lines).signature_of(KEY) is None
    assert Note(TEXT, lines).signature_of(other) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"text", Reason.MALFORMED),
        (b"text\n", Reason.SIGNATURE_MISSING),
        (b"text\n\n", Reason.SIGNATURE_MISSING),
        (b"text\n\n" + LINE.encode() + b"\n", Reason.SIGNATURE_MISSING),
        (b"text\n" + LINE.encode(), Reason.SIGNATURE_MISSING),
        (b"text\n\n" + LINE.encode()[:-1], Reason.MALFORMED),
        (b"text\n\n" + LINE.encode() + b"x", Reason.MALFORMED),
        (b"text\n\n" + LINE.encode() + b"x\n", Reason.MALFORMED),
        (b"text\n\nx\n" + LINE.encode(), Reason.MALFORMED),
        (b"text\r\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"te\0xt\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"te\txt\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"te\x1fxt\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"te\xffxt\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"te\xed\xa0\x80xt\n\n" + LINE.encode(), Reason.MALFORMED),
        (b"text\n\n" + LINE.encode() * 2, Reason.SIGNATURE_EXTRA),
        (("text\n\n" + line(signature=b"x") + line(signature=b"y")).encode(), Reason.SIGNATURE_EXTRA),
        (b"x" * (MAX_LINE + 1) + b"\n\n" + LINE.encode(), Reason.TOO_LARGE),
        (("text\n\n" + line(signature=b"x" * MAX_LINE)).encode(), Reason.TOO_LARGE),
        (b"x\n" * MAX_NOTE + b"\n" + LINE.encode(), Reason.TOO_LARGE),
    ],
)
def test_malformed_notes(data: bytes, reason: Reason) -> None:
    assert refused(data) is reason


@pytest.mark.parametrize(
    "bad",
    [
        "- a AAAAAHg=",
        "—a AAAAAHg=",
        "—  AAAAAHg=",
        "— a  AAAAAHg=",
        "— a AAAAAHg= ",
        " — a AAAAAHg=",
        "— a b AAAAAHg=",
        "— a+b AAAAAHg=",
        "— a\u00a0b AAAAAHg=",
        "— a\u2028b AAAAAHg=",
        "— a",
        "— a ",
        "— a AAAAAA==",
        "— a AAAA",
        "— a AAAAAHg",
        "— a AAAAAHh=",
        "— a AAAAAH-=",
        "— a AAAA AHg=",
        f"— {'a' * 256} AAAAAHg=",
    ],
)
def test_malformed_signature_lines(bad: str) -> None:
    assert refused(f"text\n\n{bad}\n".encode()) is Reason.MALFORMED
    with pytest.raises(MalformedError):
        parse_signature_lines(f"{bad}\n".encode())


def test_sixteen_lines_are_read_and_seventeen_are_not() -> None:
    lines = [line(name=f"unknown-{number}") for number in range(MAX_SIGNATURES + 1)]
    note = parse_note(("text\n\n" + "".join(lines[:-1])).encode())
    assert len(note.signatures) == 16
    assert refused(("text\n\n" + "".join(lines)).encode()) is Reason.TOO_LARGE
    with pytest.raises(MalformedError):
        note.with_signatures(NoteSignature.parse(lines[-1][:-1]))


def test_sixteen_of_the_largest_signatures_fit() -> None:
    lines = [line(name=f"{number:0255d}", signature=b"x" * 4627) for number in range(16)]
    assert len(parse_note(("text\n\n" + "".join(lines)).encode()).signatures) == 16


def test_a_newer_line_of_a_key_takes_the_place_of_the_older() -> None:
    note = parse_note(GOOD)
    newer = NoteSignature(KEY.name, KEY.key_id, b"newer")
    other = NoteSignature("other", KEY.key_id, b"x")
    assert note.with_signatures(other, newer).signatures == (newer, other)
    assert len(note.signatures) == 1


def test_lists_of_signature_lines() -> None:
    assert parse_signature_lines((LINE + line()).encode())[1] == NoteSignature("a", b"\0\0\0\1", b"x")
    for bad in ("", "\n", LINE[:-1], LINE + "\n", "\n" + LINE, LINE * 2):
        with pytest.raises(MalformedError):
            parse_signature_lines(bad.encode())


@given(st.binary(max_size=120) | st.text(alphabet="a\n— +AB=", max_size=60).map(str.encode))
@settings(max_examples=120, deadline=None)
def test_any_note_is_read_or_refused(data: bytes) -> None:
    for candidate in (data, b"text\n\n" + data, b"text\n\n" + LINE.encode() + data):
        with contextlib.suppress(KeyquorumError):
            assert parse_note(candidate).encode() == candidate


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
@settings(deadline=None)
def test_a_changed_byte_is_another_note_or_none(at: int, mask: int) -> None:
    changed = GOOD[:at] + bytes([GOOD[at] ^ mask]) + GOOD[at + 1 :]
    with contextlib.suppress(MalformedError):
        note = parse_note(changed)
        signature = note.signature_of(KEY)
        assert signature is None or not KEY.verifies(note.text, signature.signature)
