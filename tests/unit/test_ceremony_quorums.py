"""Any quorum derives, and no other set learns anything that would help it: over random rules, before and after every
ceremony, with whoever may be absent absent, and every set of custodians looked at, none left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keyquorum_core import ceremony, derivation
from keyquorum_core.ceremony import Commitments, EpochCertificate
from keyquorum_core.ceremony_checks import check_commitments, check_present, check_seeds
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.destruction import Consent, DestructionReceipt, check_consents, check_receipts
from keyquorum_core.errors import RefusedError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.parts import co_holders, shared_indices
from keyquorum_core.quorum import Quorum
from keyquorum_core.rebuilding import choose
from tests.support.quorums import quorums

CONTEXT = b"c" * 32
Secret = tuple[int, int, bytes]
"""Epoch, index, and a part or seed of it."""


class Cluster:
    """Custodians that keep to the ceremonies, and everything that each of them gets to see."""

    def __init__(self, quorum: Quorum) -> None:
        self.quorum = quorum
        self.seeds: list[dict[str, dict[int, bytes]]] = []
        self.certificates: list[EpochCertificate] = []
        self.seen: dict[str, set[Secret]] = {name: set() for name in quorum.ids}
        self.left: dict[str, set[Secret]] = {}
        """What custodians that others took the place of went away with."""
        self.destroyed: set[int] = set()

    def plan(self, absent_at_most: int) -> CeremonyPlan:
        epoch = len(self.seeds) + 1
        first = CeremonyPlan(
            hashlib.sha256(b"%d" % epoch).hexdigest()[:32],
            "key-1",
            1,
            "MLKEM768_X25519",
            "demo",
            "ab" * 32,
            self.quorum,
            1,
            KeyPolicy(absent_at_most=absent_at_most),
        )
        if epoch == 1:
            return first
        return replace(first, kind=Kind.ROTATE, epoch=epoch, certificate=self.certificates[-1].digest)

    def make(self, present: Iterable[str], absent_at_most: int = 0) -> None:
        """*generate*, then *rotate*: each gives each co-holder the parts of what they share, and nobody else any."""
        plan, present = self.plan(absent_at_most), set(present)
        check_present(plan, present)
        drawn = {name: ceremony.new_parts(self.quorum, name) for name in present}
        seeds: dict[str, dict[int, bytes]] = {}
        for name in present:
            given = {
                sender: {
                    index: parts[index]
                    for index in (parts if sender == name else shared_indices(self.quorum, sender, name))
                }
                for sender, parts in drawn.items()
                if sender == name or name in co_holders(self.quorum, sender)
            }
            before = self.seeds[-1][name] if self.seeds else None
            seeds[name] = ceremony.derive_seeds(self.quorum, plan.ceremony_id, name, given, present, before)
            self.seen[name] |= {(plan.epoch, i, part) for parts in given.values() for i, part in parts.items()}
            self.seen[name] |= {(plan.epoch, i, seed) for i, seed in seeds[name].items()}
        headers = {name: hashlib.sha256(name.encode()).hexdigest() for name in present}
        stated = {name: Commitments.to_seeds(plan, name, held, headers) for name, held in seeds.items()}
        certificate = check_commitments(plan, self.quorum, stated)
        for name, held in seeds.items():
            check_seeds(certificate, name, held)
        self.seeds.append(seeds)
        self.certificates.append(certificate)

    def repair(self, target: str) -> None:
        """Those who hold the newest epoch give ``target`` what they share."""
        newest, certificate = self.seeds[-1], self.certificates[-1]
        gifts = {
            name: {index: held[index] for index in shared_indices(self.quorum, name, target)}
            for name, held in newest.items()
        }
        rebuilt = choose(certificate, target, {name: gift for name, gift in gifts.items() if gift})
        assert not rebuilt.lacking
        assert not rebuilt.wrong
        newest[target] = dict(rebuilt.seeds)
        self.seen[target] |= {(certificate.plan.epoch, i, seed) for i, seed in rebuilt.seeds.items()}

    def replace(self, target: str) -> None:
        """Another custodian takes the place of ``target``, which keeps what it saw, and gets the newest epoch."""
        self.left[target] = self.left.get(target, set()) | self.seen[target]
        self.seen[target] = set()
        for seeds in self.seeds:
            seeds.pop(target, None)
        self.repair(target)

    def destroy(self, epoch: int) -> None:
        """Each erases what it holds of an epoch, once all consented, and says how much it was."""
        certificate = self.certificates[epoch - 1]
        plan = replace(certificate.plan, kind=Kind.DESTROY, certificate=certificate.digest, ceremony_id="d" * 32)
        consents = {name: Consent(plan.digest, name) for name in self.quorum.ids}
        for name in self.quorum.ids:
            rest = {other: each for other, each in consents.items() if other != name}
            with pytest.raises(RefusedError):
                check_consents(plan, self.quorum.ids, rest)
        check_consents(plan, self.quorum.ids, consents)
        held, self.seeds[epoch - 1] = self.seeds[epoch - 1], {}
        receipts = {name: DestructionReceipt(plan.digest, name, len(held.get(name, {})), 1) for name in self.quorum.ids}
        check_receipts(plan, self.quorum.ids, receipts)
        self.destroyed.add(epoch)

    def check(self) -> None:
        """For every epoch and every set of custodians."""
        for epoch, held in enumerate(self.seeds, start=1):
            if epoch in self.destroyed:
                assert not any(held.values()), "all of them together hold nothing of it"
                continue
            everything = {index: seed for seeds in held.values() for index, seed in seeds.items()}
            assert sorted(everything) == list(range(self.quorum.seed_count))
            root = derivation.root(derivation.contributions(everything, CONTEXT), CONTEXT)
            for size in range(len(self.quorum.ids) + 1):
                for members in combinations(self.quorum.ids, size):
                    joint = {index: seed for name in members for index, seed in held.get(name, {}).items()}
                    if self.quorum.is_qualified(members) and set(members) <= set(held):
                        assert derivation.root(derivation.contributions(joint, CONTEXT), CONTEXT) == root
                    if not self.quorum.is_qualified(members):
                        self.check_ignorant(epoch, members)

    def check_leavers(self) -> None:
        """Of the newest epoch those who left know nothing, so that together with any set that is no quorum they still
        lack a whole seed: every part of it, and what it was made of."""
        epoch = len(self.seeds)
        gone = {(number, index) for seen in self.left.values() for number, index, _ in seen}
        assert not [index for number, index in gone if number == epoch]
        for size in range(len(self.quorum.ids) + 1):
            for members in combinations(self.quorum.ids, size):
                if not self.quorum.is_qualified(members):
                    known = gone | {(number, index) for name in members for number, index, _ in self.seen[name]}
                    assert any((epoch, index) not in known for index in range(self.quorum.seed_count)), members

    def check_ignorant(self, epoch: int, members: tuple[str, ...]) -> None:
        """Some seed of the epoch is unknown to them, and so is every part of it, and every seed it came from; also with
        what those knew whose places some of them took."""
        seen = [self.seen[name] | self.left.get(name, set()) for name in members]
        known = {(number, index) for secrets in seen for number, index, _ in secrets}
        assert any(
            all((number, index) not in known for number in range(1, epoch + 1))
            for index in range(self.quorum.seed_count)
        ), members


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_quorum_derives_and_nothing_that_others_saw_helps_them(data: st.DataObject) -> None:
    quorum = data.draw(quorums(max_size=5))
    cluster = Cluster(quorum)
    cluster.make(quorum.ids)
    cluster.check()
    for _ in range(2):
        absent = data.draw(st.sets(st.sampled_from(quorum.ids), max_size=2))
        present = [name for name in quorum.ids if name not in absent]
        if not quorum.is_qualified(present) or quorum.is_qualified(absent):
            present, absent = list(quorum.ids), set()
        cluster.make(present, absent_at_most=len(absent))
        assert cluster.certificates[-1].absent == tuple(sorted(absent))
        cluster.check()
        for name in sorted(absent):
            cluster.repair(name)
        cluster.check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_so_it_is_before_and_after_a_replacement_and_a_destruction(data: st.DataObject) -> None:
    """Replace, then rotate, then destroy what was before: each in any order that the product allows."""
    quorum = data.draw(quorums(max_size=5))
    cluster = Cluster(quorum)
    cluster.make(quorum.ids)
    target = data.draw(st.sampled_from(quorum.ids))
    assume(quorum.indices_of(target))
    # Its co-holders have to hold all of its seeds between them: no seed may be its alone.
    assume(all(len(quorum.holders(index)) > 1 for index in quorum.indices_of(target)))
    cluster.replace(target)
    cluster.check()
    cluster.make(quorum.ids)
    cluster.check()
    cluster.check_leavers()
    cluster.destroy(1)
    cluster.check()
    cluster.check_leavers()
    cluster.make(quorum.ids)
    cluster.destroy(2)
    cluster.check()
    cluster.check_leavers()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whoever_may_make_an_epoch_is_a_quorum_and_no_two_such_sets_are_apart(data: st.DataObject) -> None:
    quorum = data.draw(quorums(max_size=5))
    plan = replace(Cluster(quorum).plan(0), kind=Kind.ROTATE, epoch=2, certificate="ab" * 32)
    plan = replace(plan, policy=KeyPolicy(absent_at_most=data.draw(st.integers(0, 5))))
    may: list[set[str]] = []
    for size in range(len(quorum.ids) + 1):
        for members in combinations(quorum.ids, size):
            try:
                check_present(plan, members)
            except RefusedError:
                continue
            may.append(set(members))
    assume(may)
    for one in may:
        assert quorum.is_qualified(one)
        assert all(any(name in one for name in quorum.holders(index)) for index in range(quorum.seed_count))
        assert all(one & other for other in may)
