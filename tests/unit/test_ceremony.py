from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keyquorum_core import ceremony
from keyquorum_core.ceremony import Commitments, EpochCertificate, PartsHeader
from keyquorum_core.ceremony_checks import check_certificate, check_commitments, check_seeds
from keyquorum_core.ceremony_plan import CeremonyPlan, check_plan, new_ceremony_id
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.derivation import hkdf_sha256
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Quorum
from keyquorum_core.transcript import H, H_each, u64be
from tests.support.quorums import committee, quorums

ID = "000102030405060708090a0b0c0d0e0f"
QUORUM = Quorum({"at_least": 2}, committee(3))


def plan_for(quorum: Quorum) -> CeremonyPlan:
    return CeremonyPlan(
        ceremony_id=ID,
        key_id="demo",
        epoch=1,
        suite="MLKEM768_X25519",
        cluster="demo.local",
        roster_digest="ab" * 32,
        quorum=quorum,
        created_at=1_700_000_000,
    )


PLAN = plan_for(QUORUM)


def drawing(name: str) -> Callable[[int], bytes]:
    """Randomness that repeats from run to run, different for each name."""
    state = hashlib.shake_256(name.encode())
    count = iter(range(1 << 30))

    def draw(size: int) -> bytes:
        state.update(str(next(count)).encode())
        return state.digest(size)

    return draw


def all_parts(quorum: Quorum) -> dict[str, dict[int, bytes]]:
    """Each custodian's own parts."""
    return {name: ceremony.new_parts(quorum, name, drawing(name)) for name in quorum.ids}


def received(quorum: Quorum, parts: dict[str, dict[int, bytes]], me: str) -> dict[str, dict[int, bytes]]:
    """What ``me`` has after delivery when everyone sends every co-holder the same."""
    mine = set(quorum.indices_of(me))
    return {name: {i: part for i, part in held.items() if i in mine} for name, held in parts.items()}


def honest_seeds(quorum: Quorum) -> dict[str, dict[int, bytes]]:
    parts = all_parts(quorum)
    return {name: ceremony.derive_seeds(quorum, ID, name, received(quorum, parts, name)) for name in quorum.ids}


def stated_by(plan: CeremonyPlan, seeds: dict[str, dict[int, bytes]]) -> dict[str, Commitments]:
    headers = {name: hashlib.sha256(name.encode()).hexdigest() for name in seeds}
    return {name: Commitments.to_seeds(plan, name, held, headers) for name, held in seeds.items()}


# A whole run


