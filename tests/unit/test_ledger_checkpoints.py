"""Checkpoints and cosignatures: signed bytes pinned, and every signature counts only for what it says."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import (
    Cosigner,
    cosignature_message,
    subtree_message,
    verify_signature,
    witnessed,
)
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.merkle import EMPTY_ROOT, MAX_SIZE
from keyquorum_core.ledger.notes import Note, NoteSignature, parse_note
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey

NOW = 1_800_000_000
ORIGIN = "log.example/keyquorum"
ROOT = hashlib.sha256(b"root").digest()
CHECKPOINT = Checkpoint(ORIGIN, 42, ROOT)


def ed25519(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def ml_dsa_44(name: str) -> MLDSA44PrivateKey:
    return MLDSA44PrivateKey.from_seed_bytes(hashlib.sha256(name.encode()).digest())


def log_signer(origin: str = ORIGIN, keys: str = "log") -> LogSigner:
    return LogSigner(origin, ed25519(keys), ml_dsa_44(keys))


def cosigner(name: str) -> Cosigner:
    return Cosigner(f"{name}.example", ed25519(name), ml_dsa_44(name))


LOG = log_signer()
WITNESSES = {name: cosigner(name) for name in ("ch-1", "de-1", "fr-1")}
KEYS = {name: witness.keys for name, witness in WITNESSES.items()}
SIGNED = LOG.sign(42, ROOT, NOW)
COSIGNED = SIGNED.with_signatures(*(line for w in WITNESSES.values() for line in w.cosign(CHECKPOINT, NOW)))


def reason_of(data: bytes, log: LogKeys = LOG.keys) -> Reason:
    with pytest.raises(KeyquorumError) as caught:
        open_checkpoint(data, log)
    return caught.value.reason


def with_text(text: bytes) -> bytes:
    """``text`` under lines that would be good if they were over it; only for what is refused before they matter."""
    return Note(text, SIGNED.note.signatures).encode()


# What is signed, byte for byte


def test_layout_of_a_checkpoint_is_pinned() -> None:
    assert CHECKPOINT.text() == b"log.example/keyquorum\n42\n" + base64.b64encode(ROOT) + b"\n"
    assert Checkpoint.parse(CHECKPOINT.text()) == CHECKPOINT
    assert Checkpoint("é", 0, EMPTY_ROOT).text() == (b"\xc3\xa9\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n")


def test_layout_of_a_0x04_cosignature_is_pinned() -> None:
    assert cosignature_message(b"o\n1\nr\n", 1679315147) == b"cosignature/v1\ntime 1679315147\no\n1\nr\n"
    line = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)[0]
    assert (len(line.signature), line.signature[:8]) == (72, struct.pack(">Q", NOW))
    ed25519("ch-1").public_key().verify(line.signature[8:], cosignature_message(CHECKPOINT.text(), NOW))


def test_layout_of_a_0x06_cosignature_is_pinned() -> None:
    message = subtree_message("w", 0x0102030405060708, "log.example", 0, 0x1112131415161718, bytes(range(32)))
    assert message.hex() == (
        "737562747265652f76310a00"  # "subtree/v1\n\0"
        "0177"
        "0102030405060708"
        "0b6c6f672e6578616d706c65"
        "0000000000000000"
        "1112131415161718"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    )
    line = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)[1]
    assert (len(line.signature), line.signature[:8]) == (2428, struct.pack(">Q", NOW))
    message = subtree_message("ch-1.example", NOW, ORIGIN, 0, 42, ROOT)
    ml_dsa_44("ch-1").public_key().verify(line.signature[8:], message)


def test_layout_of_a_signed_checkpoint_is_pinned() -> None:
    text = re.escape(f"{ORIGIN}\n42\n{base64.b64encode(ROOT).decode()}\n")
    first, second = (re.escape(f"— {ORIGIN} ") + f"(.{{{size}}})\n" for size in (92, 3244))
    match = re.fullmatch(f"{text}\n{first}{second}", SIGNED.encode().decode())
    assert match
    lines = [base64.b64decode(part) for part in match.groups()]
    assert [line[:4] for line in lines] == [LOG.keys.ed25519.key_id, LOG.keys.ml_dsa_44.key_id]
    ed25519("log").public_key().verify(lines[0][4:], CHECKPOINT.text())
    message = subtree_message(ORIGIN, NOW, ORIGIN, 0, 42, ROOT)
    ml_dsa_44("log").public_key().verify(lines[1][12:], message)


@pytest.mark.parametrize(
    "arguments",
    [
        ("", 1, "o", 0, 1, ROOT),
        ("n" * 256, 1, "o", 0, 1, ROOT),
        ("n", 1, "", 0, 1, ROOT),
        ("n", 1, "o" * 256, 0, 1, ROOT),
        ("n", -1, "o", 0, 1, ROOT),
        ("n", MAX_SIZE + 1, "o", 0, 1, ROOT),
        ("n", 1, "o", 1, 2, ROOT),
        ("n", 0, "o", 2, 1, ROOT),
        ("n", 0, "o", 0, MAX_SIZE + 1, ROOT),
        ("n", 0, "o", 0, 1, ROOT[1:]),
    ],
)
def test_impossible_subtrees_are_not_signed(arguments: tuple[str, int, str, int, int, bytes]) -> None:
    with pytest.raises(MalformedError):
        subtree_message(*arguments)


def test_a_subtree_from_the_middle_is_signed_without_a_time() -> None:
    assert subtree_message("n", 0, "o", 8, 13, ROOT)[-48:-32] == struct.pack(">QQ", 8, 13)


# Opening a checkpoint


def test_a_checkpoint_opens_under_both_signatures() -> None:
    for signed in (SIGNED, COSIGNED):
        opened = open_checkpoint(signed.encode(), LOG.keys)
        assert opened == signed
        assert (opened.checkpoint, opened.signed_at) == (CHECKPOINT, NOW)


@pytest.mark.parametrize("left_out", [0, 1])
def test_one_signature_of_the_log_is_not_enough(left_out: int) -> None:
    lines = SIGNED.note.signatures[:left_out] + SIGNED.note.signatures[left_out + 1 :]
    for extra in ((), WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)):
        assert reason_of(Note(SIGNED.note.text, (*lines, *extra)).encode()) is Reason.SIGNATURE_MISSING


def test_a_checkpoint_of_another_log_is_refused() -> None:
    assert reason_of(log_signer("other.example").sign(42, ROOT, NOW).encode()) is Reason.LEDGER_ORIGIN
    assert reason_of(log_signer(keys="other").sign(42, ROOT, NOW).encode()) is Reason.SIGNATURE_MISSING


def test_a_line_with_the_logs_key_id_by_another_key_is_refused() -> None:
    lines = log_signer(keys="other").sign(42, ROOT, NOW).note.signatures
    for at in (0, 1):
        forged = list(SIGNED.note.signatures)
        forged[at] = NoteSignature(ORIGIN, forged[at].key_id, lines[at].signature)
        assert reason_of(Note(SIGNED.note.text, tuple(forged)).encode()) is Reason.SIGNATURE


def test_lines_under_each_others_key_id_are_refused() -> None:
    first, second = SIGNED.note.signatures
    swapped = (
        NoteSignature(ORIGIN, second.key_id, first.signature),
        NoteSignature(ORIGIN, first.key_id, second.signature),
    )
    assert reason_of(Note(SIGNED.note.text, swapped).encode()) is Reason.SIGNATURE


@pytest.mark.parametrize("changed", [Checkpoint(ORIGIN, 43, ROOT), Checkpoint(ORIGIN, 42, ROOT[::-1])])
def test_signatures_are_over_size_and_root(changed: Checkpoint) -> None:
    assert reason_of(with_text(changed.text())) is Reason.SIGNATURE


@pytest.mark.parametrize("at", [0, 1, 7, 8, 40, -1])
def test_a_changed_bit_of_either_line_is_refused(at: int) -> None:
    for number in (0, 1):
        lines = list(SIGNED.note.signatures)
        raw = bytearray(lines[number].signature)
        raw[at] ^= 1
        for signature in (bytes(raw), bytes(raw)[:-1], lines[number].signature + b"\0", lines[number].signature[:4]):
            lines[number] = NoteSignature(ORIGIN, SIGNED.note.signatures[number].key_id, signature)
            assert reason_of(Note(SIGNED.note.text, tuple(lines)).encode()) is Reason.SIGNATURE


def test_unknown_lines_change_nothing() -> None:
    strangers = [NoteSignature(ORIGIN, bytes([1, 2, 3, n]), b"anything") for n in range(14)]
    assert open_checkpoint(SIGNED.with_signatures(*strangers).encode(), LOG.keys).checkpoint == CHECKPOINT


BASE64_ROOT = base64.b64encode(ROOT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\n42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a b\n42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a+b\n42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a" * 256 + b"\n42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a" * 500 + b"\n42\n" + BASE64_ROOT + b"\n", Reason.TOO_LARGE),
        (b"a\n042\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n+42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n-1\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n \n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        ("a\n\u0664\u0662\n".encode() + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n9223372036854775808\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n10000000000000000000\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n42\n" + BASE64_ROOT[:-4] + b"\n", Reason.MALFORMED),
        (b"a\n42\n" + BASE64_ROOT[:-1] + b"\n", Reason.MALFORMED),
        (b"a\n42\n" + ROOT.hex().encode() + b"\n", Reason.MALFORMED),
        (b"a\n42\n" + BASE64_ROOT, Reason.MALFORMED),
        (b"a\n42\n\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"a\n42\n", Reason.MALFORMED),
        (b"a\n42\n" + BASE64_ROOT + b"\nextension\n", Reason.UNSUPPORTED),
        (b"a\n42\n" + BASE64_ROOT + b"\n\n", Reason.MALFORMED),
        (b"a\n0\n" + BASE64_ROOT + b"\n", Reason.DIGEST),
        (b"a\xff\n42\n" + BASE64_ROOT + b"\n", Reason.MALFORMED),
        (b"", Reason.MALFORMED),
    ],
)
def test_malformed_checkpoints(text: bytes, reason: Reason) -> None:
    with pytest.raises(MalformedError) as caught:
        Checkpoint.parse(text)
    assert caught.value.reason is reason


@given(st.binary(max_size=90) | st.text(alphabet="a\n012+/=A", max_size=90).map(str.encode))
@settings(max_examples=120, deadline=None)
def test_any_checkpoint_is_read_or_refused(data: bytes) -> None:
    for candidate in (data, b"a\n7\n" + BASE64_ROOT + data):
        with contextlib.suppress(MalformedError):
            assert Checkpoint.parse(candidate).text() == candidate


@given(st.integers(0, len(COSIGNED.encode()) - 1), st.integers(1, 255))
@settings(max_examples=120, deadline=None)
def test_a_changed_byte_anywhere_never_opens_as_another_checkpoint(at: int, mask: int) -> None:
    data = bytearray(COSIGNED.encode())
    data[at] ^= mask
    with contextlib.suppress(KeyquorumError):
        opened = open_checkpoint(bytes(data), LOG.keys)
        assert opened.checkpoint == CHECKPOINT
        seen = witnessed(opened.note, CHECKPOINT, KEYS, now=NOW, oldest=NOW)
        assert set(seen.current.values()) <= {NOW}


def test_log_keys_travel_as_two_vkeys() -> None:
    text = LOG.keys.encode()
    assert LogKeys.parse(text) == LOG.keys
    assert len(text) < 2400
    first, second = text.split(" ")
    for bad in (
        first,
        second,
        f"{second} {first}",
        f"{first}  {second}",
        f" {text}",
        f"{first} {first}",
        "",
        "x" * 9000,
    ):
        with pytest.raises(MalformedError):
            LogKeys.parse(bad)
    with pytest.raises(MalformedError):
        LogKeys.parse(f"{first} {log_signer('other.example').keys.ml_dsa_44.encode()}")


def test_nothing_is_signed_without_a_time_or_about_an_impossible_tree() -> None:
    for size, root, now in ((1, ROOT, 0), (-1, ROOT, NOW), (1, b"", NOW), (0, ROOT, NOW), (MAX_SIZE + 1, ROOT, NOW)):
        with pytest.raises(MalformedError):
            LOG.sign(size, root, now)
    with pytest.raises(MalformedError):
        WITNESSES["ch-1"].cosign(CHECKPOINT, 0)
    assert LOG.sign(0, EMPTY_ROOT, NOW).checkpoint.size == 0


def test_signers_show_no_key() -> None:
    assert (repr(LOG), repr(WITNESSES["ch-1"])) == (f"LogSigner({ORIGIN})", "Cosigner(ch-1.example)")


# Who cosigned


def seen_at(signed: SignedCheckpoint, now: int = NOW, oldest: int = NOW - 60) -> tuple[set[str], set[str], set[str]]:
    seen = witnessed(signed.note, signed.checkpoint, KEYS, now=now, oldest=oldest, skew=30)
    return set(seen.current), set(seen.stale), set(seen.early)


def test_cosignatures_count_within_their_time() -> None:
    everyone = set(WITNESSES)
    assert seen_at(COSIGNED) == (everyone, set(), set())
    assert seen_at(COSIGNED, oldest=NOW) == (everyone, set(), set())
    assert seen_at(COSIGNED, now=NOW - 30) == (everyone, set(), set())
    assert seen_at(COSIGNED, oldest=NOW + 1) == (set(), everyone, set())
    assert seen_at(COSIGNED, now=NOW - 31) == (set(), set(), everyone)
    assert seen_at(SIGNED) == (set(), set(), set())


def test_a_witness_counts_only_with_both_its_lines() -> None:
    ed, ml = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)
    assert seen_at(SIGNED.with_signatures(ed))[0] == set()
    assert seen_at(SIGNED.with_signatures(ml))[0] == set()
    assert seen_at(SIGNED.with_signatures(ed, ml))[0] == {"ch-1"}


def test_the_older_of_two_lines_decides() -> None:
    old, new = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW - 100), WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)
    assert seen_at(SIGNED.with_signatures(old[0], new[1])) == (set(), {"ch-1"}, set())
    ahead = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW + 100)
    assert seen_at(SIGNED.with_signatures(old[0], ahead[1])) == (set(), set(), {"ch-1"})


def test_a_cosignature_without_a_time_never_counts() -> None:
    name = "ch-1"
    ed, ml = KEYS[name]
    untimed = struct.pack(">Q", 0)
    raw_ed = ed25519(name).sign(cosignature_message(CHECKPOINT.text(), 0))
    raw_ml = ml_dsa_44(name).sign(subtree_message(ml.name, 0, ORIGIN, 0, 42, ROOT))
    lines = (NoteSignature(ed.name, ed.key_id, untimed + raw_ed), NoteSignature(ml.name, ml.key_id, untimed + raw_ml))
    assert seen_at(SIGNED.with_signatures(*lines), oldest=0) == (set(), {"ch-1"}, set())


def test_a_bad_line_of_a_known_witness_spoils_the_note() -> None:
    for wrong in (Checkpoint(ORIGIN, 41, ROOT), Checkpoint("other", 42, ROOT), Checkpoint(ORIGIN, 42, ROOT[::-1])):
        for line in WITNESSES["fr-1"].cosign(wrong, NOW):
            with pytest.raises(RefusedError) as caught:
                seen_at(COSIGNED.with_signatures(line))
            assert caught.value.reason is Reason.SIGNATURE


def test_a_time_is_signed() -> None:
    for line, key in zip(WITNESSES["ch-1"].cosign(CHECKPOINT, NOW), KEYS["ch-1"], strict=True):
        assert verify_signature(key, CHECKPOINT, line) == NOW
        for stamp in (NOW + 1, 0, 1 << 63, (1 << 64) - 1):
            moved = NoteSignature(line.name, line.key_id, struct.pack(">Q", stamp) + line.signature[8:])
            with pytest.raises(RefusedError):
                verify_signature(key, CHECKPOINT, moved)


def test_a_cosigners_word_is_not_another_cosigners_or_the_logs() -> None:
    """The same raw keys under another name, and 0x01 where 0x04 was meant."""
    ed, ml = WITNESSES["ch-1"].cosign(CHECKPOINT, NOW)
    elsewhere = VerifierKey("elsewhere", SignatureType.ML_DSA_44, KEYS["ch-1"][1].public)
    plain = VerifierKey(ed.name, SignatureType.ED25519, KEYS["ch-1"][0].public)
    for key, signature in ((elsewhere, ml.signature), (plain, ed.signature[8:])):
        with pytest.raises(RefusedError):
            verify_signature(key, CHECKPOINT, NoteSignature(key.name, key.key_id, signature))
    with pytest.raises(RefusedError):
        verify_signature(KEYS["de-1"][0], CHECKPOINT, ed)


def test_witnesses_without_keys_or_with_a_shared_one_are_refused() -> None:
    for keys in ({"a": ()}, {"a": KEYS["ch-1"], "b": KEYS["ch-1"]}, {"a": (KEYS["ch-1"][0],) * 2}):
        with pytest.raises(MalformedError):
            witnessed(COSIGNED.note, CHECKPOINT, keys, now=NOW, oldest=0)


def test_a_checkpoint_reads_back_from_its_note() -> None:
    assert Checkpoint.parse(parse_note(COSIGNED.encode()).text) == CHECKPOINT
    assert len(COSIGNED.note.signatures) == 8
