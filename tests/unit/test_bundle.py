"""Bundles: one canonical tar per set of files, and nothing a hostile archive can smuggle past the reader."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyquorum_core.bundle import (
    BundleLimits,
    FileDigest,
    bundle_size,
    digests,
    read_bundle,
    write_bundle,
)
from keyquorum_core.bundle_names import MAX_DEPTH, check_name, split_name
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError

FILES = {"main.py": b"print('hello')\n", "data/params.json": b"{}", "data/empty": b"", "run.sh": b"#!/bin/sh\n" * 100}


class OneWay(io.RawIOBase):
    """A source that cannot seek and gives at most 200 bytes at a time, like a pipe."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._data.readinto(memoryview(buffer)[:200])


def pack(files: dict[str, bytes], **options: Any) -> bytes:
    sink = io.BytesIO()
    write_bundle([(name, len(data), io.BytesIO(data)) for name, data in files.items()], sink, **options)
    return sink.getvalue()


def unpack(data: bytes, limits: BundleLimits | None = None) -> dict[str, bytes]:
    out = {}
    for file in read_bundle(OneWay(data), limits):
        out[file.name] = file.reader.read()
        assert len(out[file.name] or b"") == file.size
    return {name: content or b"" for name, content in out.items()}


def refused(data: bytes, match: str, limits: BundleLimits | None = None) -> KeyquorumError:
    with pytest.raises(KeyquorumError, match=match) as caught:
        unpack(data, limits)
    assert caught.value.reason is Reason.BUNDLE
    return caught.value


# -- round trips and the form -----------------------------------------------------------------------------------------


def test_files_come_back_sorted_with_their_digests() -> None:
    sink = io.BytesIO()
    written = write_bundle([(n, len(d), io.BytesIO(d)) for n, d in FILES.items()], sink)
    assert unpack(sink.getvalue()) == FILES
    assert [digest.name for digest in written] == ["data/empty", "data/params.json", "main.py", "run.sh"]
    assert written == digests(io.BytesIO(sink.getvalue()))
    assert written[2] == FileDigest("main.py", 15, hashlib.sha256(FILES["main.py"]).hexdigest())
    assert len(sink.getvalue()) == bundle_size((name, len(data)) for name, data in FILES.items())


def test_a_set_of_files_has_one_bundle_whatever_their_order() -> None:
    assert pack(FILES) == pack(dict(reversed(FILES.items())))
    assert pack({}) == bytes(1024)
    assert unpack(bytes(1024)) == {}


def test_the_header_is_pinned_to_the_byte() -> None:
    header = pack({"dir/file": b"12345678"}, executable={"dir/file"})[:512]
    fields = (
        b"dir/file".ljust(100, b"\x00"),
        b"0000755\x00",
        b"0000000\x00" * 2,
        b"00000000010\x00",
        b"00000000000\x00",
        b"010617\x00 ",
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(64),
        b"0000000\x00" * 2,
        bytes(155 + 12),
    )
    assert header == b"".join(fields)


def test_the_executable_bit_is_kept() -> None:
    modes = {f.name: f.executable for f in read_bundle(io.BytesIO(pack(FILES, executable=["run.sh"])))}
    assert modes == {"data/empty": False, "data/params.json": False, "main.py": False, "run.sh": True}


def test_the_standard_library_reads_a_bundle() -> None:
    deep = "x" * 60 + "/" + "y" * 80 + "/" + "z" * 90
    files = {**FILES, deep: b"deep", "ünïcode/ß": b"name"}
    with tarfile.open(fileobj=io.BytesIO(pack(files, executable=["run.sh"])), mode="r:") as tar:
        members = tar.getmembers()
        assert {m.name: tar.extractfile(m).read() for m in members} == files  # type: ignore[union-attr]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    assert {m.name: m.mode for m in members}["run.sh"] == 0o755


def test_a_file_may_be_opened_when_its_turn_comes_and_is_closed_after() -> None:
    opened: list[BinaryIO] = []

    def opener(data: bytes) -> Callable[[], BinaryIO]:
        def open_it() -> BinaryIO:
            assert all(stream.closed for stream in opened)
            opened.append(io.BytesIO(data))
            return opened[-1]

        return open_it

    sink = io.BytesIO()
    write_bundle([(name, len(data), opener(data)) for name, data in FILES.items()], sink)
    assert sink.getvalue() == pack(FILES)
    assert len(opened) == 4
    assert all(stream.closed for stream in opened)