@settings(max_examples=40, deadline=None)
@given(quorums())
def test_honest_custodians_derive_the_same_seeds_and_one_certificate(quorum: Quorum) -> None:
    plan = plan_for(quorum)
    seeds = honest_seeds(quorum)
    for index in range(quorum.seed_count):
        assert len({seeds[name][index] for name in quorum.holders(index)}) == 1
    assert len({value for held in seeds.values() for value in held.values()}) == quorum.seed_count
    stated = {name: Commitments.parse(statement.to_payload()) for name, statement in stated_by(plan, seeds).items()}
    agreed = check_commitments(plan, quorum, stated)
    certificate = check_certificate(agreed.to_payload(), plan, quorum, quorum.ids)
    assert certificate == agreed
    assert certificate.absent == ()
    for name in quorum.ids:
        assert set(seeds[name]) == set(quorum.indices_of(name))
        check_seeds(certificate, name, seeds[name])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whoever_gives_co_holders_unequal_parts_is_among_those_named(data: st.DataObject) -> None:
    quorum = data.draw(quorums())
    liar = data.draw(st.sampled_from(quorum.ids))
    shared = [i for i in quorum.indices_of(liar) if len(quorum.holders(i)) > 1]
    assume(shared)
    index = data.draw(st.sampled_from(shared))
    victim = data.draw(st.sampled_from([name for name in quorum.holders(index) if name != liar]))
    parts = all_parts(quorum)
    seeds = honest_seeds(quorum)
    given_to_victim = received(quorum, parts, victim)
    given_to_victim[liar] = given_to_victim[liar] | {index: bytes(32)}
    seeds[victim] = ceremony.derive_seeds(quorum, ID, victim, given_to_victim)
    error = mismatch(plan_for(quorum), seeds)
    assert error.details["index"] == str(index)
    assert liar in error.details["custodians"].split(",")
    for value in (seeds[victim][index], seeds[liar][index]):
        assert ceremony.commitment(ID, index, value).hex() in error.actual
        assert value.hex() not in str(error) + str(error.details)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whoever_commits_to_another_seed_is_among_those_named(data: st.DataObject) -> None:
    quorum = data.draw(quorums())
    liar = data.draw(st.sampled_from(quorum.ids))
    shared = [i for i in quorum.indices_of(liar) if len(quorum.holders(i)) > 1]
    assume(shared)
    index = data.draw(st.sampled_from(shared))
    seeds = honest_seeds(quorum)
    seeds[liar][index] = bytes(32)
    error = mismatch(plan_for(quorum), seeds)
    assert error.details["index"] == str(index)
    assert error.details[f"commitment.{liar}"] == ceremony.commitment(ID, index, bytes(32)).hex()
    if len(quorum.holders(index)) > 2:
        assert f"{liar}: {error.details[f'commitment.{liar}']}" in error.actual


def mismatch(plan: CeremonyPlan, seeds: dict[str, dict[int, bytes]]) -> RefusedError:
    with pytest.raises(RefusedError, match="committed differently") as caught:
        check_commitments(plan, plan.quorum, stated_by(plan, seeds))
    assert caught.value.reason == Reason.CEREMONY
    return caught.value


# Values


def test_values_are_bound_by_transcript_hashes() -> None:
    identity = bytes.fromhex(ID)
    assert ceremony.commitment(ID, 3, bytes(32)) == H("keyquorum/v1/commitment", identity, u64be(3), bytes(32))
    parts = {"b": b"\2" * 32, "a": b"\1" * 32}
    expected = hkdf_sha256(
        b"\1" * 32 + b"\2" * 32, salt=b"", info=H("keyquorum/v1/seed", identity, u64be(3)), length=32
    )
    assert ceremony.seed(ID, 3, parts) == expected


def test_values_are_pinned() -> None:
    assert ceremony.seed(ID, 3, {"b": b"\2" * 32, "a": b"\1" * 32}).hex() == (
        "d80813c70eb5806300489e6b3b34109b88930c0f7ba62797e1f6780b094c4055"
    )
    assert ceremony.commitment(ID, 3, bytes(32)).hex() == (
        "cbad78537917d9f3e596998036938f3b810c624f5fce22c65548c7db61d51cf2"
    )


def test_many_at_once_are_as_each_alone() -> None:
    seeds = {index: bytes([index]) * 32 for index in (0, 3, 250)}
    assert ceremony.commitments_to(ID, seeds) == {
        index: ceremony.commitment(ID, index, value) for index, value in seeds.items()
    }
    assert list(H_each("label", b"first", [(b"a", b""), (), (b"", b"b")])) == [
        H("label", b"first", b"a", b""),
        H("label", b"first"),
        H("label", b"first", b"", b"b"),
    ]
    parts = all_parts(QUORUM)
    for me in QUORUM.ids:
        for before in (None, {index: bytes([index]) * 32 for index in QUORUM.indices_of(me)}):
            found = ceremony.derive_seeds(QUORUM, ID, me, received(QUORUM, parts, me), before=before)
            assert found == {
                index: ceremony.seed(
                    ID,
                    index,
                    {name: parts[name][index] for name in QUORUM.holders(index)},
                    before[index] if before is not None else None,
                )
                for index in QUORUM.indices_of(me)
            }


