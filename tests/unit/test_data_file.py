"""Data files: bytes as the spec has them, nothing changed gets through, and whole files only."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum.data_keys import DataKey, read_header
from keyquorum.progress import Progress, Stage
from keyquorum_core.artifact import SEGMENT_BYTES, decrypt_stream
from keyquorum_core.data_file import PREAMBLE_BYTES, DataHeader, Preamble, read_preamble, wrap_key
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from tests.support.data_files import data_key

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "docs/spec/vectors/data.json").read_text())["vectors"]
PINNED = "c7024e98e8da58eb560ff369a722ae8e62e7c8cddc357bf76209f3f641464a0a"
HEADER = DataHeader("demo", "alice", "chem-2027", 1, "patients", "personal", "", "0f" * 32, "aa" * 16)
KEY, FILE_KEY = bytes(range(32)), bytes(range(64, 96))


def opened(file: bytes, key: bytes) -> tuple[Preamble, bytes]:
    source, out = io.BytesIO(file), io.BytesIO()
    preamble = read_preamble(source)
    decrypt_stream(preamble.unwrap(key), source, out, preamble.header.binding())
    return preamble, out.getvalue()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    file, key = base64.b64decode(vector["file"]), bytes.fromhex(vector["data_key"])
    if vector["expect"] == "ok":
        preamble, plaintext = opened(file, key)
        assert plaintext.hex() == vector["plaintext"]
        assert preamble.header.wrapping().hex() == vector["wrapping"]
        assert preamble.header.binding().hex() == vector["binding"]
        assert preamble.to_bytes() == file[:PREAMBLE_BYTES]
        return
    with pytest.raises(KeyquorumError) as caught:
        opened(file, key)
    assert caught.value.reason == vector["expect"]


def test_the_vectors_are_what_the_script_makes() -> None:
    script = ROOT / "scripts" / "make_data_vectors.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_the_byte_layout_is_pinned() -> None:
    preamble = wrap_key(HEADER, FILE_KEY, KEY, rng=lambda size: bytes(range(size)))
    assert hashlib.sha256(preamble.to_bytes()).hexdigest() == PINNED
    assert "66" not in repr(preamble).partition("wrapped")[2]


def test_rewrapping_changes_what_wraps_and_not_what_binds() -> None:
    later = HEADER.at(2, b"\xbb" * 16)
    assert later.binding() == HEADER.binding()
    assert later.wrapping() != HEADER.wrapping()
    for member in ("cluster", "owner", "key_id", "name", "classification", "export_control"):
        change: dict[str, Any] = {member: "other"}
        assert dataclasses.replace(HEADER, **change).binding() != HEADER.binding(), member


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": ""}, {"owner": "Alice"}, {"key_id": "a/b"}, {"epoch": 0}, {"epoch": 1 << 53}, {"name": ""},
        {"classification": "X"}, {"export_control": "\n"}, {"file_id": "0f"}, {"key_check": "AA" * 16},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_says_only_what_can_be_asked_for(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(HEADER, **change)


def test_no_changed_byte_of_the_preamble_gets_through() -> None:
    whole = wrap_key(HEADER, FILE_KEY, KEY).to_bytes()
    assert Preamble.parse(whole).unwrap(KEY) == FILE_KEY
    for index in range(PREAMBLE_BYTES):
        changed = bytearray(whole)
        changed[index] ^= 1 + index % 255
        with pytest.raises(KeyquorumError):
            Preamble.parse(bytes(changed)).unwrap(KEY)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 700), st.integers(0, 300), st.booleans())
def test_any_bytes_are_parsed_or_refused_and_parse_to_themselves(new: bytes, at: int, drop: int, pad: bool) -> None:
    whole = wrap_key(HEADER, FILE_KEY, KEY).to_bytes()
    data = whole[:at] + new + whole[at + drop :]
    data = data[:PREAMBLE_BYTES].ljust(PREAMBLE_BYTES, b"\0") if pad else data
    try:
        assert Preamble.parse(data).to_bytes() == data
    except MalformedError:
        assert data != whole


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, SEGMENT_BYTES, 3 * SEGMENT_BYTES + 17])
def test_a_file_comes_back_from_paths_and_streams(tmp_path: Path, size: int) -> None:
    source, sealed, back = tmp_path / "in", tmp_path / "sealed", tmp_path / "back"
    source.write_bytes(b"p" * size)
    reports: list[Progress] = []
    with data_key(1) as key:
        made = key.encrypt(source, sealed, progress=reports.append)
        assert key.decrypt(sealed, back, progress=reports.append) == made == read_header(sealed)
        streamed, out = io.BytesIO(), io.BytesIO()
        key.encrypt(io.BytesIO(b"p" * size), streamed)
        key.decrypt(io.BytesIO(streamed.getvalue()), out)
    assert made.size == size
    assert back.read_bytes() == out.getvalue() == b"p" * size
    assert {stat.S_IMODE(each.stat().st_mode) for each in (sealed, back)} == {0o600}
    assert {each.stage for each in reports} == {Stage.ENCRYPT, Stage.DECRYPT}
    assert reports[-1].done == size
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "in", "sealed"]
    assert b"p" * 32 not in sealed.read_bytes()


def test_rewrapping_leaves_the_artifact_as_it_is_and_the_old_key_out(tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    reports: list[Progress] = []
    with data_key(1) as old, data_key(2) as new:
        old.encrypt(io.BytesIO(b"p" * 3_000_000), sealed)
        before = sealed.read_bytes()
        made = old.rewrap(sealed, new, progress=reports.append)
        after = sealed.read_bytes()
        assert after[PREAMBLE_BYTES:] == before[PREAMBLE_BYTES:]
        assert (made.header.epoch, made.size, made) == (2, 3_000_000, read_header(sealed))
        assert (reports[-1].stage, reports[-1].done) == (Stage.REWRAP, len(after) - PREAMBLE_BYTES)
        new.decrypt(sealed, tmp_path / "back")
        refused(Reason.EPOCH, old, sealed, tmp_path / "never")
    assert (tmp_path / "back").read_bytes() == b"p" * 3_000_000
    assert stat.S_IMODE(sealed.stat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "sealed"]


def test_a_copy_is_whole_where_the_file_system_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", never)
    sealed = tmp_path / "sealed"
    with data_key(1) as old, data_key(2) as new:
        old.encrypt(io.BytesIO(b"p" * 3_000_000), sealed)
        before = sealed.read_bytes()
        old.rewrap(sealed, new)
    assert sealed.read_bytes()[PREAMBLE_BYTES:] == before[PREAMBLE_BYTES:]


def refused(reason: Reason, key: DataKey, source: Path, target: Path) -> None:
    """Not decrypted, and nothing is left that looks like it was."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(KeyquorumError) as caught:
        key.decrypt(source, target)
    assert caught.value.reason is reason
    assert sorted(target.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 2}, Reason.EPOCH),
        ({"key_id": "other"}, Reason.UNKNOWN_KEY),
        ({"name": "other"}, Reason.UNKNOWN_KEY),
        ({"cluster": "other"}, Reason.UNKNOWN_KEY),
        ({"owner": "mallory"}, Reason.UNKNOWN_OWNER),
        ({"root": b"\x07" * 32}, Reason.UNSEAL),
    ],
    ids=str,
)
def test_another_key_does_not_open_it(tmp_path: Path, changes: dict[str, Any], reason: Reason) -> None:
    sealed = tmp_path / "sealed"
    with data_key(1) as key:
        key.encrypt(io.BytesIO(b"secret"), sealed)
    with data_key(**{"epoch": 1, **changes}) as other:
        refused(reason, other, sealed, tmp_path / "out")
        with pytest.raises(KeyquorumError), data_key(3) as new:
            other.rewrap(sealed, new)
    assert read_header(sealed).header.epoch == 1


