from __future__ import annotations

import hashlib
import hmac
import importlib.util
import json
import random
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keyquorum_core import derivation
from keyquorum_core.derivation import Combiner, decode_contributions, encode_contributions
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Custodian, Quorum
from tests.support.quorums import committee, qualifies, quorums, subsets

REPOSITORY = Path(__file__).parents[2]
PATH = REPOSITORY / "docs" / "spec" / "vectors" / "derivation.json"
VECTORS: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["vectors"]
CONTEXT = derivation.context("demo", 1, "job", bytes(32))

by_name = pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])


def seeds_of(quorum: Quorum) -> dict[int, bytes]:
    return {i: hashlib.sha256(f"seed {i}".encode()).digest() for i in range(quorum.seed_count)}


class Cluster:
    """Honest answers for a quorum, and the truth about them."""

    def __init__(self, quorum: Quorum) -> None:
        self.quorum = quorum
        self.contributions = derivation.contributions(seeds_of(quorum), CONTEXT)
        self.root = derivation.root(self.contributions, CONTEXT)
        self.key_check = derivation.key_check(self.root, CONTEXT)

    def answer(self, name: str, lies: Iterable[int] = (), tale: str = "") -> dict[int, bytes]:
        """A custodian's answer with some values replaced: by ``tale``, the same for all who tell it."""
        out = {i: self.contributions[i] for i in self.quorum.indices_of(name)}
        return out | {i: hashlib.sha256(f"{tale} {i}".encode()).digest() for i in lies}

    def cancelling(self, name: str, first: int, second: int) -> dict[int, bytes]:
        """Two wrong values whose differences from the truth cancel in the XOR."""
        out = self.answer(name)
        return out | {i: bytes([out[i][0] ^ 5]) + out[i][1:] for i in (first, second)}

    def combiner(self, checked: bool = True) -> Combiner:
        return Combiner(self.quorum, CONTEXT, self.key_check if checked else None)


# Vectors