@pytest.mark.parametrize("size", [0, 31, 33])
def test_many_at_once_refuse_what_one_would(size: int) -> None:
    with pytest.raises(MalformedError, match="bad seed size"):
        ceremony.commitments_to(ID, {0: bytes(32), 1: bytes(size)})
    given = received(QUORUM, all_parts(QUORUM), "ch-1")
    before = dict.fromkeys(QUORUM.indices_of("ch-1"), bytes(size))
    with pytest.raises(MalformedError, match="bad seed size"):
        ceremony.derive_seeds(QUORUM, ID, "ch-1", given, before=before)


def test_parts_are_fresh() -> None:
    first, second = (ceremony.new_parts(QUORUM, "ch-1") for _ in range(2))
    assert set(first) == set(second) == set(QUORUM.indices_of("ch-1"))
    assert len({*first.values(), *second.values()}) == 4
    assert len(new_ceremony_id()) == 32
    assert new_ceremony_id() != new_ceremony_id()


def test_wrong_values_are_malformed() -> None:
    for bad in ("", ID[:-1], ID.upper(), ID + "00", ID[:-1] + "\n"):
        with pytest.raises(MalformedError):
            ceremony.commitment(bad, 0, bytes(32))
    for size in (0, 31, 33):
        with pytest.raises(MalformedError):
            ceremony.commitment(ID, 0, bytes(size))
        with pytest.raises(MalformedError):
            ceremony.seed(ID, 0, {"a": bytes(size)})
    with pytest.raises(MalformedError):
        ceremony.seed(ID, 0, {})
    with pytest.raises(MalformedError):
        ceremony.commitment(ID, -1, bytes(32))
    with pytest.raises(MalformedError):
        ceremony.new_parts(QUORUM, "nobody")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda parts: parts.pop("de-1"), "de-1"),
        (lambda parts: parts["de-1"].popitem(), "de-1"),
        (lambda parts: parts["de-1"].update({0: bytes(32)}), "de-1"),
        (lambda parts: parts["fr-1"].update({1: bytes(31)}), "fr-1"),
        (lambda parts: parts.pop("ch-1"), "ch-1"),
    ],
)
def test_seeds_need_the_right_parts_of_everyone(change: Callable[[Any], object], named: str) -> None:
    parts = received(QUORUM, all_parts(QUORUM), "ch-1")
    change(parts)
    with pytest.raises(RefusedError) as caught:
        ceremony.derive_seeds(QUORUM, ID, "ch-1", parts)
    assert caught.value.reason == Reason.CEREMONY
    assert caught.value.details["custodians"] == named
    assert named in str(caught.value)
    with pytest.raises(MalformedError):
        ceremony.derive_seeds(QUORUM, ID, "ch-1", {"stranger": {}})


# Payload bytes


def test_plan_bytes_are_pinned() -> None:
    assert PLAN.to_payload() == (
        b'{"ceremony_id":"000102030405060708090a0b0c0d0e0f","certificate":"","cluster":"demo.local","created_at":1700000000,'
        b'"custodians":[{"id":"ch-1","jurisdiction":"CH"},{"id":"de-1","jurisdiction":"DE"},'
        b'{"id":"fr-1","jurisdiction":"FR"}],"epoch":1,"key_id":"demo","kind":"generate","ordered_by":"operators",'
        b'"policy":{"absent_at_most":1,"canary":false,"lease_seconds":3600,"reattest_seconds":1800,'
        b'"retain_seconds":2592000,"rotate_after_seconds":0},'
        b'"quorum":{"at_least":2},"roster_digest":"' + b"ab" * 32 + b'","suite":"MLKEM768_X25519","target":""}'
    )
    assert PLAN.digest == hashlib.sha256(PLAN.to_payload()).hexdigest()
    assert CeremonyPlan.parse(PLAN.to_payload()) == PLAN


