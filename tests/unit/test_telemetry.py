"""Telemetry: exact bytes, and a chain that nothing can be taken from, put into or moved in."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.signing import Identity, PublicIdentity
from keyquorum_core.telemetry import (
    NO_BATCH,
    Batch,
    Chain,
    Record,
    open_batch,
    open_records,
    seal_records,
    sign_batch,
    worker_digest,
)
from tests.support import signed_vectors

NOW = 1_800_000_000
JOB = "abcdefghijklmnopqrstuvwxyz"
WORKER = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
MAKER = WORKER.public.to_bytes()
KEY = b"\x07" * 32
MEMBERS: dict[str, Any] = {
    "job_id": JOB,
    "worker": worker_digest(WORKER.public),
    "sequence": 0,
    "previous_sha256": NO_BATCH,
    "first_at": NOW,
    "last_at": NOW + 5,
    "records": 1,
    "content_sha256": "22" * 32,
    "content_size": 100,
    "last": False,
}


def envelopes(count: int, *, ended: bool = True) -> list[bytes]:
    """A chain of this many batches."""
    out: list[bytes] = []
    for sequence in range(count):
        previous = hashlib.sha256(out[-1]).hexdigest() if out else NO_BATCH
        last = ended and sequence == count - 1
        batch = Batch(**{**MEMBERS, "sequence": sequence, "previous_sha256": previous, "last": last})
        out.append(sign_batch(batch, WORKER))
    return out


def replay(vector: signed_vectors.Vector) -> object:
    signer = PublicIdentity.from_bytes(vector["signer"])
    if vector["operation"] == "batch":
        return open_batch(vector["envelope"], signer, vector["job"]).payload()
    batch = Batch.parse(vector["payload"])
    content = bytes.fromhex(vector["content"])
    records = open_records(bytes.fromhex(vector["key"]), content, batch, vector["signer"])
    return hashlib.sha256(b"".join(record.to_bytes() + b"\n" for record in records)).hexdigest()


@pytest.mark.parametrize("vector", signed_vectors.load("telemetry")["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    if vector["expect"] == "ok":
        assert replay(vector) == vector["payload" if vector["operation"] == "batch" else "plaintext_sha256"]
    else:
        with pytest.raises(KeyquorumError) as caught:
            replay(vector)
        assert caught.value.reason == vector["expect"]


def test_the_bytes_of_a_statement_and_a_record_are_pinned() -> None:
    assert Batch(**{**MEMBERS, "worker": "33" * 32, "last": True, "reason": "LEASE"}).payload() == (
        b'{"content_sha256":"' + b"22" * 32 + b'","content_size":100,"first_at":1800000000,"job_id":"' + JOB.encode()
        + b'","last":true,"last_at":1800000005,"previous_sha256":"' + NO_BATCH.encode()
        + b'","reason":"LEASE","records":1,"sequence":0,"worker":"' + b"33" * 32 + b'"}'
    )  # fmt: skip
    record = Record(NOW, "lease-renewed", {"seconds": 3600, "by": "a quorum"})
    assert record.to_bytes() == (
        b'{"event":"lease-renewed","time":1800000000,"values":{"by":"a quorum","seconds":3600}}'
    )


def test_a_whole_chain_is_taken_and_says_that_it_is_whole() -> None:
    chain = Chain(JOB, WORKER.public)
    *most, last = envelopes(4)
    for envelope in most:
        chain.take(envelope)
        assert not chain.complete
    chain.take(last)
    assert chain.complete
    with pytest.raises(RefusedError) as caught:
        chain.take(envelopes(1)[0])
    assert caught.value.reason is Reason.DIGEST


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 4))
def test_any_other_order_or_choice_of_batches_breaks_it(order: list[int], count: int) -> None:
    made = envelopes(4)
    chosen = order[:count]
    chain = Chain(JOB, WORKER.public)
    taken = 0
    for expected, number in enumerate(chosen):
        if number != expected:
            with pytest.raises(RefusedError) as caught:
                chain.take(made[number])
            assert caught.value.reason is Reason.DIGEST
            break
        chain.take(made[number])
        taken += 1
    assert chain.length == taken
    assert chain.complete == (chosen == [0, 1, 2, 3])


def test_a_batch_of_another_chain_does_not_follow() -> None:
    """Signed by the same worker about the same job, after another first batch."""
    chain = Chain(JOB, WORKER.public)
    chain.take(envelopes(2)[0])
    with pytest.raises(RefusedError) as caught:
        chain.take(envelopes(2)[1])  # ML-DSA signatures are randomised: this chain's first batch is another
    assert caught.value.reason is Reason.DIGEST


def test_records_come_back_as_they_were() -> None:
    records = (Record(NOW, "usage", {"memory_bytes": 2**40, "step": "über"}), Record(NOW + 1, "ended", {}))
    content = seal_records(KEY, records, JOB, MAKER, 3)
    batch = Batch(
        **{
            **MEMBERS,
            "sequence": 3,
            "previous_sha256": "11" * 32,
            "records": 2,
            "content_sha256": hashlib.sha256(content).hexdigest(),
            "content_size": len(content),
        }
    )
    assert open_records(KEY, content, batch, MAKER) == records
    for key, maker in ((b"\x08" * 32, MAKER), (KEY, Identity.generate().public.to_bytes())):
        with pytest.raises(RefusedError) as caught:
            open_records(key, content, batch, maker)
        assert caught.value.reason is Reason.ARTIFACT


@pytest.mark.parametrize(
    ("event", "values"),
    [
        ("Usage", {}),
        ("", {}),
        ("usage", {"Name": 1}),
        ("usage", {"a": "x" * 257}),
        ("usage", {"a": "\x1b[31m"}),
        ("usage", {"a": 2**53}),
        ("usage", {"a": True}),
        ("usage", {"a": 1.5}),
        ("usage", {f"n{number}": "x" * 200 for number in range(5)}),
    ],
)
def test_records_of_anything_else_are_refused(event: str, values: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        Record(NOW, event, values)


@given(st.binary(max_size=200))
def test_nothing_but_typed_errors_comes_of_other_bytes(data: bytes) -> None:
    for read in (Record.parse, Batch.parse):
        with pytest.raises(MalformedError):
            read(data)