@by_name
def test_vectors_follow_from_hashlib_and_hmac_alone(vector: dict[str, Any]) -> None:
    """Straight from DESIGN §4, with none of the product's code."""
    ids = sorted(c["id"] for c in vector["custodians"])
    custodians = [Custodian(c["id"], c["jurisdiction"]) for c in vector["custodians"]]
    bad = [s for s in subsets(ids) if not qualifies(vector["quorum"], custodians, s)]
    sets = [s for s in bad if not any(set(s) < set(t) for t in bad if len(t) == len(s) + 1)]
    assert [list(s) for s in sorted(sets, key=lambda s: (len(s), s))] == vector["maximal_unqualified_sets"]

    digest = hashlib.sha256()
    label = b"keyquorum/v1/context"
    digest.update(len(label).to_bytes(2, "big") + label)
    for part in (
        vector["key_id"].encode(),
        vector["epoch"].to_bytes(8, "big"),
        vector["purpose"].encode(),
        bytes.fromhex(vector["subject"]),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    context = digest.digest()
    assert context.hex() == vector["context"]

    assert len(vector["seeds"]) == len(sets)
    contributions = [
        hmac.new(bytes.fromhex(seed), b"keyquorum/v1/contribution" + context, hashlib.sha256).digest()
        for seed in vector["seeds"]
    ]
    assert [c.hex() for c in contributions] == vector["contributions"]

    mixed = bytes(32)
    for c in contributions:
        mixed = bytes(a ^ b for a, b in zip(mixed, c, strict=True))

    def hkdf(ikm: bytes, info: bytes, length: int) -> bytes:
        prk = hmac.new(context, ikm, hashlib.sha256).digest()
        return hmac.new(prk, info + b"\x01", hashlib.sha256).digest()[:length]

    root = hkdf(mixed, b"keyquorum/v1/root", 32)
    assert root.hex() == vector["root"]
    assert hkdf(root, b"keyquorum/v1/key-check", 16).hex() == vector["key_check"]
    names = ("bundle", "result", "telemetry", "tokenize", "mapping", "projection", "data")
    keys = {name: hkdf(root, b"keyquorum/v1/" + name.encode(), 32).hex() for name in names}
    assert keys == vector["purpose_keys"]


@by_name
def test_vectors_hold_for_the_module(vector: dict[str, Any]) -> None:
    quorum = Quorum(vector["quorum"], [Custodian(c["id"], c["jurisdiction"]) for c in vector["custodians"]])
    assert [list(s) for s in quorum.maximal_unqualified_sets] == vector["maximal_unqualified_sets"]
    context = derivation.context(vector["key_id"], vector["epoch"], vector["purpose"], bytes.fromhex(vector["subject"]))
    assert context.hex() == vector["context"]
    seeds = {i: bytes.fromhex(seed) for i, seed in enumerate(vector["seeds"])}
    combiner = Combiner(quorum, context, bytes.fromhex(vector["key_check"]))
    for name in quorum.ids:
        held = {i: seeds[i] for i in quorum.indices_of(name)}
        answer = derivation.contributions(held, context)
        assert [answer[i].hex() for i in held] == [vector["contributions"][i] for i in held]
        combiner.add(name, answer)
    key = combiner.conclude(require_confirmed=True).key
    assert key.root.hex() == vector["root"]
    assert key.key_check.hex() == vector["key_check"]
    assert {name: key.purpose_key(name).hex() for name in derivation.PURPOSES} == vector["purpose_keys"]


def test_the_vector_file_has_the_published_shape_and_is_current() -> None:
    members = ["name", "custodians", "quorum", "maximal_unqualified_sets", "seeds", "key_id", "epoch", "purpose"]
    members += ["subject", "context", "contributions", "root", "key_check", "purpose_keys"]
    assert list(json.loads(PATH.read_text(encoding="utf-8"))) == ["vectors"]
    assert all(list(vector) == members for vector in VECTORS)
    assert len(VECTORS) >= 5
    assert script().render() == PATH.read_text(encoding="utf-8")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", REPOSITORY / "scripts" / "make_derivation_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Primitives and encodings


@given(st.binary(min_size=1, max_size=80), st.binary(max_size=80), st.binary(max_size=40), st.integers(1, 32))
def test_hkdf_agrees_with_another_implementation(ikm: bytes, salt: bytes, info: bytes, length: int) -> None:
    expected = HKDF(SHA256(), length, salt, info).derive(ikm)
    assert derivation.hkdf_sha256(ikm, salt=salt, info=info, length=length) == expected


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.binary(min_size=32, max_size=32), max_size=8))
def test_contributions_survive_encoding(values: dict[int, bytes]) -> None:
    encoded = encode_contributions(values)
    assert decode_contributions(encoded, tuple(sorted(values))) == values


def test_contribution_encoding_is_pinned() -> None:
    encoded = encode_contributions({258: b"\x02" * 32, 0: b"\x01" * 32})
    assert encoded == b"\0\0\0\0" + b"\x01" * 32 + b"\0\0\x01\x02" + b"\x02" * 32


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(35),
        bytes(36),
        bytes(72),
        encode_contributions({1: bytes(32), 2: bytes(32)}),
        encode_contributions({0: bytes(32), 2: bytes(32)}) + b"\0",
        encode_contributions({0: bytes(32), 1: bytes(32), 2: bytes(32)}),
        encode_contributions({2: bytes(32)}) + encode_contributions({0: bytes(32)}),
        encode_contributions({0: bytes(32)}) * 2,
    ],
)
def test_contributions_other_than_those_expected_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_contributions(data, (0, 2))


