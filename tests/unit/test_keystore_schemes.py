"""Sealing a keystore: the record's bytes, k of n shares, attempts, and a token's keys."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyquorum_core import keywrap
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_custodian.sealing.attempts import FREE, MOST_SECONDS, Attempts
from keyquorum_custodian.sealing.record import Scheme, SealingRecord, ShareSet, TokenKey, scheme_of
from keyquorum_custodian.sealing.schemes import PassphraseWrapping, SharesWrapping, TokenWrapping, unwrap
from keyquorum_custodian.sealing.shares import HOLD_SECONDS, HeldShares, combine, new_shares
from keyquorum_custodian.sealing.token import Token
from tests.support.softhsm import MODULE, PIN, SoftToken, a_token, needs_softhsm

ROOT = Path(__file__).parents[2]
KEK = bytes(range(32))
SALT = bytes(range(16))
SET, SECRET, WORDS = new_shares(3, 5)
RECORD = SealingRecord(Scheme.SLIP39, "ch-1", ShareSet(7, 2, 3, SALT), bytes(12), bytes(48))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def held(texts: Sequence[str] = (), clock: Callable[[], float] = lambda: 0.0) -> HeldShares:
    out = HeldShares(SET, clock)
    for text in texts:
        out.add(text)
    return out


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_record_are_these() -> None:
    assert RECORD.to_bytes() == (
        b'{"ciphertext":"'
        + b"A" * 64
        + b'","custodian":"ch-1","format":"keyquorum/v1/keystore-sealing","identifier":7,'
        b'"nonce":"000000000000000000000000","salt":"000102030405060708090a0b0c0d0e0f","scheme":"slip39","shares":3,'
        b'"threshold":2}'
    )
    associated = RECORD.associated_data()
    assert associated[:2] == b"\x00\x1d"
    assert associated[2:31] == b"keyquorum/v1/keystore-sealing"
    assert associated[31:39] == (len(associated) - 39).to_bytes(8, "big")
    assert json.loads(associated[39:]) == {
        name: value for name, value in json.loads(RECORD.to_bytes()).items() if name != "ciphertext"
    }
    token = replace(RECORD, scheme=Scheme.PKCS11, by=TokenKey("kq", "abff", SALT))
    assert token.to_bytes() == (
        b'{"ciphertext":"' + b"A" * 64 + b'","custodian":"ch-1","format":"keyquorum/v1/keystore-sealing",'
        b'"key":"000102030405060708090a0b0c0d0e0f","nonce":"000000000000000000000000","scheme":"pkcs11",'
        b'"token_label":"kq","token_serial":"abff"}'
    )
    for each in (RECORD, token, replace(token, scheme=Scheme.PKCS11_SEEDS)):
        assert SealingRecord.parse(each.to_bytes()) == each
        assert scheme_of(each.to_bytes()) is each.scheme


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "passphrase"},
        {"scheme": "slip40"},
        {"threshold": 1},
        {"threshold": 4},
        {"shares": 17},
        {"identifier": 1 << 15},
        {"salt": "00"},
        {"nonce": "00"},
        {"custodian": "not a name"},
        {"format": "keyquorum/v2/keystore-sealing"},
        {"ciphertext": "AAAA"},
        {"more": 1},
    ],
)
def test_a_record_that_nobody_writes_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        SealingRecord.parse(
            json.dumps({**json.loads(RECORD.to_bytes()), **changes}, separators=(",", ":"), sort_keys=True).encode()
        )


def test_no_member_of_a_record_can_be_changed() -> None:
    shares = SharesWrapping(SET, SECRET)
    record = SealingRecord.parse(shares.wrap(KEK, "ch-1"))
    assert unwrap(record.to_bytes(), "ch-1", WORDS[:3]).kek == KEK
    for changed in (
        replace(record, by=replace(SET, salt=bytes(16))),
        replace(record, by=replace(SET, count=6)),
        replace(record, nonce=bytes(12)),
        replace(record, ciphertext=bytes(48)),
    ):
        with pytest.raises(RefusedError) as caught:
            unwrap(changed.to_bytes(), "ch-1", WORDS[:3])
        assert caught.value.reason is Reason.UNSEAL
    with pytest.raises(RefusedError, match="another custodian"):
        unwrap(record.to_bytes(), "is-1", WORDS[:3])


def test_an_older_keystore_record_is_the_passphrase_scheme() -> None:
    older = keywrap.wrap(KEK, "secret", purpose="keyquorum/v1/keystore", opslimit=1, memlimit=8 << 10)
    assert scheme_of(older) is Scheme.PASSPHRASE
    assert unwrap(older, "ch-1", "secret").kek == KEK
    assert scheme_of(PassphraseWrapping("x", 1, 8 << 10).wrap(KEK, "ch-1")) is Scheme.PASSPHRASE
    with pytest.raises(StateError) as caught:
        unwrap(older, "ch-1", WORDS[:3])
    assert caught.value.reason is Reason.SEALED


def test_the_vectors_are_those_of_the_script_and_come_out_as_they_say() -> None:
    script = ROOT / "scripts" / "make_keystore_sealing_vectors.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
    vectors = json.loads((ROOT / "docs" / "spec" / "vectors" / "keystore-sealing.json").read_text())["vectors"]
    assert len(vectors) > 20
    for vector in vectors:
        record = base64.b64decode(vector["record"])
        try:
            if "shares" in vector:
                assert unwrap(record, vector["custodian"], vector["shares"]).kek.hex() == vector["kek"], vector["name"]
            else:
                assert SealingRecord.parse(record).to_bytes() == record
            found = "ok"
        except KeyquorumError as error:
            found = str(error.reason)
        assert found == vector["expect"], vector["name"]


# -- shares ------------------------------------------------------------------------------------------------------------


def test_any_three_of_five_combine_and_no_two_do() -> None:
    assert len(set(WORDS)) == 5
    for three in combinations(WORDS, 3):
        assert combine(SET, three) == SECRET
    for two in combinations(WORDS, 2):
        with pytest.raises(StateError) as caught:
            combine(SET, two)
        assert (caught.value.reason, caught.value.actual) == (Reason.SEALED, "2")


def test_two_shares_fit_every_secret_alike() -> None:
    """What k-1 officers hold says nothing: for each value of the third share's first byte there is one secret byte."""
    from shamir_mnemonic.shamir import RawShare, _interpolate
    from shamir_mnemonic.share import Share

    two = [Share.from_mnemonic(words) for words in WORDS[:2]]
    known = [RawShare(share.index, share.value[:1]) for share in two]
    possible = {_interpolate([*known, RawShare(9, bytes([value]))], 255)[0] for value in range(256)}
    assert possible == set(range(256))


