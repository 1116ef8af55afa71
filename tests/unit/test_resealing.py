"""Changing a keystore's scheme: everything under the new key or nothing, whatever dies, and the old key is gone."""

from __future__ import annotations

import hmac
import os
import signal
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.ceremony import Seed
from keyquorum_core.ceremony_states import Kind, State
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.resealing import FOREIGN, SEALED_TABLES, reseal
from keyquorum_custodian.sealed_keystore import SealedKeystore, peek_scheme
from keyquorum_custodian.sealing.record import Scheme, token_key_of
from keyquorum_custodian.sealing.schemes import PassphraseWrapping, Secret, SharesWrapping, TokenWrapping, Wrapping
from keyquorum_custodian.sealing.shares import new_shares
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.sealing.token_seeds import TokenSeed
from keyquorum_custodian.seed_records import CeremonyRow, EpochRow
from keyquorum_custodian.token_leftovers import name_leftovers, named_leftovers
from tests.support.softhsm import MODULE, PIN, a_token, needs_softhsm

NOW = 1_700_000_000
OLD = "the old passphrase"
NEW = "the new passphrase"
MAKING = CeremonyRow("c" * 32, Kind.GENERATE, "key-1", 1, State.PROPOSED, None, b"plan", ("olga",))
NEXT = CeremonyRow("d" * 32, Kind.ROTATE, "key-1", 2, State.PROPOSED, None, b"plan", ())
SEEDS = {0: bytes([1]) * 32, 5: bytes([2]) * 32}
PARTS = {0: bytes([3]) * 32}
REBUILT = EpochRow("key-2", 4, "e" * 32, b"certificate")


def cheap(passphrase: str) -> PassphraseWrapping:
    return PassphraseWrapping(passphrase, 1, 8 << 10)


def full_keystore(path: Path, sealing: Wrapping) -> Keystore:
    """One with a value in every table that has sealed ones."""
    store = Keystore.create(
        path, "ch-1", Identity.generate(), RecipientKey.generate(), Cosigner.generate("demo/ch-1"), sealing
    )
    with store.transaction():
        store.insert_ceremony(MAKING, NOW)
        store.insert_seeds(MAKING.ceremony_id, "key-1", 1, SEEDS)
        store.insert_epoch(EpochRow("key-1", 1, MAKING.ceremony_id, b"certificate"), NOW)
        store.insert_ceremony(NEXT, NOW)
        store.insert_parts(NEXT, PARTS)
        store.insert_seeds(REBUILT.ceremony_id, "key-2", 4, SEEDS)
        store.insert_epoch(REBUILT, NOW)
        sealed = store.seal_row(b"lease", "leases", "job", "ab" * 32)
        store.change(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", "job", "ab" * 32, "k", 1, 2, 3, 0, "", sealed
        )
    store.save_appraisals([(b"\xab" * 32, b"\xcd" * 32, NOW + 100, b"verdict")], [("ak", b"state")], NOW)
    return store


def computed(seeds: Mapping[int, Seed]) -> dict[int, bytes]:
    """What seeds give, wherever they are."""
    out = {}
    for index, seed in seeds.items():
        assert isinstance(seed, bytes | TokenSeed)
        out[index] = hmac.digest(seed, b"m", "sha256") if isinstance(seed, bytes) else seed.mac(b"m")
    return out


def contents(store: Keystore) -> list[object]:
    """Everything sealed, opened, or computed with."""
    ((lease,),) = store.select("SELECT sealed FROM leases")
    return [
        store.identity().seeds(),
        store.recipient().to_seed_bytes(),
        computed(store.held_seeds(MAKING)),
        store.parts(NEXT),
        computed(store.held_seeds(REBUILT)),
        store.appraisal(b"\xab" * 32, b"\xcd" * 32, NOW),
        store.tpm_state("ak"),
        store.unseal_row(lease, "leases", "job", "ab" * 32),
    ]


def ciphertexts(path: Path) -> set[bytes]:
    db = sqlite3.connect(path)
    found = {bytes(row[0]) for table in SEALED_TABLES for row in db.execute(f"SELECT sealed FROM {table}")}  # noqa: S608
    found |= {bytes(row[0]) for row in db.execute("SELECT value FROM meta WHERE name = 'kek'")}
    db.close()
    return found


