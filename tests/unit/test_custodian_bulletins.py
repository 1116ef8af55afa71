"""A custodian's signed operator documents: the last good one stays, nothing older comes back, a crash loses nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from keyquorum_core.bulletin import Bulletin, Kind, sign_bulletin
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, PublicIdentity
from keyquorum_custodian.bulletins import Bulletins
from keyquorum_custodian.keystore import Keystore

NOW = 1_800_000_000
PEOPLE = {name: Identity.generate() for name in ("ann", "ben", "cleo")}
OPERATORS = {name: each.public for name, each in PEOPLE.items()}


def read_number(bulletin: Bulletin) -> int:
    number = bulletin.body.get("number")
    if not isinstance(number, int):
        raise MalformedError(Reason.MALFORMED, "no number")
    return number


NUMBER = Kind("number", read_number)
OTHER = Kind("other", read_number)


def signed(
    number: int, version: int = 1, by: tuple[str, ...] = ("ann", "ben"), kind: str = "number", **times: int
) -> bytes:
    made = Bulletin(
        "demo", kind, version, times.get("issued_at", NOW), times.get("expires_at", NOW + 10**7), {"number": number}
    )
    return sign_bulletin(made, [PEOPLE[name] for name in by])


class Custodian:
    """A folder, a keystore and a clock around :class:`Bulletins`; :meth:`restart` forgets what was in memory."""

    def __init__(self, folder: Path, keystore: type[Keystore] = Keystore) -> None:
        self.folder = folder / "bulletins"
        self.folder.mkdir()
        self.now = NOW
        self.path = folder / "k.db"
        keystore.create(
            self.path,
            "ch-1",
            Identity.generate(),
            RecipientKey.generate(),
            Cosigner.generate("demo/ch-1"),
            "p",
            opslimit=1,
            memlimit=8 << 10,
        ).close()
        self.keystore = keystore.open(self.path, "p")
        self.bulletins = self._start(OPERATORS, 2)

    def _start(self, operators: Mapping[str, PublicIdentity], threshold: int) -> Bulletins:
        return Bulletins(
            self.folder,
            (NUMBER, OTHER),
            cluster="demo",
            operators=operators,
            threshold=threshold,
            keystore=self.keystore,
            clock=lambda: self.now,
        )

    def restart(self, operators: Mapping[str, PublicIdentity] = OPERATORS, threshold: int = 2) -> None:
        self.bulletins = self._start(operators, threshold)

    def put(self, data: bytes, name: str = "number.json") -> None:
        """The file, in place at once; a second later, as far as its stamp goes."""
        partial = self.folder / "partial"
        partial.write_bytes(data)
        partial.replace(self.folder / name)
        self.now += 1

    def value(self) -> int:
        return self.bulletins.get(NUMBER).value


@pytest.fixture
def custodian(tmp_path: Path) -> Custodian:
    return Custodian(tmp_path)


def refused(act: Callable[[], object], reason: Reason) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        act()
    assert caught.value.reason == reason
    return caught.value


def test_a_file_dropped_into_the_folder_is_noticed_and_a_newer_one_too(custodian: Custodian) -> None:
    assert custodian.bulletins.find(NUMBER) is None
    refused(custodian.value, Reason.NOT_FOUND)
    custodian.put(signed(7))
    assert custodian.value() == 7
    custodian.put(signed(8, version=2))
    found = custodian.bulletins.get(NUMBER)
    assert (found.value, found.version, found.signers) == (8, 2, ("ann", "ben"))
    assert custodian.bulletins.warnings() == []
    assert [message for message, _ in custodian.bulletins.take_events()] == ["bulletin accepted"] * 2
    assert custodian.bulletins.take_events() == []


BROKEN: dict[str, tuple[Callable[[], bytes], Reason]] = {
    "cut off": (lambda: signed(9, 3)[:-20], Reason.MALFORMED),
    "empty": (lambda: b"", Reason.MALFORMED),
    "one signer of two": (lambda: signed(9, 3, by=("ann",)), Reason.SIGNATURE_MISSING),
    "older": (lambda: signed(9, 1), Reason.ROLLBACK),
    "another of the same version": (lambda: signed(9, 2), Reason.ROLLBACK),
    "of another kind": (lambda: signed(9, 3, kind="other"), Reason.BULLETIN),
    "expired": (lambda: signed(9, 3, expires_at=NOW + 1), Reason.EXPIRED),
    "not yet valid": (lambda: signed(9, 3, issued_at=NOW + 1000), Reason.NOT_YET_VALID),
    "too large": (lambda: b" " * (13 << 20), Reason.TOO_LARGE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_refused_leaves_the_last_good_one_and_a_warning(custodian: Custodian, name: str) -> None:
    make, reason = BROKEN[name]
    custodian.put(signed(8, version=2))
    assert custodian.value() == 8
    custodian.put(make())
    assert custodian.value() == 8
    (warning,) = custodian.bulletins.warnings()
    assert str(reason) in warning
    assert "version 2 stays in force" in warning
    custodian.restart()
    assert custodian.value() == 8
    custodian.put(signed(10, version=4))
    assert custodian.value() == 10
    assert custodian.bulletins.warnings() == []


def test_a_body_that_its_kind_refuses_is_not_accepted(custodian: Custodian) -> None:
    made = Bulletin("demo", "number", 2, NOW, NOW + 10**7, {"word": "seven"})
    custodian.put(signed(7))
    assert custodian.value() == 7
    custodian.put(sign_bulletin(made, PEOPLE.values()))
    assert custodian.value() == 7
    custodian.put(signed(8, version=2))
    assert custodian.value() == 8, "the refused version 2 was not counted"


def test_nothing_older_comes_back_when_the_file_is_removed_or_the_custodian_restarted(custodian: Custodian) -> None:
    custodian.put(signed(8, version=2))
    assert custodian.value() == 8
    (custodian.folder / "number.json").unlink()
    assert custodian.value() == 8
    custodian.restart()
    assert custodian.value() == 8
    custodian.put(signed(7, version=1))
    custodian.restart()
    assert custodian.value() == 8
    assert "ROLLBACK" in custodian.bulletins.warnings()[0]


def test_expiry_is_asked_at_every_use_and_nothing_takes_its_place(custodian: Custodian) -> None:
    custodian.put(signed(7, expires_at=NOW + 100))
    assert custodian.value() == 7
    assert "expires within 14 days" in custodian.bulletins.warnings()[0]
    custodian.now = NOW + 99
    assert custodian.value() == 7
    custodian.now = NOW + 100
    refused(custodian.value, Reason.EXPIRED)
    refused(lambda: custodian.bulletins.find(NUMBER), Reason.EXPIRED)
    assert any("expired" in warning for warning in custodian.bulletins.warnings())
    custodian.restart()
    refused(custodian.value, Reason.EXPIRED)


def test_a_document_of_the_near_future_is_taken_when_its_time_comes(custodian: Custodian) -> None:
    custodian.put(signed(7, issued_at=NOW + 30))
    refused(custodian.value, Reason.NOT_FOUND)
    custodian.now = NOW + 30
    assert custodian.value() == 7
    assert custodian.bulletins.warnings() == []


def test_what_new_operators_did_not_sign_is_no_longer_in_force(custodian: Custodian) -> None:
    custodian.put(signed(7, version=5))
    assert custodian.value() == 7
    dave = Identity.generate()
    custodian.restart({"dave": dave.public, "ann": OPERATORS["ann"]}, 2)
    refused(custodian.value, Reason.SIGNATURE)
    assert "none is in force" in custodian.bulletins.warnings()[0]
    made = Bulletin("demo", "number", 4, NOW, NOW + 10**7, {"number": 1})
    custodian.put(sign_bulletin(made, [dave, PEOPLE["ann"]]))
    refused(custodian.value, Reason.SIGNATURE)
    made = Bulletin("demo", "number", 6, NOW, NOW + 10**7, {"number": 9})
    custodian.put(sign_bulletin(made, [dave, PEOPLE["ann"]]))
    assert custodian.value() == 9


def test_an_operator_hands_one_over_and_finds_it_as_the_file(custodian: Custodian) -> None:
    custodian.put(signed(7))
    envelope = signed(8, version=2)
    assert custodian.bulletins.accept(envelope).value == 8
    assert (custodian.folder / "number.json").read_bytes() == envelope
    assert custodian.value() == 8
    assert custodian.bulletins.accept(envelope).value == 8, "once more is no error"
    refused(lambda: custodian.bulletins.accept(signed(7)), Reason.ROLLBACK)
    refused(lambda: custodian.bulletins.accept(signed(7, 3, kind="unheard-of")), Reason.BULLETIN)
    assert custodian.value() == 8


def test_a_folder_that_cannot_be_written_does_not_undo_the_acceptance(custodian: Custodian, tmp_path: Path) -> None:
    custodian.folder.rmdir()
    custodian.folder.write_text("in the way")
    assert custodian.bulletins.accept(signed(8, version=2)).value == 8
    custodian.folder.unlink()
    custodian.restart()
    assert custodian.value() == 8


class FullDisk(Keystore):
    """No document fits any more."""

    __slots__ = ()
    full = False

    def _commit(self) -> None:
        if FullDisk.full:
            raise UnavailableError(Reason.STORAGE, "the disk is full")
        super()._commit()


def test_a_disk_that_is_full_leaves_the_last_one_and_is_tried_again(tmp_path: Path) -> None:
    FullDisk.full = False
    custodian = Custodian(tmp_path, FullDisk)
    custodian.put(signed(7))
    assert custodian.value() == 7
    FullDisk.full = True
    refused(lambda: custodian.bulletins.accept(signed(8, version=2)), Reason.STORAGE)
    custodian.put(signed(8, version=2))
    assert custodian.value() == 7
    assert "STORAGE" in custodian.bulletins.warnings()[0]
    custodian.now += 1
    FullDisk.full = False
    assert custodian.value() == 8


def test_a_file_rewritten_in_place_within_the_same_second_is_seen_in_the_next(custodian: Custodian) -> None:
    path = custodian.folder / "number.json"
    first, second = signed(7), signed(8, version=2)
    path.write_bytes(first)
    assert custodian.value() == 7
    before = os.stat(path)
    path.write_bytes(second)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    custodian.now += 1
    assert custodian.value() == 8


def test_a_look_at_a_settled_file_reads_nothing(custodian: Custodian, monkeypatch: pytest.MonkeyPatch) -> None:
    custodian.put(signed(7))
    old = os.stat(custodian.folder / "number.json").st_mtime_ns - 5 * 10**9
    assert custodian.value() == 7
    monkeypatch.setattr("keyquorum_custodian.bulletins.settled", lambda stamp: stamp)
    os.utime(custodian.folder / "number.json", ns=(old, old))
    custodian.now += 1
    assert custodian.value() == 7

    def unread(*arguments: object) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr("keyquorum_custodian.bulletins.read_bytes", unread)
    custodian.now += 1
    assert custodian.value() == 7


def test_errors_say_which_and_what_to_do(custodian: Custodian) -> None:
    error = refused(custodian.value, Reason.NOT_FOUND)
    assert isinstance(error, StateError)
    assert "number" in error.message
    assert "number.json" in error.next_step
    custodian.put(signed(7, expires_at=NOW + 10))
    assert custodian.value() == 7
    custodian.now = NOW + 10
    error = refused(custodian.value, Reason.EXPIRED)
    assert isinstance(error, RefusedError)
    assert "version 1" in error.message