def test_wrong_sizes_and_contexts_are_malformed() -> None:
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(MalformedError):
            derivation.contribution(wrong, CONTEXT)
        with pytest.raises(MalformedError):
            derivation.contribution(bytes(32), wrong)
        with pytest.raises(MalformedError):
            derivation.root({0: wrong}, CONTEXT)
        with pytest.raises(MalformedError):
            encode_contributions({0: wrong})
    for arguments in (("", 1, "job"), ("k", -1, "job"), ("k", 2**64, "job"), ("k", 1, ""), ("\ud800", 1, "job")):
        with pytest.raises(MalformedError):
            derivation.context(*arguments, bytes(32))
    for incomplete in ({}, {1: bytes(32)}, {0: bytes(32), 2: bytes(32)}):
        with pytest.raises(MalformedError):
            derivation.root(incomplete, CONTEXT)
    with pytest.raises(MalformedError):
        Combiner(Quorum({"at_least": 2}, committee(3)), CONTEXT, bytes(15))


def test_every_part_of_the_context_counts() -> None:
    contexts = {
        derivation.context("demo", 1, "job", b"x"),
        derivation.context("demo1", 1, "job", b"x"),
        derivation.context("demo", 2, "job", b"x"),
        derivation.context("demo", 1, "job2", b"x"),
        derivation.context("demo", 1, "job", b"y"),
        derivation.context("demo", 1, "jobx", b""),
    }
    assert len(contexts) == 6


def test_the_public_key_check_cannot_be_asked_for_as_a_key() -> None:
    for name in ("key-check", "root", "", "Bundle", "bundle\0"):
        with pytest.raises(MalformedError):
            derivation.purpose_key(bytes(32), CONTEXT, name)


def test_a_derived_key_does_not_show_its_root() -> None:
    key = derivation.DerivedKey(CONTEXT, b"\xabsecret" + bytes(25), bytes(16))
    assert "secret" not in repr(key)


# Combining


@settings(max_examples=60, deadline=None)
@given(quorums(max_size=5))
def test_any_quorum_derives_and_no_unqualified_set_can(quorum: Quorum) -> None:
    """G4: any quorum derives; no set of answers short of one does, for it lacks at least one seed entirely.

    The derivation is symmetric, so that a missing 32-byte seed leaves a quantum computer a 256-bit search and no more.
    """
    cluster = Cluster(quorum)
    for chosen in subsets(quorum.ids):
        held = {i for name in chosen for i in quorum.indices_of(name)}
        combiner = cluster.combiner()
        for name in chosen:
            combiner.add(name, cluster.answer(name))
        found = combiner.result()
        if quorum.is_qualified(chosen):
            assert held == set(range(quorum.seed_count))
            assert found is not None
            assert found.key.root == cluster.root
            assert found.blamed == found.suspected == ()
            assert found.used == chosen
        else:
            assert held != set(range(quorum.seed_count))
            assert found is None
            with pytest.raises(RefusedError) as caught:
                combiner.conclude()
            assert caught.value.reason == Reason.NO_QUORUM


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_wrong_answers_are_caught_and_their_authors_named(data: st.DataObject) -> None:
    """G6: any quorum suffices; a wrong answer is caught and its author named.

    Liars are any custodians without whom the rest qualifies. They lie at random, in concert (the same wrong values),
    or with differences that cancel, and leave out or add indices.
    """
    quorum = data.draw(quorums(max_size=7))
    cluster = Cluster(quorum)
    liars = data.draw(st.sets(st.sampled_from(quorum.ids)))
    honest = set(quorum.ids) - liars
    assume(quorum.is_qualified(honest))
    answers = {name: cluster.answer(name) for name in quorum.ids}
    misshapen: set[str] = set()
    cancelled = False
    for name in sorted(liars):
        held = quorum.indices_of(name)
        assume(held)
        kind = data.draw(st.sampled_from(["alone", "in concert", "cancelling", "short", "long", "size"]))
        if kind == "cancelling" and len(held) > 1:
            first, second = data.draw(st.lists(st.sampled_from(held), min_size=2, max_size=2, unique=True))
            answers[name] = cluster.cancelling(name, first, second)
            cancelled = True
        elif kind in ("short", "long", "size"):
            misshapen.add(name)
            if kind == "short":
                del answers[name][held[0]]
            elif kind == "long":
                answers[name][quorum.seed_count + 3] = bytes(32)
            else:
                answers[name][held[0]] += b"\0"
        else:
            lies = data.draw(st.sets(st.sampled_from(held), min_size=1))
            answers[name] = cluster.answer(name, lies, tale="ours" if kind == "in concert" else name)
    combiner = cluster.combiner()
    for name in data.draw(st.permutations(quorum.ids)):
        combiner.add(name, answers[name])
        early = combiner.result()
        assert early is None or early.key.root == cluster.root
    found = combiner.conclude(require_confirmed=True)
    assert found.key.root == cluster.root
    assert found.key.key_check == cluster.key_check
    assert quorum.is_qualified(found.used)
    assert misshapen <= set(found.blamed) <= liars
    assert liars <= set(found.blamed) | set(found.suspected)
    if not cancelled:
        assert set(found.blamed) == liars
        assert found.suspected == ()
        assert set(found.used) == honest


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_one_liar_plants_no_key_at_an_owner_who_waits_for_confirmation(data: st.DataObject) -> None:
    """Without a key check: a confirmed key is the true one, and nobody honest is blamed, whatever one liar does."""
    quorum = data.draw(quorums(max_size=6))
    cluster = Cluster(quorum)
    liar = data.draw(st.sampled_from(quorum.ids))
    held = quorum.indices_of(liar)
    assume(held)
    lies = data.draw(st.sets(st.sampled_from(held), min_size=1))
    combiner = cluster.combiner(checked=False)
    for name in data.draw(st.permutations(quorum.ids)):
        combiner.add(name, cluster.answer(name, lies if name == liar else ()))
        found = combiner.result(require_confirmed=True)
        if found is not None:
            assert found.key.root == cluster.root
        assert set(combiner.blamed) <= {liar}