def on_disk(path: Path) -> bytes:
    return b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))


def test_every_table_with_sealed_values_is_known_and_filled(tmp_path: Path) -> None:
    store = full_keystore(tmp_path / "k.db", cheap(OLD))
    tables = {str(name) for (name,) in store.select("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    sealed = {
        name
        for name in tables
        if any(column == "sealed" for (column,) in store.select(f"SELECT name FROM pragma_table_info('{name}')"))  # noqa: S608
    }
    assert sealed == SEALED_TABLES.keys() | FOREIGN
    assert all(store.select(f"SELECT 1 FROM {name}") for name in SEALED_TABLES)  # noqa: S608
    store.close()


def test_all_is_there_under_the_new_key_and_nothing_of_the_old_is_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "k.db"
    store = full_keystore(path, cheap(OLD))
    before = contents(store)
    store.close()
    old = ciphertexts(path)
    assert all(value in on_disk(path) for value in old)
    shares, secret, words = new_shares(2, 3)
    store = Keystore.open(path, OLD)
    reseal(store, SharesWrapping(shares, secret))
    assert contents(store) == before
    assert not [value for value in old if value in on_disk(path)]
    store.close()
    assert not [value for value in old if value in on_disk(path)]
    assert peek_scheme(path) is Scheme.SLIP39
    with pytest.raises(StateError) as caught:
        Keystore.open(path, OLD)
    assert caught.value.reason is Reason.SEALED
    store = Keystore.open(path, words[1:])
    assert contents(store) == before
    reseal(store, cheap(NEW))
    store.close()
    store = Keystore.open(path, NEW)
    assert contents(store) == before
    store.close()


def test_a_value_that_does_not_open_leaves_the_old_scheme_whole(tmp_path: Path) -> None:
    path = tmp_path / "k.db"
    store = full_keystore(path, cheap(OLD))
    store.change("UPDATE leases SET sealed = zeroblob(40)")
    with pytest.raises(UnavailableError) as caught:
        reseal(store, cheap(NEW))
    assert caught.value.reason is Reason.STORAGE
    assert store.seeds(MAKING) == SEEDS
    store.close()
    store = Keystore.open(path, OLD)
    assert store.seeds(MAKING) == SEEDS
    with pytest.raises(KeyquorumError):
        Keystore.open(path, NEW)
    store.change("CREATE TABLE strange (name TEXT, sealed BLOB)")
    with pytest.raises(UnavailableError, match="cannot seal again") as unknown:
        reseal(store, cheap(NEW))
    assert unknown.value.actual == "strange"
    store.close()


def die_in_reseal(path: Path, secret: Secret, make: Callable[[Keystore], Wrapping], number: int) -> bool:
    """Change the scheme in a process that is killed before its ``number``-th statement; False: it got to the end."""
    child = os.fork()
    if not child:
        try:
            store = Keystore.open(path, secret, module=MODULE)
            wrapping, left = make(store), number

            def traced(statement: str) -> None:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

            store._db.set_trace_callback(traced)
            reseal(store, wrapping)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def check_killed_everywhere(
    path: Path,
    old: Secret,
    new: Secret,
    make: Callable[[Keystore], Wrapping],
    before: list[object],
    look: Callable[[Keystore, bool], None] = lambda store, changed: None,
) -> None:
    kept, outcomes, number, dies = path.read_bytes(), [], 0, True
    record = SealedKeystore.open(path)
    record.close()
    sealed_before = ciphertexts(path)
    while dies:
        number += 1
        dies = die_in_reseal(path, old, make, number)
        now = SealedKeystore.open(path)
        changed = now.record != record.record
        now.close()
        store = Keystore.open(path, new if changed else old, module=MODULE)
        assert contents(store) == before
        look(store, changed)
        store.close()
        if changed:
            assert not [value for value in sealed_before if value in on_disk(path)]
            path.write_bytes(kept)
        outcomes.append(changed)
    assert outcomes == sorted(outcomes)
    assert outcomes.count(True) >= 3  # after the commit: overwriting, then saying that it is done
    assert outcomes.count(False) > 12


def test_a_death_at_any_statement_leaves_one_scheme_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "k.db"
    store = full_keystore(path, cheap(OLD))
    before = contents(store)
    store.close()
    shares, secret, words = new_shares(2, 3)
    check_killed_everywhere(path, OLD, words[:2], lambda store: SharesWrapping(shares, secret), before)


def keys_in(token: Token, label: str) -> list[Any]:
    """The token's keys of that label. SoftHSM looks for what other processes made when a session is opened."""
    from pkcs11 import Attribute, ObjectClass

    return list(token._session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: label}))


