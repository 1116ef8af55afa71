"""Streaming artifacts: round trips at every segment boundary, and every way of tampering with the stream."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core import artifact
from keyquorum_core.artifact import (
    SEGMENT_BYTES,
    DecryptingReader,
    EncryptingWriter,
    ciphertext_size,
    decrypt_stream,
    encrypt_stream,
    plaintext_size,
)
from keyquorum_core.errors import (
    KeyquorumError,
    MalformedError,
    Reason,
    RefusedError,
    StateError,
    UnavailableError,
)

KEY = bytes(range(32))
AD = b"job and kind"
FIRST = SEGMENT_BYTES - 40 - 16
FULL = SEGMENT_BYTES - 16
BOUNDARIES = [0, 1, 15, 16, 17, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL - 1, FIRST + FULL, FIRST + FULL + 1]
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "docs" / "spec" / "vectors" / "artifact.json").read_text("utf-8")
)
BY_NAME = {vector["name"]: vector for vector in VECTORS["vectors"]}


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def seal(plain: bytes, key: bytes = KEY, ad: bytes = AD, **options: Any) -> bytes:
    sink = io.BytesIO()
    assert encrypt_stream(key, io.BytesIO(plain), sink, ad, **options) == len(plain)
    return sink.getvalue()


def unseal(sealed: bytes, key: bytes = KEY, ad: bytes = AD) -> bytes:
    sink = io.BytesIO()
    assert decrypt_stream(key, io.BytesIO(sealed), sink, ad) == len(sink.getvalue())
    return sink.getvalue()


def vector_bytes(vector: dict[str, Any]) -> bytes:
    parts = iter([bytes.fromhex(vector["salt"]), bytes.fromhex(vector["nonce_prefix"])])
    return seal(
        pattern(vector["plaintext_bytes"]),
        bytes.fromhex(vector["key"]),
        bytes.fromhex(vector["associated_data"]),
        rng=lambda size: next(parts),
    )


class Dripping(io.RawIOBase):
    """A source and sink that handles a few bytes at a time and knows only ``read``, like some sockets."""

    def __init__(self, data: bytes = b"", step: int = 100_003) -> None:
        self.data = io.BytesIO(data)
        self.step = step

    def read(self, size: int = -1, /) -> bytes:
        return self.data.read(min(size, self.step))

    def write(self, data: Any, /) -> int:
        return self.data.write(bytes(data[: self.step]))

    readinto = None  # type: ignore[assignment]


# -- round trips and the layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BOUNDARIES)
def test_what_was_encrypted_decrypts_and_has_the_size_foretold(size: int) -> None:
    sealed = seal(pattern(size))
    assert len(sealed) == ciphertext_size(size)
    assert plaintext_size(len(sealed)) == size
    assert unseal(sealed) == pattern(size)


def test_the_layout_is_tinks_built_here_by_hand() -> None:
    """Two segments, each sealed as the specification words it, without the code under test."""
    salt, prefix, plain = bytes(range(100, 132)), b"prefix7", pattern(FIRST + 5)
    derived = AESGCM(HKDF(SHA256(), 32, salt=salt, info=AD).derive(KEY))
    by_hand = (
        b"\x28"
        + salt
        + prefix
        + derived.encrypt(prefix + b"\x00\x00\x00\x00" + b"\x00", plain[:FIRST], None)
        + derived.encrypt(prefix + b"\x00\x00\x00\x01" + b"\x01", plain[FIRST:], None)
    )
    parts = iter([salt, prefix])
    assert seal(plain, rng=lambda size: next(parts)) == by_hand
    assert unseal(by_hand) == plain
    assert len(by_hand) == SEGMENT_BYTES + 5 + 16


@pytest.mark.parametrize("name", BY_NAME)
def test_vector(name: str) -> None:
    vector = BY_NAME[name]
    sealed = vector_bytes(vector)
    assert len(sealed) == vector["ciphertext_bytes"]
    assert hashlib.sha256(sealed).hexdigest() == vector["ciphertext_sha256"]
    assert sealed.hex() == vector.get("ciphertext", sealed.hex())
    plain = unseal(sealed, bytes.fromhex(vector["key"]), bytes.fromhex(vector["associated_data"]))
    assert hashlib.sha256(plain).hexdigest() == vector["plaintext_sha256"]


def refused_artifact(case: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """``(artifact, key, associated data)`` of a vector that must not decrypt."""
    vector = BY_NAME[case["of"]]
    sealed = bytearray(vector_bytes(vector))
    if "keep" in case:
        assert case["keep"] < len(sealed)
        del sealed[case["keep"] :]
    if "append" in case:
        sealed += bytes.fromhex(case["append"])
    if "flip" in case:
        sealed[case["flip"]["offset"]] ^= case["flip"]["mask"]
    if "segments" in case:
        pieces = [sealed[at : at + SEGMENT_BYTES] for at in range(0, len(sealed), SEGMENT_BYTES)]
        pieces[0], header = pieces[0][40:], pieces[0][:40]
        sealed = header + b"".join(pieces[index] for index in case["segments"])
    key = bytes.fromhex(case.get("key", vector["key"]))
    ad = bytes.fromhex(case.get("associated_data", vector["associated_data"]))
    return bytes(sealed), key, ad


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_refused_vector(case: dict[str, Any]) -> None:
    with pytest.raises(KeyquorumError) as caught:
        unseal(*refused_artifact(case))
    assert caught.value.reason is Reason.ARTIFACT


def test_every_artifact_has_its_own_salt_and_prefix() -> None:
    assert len({seal(b"same")[:40] for _ in range(20)}) == 20


@given(st.integers(0, 1 << 40))
def test_sizes_are_one_to_one(size: int) -> None:
    assert plaintext_size(ciphertext_size(size)) == size


@given(st.integers(-5, 4 * SEGMENT_BYTES))
def test_a_size_no_artifact_has_is_refused_and_every_other_fits(size: int) -> None:
    try:
        plain = plaintext_size(size)
    except MalformedError:
        assert size < 56 or 0 < (size % SEGMENT_BYTES or SEGMENT_BYTES) <= 16
    else:
        assert ciphertext_size(plain) == size


@pytest.mark.parametrize("size", [-1, (2**32 - 1) * FULL])
def test_a_plaintext_no_artifact_holds_is_refused(size: int) -> None:
    with pytest.raises(MalformedError):
        ciphertext_size(size)


# -- truncation, and never a byte that did not verify -----------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_a_cut_or_changed_short_artifact_never_decrypts(data: st.DataObject) -> None:
    sealed = bytearray(seal(pattern(50)))
    position = data.draw(st.integers(0, len(sealed) - 1))
    if data.draw(st.booleans()):
        del sealed[position:]
    else:
        sealed[position] ^= data.draw(st.integers(1, 255))
    sink = io.BytesIO()
    with pytest.raises(KeyquorumError) as caught:
        decrypt_stream(KEY, io.BytesIO(sealed), sink, AD)
    assert caught.value.reason is Reason.ARTIFACT
    assert sink.getvalue() == b""


def test_only_verified_segments_reach_the_sink() -> None:
    plain = pattern(FIRST + FULL + 10)
    sealed = bytearray(seal(plain))
    sealed[SEGMENT_BYTES + 7] ^= 1
    sink = io.BytesIO()
    with pytest.raises(RefusedError, match="segment 1 ") as caught:
        decrypt_stream(KEY, io.BytesIO(sealed), sink, AD)
    assert caught.value.reason is Reason.ARTIFACT
    assert sink.getvalue() == plain[:FIRST]


def test_a_truncated_artifact_is_refused_at_its_end_not_taken_for_a_short_one() -> None:
    plain = pattern(FIRST + FULL + 10)
    reader = DecryptingReader(KEY, io.BytesIO(seal(plain)[: 2 * SEGMENT_BYTES]), AD)
    assert reader.read(FIRST) == plain[:FIRST]
    assert not reader.finished
    with pytest.raises(RefusedError, match="segment 1 "):
        reader.read(1)
    with pytest.raises(StateError):
        reader.read(1)
    reader.close()


def test_an_empty_last_segment_after_others_is_refused() -> None:
    """No writer makes one; accepting it would give a plaintext two artifacts of different size."""
    salt, prefix, plain = bytes(32), bytes(7), pattern(FIRST)
    derived = AESGCM(HKDF(SHA256(), 32, salt=salt, info=AD).derive(KEY))
    sealed = b"\x28" + salt + prefix + derived.encrypt(prefix + bytes(5), plain, None)
    sealed += derived.encrypt(prefix + b"\x00\x00\x00\x01\x01", b"", None)
    with pytest.raises(RefusedError):
        unseal(sealed)


def test_the_counter_stops_where_tinks_does() -> None:
    segments = artifact._Segments(KEY, memoryview(bytes(40)), AD)
    segments.count = 2**32 - 2
    assert segments.next_nonce(last=True) == bytes(7) + b"\xff\xff\xff\xfe\x01"
    with pytest.raises(RefusedError):
        segments.next_nonce(last=True)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(MalformedError, match="another length"):
        seal(b"x", key=bytes(size))
    with pytest.raises(MalformedError, match="another length"):
        unseal(seal(b"x"), key=bytes(size))


# -- readers and writers ----------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, SEGMENT_BYTES + 3), max_size=5))
def test_however_it_is_written_and_read_the_plaintext_is_the_same(pieces: list[int]) -> None:
    plain = pattern(sum(pieces))
    sink = io.BytesIO()
    with EncryptingWriter(KEY, sink, AD) as writer:
        at = 0
        for piece in pieces:
            assert writer.write(plain[at : at + piece]) == piece
            at += piece
    assert len(sink.getvalue()) == ciphertext_size(len(plain))
    reader = DecryptingReader(KEY, io.BytesIO(sink.getvalue()), AD)
    got = b"".join(iter(lambda: reader.read(300_007), b""))
    assert got == plain
    assert reader.finished
    assert reader.plaintext_bytes == writer.plaintext_bytes == len(plain)
    reader.close()


def test_writing_and_copying_may_be_mixed() -> None:
    sink = io.BytesIO()
    with EncryptingWriter(KEY, sink, AD) as writer:
        writer.write(b"head")
        assert writer.copy_from(io.BytesIO(pattern(FIRST + 9))) == FIRST + 9
        writer.write(memoryview(b"tail"))
    assert unseal(sink.getvalue()) == b"head" + pattern(FIRST + 9) + b"tail"


def test_streams_that_give_and_take_little_at_a_time_work() -> None:
    plain = pattern(FIRST + 1000)
    sink = Dripping()
    encrypt_stream(KEY, Dripping(plain), sink, AD)
    out = Dripping()
    decrypt_stream(KEY, Dripping(sink.data.getvalue()), out, AD)
    assert out.data.getvalue() == plain


def test_a_reader_may_be_buffered_and_read_by_lines() -> None:
    sealed = seal(b"one\ntwo\n")
    with io.BufferedReader(DecryptingReader(KEY, io.BytesIO(sealed), AD)) as lines:
        assert list(lines) == [b"one\n", b"two\n"]


def test_segments_come_uncopied_and_after_what_was_read() -> None:
    plain = pattern(FIRST + 10)
    reader = DecryptingReader(KEY, io.BytesIO(seal(plain)), AD)
    assert reader.read(3) == plain[:3]
    assert bytes(reader.read_segment()) == plain[3:FIRST]
    assert bytes(reader.read_segment()) == plain[FIRST:]
    assert len(reader.read_segment()) == 0
    assert reader.finished
    reader.close()


def test_progress_counts_plaintext() -> None:
    seen: list[int] = []
    size = FIRST + FULL + 5
    sealed = seal(pattern(size), progress=seen.append)
    assert seen == [FIRST, FIRST + FULL, size]
    seen.clear()
    decrypt_stream(KEY, io.BytesIO(sealed), io.BytesIO(), AD, progress=seen.append)
    assert seen == [FIRST, FIRST + FULL, size]


class BreakingSource(io.BytesIO):
    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        if count == 0:
            raise OSError("the connection is gone")
        return count


class FullDisk(io.BytesIO):
    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_source_that_breaks_leaves_no_artifact_that_decrypts() -> None:
    sink = io.BytesIO()
    with pytest.raises(OSError, match="gone"):
        encrypt_stream(KEY, BreakingSource(pattern(100)), sink, AD)
    with pytest.raises(RefusedError):
        unseal(sink.getvalue())


def test_a_full_disk_passes_through_and_the_writer_never_uses_a_nonce_again() -> None:
    writer = EncryptingWriter(KEY, FullDisk(room=100), AD)
    with pytest.raises(OSError, match="No space"):
        writer.write(pattern(FIRST + 1))
    for again in (lambda: writer.write(b"x"), writer.close, lambda: writer.copy_from(io.BytesIO())):
        with pytest.raises(StateError):
            again()
    writer.abort()
    writer.close()


def test_a_writer_left_by_an_exception_or_dropped_completes_nothing() -> None:
    sink = io.BytesIO()
    writer = EncryptingWriter(KEY, sink, AD)
    with contextlib.suppress(KeyError), writer:
        writer.write(b"half of it")
        raise KeyError
    dropped = EncryptingWriter(KEY, sink, AD)
    dropped.write(b"half of it")
    del dropped
    gc.collect()
    assert len(sink.getvalue()) == 2 * 40


def test_a_closed_writer_and_reader_refuse_more() -> None:
    sink = io.BytesIO()
    writer = EncryptingWriter(KEY, sink, AD)
    writer.close()
    writer.close()
    assert unseal(sink.getvalue()) == b""
    with pytest.raises(StateError):
        writer.write(b"x")
    reader = DecryptingReader(KEY, io.BytesIO(sink.getvalue()), AD)
    reader.close()
    with pytest.raises(StateError):
        reader.read_segment()


def test_a_stream_that_would_block_is_no_end_and_a_sink_that_takes_nothing_is_an_error() -> None:
    class Blocking(io.RawIOBase):
        def readinto(self, buffer: Any, /) -> None:
            return None

        def write(self, data: Any, /) -> None:
            return None

    with pytest.raises(UnavailableError):
        encrypt_stream(KEY, Blocking(), io.BytesIO(), AD)
    with pytest.raises(UnavailableError):
        encrypt_stream(KEY, io.BytesIO(b"x"), Blocking(), AD)


# -- interoperability -------------------------------------------------------------------------------------------------


def tinks(key: bytes) -> Any:
    """Tink's streaming AEAD (its C++ under Python) for ``key``: AES256-GCM-HKDF with 1 MiB segments."""
    tink = importlib.import_module("tink")
    streaming_aead = importlib.import_module("tink.streaming_aead")
    secret = importlib.import_module("tink.secret_key_access")
    streaming_aead.register()
    # google.crypto.tink.AesGcmHkdfStreamingKey {params: {1 MiB, 32, SHA256}, key_value: KEY}, as protobuf writes it
    material = bytes.fromhex("12080880804010201803") + b"\x1a\x20" + key
    keyset = {
        "primaryKeyId": 1,
        "key": [
            {
                "keyData": {
                    "typeUrl": "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
                    "value": base64.b64encode(material).decode(),
                    "keyMaterialType": "SYMMETRIC",
                },
                "status": "ENABLED",
                "keyId": 1,
                "outputPrefixType": "RAW",
            }
        ],
    }
    handle = tink.json_proto_keyset_format.parse(json.dumps(keyset), secret.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def tink_reads(sealed: bytes, key: bytes, ad: bytes) -> bytes:
    with tinks(key).new_decrypting_stream(io.BytesIO(sealed), ad) as stream:
        plain: bytes = stream.read()
    return plain


@pytest.mark.parametrize("size", [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL, FIRST + FULL + 77])
def test_tink_reads_ours_and_we_read_tinks(size: int) -> None:
    class Kept(io.BytesIO):
        def close(self) -> None:
            self.kept = self.getvalue()
            super().close()

    plain = pattern(size)
    assert tink_reads(seal(plain), KEY, AD) == plain
    destination = Kept()
    with tinks(KEY).new_encrypting_stream(destination, AD) as stream:
        stream.write(plain)
    assert len(destination.kept) == ciphertext_size(size)
    assert unseal(destination.kept) == plain


@pytest.mark.parametrize("name", BY_NAME)
def test_tink_reads_every_vector(name: str) -> None:
    vector = BY_NAME[name]
    plain = tink_reads(vector_bytes(vector), bytes.fromhex(vector["key"]), bytes.fromhex(vector["associated_data"]))
    assert hashlib.sha256(plain).hexdigest() == vector["plaintext_sha256"]


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_tink_refuses_what_we_refuse_but_bytes_behind_a_full_last_segment(case: dict[str, Any]) -> None:
    artifact_, key, ad = refused_artifact(case)
    if case["name"] in ("one byte appended at a segment boundary", "the last segment repeated"):
        plain = tink_reads(artifact_, key, ad)
        assert hashlib.sha256(plain).hexdigest() == BY_NAME[case["of"]]["plaintext_sha256"]
    else:
        error = importlib.import_module("tink").TinkError
        with pytest.raises((error, OSError, ValueError)):
            tink_reads(artifact_, key, ad)