def test_a_conflict_between_two_words_needs_more_answers() -> None:
    cluster = Cluster(Quorum({"at_least": 2}, committee(4)))
    a, b, c, d = cluster.quorum.ids
    combiner = cluster.combiner(checked=False)
    combiner.add(a, cluster.answer(a))
    lie = cluster.answer(b, lies=[i for i in cluster.quorum.indices_of(b) if i in cluster.quorum.indices_of(a)][:1])
    combiner.add(b, lie)
    assert combiner.result() is None
    assert "contradict each other" in combiner.missing().why
    assert combiner.missing().ask == (c, d)
    with pytest.raises(RefusedError) as caught:
        combiner.conclude()
    assert caught.value.reason == Reason.BLAME
    combiner.add(c, cluster.answer(c))
    combiner.add(d, cluster.answer(d))
    found = combiner.conclude(require_confirmed=True)
    assert found.blamed == (b,)
    assert found.key.root == cluster.root


def test_two_against_two_is_not_decided() -> None:
    """Whom nobody contradicts sides with neither."""
    cluster = Cluster(Quorum({"at_least": 2}, committee(5)))
    absent = cluster.quorum.ids[4]
    disputed = cluster.quorum.maximal_unqualified_sets.index((absent,))
    combiner = cluster.combiner(checked=False)
    for position, name in enumerate(cluster.quorum.ids[:4]):
        combiner.add(name, cluster.answer(name, [disputed] if position < 2 else [], tale="ours"))
    assert combiner.result() is None
    assert combiner.blamed == ()
    combiner.add(absent, cluster.answer(absent))
    with pytest.raises(RefusedError, match="contradict each other") as caught:
        combiner.conclude()
    assert caught.value.reason == Reason.BLAME


def test_one_word_against_another_blames_nobody_even_when_only_one_of_them_can_be_spared() -> None:
    """Without the liar the rest would not qualify, without its victim it would: no reason to believe the liar."""
    rule = {
        "any_of": [
            {"at_least": 2, "of": ["liar", "z"]},
            {"at_least": 3, "of": ["victim", "w", "z"]},
        ]
    }
    cluster = Cluster(Quorum(rule, [Custodian(name, "CH") for name in ("liar", "victim", "w", "z")]))
    disputed = cluster.quorum.maximal_unqualified_sets.index(("w", "z"))
    combiner = cluster.combiner(checked=False)
    combiner.add("liar", cluster.answer("liar", [disputed]))
    combiner.add("victim", cluster.answer("victim"))
    combiner.add("z", cluster.answer("z"))
    assert combiner.result() is None
    assert combiner.blamed == ()