def test_what_of_a_file_was_not_read_is_skipped() -> None:
    names = []
    for file in read_bundle(OneWay(pack(FILES))):
        names.append(file.name)
        file.reader.read(3)
        if file.name == "main.py":
            file.reader.close()
    assert names == sorted(FILES)


def test_a_files_reader_ends_with_its_turn() -> None:
    files = list(read_bundle(io.BytesIO(pack(FILES))))
    with pytest.raises(StateError):
        files[1].reader.readinto(bytearray(2))


@pytest.mark.parametrize("said", [0, 4, 6])
def test_a_file_that_changed_its_size_is_refused(said: int) -> None:
    with pytest.raises(MalformedError, match="changed its size") as caught:
        write_bundle([("a", said, io.BytesIO(b"12345"))], io.BytesIO())
    assert caught.value.reason is Reason.BUNDLE


# -- names ------------------------------------------------------------------------------------------------------------

HOSTILE_NAMES = {
    "": "an empty name",
    "/etc/passwd": "absolute",
    "../outside": "parent folder",
    "a/../../outside": "parent folder",
    "a/..": "parent folder",
    "a//b": "empty component",
    "a/": "empty component",
    "./a": "single dot",
    "a/./b": "single dot",
    "a\\b": "backslash",
    "..\\outside": "backslash",
    "C:evil": "drive letter",
    "c:/evil": "drive letter",
    "a\x00b": "control",
    "a\nb": "control",
    "a\x7fb": "control",
    "a\x85b": "control",
    "a\u2028b": "control",
    "a\ud800b": "half a character",
    "gpj.\u202eexe": "writing direction",
    "/".join("a" * (MAX_DEPTH + 1)): "components",
    "é" * 128: "255 bytes",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_name_that_is_not_a_plain_relative_path_is_refused(name: str) -> None:
    for check in (check_name, lambda name: pack({name: b""})):
        with pytest.raises(RefusedError, match=HOSTILE_NAMES[name]) as caught:
            check(name)
        assert caught.value.reason is Reason.BUNDLE
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("a" * 100, ""),
        ("a/" + "b" * 100, "a"),
        ("a/b/" + "c" * 97, "a"),
        ("a" * 154 + "/" + "b" * 100, "a" * 154),
        ("é" * 30 + "/" + "é" * 50, "é" * 30),
    ],
)
def test_long_names_are_split_at_the_first_slash_that_will_do(name: str, prefix: str) -> None:
    assert split_name(name)[0] == prefix.encode()
    assert unpack(pack({name: b"x"})) == {name: b"x"}


@pytest.mark.parametrize("name", ["a" * 101, "a/" + "b" * 101, "a" * 156 + "/b", "é" * 51])
def test_a_name_that_ustar_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(RefusedError, match="does not fit"):
        pack({name: b""})


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a", "a"], "twice"),
        (["Readme", "README"], "differ only in case"),
        (["é", "e\u0301"], "Unicode form"),
        (["ß", "ss"], "differ only in case"),
        (["a", "a/b"], "a file and a folder"),
        (["a/b", "a"], "a file and a folder"),
        (["a/b/c", "A/b"], "two folders"),
        (["a/b", "A/c"], "two folders"),
        (["x/É/1", "x/e\u0301/2"], "two folders"),
    ],
)
def test_names_that_meet_on_some_file_system_are_refused(names: list[str], match: str) -> None:
    with pytest.raises(RefusedError, match=match) as caught:
        write_bundle([(name, 0, io.BytesIO()) for name in names], io.BytesIO())
    assert caught.value.reason is Reason.BUNDLE


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (BundleLimits(max_files=3), "at most 3 files"),
        (BundleLimits(max_file_bytes=999), "at most 999 bytes in one file"),
        (BundleLimits(max_total_bytes=1016), "at most 1016 bytes in all"),
    ],
)
def test_limits_hold_in_both_directions(limits: BundleLimits, match: str) -> None:
    refused(pack(FILES), match, limits)
    with pytest.raises(RefusedError, match=match):
        pack(FILES, limits=limits)
    assert unpack(pack(FILES), BundleLimits(4, 1000, 1017)) == FILES


