"""Windows: one nonce and one answer key each, certified by the custodian's identity; only the present two count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from keyquorum_core.release import open_window
from keyquorum_core.signing import Identity
from keyquorum_custodian.windows import Windows

IDENTITY = Identity.generate()


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def windows(clock: Clock) -> Windows:
    return Windows("demo", "ch-1", IDENTITY, clock)


def test_a_statement_certifies_the_nonce_and_the_answer_key_of_its_window() -> None:
    clock = Clock(3000.9)
    made = windows(clock)
    current = made.current()
    statement = open_window(current.statement, IDENTITY.public, custodian="ch-1", cluster="demo", now=3000)
    assert statement.window == current.number == made.number() == 100
    assert bytes.fromhex(statement.answer_key) == current.answer_key.public_key().public_bytes_raw()
    assert made.current_nonces()[100] == statement.nonce_bytes


def test_a_window_is_made_once() -> None:
    made = windows(Clock(3000))
    assert made.current() is made.current()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: made.prepare(101), range(16)))
    assert len({id(window) for window in found}) == 1


def test_windows_prepared_and_forgotten_by_many_threads_at_once_do_not_collide() -> None:
    made = windows(Clock(3000))
    with ThreadPoolExecutor(8) as pool:
        assert [window.number for window in pool.map(made.prepare, range(64))] == list(range(64))


def test_the_next_window_can_be_prepared_ahead() -> None:
    clock = Clock(3029)
    made = windows(clock)
    ahead = made.prepare_next()
    clock.now = 3030
    assert made.current() is ahead


def test_only_the_present_window_and_the_one_before_have_nonces() -> None:
    clock = Clock(3000)
    made = windows(clock)
    before = made.current_nonces()
    assert sorted(before) == [99, 100]
    assert before[99] != before[100]
    clock.now += 30
    after = made.current_nonces()
    assert sorted(after) == [100, 101]
    assert after[100] == before[100]


def test_a_restart_changes_every_nonce() -> None:
    clock = Clock(3000)
    assert windows(clock).current_nonces()[100] != windows(clock).current_nonces()[100]


def test_old_windows_are_forgotten() -> None:
    clock = Clock(3000)
    made = windows(clock)
    for _ in range(10):
        made.current()
        clock.now += 30
    assert len(made._open) <= 4


def test_the_answer_key_is_not_shown() -> None:
    assert "Ed25519PrivateKey" not in repr(windows(Clock(3000)).current())
