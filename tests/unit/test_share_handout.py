"""Handing shares out: one on the screen at a time, each proven to be written down, or each in a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_custodian.sealing.shares import new_shares
from keyquorum_custodian.share_handout import Screen, show_shares, write_shares

WORDS = new_shares(2, 3)[2]


class Terminal:
    """What stands on it, and officers who wrote their words down, but for ``wrong`` of their answers."""

    def __init__(self, wrong: int = 0) -> None:
        self.visible: list[str] = []
        self.most_shares_seen = 0
        self.notes: list[str] = []
        self.wrong = wrong
        self.asked = 0
        self.screen = Screen(self.show, self.ask, self.wait, self.clear)

    def shares_seen(self) -> int:
        text = " ".join(self.visible)
        return sum(all(f" {word} " in f" {text} " for word in share.split()) for share in WORDS)

    def show(self, line: str) -> None:
        self.visible += [*line.split(), ""]
        self.most_shares_seen = max(self.most_shares_seen, self.shares_seen())

    def wait(self, text: str) -> None:
        if self.shares_seen():
            text = " ".join(self.visible)
            (share,) = [each for each in WORDS if all(f" {word} " in f" {text} " for word in each.split())]
            self.notes = share.split()

    def ask(self, question: str) -> str:
        assert not self.shares_seen()  # nobody reads the answer off the screen
        self.asked += 1
        if self.wrong:
            self.wrong -= 1
            return "wrong"
        return " " + self.notes[int(question.rpartition(" ")[2]) - 1].upper()

    def clear(self) -> None:
        self.visible.clear()


def test_each_officer_sees_one_share_and_repeats_three_of_its_words() -> None:
    terminal = Terminal(wrong=2)
    show_shares(terminal.screen, WORDS, 2, "ch-1")
    assert terminal.most_shares_seen == 1
    assert terminal.asked == 3 * 3 + 2
    assert not terminal.visible


def test_an_officer_who_cannot_repeat_the_words_ends_it_and_nothing_stays_on_the_screen() -> None:
    terminal = Terminal(wrong=3)
    with pytest.raises(StateError, match="share 1 was not written down rightly"):
        show_shares(terminal.screen, WORDS, 2, "ch-1")
    assert not terminal.visible


def test_files_are_for_their_officers_alone_and_never_overwritten(tmp_path: Path) -> None:
    made = write_shares(tmp_path / "out", WORDS, 2, "ch-1")
    assert [path.name for path in made] == [f"ch-1-share-{number}-of-3.txt" for number in (1, 2, 3)]
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out", *made)] == [0o700, 0o600, 0o600, 0o600]
    assert [path.read_text().splitlines()[1] for path in made] == list(WORDS)
    made[0].unlink()
    with pytest.raises(StateError) as caught:
        write_shares(tmp_path / "out", WORDS, 2, "ch-1")
    assert caught.value.reason is Reason.EXISTS
    assert not made[0].exists()  # what it had made it took back
    with pytest.raises(UnavailableError):
        write_shares(made[1] / "in-a-file", WORDS, 2, "ch-1")