def test_a_bomb_is_refused_at_its_header_before_any_of_it_is_read() -> None:
    """A header that promises 8 GiB, from a source that would go on for ever."""

    class Endless(io.RawIOBase):
        given = 0
        header = pack({"bomb": b""})[:512]

        def readinto(self, buffer: Any, /) -> int:
            view = memoryview(buffer)
            block = reseal(self.header, {124: b"77777777777"}) if self.given == 0 else bytes(len(view))
            view[:] = block[: len(view)]
            self.given += len(view)
            return len(view)

    source = Endless()
    with pytest.raises(RefusedError, match="bytes in one file"):
        list(read_bundle(source))
    assert source.given == 512


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(MalformedError, match="negative"):
        write_bundle([("a", -1, io.BytesIO())], io.BytesIO())


# -- hostile archives -------------------------------------------------------------------------------------------------


def reseal(header: bytes, changes: dict[int, bytes]) -> bytes:
    """A header with some bytes changed and a right checksum."""
    block = bytearray(header)
    for at, data in changes.items():
        block[at : at + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def tar(members: Iterable[tarfile.TarInfo], **options: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", **options) as out:
        for member in members:
            out.addfile(member, io.BytesIO(bytes(member.size)))
    return sink.getvalue()


def member(name: str = "a", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "FIFO"),
        (tarfile.DIRTYPE, "directory"),
        (tarfile.CONTTYPE, "contiguous"),
    ],
)
def test_links_devices_and_whatever_is_no_regular_file_is_refused(kind: bytes, match: str) -> None:
    refused(tar([member(type=kind, linkname="/etc/passwd")], format=tarfile.USTAR_FORMAT), match)


@pytest.mark.parametrize("kind", [b"g", b"x", b"D", b"K", b"L", b"M", b"S", b"V", b"\x00", b"9", b"Z"])
def test_extension_records_are_refused(kind: bytes) -> None:
    refused(reseal(pack({"a": b""})[:512], {156: kind}) + bytes(1024), "regular files only")


def test_pax_and_gnu_archives_are_refused() -> None:
    refused(tar([member("n" * 300)], format=tarfile.PAX_FORMAT), "PAX header")
    refused(tar([member()], format=tarfile.PAX_FORMAT, pax_headers={"path": "../x"}), "PAX global header")
    refused(tar([member("n" * 300)], format=tarfile.GNU_FORMAT), "ustar")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({100: b"0004755\x00"}, "not in the bundle's form"),  # set-uid
        ({100: b"0000666\x00"}, "not in the bundle's form"),
        ({108: b"0001750\x00"}, "not in the bundle's form"),  # an owner
        ({136: b"00000000001\x00"}, "not in the bundle's form"),  # a time
        ({157: b"/etc/passwd"}, "not in the bundle's form"),  # a link name on a regular file
        ({265: b"root"}, "not in the bundle's form"),
        ({329: b"0000001\x00"}, "not in the bundle's form"),
        ({500: b"\x01"}, "not in the bundle's form"),
        ({2: b"hidden"}, "not in the bundle's form"),  # after the name's NUL
        ({345: b"prefix"}, "not in the bundle's form"),  # a split the writer would not make
        ({345: b".."}, "parent folder"),
        ({0: b"/"}, "absolute"),
        ({0: b"\xff"}, "not UTF-8"),
        ({124: b"\x80"}, "badly written"),  # base-256
        ({124: b"-0000000001"}, "badly written"),
        ({124: b"0000000000 "}, "badly written"),
        ({135: b" "}, "badly written"),
        ({257: b"ustar  \x00"}, "no ustar header"),  # GNU's magic
        ({257: bytes(8)}, "no ustar header"),
    ],
)
def test_a_header_that_is_not_the_one_the_writer_makes_is_refused(changes: dict[int, bytes], match: str) -> None:
    refused(reseal(pack({"a": b""})[:512], changes) + bytes(1024), match)


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(pack(FILES))
    data[0] ^= 1
    refused(bytes(data), "checksum")


