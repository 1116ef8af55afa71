"""A custodian whose seeds are keys of a PKCS#11 token (SoftHSM2), in every ceremony with others whose seeds are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.release import Leaf, open_share
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore, open_keystore
from keyquorum_custodian.resealing import reseal
from keyquorum_custodian.sealing.record import Scheme
from keyquorum_custodian.sealing.schemes import PassphraseWrapping, TokenWrapping
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.sealing.token_seeds import TokenSeeds
from tests.support.ceremonies import Destroy, Make, Rebuild, derived
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.softhsm import MODULE, PIN, SoftToken, a_token, needs_softhsm

pytestmark = needs_softhsm
ME = "ch-1"


class Clock:
    def __init__(self, now: int = 1_800_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def token() -> SoftToken:
    return a_token()


@pytest.fixture
def committee(tmp_path: Path, token: SoftToken, clock: Clock) -> Iterator[Committee]:
    """Epoch 1 was made before; then ``ME`` moved its seeds into the token, by the command."""
    built = build_committee(tmp_path, clock=clock)
    built.generate(policy=KeyPolicy(retain_seconds=600))
    built.close()
    folder = built.directory(ME)
    config = (folder / "custodian.toml").read_text().replace('pkcs11_module = ""', f'pkcs11_module = "{MODULE}"')
    (folder / "custodian.toml").write_text(config)
    pin = tmp_path / "pin"
    pin.write_text(PIN + "\n")
    pin.chmod(0o600)
    arguments = ["--dir", str(folder), "--to", "pkcs11-seeds", "--token", token.label, "--pin-file", str(pin)]
    done = subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", "reseal", *arguments],
        env={**os.environ, "KEYQUORUM_PASSPHRASE": PASSPHRASE},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built.secrets[ME] = PIN
    yield built
    built.close()


def in_token(committee: Committee) -> int:
    """How many seeds the token holds."""
    store = committee.open(ME).keystore
    assert store.token is not None
    return len(store.token.seeds(f"keyquorum seed {ME}"))


def rows(committee: Committee) -> int:
    return len(committee.open(ME).keystore.select("SELECT 1 FROM seeds"))


def refusal(reason: Reason, call: object, *arguments: object) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.reason is reason, caught.value
    return caught.value


def test_generate_release_rotate_repair_and_destroy_with_seeds_in_the_token(committee: Committee, clock: Clock) -> None:
    committee.open_all()
    before = derived(committee, 1)  # everyone agrees on every seed, whoever computes
    assert (in_token(committee), rows(committee)) == (2, 2)
    store = committee.open(ME).keystore
    refusal(Reason.UNSUPPORTED, store.seeds, store.epochs()[0])
    assert not any(isinstance(kept, bytes) for kept in store.held_seeds(store.epochs()[0]).values())

    # A release: its share opens, and is what the other holders contribute too.
    request = committee.owner_request()
    opened = {
        name: open_share(
            node.gate.release(request), committee.owner.recipient, Leaf.parse(request.leaf).hash(), committee.quorum
        )
        for name, node in committee.nodes.items()
    }
    for name in committee.ids:
        for index in opened[ME].contributions.keys() & opened[name].contributions.keys():
            assert opened[ME].contributions[index] == opened[name].contributions[index]

    # A new key, and the next epoch of the old one, whose seeds the token hashed for.
    committee.generate("key-2")
    Make.rotate(committee, "key-1").activate()
    after = derived(committee, 2)
    assert after != before
    assert in_token(committee) == rows(committee) == 6
    committee.close()
    committee.open_all()  # every seed is checked against its certificate again
    assert (derived(committee, 1), derived(committee, 2)) == (before, after)

    # It cannot give; who lacks an epoch gets it from those who can, and so does it.
    Make.rotate(committee, "key-2", present=[ME, "is-1"]).activate()
    lacking = Rebuild(committee, "key-2", 2, "no-1")
    error = refusal(Reason.UNSUPPORTED, lacking.propose_one, ME)
    assert isinstance(error, UnavailableError)
    assert "does not give them away" in error.message
    Make.rotate(committee, "key-1", present=["is-1", "no-1"]).activate()
    Rebuild(committee, "key-1", 3, ME).restore()
    third = derived(committee, 3)
    committee.close()
    committee.open_all()
    assert derived(committee, 3) == third

    # What is destroyed is gone from the token.
    held = in_token(committee)
    clock.now += 700
    destroy = Destroy(committee, "key-1", 1)
    destroy.approve()
    destroy.erase()
    assert in_token(committee) == rows(committee) == held - 2


def test_a_ceremony_that_dies_or_ends_leaves_nothing_in_the_token(committee: Committee, token: SoftToken) -> None:
    committee.open_all()
    made = Make.rotate(committee, "key-1").deliver()
    assert in_token(committee) == 4
    made.cancel()
    assert in_token(committee) == 2

    again = Make.rotate(committee, "key-1").propose()
    committee.close()
    child = os.fork()
    if not child:  # killed with the seeds in the token and their rows not committed
        try:
            committee.keystore = Dying
            committee.open_all()
            again.deliver_one(ME)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    opened = Token.open(MODULE, PIN, token.label)
    assert len(opened.seeds(f"keyquorum seed {ME}")) == 4
    opened.close()
    committee.open_all()
    assert in_token(committee) == rows(committee) == 2
    again.activate()
    assert in_token(committee) == rows(committee) == 4
    derived(committee, 2)


class Dying(Keystore):
    """Dies before it commits a delivery."""

    __slots__ = ()

    def _commit(self) -> None:
        if self.token_seeds is not None and self.token_seeds._new:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._commit()


def test_a_seed_that_is_not_the_certified_one_or_is_missing_is_found_at_the_start(
    committee: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = committee.open(ME).keystore
    (epoch,) = store.epochs()
    kept = store.token_seeds
    assert kept is not None
    with store.transaction():
        store.drop_secrets(epoch.ceremony_id)
        store.insert_seeds(
            epoch.ceremony_id, "key-1", 1, {index: bytes(32) for index in committee.open(ME).epochs.all()[0].indices}
        )
    committee.close()
    for hashes in (True, False):
        monkeypatch.setattr(TokenSeeds, "_can_hash", lambda self, hashes=hashes: hashes)
        error = refusal(Reason.CEREMONY, committee.open, ME)
        assert "is not the one in the epoch certificate" in error.message
    store = open_keystore(load_config(committee.directory(ME)), PIN)
    assert store.token_seeds is not None
    for key in store.token_seeds._keys.values():
        store.token_seeds.token.destroy(key)
    store.close()
    assert "lacks a seed" in refusal(Reason.STORAGE, committee.open, ME).message


def test_a_token_that_does_not_hash_its_keys_serves_and_is_repaired_instead_of_rotating(
    committee: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> bytes:
        raise UnavailableError(Reason.UNSUPPORTED, "the token does not hash its keys")

    monkeypatch.setattr(Token, "digest", refuse)
    committee.open_all()  # by check values
    derived(committee, 1)
    committee.generate("key-2")
    derived(committee, 1, "key-2")
    rotation = Make.rotate(committee, "key-1")
    error = refusal(Reason.KEY_STATE, rotation.propose_one, ME)
    assert isinstance(error, StateError)
    assert error.details["stale"] == ME
    Make.rotate(committee, "key-1", present=["is-1", "no-1"]).activate()
    Rebuild(committee, "key-1", 2, ME).restore()
    derived(committee, 2)


def test_seeds_in_a_token_do_not_follow_to_another_scheme(committee: Committee, token: SoftToken) -> None:
    store = open_keystore(load_config(committee.directory(ME)), PIN)
    error = refusal(Reason.STATE, reseal, store, PassphraseWrapping("new", 1, 8 << 10))
    assert "does not give them away" in error.message
    assert store.token is not None
    reseal(store, TokenWrapping(store.token, Scheme.PKCS11_SEEDS))  # a new key beside the same seeds
    store.close()
    committee.open_all()
    derived(committee, 1)
