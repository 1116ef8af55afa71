"""Typed errors survive the wire with reason, expectation, actual value and next step."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.errors import (
    KeyquorumError,
    MalformedError,
    Reason,
    RefusedError,
    StateError,
    UnavailableError,
)
from keyquorum_protos.wire.errors import from_status, to_status

KINDS = [MalformedError, RefusedError, UnavailableError, StateError, KeyquorumError]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_and_kind_round_trips(kind: type[KeyquorumError], reason: Reason) -> None:
    sent = kind(reason, "no", expected="a", actual="b", next_step="Do c", details={"custodian": "ch-1"})
    got = from_status(to_status(sent))
    assert type(got) is kind
    assert got.as_dict() == sent.as_dict()


def test_the_status_carries_one_error_info_in_our_domain() -> None:
    status = to_status(RefusedError(Reason.QUOTA, "too many", expected=3, actual=4))
    assert len(status.details) == 1
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("keyquorum", "QUOTA")
    assert dict(info.metadata) == {"kind": "refused", "expected": "3", "actual": "4"}


def test_an_unknown_reason_becomes_internal_and_keeps_the_text() -> None:
    packed = Any()
    packed.Pack(ErrorInfo(reason="FROM_THE_FUTURE", domain="keyquorum", metadata={"kind": "refused"}))
    got = from_status(Status(code=7, message="m", details=[packed]))
    assert (got.reason, got.message, got.details) == (Reason.INTERNAL, "m", {"peer_reason": "FROM_THE_FUTURE"})


def test_error_info_of_another_domain_is_not_ours() -> None:
    packed = Any()
    packed.Pack(ErrorInfo(reason="QUOTA", domain="example.com"))
    assert from_status(Status(code=8, message="m", details=[packed])).reason is Reason.INTERNAL


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=500)


@given(TEXT.map(lambda t: t * 10), st.dictionaries(TEXT, TEXT, max_size=40), st.binary())
def test_whatever_a_peer_sends_is_read_without_an_exception(
    message: str, metadata: dict[str, str], junk: bytes
) -> None:
    packed = Any()
    packed.Pack(ErrorInfo(reason="QUOTA", domain="keyquorum", metadata=metadata))
    broken = Any(type_url=packed.type_url, value=junk)
    for details in ([packed], [broken], [broken, packed]):
        error = from_status(Status(code=7, message=message, details=details))
        assert len(str(error)) < 10_000
        assert sum(len(k) + len(v) for k, v in error.details.items()) < 70_000


def test_an_error_for_people_names_every_part_and_no_terminal_escape() -> None:
    error = RefusedError(
        Reason.QUOTA,
        "too many\x1b[2J",
        expected="1",
        actual="2\x07",
        next_step="Wait",
        details={"custodian": "ch-1\u202e", "empty": ""},
    )
    assert error.for_people() == (
        "refused: QUOTA: too many\ufffd[2J\n  expected: 1\n  got: 2\ufffd\n  next step: Wait\n  custodian: ch-1\ufffd"
    )