def test_names_out_of_order_or_twice_are_refused() -> None:
    one, two = pack({"a": b"1"})[:1024], pack({"b": b"2"})[:1024]
    assert unpack(one + two + bytes(1024)) == {"a": b"1", "b": b"2"}
    refused(two + one + bytes(1024), "not in order")
    refused(one + one + bytes(1024), "twice")


def test_conflicting_names_are_refused_when_read_too() -> None:
    file, folder = pack({"a": b""})[:512], pack({"a/b": b""})[:512]
    refused(file + folder + bytes(1024), "a file and a folder")
    refused(pack({"A": b""})[:512] + file + bytes(1024), "differ only in case")


@pytest.mark.parametrize("tail", [b"\x00", bytes(512), b"x", pack(FILES)])
def test_anything_after_the_end_is_refused(tail: bytes) -> None:
    refused(pack(FILES) + tail, "follows the bundle's end")


def test_padding_that_is_not_zero_is_refused() -> None:
    data = bytearray(pack({"a": b"1"}))
    data[513] = 1
    refused(bytes(data), "padding")


def test_a_single_zero_block_is_no_end() -> None:
    data = pack(FILES)
    refused(data[:-512], "the bundle ends")
    refused(data[:-512] + data[:512], "follows the bundle's end")


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 1024, 1030, 1536])
def test_a_truncated_bundle_is_refused(keep: int) -> None:
    data = pack({"a": b"x" * 600})
    refused(data[:keep], "the bundle ends")


@pytest.mark.parametrize(
    ("magic", "what"),
    [(b"\x1f\x8b\x08", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")],
)
def test_compressed_archives_are_refused(magic: bytes, what: str) -> None:
    refused(magic + bytes(2000), what)
    if what == "gzip":
        refused(gzip.compress(bytes(range(256)) * 4000 + pack(FILES), 0), what)


# -- algebra and fuzz -------------------------------------------------------------------------------------------------

COMPONENT = st.text(
    st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="/\\:"), min_size=1, max_size=8
)
NAME = st.lists(COMPONENT.filter(lambda c: c not in {".", ".."}), min_size=1, max_size=4).map("/".join)


@settings(max_examples=80, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.dictionaries(NAME, st.binary(max_size=1500), max_size=6), st.randoms())
def test_whatever_is_packed_comes_back(files: dict[str, bytes], random: Any) -> None:
    try:
        data = pack(files)
    except RefusedError:
        return  # names that meet; the writer and the reader share that rule
    assert unpack(data) == files
    items = list(files.items())
    random.shuffle(items)
    assert pack(dict(items)) == data
    assert len(data) == bundle_size((name, len(content)) for name, content in files.items())


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_bundle_is_refused_or_another_bundle(data: st.DataObject) -> None:
    """Only keyquorum's errors come out, and what is accepted is the canonical bundle of what was read."""
    original = pack(FILES, executable=["run.sh"])
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "copy"])):
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[at : at + data.draw(st.sampled_from([1, 512, 1024]))]
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=512))
            case "copy":
                block = at // 512 * 512
                mutated[block:block] = mutated[block : block + 512]
        mutated = mutated or bytearray(1)
    try:
        files, modes = {}, []
        for file in read_bundle(OneWay(bytes(mutated))):
            files[file.name] = file.reader.read() or b""
            if file.executable:
                modes.append(file.name)
    except KeyquorumError as error:
        assert error.reason is Reason.BUNDLE  # noqa: PT017 - either outcome is right
    else:
        assert pack(files, executable=modes) == bytes(mutated)


@settings(max_examples=100)
@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    if data != bytes(1024):
        refused(data, "bundle|header")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "/", "\\", "~", "$HOME", "%2e%2e"]), min_size=1, max_size=5))
def test_no_accepted_name_leads_out_of_the_folder(tmp_path: Path, components: list[str]) -> None:
    name = "/".join(components)
    try:
        check_name(name)
    except RefusedError:
        return
    folder = tmp_path / "out"
    assert (folder / name).resolve().is_relative_to(folder.resolve())
    assert (folder / name).resolve() != folder.resolve()