def test_shares_are_refused_for_what_is_wrong_with_them_and_nothing_is_forgotten() -> None:
    waiting = held(WORDS[:2])
    words = WORDS[2].split()
    _, _, others = new_shares(3, 5, lambda size: hashlib.shake_128(b"another").digest(size))
    swapped = [*words[:20], words[21], words[20], *words[22:]]
    cases: list[tuple[str, type[KeyquorumError], Reason, str]] = [
        (WORDS[0], StateError, Reason.EXISTS, "share 1 was entered before"),
        (others[2], RefusedError, Reason.UNSEAL, "its identifier is not that"),
        (" ".join(words[:-1]), MalformedError, Reason.MALFORMED, "32 words"),
        (" ".join([*words[:6], "keyquorum", *words[7:]]), MalformedError, Reason.MALFORMED, "place 7"),
        (" ".join(swapped), MalformedError, Reason.MALFORMED, "checksum"),
        ("x" * 2000, MalformedError, Reason.TOO_LARGE, "33 words"),
    ]
    for text, kind, reason, said in cases:
        with pytest.raises(kind) as caught:
            waiting.add(text)
        assert caught.value.reason is reason
        assert said in str(caught.value)
        assert not set(words[7:20]) & set(str(caught.value).split())
        assert len(waiting) == 2
    waiting.add("  " + WORDS[2].upper().replace(" ", "  ") + "\n")
    assert waiting.take() == SECRET
    assert len(waiting) == 0


def test_a_forged_share_is_found_when_the_last_one_comes_and_all_are_forgotten() -> None:
    from shamir_mnemonic.share import Share

    real = Share.from_mnemonic(WORDS[2])
    forged = replace(real, value=bytes(32)).mnemonic()
    waiting = held([WORDS[0], forged])
    with pytest.raises(RefusedError, match="another share 3 was entered before"):
        waiting.add(WORDS[2])
    waiting.add(WORDS[1])
    with pytest.raises(RefusedError) as caught:
        waiting.take()
    assert caught.value.reason is Reason.UNSEAL
    assert len(waiting) == 0