HEADER = PartsHeader("cd" * 32, "ch-1", {"fr-1": "02" * 32, "de-1": "01" * 32})
COMMITMENTS = Commitments(
    "cd" * 32, "ch-1", {10: b"\x0a" * 32, 9: b"\x09" * 32}, {"fr-1": "02" * 32, "ch-1": "03" * 32}
)
CERTIFICATE = EpochCertificate(PLAN, tuple(bytes([i]) * 32 for i in range(3)))
ROTATION = dataclasses.replace(PLAN, kind=Kind.ROTATE, epoch=2, certificate="ef" * 32)
LACKING = EpochCertificate(ROTATION, CERTIFICATE.commitments, ("de-1",))


def test_header_bytes_are_pinned() -> None:
    assert HEADER.to_payload() == (
        b'{"custodian":"ch-1","plan_digest":"' + b"cd" * 32 + b'",'
        b'"recipients":{"de-1":"' + b"01" * 32 + b'","fr-1":"' + b"02" * 32 + b'"}}'
    )
    assert PartsHeader.parse(HEADER.to_payload()) == HEADER


def test_commitments_bytes_are_pinned() -> None:
    assert COMMITMENTS.to_payload() == (
        b'{"commitments":[[9,"' + b"09" * 32 + b'"],[10,"' + b"0a" * 32 + b'"]],'
        b'"custodian":"ch-1","headers":{"ch-1":"' + b"03" * 32 + b'","fr-1":"' + b"02" * 32 + b'"},'
        b'"plan_digest":"' + b"cd" * 32 + b'"}'
    )
    assert Commitments.parse(COMMITMENTS.to_payload()) == COMMITMENTS


def test_certificate_bytes_are_pinned() -> None:
    assert CERTIFICATE.to_payload() == (
        b'{"absent":[],"commitments":["' + b"00" * 32 + b'","' + b"01" * 32 + b'","' + b"02" * 32 + b'"],'
        b'"plan":' + PLAN.to_payload() + b',"plan_digest":"' + PLAN.digest.encode() + b'"}'
    )
    assert CERTIFICATE.digest == hashlib.sha256(CERTIFICATE.to_payload()).hexdigest()
    assert EpochCertificate.parse(CERTIFICATE.to_payload()) == CERTIFICATE
    assert LACKING.to_payload().startswith(b'{"absent":["de-1"],"commitments":[')
    assert LACKING.signers == ("ch-1", "fr-1")


Parser = Callable[[bytes], object]
PAYLOADS: list[tuple[Parser, bytes]] = [
    (CeremonyPlan.parse, PLAN.to_payload()),
    (PartsHeader.parse, HEADER.to_payload()),
    (Commitments.parse, COMMITMENTS.to_payload()),
    (EpochCertificate.parse, CERTIFICATE.to_payload()),
]
parsers = pytest.mark.parametrize(("parse", "payload"), PAYLOADS, ids=["plan", "header", "commitments", "certificate"])


@parsers
def test_parsers_refuse_other_forms_and_unknown_or_missing_members(parse: Parser, payload: bytes) -> None:
    value: dict[str, Any] = json.loads(payload)
    forms = [payload + b"\n", b" " + payload, payload[:-1], b"", b"[]", b"null", payload * 2, b"\xff" + payload]
    forms += [json.dumps(value).encode(), rfc8785.dumps({**value, "extra": 1})]
    forms += [rfc8785.dumps({k: v for k, v in value.items() if k != name}) for name in value]
    wrongs: tuple[Any, ...] = (None, 1.5, True, -1, "", "x" * 3000, [], {}, "A B", "ch-1\x00")
    forms += [rfc8785.dumps({**value, name: wrong}) for name in value for wrong in wrongs if value[name] != wrong]
    digests = [name for name in value if name.endswith("digest")]
    forms += [rfc8785.dumps({**value, name: value[name].upper()}) for name in digests]
    forms.append(payload.replace(b'"ch-1"', b'"\\ud800"'))
    # Nobody to send to and nothing to commit to are well-formed.
    allowed = [payload]
    if parse != EpochCertificate.parse:
        allowed += [
            rfc8785.dumps({**value, name: nothing})
            for name, nothing in (("recipients", {}), ("commitments", []), ("headers", {}))
        ]
    for form in (form for form in forms if form not in allowed):
        with pytest.raises(KeyquorumError):
            parse(form)


