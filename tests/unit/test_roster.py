"""Rosters: signed by enough pinned operators, current, never older than the last; cards prove their identity."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.witness_keys import WitnessKeys
from keyquorum_core.roster import (
    CARD_TYPE,
    MAX_COSIGNERS,
    ROSTER_TYPE,
    EnrolmentCard,
    Operator,
    Roster,
    RosterCustodian,
    make_card,
    open_card,
    open_roster,
    sign_roster,
)
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, PublicIdentity, merge, sign

NOW = 1_800_000_000
PEM = "-----BEGIN CERTIFICATE-----\n" + base64.b64encode(b"certificate " * 4).decode() + "\n-----END CERTIFICATE-----\n"


def identity(seed: int) -> Identity:
    return Identity.from_seeds(bytes([seed]) * 32, bytes([seed + 100]) * 32)


def witness(number: int, name: str) -> WitnessKeys:
    return Cosigner.from_seeds(f"demo/{name}", bytes([number + 20]) * 32, bytes([number + 120]) * 32).witness_key


def custodian(number: int, name: str, jurisdiction: str) -> RosterCustodian:
    hpke = RecipientKey.from_seed_bytes(b"\x00\x0fMLKEM768_X25519" + bytes([number]) * 32).public
    public = identity(number).public
    return RosterCustodian(name, jurisdiction, f"{name}.example:700{number}", public, hpke, PEM, witness(number, name))


CUSTODIANS = (custodian(1, "ch-1", "CH"), custodian(2, "de-1", "DE"), custodian(3, "us-1", "US"))
OPERATORS = {"ann": identity(11), "ben": identity(12), "cleo": identity(13)}
PINNED = {name: operator.public for name, operator in OPERATORS.items()}
LOG = LogSigner.from_seeds("demo/ledger", bytes([60]) * 32, bytes([160]) * 32)
ROSTER = Roster(
    cluster="demo",
    version=7,
    issued_at=NOW,
    expires_at=NOW + 1000,
    committee="main",
    custodians=CUSTODIANS,
    quorum={"at_least": 2, "jurisdictions": 2},
    operators=tuple(Operator(name, public) for name, public in PINNED.items()),
    operator_threshold=2,
    coordinator_tls=(PEM,),
    log_key=LOG.keys,
    log_url="https://log.example/demo",
    previous="ab" * 32,
)
SIGNED = sign_roster(ROSTER, (OPERATORS["ann"], OPERATORS["cleo"]))
CARD = EnrolmentCard("demo", CUSTODIANS[0], NOW)


def open_(envelope: bytes = SIGNED, now: int = NOW, threshold: int = 2, **more: Any) -> Roster:
    return open_roster(envelope, PINNED, threshold, now, **more)


def test_layout_of_the_roster_is_pinned() -> None:
    payload = ROSTER.payload()
    tree = json.loads(payload)
    assert rfc8785.dumps(tree) == payload
    assert sorted(tree) == [
        "cluster", "committee", "coordinator_tls", "custodians", "expires_at", "issued_at", "log_key",
        "log_url", "operator_threshold", "operators", "previous", "quorum", "version",
    ]  # fmt: skip
    assert sorted(tree["custodians"][0]) == [
        "address", "hpke", "id", "identity", "jurisdiction", "tls_certificate", "witness_key",
    ]  # fmt: skip
    assert tree["log_key"] == LOG.keys.encode()
    assert tree["custodians"][0]["witness_key"] == witness(1, "ch-1").encode()
    assert sorted(tree["operators"][0]) == ["identity", "name"]
    assert (
        ROSTER.digest
        == hashlib.sha256(payload).hexdigest()
        == "ac59c36e433e4ac7150f6c48839c928efd339fbcd903fe66e84e04e0c157ff76"
    )


def test_layout_of_the_enrolment_card_is_pinned() -> None:
    payload = CARD.payload()
    assert rfc8785.dumps(json.loads(payload)) == payload
    assert sorted(json.loads(payload)) == ["cluster", "custodian", "issued_at"]
    assert hashlib.sha256(payload).hexdigest() == "c8aa22904ccd0e83a597a973c585853d31798516fb5501a75e97aac27bdddeb8"


def test_a_roster_signed_by_enough_operators_opens() -> None:
    roster = open_(cluster="demo", minimum_version=7)
    assert roster == ROSTER
    assert roster.payload() == ROSTER.payload()
    assert roster.quorum_of().ids == ("ch-1", "de-1", "us-1")
    assert roster.custodian("de-1") == CUSTODIANS[1]
    assert roster.operator_identities() == PINNED
    assert open_(merge([sign_roster(ROSTER, [OPERATORS["ben"]]), sign_roster(ROSTER, [OPERATORS["ann"]])])) == ROSTER


def test_order_of_custodians_and_operators_does_not_matter() -> None:
    other = dataclasses.replace(ROSTER, custodians=CUSTODIANS[::-1], operators=ROSTER.operators[::-1])
    assert other.payload() == ROSTER.payload()


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (sign_roster(ROSTER, (OPERATORS["ann"],)), Reason.SIGNATURE_MISSING),
        (sign_roster(ROSTER, ()), Reason.SIGNATURE_MISSING),
        (sign_roster(ROSTER, (OPERATORS["ann"], OPERATORS["ann"])), Reason.SIGNATURE_EXTRA),
        (sign_roster(ROSTER, (OPERATORS["ann"], identity(99))), Reason.SIGNATURE),
        (sign_roster(ROSTER, (identity(1), identity(2))), Reason.SIGNATURE),
    ],
    ids=["too few", "none", "one twice", "a stranger beside", "custodians instead"],
)
def test_a_roster_not_signed_by_pinned_operators_is_refused(envelope: bytes, reason: Reason) -> None:
    with pytest.raises(RefusedError) as caught:
        open_(envelope)
    assert caught.value.reason is reason


def test_a_roster_is_verified_by_pinned_operators_not_by_those_it_names() -> None:
    usurper = Operator("eve", identity(50).public)
    coup = dataclasses.replace(ROSTER, operators=(usurper,), operator_threshold=1)
    with pytest.raises(RefusedError) as caught:
        open_(sign_roster(coup, (identity(50),)), threshold=1)
    assert caught.value.reason is Reason.SIGNATURE


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"now": NOW - 1}, Reason.NOT_YET_VALID),
        ({"now": NOW + 1000}, Reason.EXPIRED),
        ({"minimum_version": 8}, Reason.ROSTER),
        ({"cluster": "prod"}, Reason.ROSTER),
    ],
    ids=str,
)
def test_a_stale_or_foreign_roster_is_refused(arguments: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(RefusedError) as caught:
        open_(**arguments)
    assert caught.value.reason is reason


def test_an_unknown_custodian_is_refused_by_name() -> None:
    with pytest.raises(RefusedError) as caught:
        ROSTER.custodian("fr-1")
    assert caught.value.reason is Reason.UNKNOWN_CUSTODIAN
    assert "ch-1, de-1, us-1" in str(caught.value)


def swapped(**changes: Any) -> tuple[RosterCustodian, ...]:
    return (CUSTODIANS[0], dataclasses.replace(CUSTODIANS[1], **changes), CUSTODIANS[2])


@pytest.mark.parametrize(
    "change",
    [
        {"custodians": CUSTODIANS[:1]},
        {"custodians": (*CUSTODIANS, CUSTODIANS[0])},
        {"custodians": swapped(identity=CUSTODIANS[0].identity)},
        {"custodians": swapped(hpke=CUSTODIANS[0].hpke)},
        {"custodians": swapped(address=CUSTODIANS[0].address)},
        {"custodians": swapped(identity=PINNED["ann"])},
        {"custodians": swapped(identity=PublicIdentity.from_bytes(
            CUSTODIANS[0].identity.ed25519 + CUSTODIANS[1].identity.ml_dsa_65))},
        {"quorum": {"at_least": 1}},
        {"quorum": {"at_least": 4}},
        {"quorum": {"surprise": 1}},
        {"operators": ()},
        {"operators": ROSTER.operators * 2},
        {"operator_threshold": 0},
        {"operator_threshold": 4},
        {"version": 0},
        {"expires_at": NOW},
        {"cluster": "Demo"},
        {"committee": ""},
        {"coordinator_tls": ()},
        {"coordinator_tls": ("PEM",)},
        {"custodians": swapped(witness_key=CUSTODIANS[0].witness_key)},
        {"custodians": swapped(witness_key=witness(1, "de-1"))},
        {"custodians": swapped(witness_key=witness(2, "de-2"))},
        {"log_key": LogSigner.from_seeds("demo/ch-1", bytes([60]) * 32, bytes([160]) * 32).keys},
        {"log_key": LogSigner.from_seeds("demo/ledger", bytes([21]) * 32, bytes([160]) * 32).keys},
        {"log_key": LogSigner.from_seeds("demo/ledger", bytes([1]) * 32, bytes([160]) * 32).keys},
        {"log_url": "ftp://log.example"},
        {"log_url": "https://log.example/"},
        {"log_url": "https://log.example/?x"},
    ],
    ids=lambda c: f"{next(iter(c))} {len(str(c))}",
)  # fmt: skip
def test_a_roster_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises((MalformedError, RefusedError)) as caught:
        dataclasses.replace(ROSTER, **change)
    assert caught.value.reason in (Reason.ROSTER, Reason.QUORUM_RULE, Reason.MALFORMED)


@pytest.mark.parametrize(
    "change",
    [{"id": "CH 1"}, {"jurisdiction": "ch"}, {"address": "host"}, {"address": "host:0"}, {"address": "host:65536"},
     {"address": "ho st:1"}, {"hpke": b""}, {"hpke": b"\x00\x03FOO"}, {"tls_certificate": PEM[:-3]},
     {"tls_certificate": PEM + PEM}, {"tls_certificate": PEM.replace("CERT", "PRIV")}],
    ids=str,
)  # fmt: skip
def test_a_custodian_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises((MalformedError, RefusedError)):
        dataclasses.replace(CUSTODIANS[0], **change)


@pytest.mark.parametrize("address", ["localhost:7001", "10.0.0.1:1", "[::1]:65535", "ch-1.example.org:443"])
def test_addresses_are_host_and_port(address: str) -> None:
    assert dataclasses.replace(CUSTODIANS[0], address=address).address == address


def test_only_canonical_payloads_are_accepted() -> None:
    tree = json.loads(ROSTER.payload())
    unsorted = rfc8785.dumps({**tree, "custodians": tree["custodians"][::-1]})
    for payload in (ROSTER.payload() + b"\n", unsorted, ROSTER.payload()[:-1] + b',"x":1}'):
        with pytest.raises(MalformedError):
            open_(sign_two(payload))


def sign_two(payload: bytes) -> bytes:
    return merge([sign(OPERATORS["ann"], ROSTER_TYPE, payload), sign(OPERATORS["ben"], ROSTER_TYPE, payload)])


def test_a_card_opens_and_becomes_the_roster_entry() -> None:
    card = open_card(make_card(CARD, identity(1)), cluster="demo")
    assert card == CARD
    assert card.custodian == ROSTER.custodian("ch-1")


def test_a_card_must_be_signed_by_the_identity_in_it() -> None:
    with pytest.raises(MalformedError):
        make_card(CARD, identity(2))
    with pytest.raises(RefusedError) as caught:
        open_card(sign(identity(2), CARD_TYPE, CARD.payload()), cluster="demo")
    assert caught.value.reason is Reason.SIGNATURE
    with pytest.raises(RefusedError) as caught:
        open_card(make_card(CARD, identity(1)), cluster="prod")
    assert caught.value.reason is Reason.ROSTER


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    for parse in (Roster.parse, EnrolmentCard.parse, open_, lambda d: open_card(d, cluster="demo")):
        with pytest.raises(KeyquorumError):
            parse(data)


@given(st.sampled_from((ROSTER.payload(), CARD.payload())), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_payloads_raise_only_our_errors(good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good)))
    twin = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
    for parse in (Roster.parse, EnrolmentCard.parse):
        with contextlib.suppress(KeyquorumError):
            parse(twin)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x), max_leaves=4)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_roster_shaped_json_raises_only_our_errors(data: st.DataObject) -> None:
    tree = json.loads(ROSTER.payload())
    part = data.draw(st.sampled_from((tree, tree["custodians"][1], tree["operators"][0], tree["quorum"])))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    with contextlib.suppress(KeyquorumError):
        Roster.parse(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def test_a_roster_without_a_log_can_be_made_and_names_none() -> None:
    bare = dataclasses.replace(ROSTER, log_key=None, log_url="")
    tree = json.loads(bare.payload())
    assert (tree["log_key"], tree["log_url"]) == ("", "")
    assert Roster.parse(bare.payload()).log_key is None


@pytest.mark.parametrize(
    "text",
    [LOG.keys.encode()[:-4], LOG.keys.ed25519.encode(), " ".join(LOG.keys.encode().split()[::-1]),
     witness(1, "ch-1").encode(), LOG.keys.encode().replace(LOG.keys.ed25519.key_id.hex(), "00000000")],
    ids=["cut short", "one key", "swapped", "a witness's", "another key id"],
)  # fmt: skip
def test_a_log_key_is_the_two_keys_of_one_log(text: str) -> None:
    tree = json.loads(ROSTER.payload())
    with pytest.raises(MalformedError):
        Roster.parse(rfc8785.dumps({**tree, "log_key": text}))


@pytest.mark.parametrize(
    "text",
    [LOG.keys.encode(), witness(1, "ch-1").ed25519.encode(), " ".join(witness(1, "ch-1").encode().split()[::-1]), ""],
    ids=["the log's", "one key", "swapped", "none"],
)
def test_a_witness_key_is_the_two_keys_of_one_witness(text: str) -> None:
    tree = json.loads(ROSTER.payload())
    tree["custodians"][0]["witness_key"] = text
    with pytest.raises(MalformedError):
        Roster.parse(rfc8785.dumps(tree))


def test_a_quorum_that_no_checkpoint_could_carry_is_refused_where_a_log_runs() -> None:
    many = tuple(custodian(number, f"c-{number}", "CH") for number in range(1, 10))
    big: dict[str, Any] = {"custodians": many, "quorum": {"at_least": MAX_COSIGNERS + 1}}
    assert dataclasses.replace(ROSTER, **big, log_key=None).quorum_of().seed_count > 0
    with pytest.raises(MalformedError) as caught:
        dataclasses.replace(ROSTER, **big)
    assert caught.value.reason is Reason.ROSTER
    assert dataclasses.replace(ROSTER, custodians=many, quorum={"at_least": MAX_COSIGNERS}).witnesses().keys() == {
        custodian.id for custodian in many
    }


def test_a_card_for_another_name_than_the_witness_keys_cannot_be_made() -> None:
    with pytest.raises(MalformedError):
        EnrolmentCard("demo", dataclasses.replace(CUSTODIANS[0], witness_key=witness(1, "ch-2")), NOW)
    with pytest.raises(MalformedError):
        EnrolmentCard("prod", CUSTODIANS[0], NOW)