def test_an_honest_custodian_is_not_suspected_for_contradicting_every_liar() -> None:
    cluster = Cluster(Quorum({"at_least": 2}, committee(5)))
    *others, bystander = cluster.quorum.ids
    disputed = cluster.quorum.maximal_unqualified_sets.index((bystander,))
    combiner = cluster.combiner()
    for name in others[:2]:
        combiner.add(name, cluster.answer(name))
    combiner.add(bystander, cluster.answer(bystander))
    for name in others[2:]:
        combiner.add(name, cluster.answer(name, [disputed], tale="ours"))
    found = combiner.conclude()
    assert (found.blamed, found.suspected) == (tuple(others[2:]), ())


def test_a_key_is_confirmed_once_two_custodians_report_every_seed() -> None:
    cluster = Cluster(Quorum({"at_least": 3}, committee(5)))
    combiner = cluster.combiner(checked=False)
    for name in cluster.quorum.ids[:3]:
        combiner.add(name, cluster.answer(name))
    unconfirmed = combiner.result()
    assert unconfirmed is not None
    assert not unconfirmed.confirmed
    assert combiner.result(require_confirmed=True) is None
    missing = combiner.missing()
    assert str(missing) == "3 of 10 seeds are reported by one custodian only; ask fr-1, se-1"
    with pytest.raises(RefusedError) as caught:
        combiner.conclude(require_confirmed=True)
    assert caught.value.reason == Reason.NO_QUORUM
    combiner.add(cluster.quorum.ids[3], cluster.answer(cluster.quorum.ids[3]))
    confirmed = combiner.conclude(require_confirmed=True)
    assert confirmed.confirmed
    assert confirmed.key == unconfirmed.key


def test_a_key_with_a_liar_excluded_still_asks_for_confirmation() -> None:
    cluster = Cluster(Quorum({"at_least": 3}, committee(5)))
    *first, last = cluster.quorum.ids
    liar = first[0]
    disputed = next(i for i in cluster.quorum.indices_of(liar) if last not in cluster.quorum.holders(i))
    combiner = cluster.combiner(checked=False)
    for name in first:
        combiner.add(name, cluster.answer(name, [disputed] if name == liar else ()))
    found = combiner.result()
    assert found is not None
    assert (found.used, found.blamed, found.confirmed) == (tuple(first[1:]), (liar,), False)
    assert combiner.result(require_confirmed=True) is None
    assert str(combiner.missing()) == f"3 of 10 seeds are reported by one custodian only; ask {last}"
    combiner.add(last, cluster.answer(last))
    assert combiner.conclude(require_confirmed=True).key.root == cluster.root


def test_a_wrong_key_check_gives_no_key() -> None:
    cluster = Cluster(Quorum({"at_least": 2}, committee(3)))
    combiner = Combiner(cluster.quorum, CONTEXT, bytes(16))
    for name in cluster.quorum.ids:
        combiner.add(name, cluster.answer(name))
    assert combiner.result() is None
    with pytest.raises(RefusedError, match="do not meet the key check") as caught:
        combiner.conclude()
    assert caught.value.reason == Reason.BLAME


def test_a_second_different_answer_is_blamed_and_a_repeated_one_is_not() -> None:
    cluster = Cluster(Quorum({"at_least": 2}, committee(3)))
    a, b, c = cluster.quorum.ids
    combiner = cluster.combiner()
    combiner.add(a, cluster.answer(a))
    combiner.add(a, cluster.answer(a))
    assert combiner.blamed == ()
    assert combiner.missing().ask == (b, c)
    combiner.add(a, cluster.answer(a, lies=cluster.quorum.indices_of(a)[:1]))
    combiner.add(a, cluster.answer(a))
    combiner.add(b, cluster.answer(b))
    assert combiner.result() is None
    assert combiner.missing().ask == (c,)
    combiner.add(c, cluster.answer(c))
    found = combiner.conclude()
    assert (found.used, found.blamed, found.key.root) == ((b, c), (a,), cluster.root)