WRAPPING, SEED = "keyquorum keystore ch-1", "keyquorum seed ch-1"


@needs_softhsm
def test_seeds_to_a_token_with_deaths_at_any_statement_leave_nothing_there_after_the_next_start(tmp_path: Path) -> None:
    token = a_token()
    path = tmp_path / "k.db"
    store = full_keystore(path, cheap(OLD))
    before = contents(store)
    store.close()

    def to_token(store: Keystore) -> Wrapping:
        return TokenWrapping(Token.open(MODULE, PIN, token.label), Scheme.PKCS11_SEEDS)

    most = 0

    def look(store: Keystore, changed: bool) -> None:
        nonlocal most
        opened = store.token or Token.open(MODULE, PIN, token.label)
        wrapping, seeds = keys_in(opened, WRAPPING), keys_in(opened, SEED)
        if changed:  # this start was logged in to the token
            assert (len(wrapping), len(seeds)) == (1, 2 * len(SEEDS))
            for key in (*wrapping, *seeds):  # as the file goes back to what it was, so does the token
                key.destroy()
        else:  # this one wasn't: the next change of scheme is, and finds one death's leftovers, not all deaths'
            most = max(most, len(wrapping))
            assert len(wrapping) <= 1
            assert len(seeds) <= 2 * len(SEEDS)
        if opened is not store.token:
            opened.close()

    check_killed_everywhere(path, OLD, PIN, to_token, before, look)
    assert most == 1


@needs_softhsm
def test_from_one_key_of_a_token_to_another_and_to_a_passphrase_leaves_no_key_of_before(tmp_path: Path) -> None:
    token = a_token()
    path = tmp_path / "k.db"
    store = full_keystore(path, cheap(OLD))
    before = contents(store)
    reseal(store, TokenWrapping(Token.open(MODULE, PIN, token.label), Scheme.PKCS11))
    store.close()
    outcomes, number, dies = [], 0, True
    first = SealedKeystore.open(path)
    first.close()
    while dies:
        number += 1
        dies = die_in_reseal(path, PIN, lambda store: TokenWrapping(_its(store), Scheme.PKCS11), number)
        store = Keystore.open(path, PIN, module=MODULE)
        assert contents(store) == before
        assert len(keys_in(_its(store), WRAPPING)) == 1
        outcomes.append(store.sealing_record() != first.record)
        store.close()
    assert outcomes == sorted(outcomes)
    assert 3 <= outcomes.count(True) < len(outcomes)
    store = Keystore.open(path, PIN, module=MODULE)
    reseal(store, cheap(NEW))
    store.close()
    store = Keystore.open(path, NEW)
    assert contents(store) == before
    store.close()
    opened = Token.open(MODULE, PIN, token.label)
    assert keys_in(opened, WRAPPING) == []
    opened.close()


@needs_softhsm
def test_a_named_key_that_opens_the_keystore_is_never_destroyed(tmp_path: Path) -> None:
    token = a_token()
    path = tmp_path / "k.db"
    store = full_keystore(path, TokenWrapping(Token.open(MODULE, PIN, token.label), Scheme.PKCS11))
    key = token_key_of(store.sealing_record())
    assert key is not None
    with store.transaction():
        name_leftovers(store, [key])
    store.close()
    store = Keystore.open(path, PIN, module=MODULE)
    assert named_leftovers(store) == []
    store.close()
    Keystore.open(path, PIN, module=MODULE).close()


def _its(store: Keystore) -> Token:
    assert store.token is not None
    return store.token