def test_shares_are_forgotten_in_time() -> None:
    clock = Clock()
    waiting = held(WORDS[:1], clock)
    clock.now += HOLD_SECONDS - 1
    waiting.add(WORDS[1])
    assert waiting.seconds_left == 1
    clock.now += 1
    assert waiting.expire() == 2
    assert (len(waiting), waiting.seconds_left, repr(waiting)) == (0, 0.0, "HeldShares(0 of 3)")
    waiting.add(WORDS[2])
    assert len(waiting) == 1


@given(
    st.integers(2, 16).flatmap(lambda n: st.tuples(st.integers(2, n), st.just(n))), st.randoms(use_true_random=False)
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_k_of_any_n_combine(sizes: tuple[int, int], random: object) -> None:
    shares, secret, words = new_shares(*sizes)
    chosen = list(words)
    random.shuffle(chosen)  # type: ignore[attr-defined]
    assert combine(shares, chosen[: sizes[0]]) == secret


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (4, 3), (2, 17), (0, 2)])
def test_a_set_that_protects_nothing_cannot_be_made(sizes: tuple[int, int]) -> None:
    with pytest.raises(MalformedError, match="bad set of shares"):
        new_shares(*sizes)


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_waits_double_after_three_wrong_attempts_up_to_an_hour() -> None:
    attempts, waits = Attempts(), []
    for number in range(16):
        attempts = attempts.another(number)
        waits.append(attempts.wait)
    assert waits[: FREE + 3] == [0, 0, 30, 60, 120, 240]
    assert waits[-1] == MOST_SECONDS
    assert Attempts.parse(attempts.to_bytes()) == attempts
    assert attempts.to_bytes() == (16).to_bytes(4, "big") + (15).to_bytes(8, "big")
    with pytest.raises(MalformedError):
        Attempts.parse(b"")


@given(st.integers(0, 1 << 30), st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 10_000))
def test_a_wait_ends_by_the_wall_clock_or_by_the_process_and_by_nothing_else(
    failed: int, last: int, now: int, idle: int
) -> None:
    attempts = Attempts(failed, last)
    at = attempts.next_at(now, idle)
    assert (at == 0) == (now - last >= attempts.wait or idle >= attempts.wait)
    assert at == 0 or now < at <= now + MOST_SECONDS + max(0, last - now)
    if at:
        with pytest.raises(RefusedError) as caught:
            attempts.check(now, idle)
        assert caught.value.reason is Reason.ATTEMPTS
    else:
        attempts.check(now, idle)


# -- a token -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token() -> SoftToken:
    return a_token()


@needs_softhsm
def test_a_tokens_key_wraps_and_unwraps_and_does_not_come_out(token: SoftToken) -> None:
    opened = Token.open(MODULE, PIN, token.label)
    record = TokenWrapping(opened, Scheme.PKCS11).wrap(KEK, "ch-1")
    parsed = SealingRecord.parse(record)
    assert isinstance(parsed.by, TokenKey)
    assert (parsed.by.label, parsed.by.serial) == (token.label, opened.serial)
    with pytest.raises(StateError, match="logged in"):
        unwrap(record, "ch-1", PIN, MODULE)
    opened.close()
    again = unwrap(record, "ch-1", PIN, MODULE)
    assert again.kek == KEK
    assert again.token is not None
    again.token.close()
    for changed, reason in (
        (replace(parsed, ciphertext=bytes(48)), Reason.UNSEAL),
        (replace(parsed, scheme=Scheme.PKCS11_SEEDS), Reason.UNSEAL),
        (replace(parsed, by=replace(parsed.by, key_id=bytes(16))), Reason.UNAVAILABLE),
        (replace(parsed, by=replace(parsed.by, serial="other")), Reason.UNAVAILABLE),
        (replace(parsed, by=replace(parsed.by, label="other")), Reason.UNAVAILABLE),
    ):
        with pytest.raises(KeyquorumError) as caught:
            unwrap(changed.to_bytes(), "ch-1", PIN, MODULE)
        assert caught.value.reason is reason


@needs_softhsm
def test_a_wrong_pin_and_a_missing_module_are_said(token: SoftToken) -> None:
    with pytest.raises(RefusedError) as caught:
        Token.open(MODULE, "wrong-pin", token.label)
    assert (caught.value.reason, caught.value.actual) == (Reason.PASSPHRASE, "PinIncorrect")
    for module in ("", "libsofthsm2.so"):
        with pytest.raises(UnavailableError) as missing:
            Token.open(module, PIN, token.label)
        assert missing.value.reason is Reason.UNSUPPORTED
    with pytest.raises(UnavailableError) as broken:
        Token.open("/nonexistent/module.so", PIN, token.label)
    assert broken.value.reason is Reason.UNAVAILABLE