def test_an_answer_that_cannot_be_opened_is_blamed_with_the_reason() -> None:
    cluster = Cluster(Quorum({"at_least": 2}, committee(3)))
    combiner = cluster.combiner()
    combiner.reject(cluster.quorum.ids[0], "the sealed share does not open")
    with pytest.raises(RefusedError) as caught:
        combiner.conclude()
    assert caught.value.details == {"blamed.ch-1": "the sealed share does not open"}
    with pytest.raises(MalformedError) as unknown:
        combiner.add("nobody", {})
    assert unknown.value.reason == Reason.UNKNOWN_CUSTODIAN


def test_lies_that_cancel_neither_change_the_key_nor_pin_blame_on_the_honest() -> None:
    """A liar and an honest custodian contradict each other on two seeds nobody else reports, and both readings fit."""
    rule = {
        "include": {"custodian": "z"},
        "any_of": [{"at_least": 1, "of": ["liar", "honest"]}, {"at_least": 2, "of": ["a", "b"]}],
    }
    cluster = Cluster(Quorum(rule, [Custodian(name, "CH") for name in ("a", "b", "honest", "liar", "z")]))
    assert cluster.quorum.maximal_unqualified_sets[:2] == (("a", "z"), ("b", "z"))
    combiner = cluster.combiner()
    combiner.add("liar", cluster.cancelling("liar", 0, 1))
    combiner.add("honest", cluster.answer("honest"))
    combiner.add("z", cluster.answer("z"))
    found = combiner.conclude()
    assert found.key.root == cluster.root
    assert found.blamed == ()
    assert found.suspected == ("honest", "liar")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_many_colluding_liars_are_searched_in_bounded_time(seed: int) -> None:
    """All but a quorum lie, in overlapping gangs made to multiply explanations."""
    chance = random.Random(seed)  # noqa: S311 - a scenario, not a secret
    ids = CROWD.quorum.ids
    liars = chance.sample(ids, 10)
    combiner = CROWD.combiner()
    for name in ids:
        lies = [i for i in CROWD.quorum.indices_of(name) if name in liars and chance.random() < 0.2]
        combiner.add(name, CROWD.answer(name, lies, tale=f"gang {i}" if (i := chance.randrange(3)) else name))
    found = combiner.conclude()
    assert found.key.root == CROWD.root
    assert set(found.blamed) <= set(liars)


CROWD = Cluster(Quorum({"at_least": 4}, committee(14)))


@pytest.mark.timeout(60)  # the search is bounded: unbounded, it would not end in a lifetime
def test_a_large_committee_with_all_but_a_quorum_lying() -> None:
    cluster = Cluster(Quorum({"at_least": 3}, [Custodian(f"c{i:02}", "CH") for i in range(24)]))
    liars = cluster.quorum.ids[3:]
    combiner = cluster.combiner()
    for name in cluster.quorum.ids:
        combiner.add(name, cluster.answer(name, cluster.quorum.indices_of(name) if name in liars else (), tale=name))
    found = combiner.conclude()
    assert found.blamed == liars
    assert found.key.root == cluster.root


def test_combinations_of_pairs_all_agree() -> None:
    """Whichever quorum answers, the key is the same."""
    cluster = Cluster(Quorum({"at_least": 2}, committee(5)))
    roots = set()
    for pair in combinations(cluster.quorum.ids, 2):
        combiner = cluster.combiner(checked=False)
        for name in pair:
            combiner.add(name, cluster.answer(name))
        roots.add(combiner.conclude().key.root)
    assert roots == {cluster.root}