@parsers
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_another_value_or_refused(parse: Parser, payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    changed = bytearray(payload)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        value = parse(bytes(changed))
    except KeyquorumError:
        return
    assert value != parse(payload)


def test_commitments_repeated_or_out_of_order_are_refused() -> None:
    one = "00" * 32
    lists: list[Any] = [
        [[1, one], [1, one]],
        [[2, one], [1, one]],
        [[1]],
        [[1, one, one]],
        [1],
        [["1", one]],
        [[True, one]],
        [[-1, one]],
        [[1, one.upper() + "A"]],
    ]
    for pairs in lists:
        value = {"plan_digest": "cd" * 32, "custodian": "ch-1", "commitments": pairs, "headers": {}}
        payload = rfc8785.dumps(value)
        with pytest.raises(MalformedError):
            Commitments.parse(payload)


@pytest.mark.parametrize(
    "change",
    [
        {"ceremony_id": ID.upper()},
        {"kind": "refresh"},
        {"ordered_by": "chance"},
        {"ordered_by": "policy"},
        {"certificate": "ab" * 32},
        {"certificate": "AB"},
        {"target": "ch-1"},
        {"kind": Kind.ROTATE},
        {"kind": Kind.ROTATE, "certificate": "ab" * 32},
        {"kind": Kind.ROTATE, "epoch": 2},
        {"kind": Kind.DESTROY},
        {"kind": Kind.DESTROY, "certificate": "ab" * 32, "target": "ch-1"},
        {"kind": Kind.REPAIR, "certificate": "ab" * 32},
        {"kind": Kind.REPAIR, "certificate": "ab" * 32, "target": "nobody"},
        {"kind": Kind.REPLACE, "certificate": "ab" * 32, "target": "ch-1", "ordered_by": "policy"},
        {"key_id": "Demo"},
        {"key_id": ""},
        {"epoch": 0},
        {"epoch": 2**53},
        {"suite": "a suite"},
        {"cluster": "demo/local"},
        {"roster_digest": "ab"},
        {"created_at": -1},
    ],
    ids=str,
)
def test_plans_outside_the_format_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(PLAN, **change)


# Checks


def test_plans_for_others_are_refused() -> None:
    check_plan(PLAN, cluster="demo.local", roster_digest="ab" * 32, quorum=QUORUM)
    for change in (
        {"cluster": "other"},
        {"roster_digest": "ac" * 32},
        {"quorum": Quorum({"at_least": 3}, committee(3))},
    ):
        arguments: dict[str, Any] = {"cluster": "demo.local", "roster_digest": "ab" * 32, "quorum": QUORUM, **change}
        with pytest.raises(RefusedError, match=next(iter(change)).split("_")[0]):
            check_plan(PLAN, **arguments)


def test_commitments_short_long_missing_or_misattributed_are_refused_naming_the_custodian() -> None:
    good = stated_by(PLAN, honest_seeds(QUORUM))
    check_commitments(PLAN, QUORUM, good)
    mine = good["de-1"]
    short = {i: value for i, value in mine.commitments.items() if i != 0}
    bad: list[tuple[dict[str, Commitments], str]] = [
        ({**good, "de-1": dataclasses.replace(mine, commitments=short)}, "wrong seeds"),
        ({**good, "de-1": dataclasses.replace(mine, commitments={**mine.commitments, 1: bytes(32)})}, "wrong seeds"),
        ({**good, "de-1": dataclasses.replace(mine, commitments={**mine.commitments, 77: bytes(32)})}, "wrong seeds"),
        ({**good, "de-1": good["fr-1"]}, "another custodian's name"),
        ({**good, "de-1": dataclasses.replace(mine, plan_digest="00" * 32)}, "another plan"),
        ({name: statement for name, statement in good.items() if name != "de-1"}, "too many custodians are absent"),
        (
            {**good, "ch-1": dataclasses.replace(good["ch-1"], headers={"ch-1": "0" * 64, "fr-1": "0" * 64})},
            "was told of other participants",
        ),
    ]
    for stated, message in bad:
        with pytest.raises(RefusedError, match=message) as caught:
            check_commitments(PLAN, QUORUM, stated)
        assert caught.value.reason == Reason.CEREMONY
        assert caught.value.details["custodians"] == "de-1"
        assert "de-1" in str(caught.value)
    # One that says it went by another header of a co-holder's may lie itself: it is named with the author.
    lie = dataclasses.replace(mine, headers={**mine.headers, "fr-1": "0" * 64})
    with pytest.raises(RefusedError, match="different headers of fr-1") as caught:
        check_commitments(PLAN, QUORUM, {**good, "de-1": lie})
    assert caught.value.details["custodians"] == "de-1,fr-1"
    with pytest.raises(RefusedError, match="not of the key's committee"):
        check_commitments(PLAN, QUORUM, {**good, "xx-1": mine})
    with pytest.raises(RefusedError, match="another quorum"):
        check_commitments(PLAN, Quorum({"at_least": 3}, committee(3)), good)


def test_certificates_must_fit_plan_quorum_and_signers() -> None:
    payload = CERTIFICATE.to_payload()
    check_certificate(payload, PLAN, QUORUM, ["fr-1", "ch-1", "de-1"])
    with pytest.raises(RefusedError, match="not signed by all who made the epoch, and nobody else: fr-1"):
        check_certificate(payload, PLAN, QUORUM, ["ch-1", "de-1"])
    with pytest.raises(RefusedError, match="not signed by all who made the epoch, and nobody else: xx-1"):
        check_certificate(payload, PLAN, QUORUM, [*QUORUM.ids, "xx-1"])
    with pytest.raises(RefusedError, match="another plan or quorum"):
        check_certificate(payload, dataclasses.replace(PLAN, created_at=2), QUORUM, QUORUM.ids)
    with pytest.raises(RefusedError, match="another plan or quorum"):
        check_certificate(payload, PLAN, Quorum({"at_least": 3}, committee(3)), QUORUM.ids)
    for commitments in ((), CERTIFICATE.commitments[:2], (*CERTIFICATE.commitments, bytes(32))):
        wrong = EpochCertificate(PLAN, commitments).to_payload()
        with pytest.raises(MalformedError, match="wrong number of commitments"):
            check_certificate(wrong, PLAN, QUORUM, QUORUM.ids)
    other = payload.replace(PLAN.digest.encode(), b"0" * 64)
    with pytest.raises(MalformedError, match="names another plan"):
        check_certificate(other, PLAN, QUORUM, QUORUM.ids)


def test_seeds_on_disk_are_checked_against_the_certificate() -> None:
    seeds = honest_seeds(QUORUM)
    certificate = check_commitments(PLAN, QUORUM, stated_by(PLAN, seeds))
    mine = seeds["de-1"]
    check_seeds(certificate, "de-1", mine)
    with pytest.raises(RefusedError, match="seed 0 is not the one") as caught:
        check_seeds(certificate, "de-1", {**mine, 0: mine[2]})
    assert mine[2].hex() not in str(caught.value)
    for wrong in ({}, {0: mine[0]}, {**mine, 1: bytes(32)}):
        with pytest.raises(RefusedError, match="wrong seeds"):
            check_seeds(certificate, "de-1", wrong)
    with pytest.raises(MalformedError):
        check_seeds(certificate, "de-1", {**mine, 0: b"short"})