def test_a_file_cut_short_or_changed_decrypts_to_nothing(tmp_path: Path) -> None:
    sealed, broken = tmp_path / "sealed", tmp_path / "broken"
    with data_key(1) as key, data_key(2) as new:
        key.encrypt(io.BytesIO(b"p" * 2_500_000), sealed)
        whole = sealed.read_bytes()
        for data, reason in (
            (whole[:-1], Reason.ARTIFACT),
            (whole[: PREAMBLE_BYTES + 2 * SEGMENT_BYTES], Reason.ARTIFACT),
            (whole[:PREAMBLE_BYTES], Reason.ARTIFACT),
            (whole[:100], Reason.MALFORMED),
            (b"", Reason.MALFORMED),
            (whole + b"\0", Reason.ARTIFACT),
            (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], Reason.ARTIFACT),
        ):
            broken.write_bytes(data)
            refused(reason, key, broken, tmp_path / "out")
        broken.write_bytes(whole[:PREAMBLE_BYTES])
        with pytest.raises(MalformedError):
            key.rewrap(broken, new)
        assert broken.read_bytes() == whole[:PREAMBLE_BYTES]


def test_nothing_is_overwritten_followed_or_used_after_it_was_closed(tmp_path: Path) -> None:
    sealed, taken = tmp_path / "sealed", tmp_path / "taken"
    taken.write_bytes(b"precious")
    with data_key(1) as key, data_key(2) as new:
        key.encrypt(io.BytesIO(b"secret"), sealed)
        for act in (key.encrypt, key.decrypt):
            with pytest.raises(StateError) as caught:
                act(sealed, taken)
            assert caught.value.reason is Reason.EXISTS
        (tmp_path / "link").symlink_to(sealed)
        with pytest.raises(RefusedError):
            key.rewrap(tmp_path / "link", new)
        with pytest.raises(UnavailableError) as missing:
            key.encrypt(tmp_path / "missing", tmp_path / "out")
        assert missing.value.reason is Reason.NOT_FOUND
    assert taken.read_bytes() == b"precious"
    assert not (tmp_path / "out").exists()
    assert key._key == bytes(32)
    for act in (key.encrypt, key.decrypt):
        with pytest.raises(StateError) as closed:
            act(sealed, tmp_path / "out")
        assert closed.value.reason is Reason.STATE
    with pytest.raises(StateError), data_key(1) as again:
        again.rewrap(sealed, key)
