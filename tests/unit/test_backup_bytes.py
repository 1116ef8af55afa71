"""The exact bytes of what a backup says of itself and of what peers say to one that was restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from keyquorum_core import testimony
from keyquorum_core.backup import BackedEpoch, Opening, Statement
from keyquorum_core.errors import KeyquorumError, MalformedError
from tests.support.backup_samples import OPENING, STATEMENT, TESTIMONY

PINNED: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "opening": (
        b'{"backup_id":"' + b"0b" * 16 + b'","cluster":"demo","custodian":"ch-1","format":1,"recipients":['
        b'{"fingerprint":"'
        + b"aa" * 32
        + b'","sealed":"AQI="},{"fingerprint":"'
        + b"bb" * 32
        + b'","sealed":"Aw=="}]}',
        Opening.parse,
    ),
    "statement": (
        b'{"backup_id":"' + b"0b" * 16 + b'","body_bytes":4096,"body_sha256":"' + b"02" * 32 + b'","cluster":"demo",'
        b'"created_at":1800000000,"custodian":"ch-1","epochs":[{"certificate":"' + b"0a" * 32 + b'","epoch":3,'
        b'"held":"keystore","key_id":"demo","seeds":6,"state":"active"},{"certificate":"' + b"0c" * 32 + b'","epoch":4,'
        b'"held":"token","key_id":"demo","seeds":0,"state":"active"}],"highest_time":1800000001,"jurisdiction":"CH",'
        b'"ledger_size":20411,"opening_sha256":"' + b"01" * 32 + b'","roster_digest":"' + b"5e" * 32 + b'",'
        b'"roster_version":2,"sequence":41}',
        Statement.parse,
    ),
    "testimony": (
        b'{"custodian":"de-1","documents":{"inventory":{"digest":"' + b"0e" * 32 + b'","version":7}},"epochs":['
        b'{"certificate":"' + b"0a" * 32 + b'","epoch":3,"key_id":"demo","retired_at":1799999000,"state":"retired"}],'
        b'"ledger":{"log":"'
        + b"0f" * 32
        + b'","root":"'
        + b"10" * 32
        + b'","size":20411},"nonce":"'
        + b"0d" * 32
        + b'",'
        b'"restored":false,"roster":{"digest":"' + b"5e" * 32 + b'","version":2},"subject":"ch-1","time":1800000002}',
        testimony.Testimony.parse,
    ),
}


@pytest.mark.parametrize(("name", "value"), [("opening", OPENING), ("statement", STATEMENT), ("testimony", TESTIMONY)])
def test_the_byte_layout_is_pinned(name: str, value: Opening | Statement | testimony.Testimony) -> None:
    payload, parse = PINNED[name]
    assert value.payload() == payload
    assert parse(payload) == value


@pytest.mark.parametrize("name", PINNED)
def test_nothing_but_the_canonical_bytes_is_read(name: str) -> None:
    payload, parse = PINNED[name]
    for spoilt in (
        payload.replace(b",", b", ", 1),
        payload[:-1] + b',"zz":1}',
        payload[:-1],
        payload.replace(b'"custodian"', b'"Custodian"', 1),
        payload.replace(b"18000000", b"1.8000000", 1).replace(b'"format":1', b'"format":2'),
    ):
        with pytest.raises(KeyquorumError):
            parse(spoilt)


def test_what_a_backup_can_t_be_is_not_made() -> None:
    for change in ({"sequence": 0}, {"roster_version": 0}, {"created_at": -1}, {"body_sha256": "x"}):
        with pytest.raises(MalformedError):
            dataclasses.replace(STATEMENT, **change)
    with pytest.raises(MalformedError):
        dataclasses.replace(STATEMENT, epochs=STATEMENT.epochs[::-1])
    with pytest.raises(MalformedError):
        dataclasses.replace(OPENING, recipients=OPENING.recipients[::-1])
    with pytest.raises(MalformedError):
        BackedEpoch("demo", 1, "asleep", "0a" * 32, 1)
