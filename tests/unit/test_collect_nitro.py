"""Nitro collection: the request to ``/dev/nsm`` byte for byte, and answers that are none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest

from keyquorum_core.attestation.nitro_verdict import judge_nitro
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_gpu_worker.evidence.nitro import Nitro, attestation_request
from tests.support.bindings import BINDING
from tests.support.genuine import nitro_reference
from tests.support.kernel import Nsm
from tests.support.nitro_vendor import NOW, nitro_vendor


def attested(request: bytes) -> bytes:
    """What the module does: the members of the request, in a signed document."""
    asked = cbor2.loads(request)["Attestation"]
    document = nitro_vendor().document(**asked)
    return cbor2.dumps({"Attestation": {"document": document}})


def source(tmp_path: Path, nsm: Any) -> Nitro:
    (tmp_path / "nsm").touch()
    return Nitro(tmp_path / "nsm", nsm)


def test_the_request_is_pinned_and_the_document_binds_keys_and_challenge(tmp_path: Path) -> None:
    nsm = Nsm(attested)
    item = source(tmp_path, nsm).collect(BINDING)
    ((number, request),) = nsm.asked
    assert number == Nitro.RAW == 0xC0200A00  # _IOWR(0x0a, 0, 32 bytes)
    assert request == (
        b"\xa1\x6bAttestation\xa3\x69user_data\xf6\x65nonce\x58\x20" + BINDING.challenge
        + b"\x6apublic_key\x58\x40" + BINDING.report_data
    )  # fmt: skip
    members = {"user_data": None, "nonce": BINDING.challenge, "public_key": BINDING.report_data}
    assert request == cbor2.dumps({"Attestation": members})
    assert (item.type, item.endorsements) == ("nitro", ())
    verdict = judge_nitro(
        item.evidence, now=NOW + 1, reference=nitro_reference(), expected_report_data=BINDING.report_data
    )
    assert verdict.ok, verdict.detail


def test_another_implementation_reads_the_request() -> None:
    assert cbor2.loads(attestation_request(bytes(64), b"\x01" * 32)) == {
        "Attestation": {"user_data": None, "nonce": b"\x01" * 32, "public_key": bytes(64)}
    }


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (cbor2.dumps({"Error": "InvalidArgument"}), UnavailableError, "refused"),
        (cbor2.dumps({"Attestation": {"document": b""}}), MalformedError, "holds no document"),
        (cbor2.dumps({"Attestation": {"document": "text"}}), MalformedError, "holds no document"),
        (cbor2.dumps({"Attestation": {}}), MalformedError, "holds no document"),
        (cbor2.dumps({"Error": 7}), MalformedError, "holds no document"),
        (cbor2.dumps([]), MalformedError, "holds no document"),
        (b"\xa1\x6bAttestation", MalformedError, "answer"),
        (cbor2.dumps({"Attestation": {"document": b"d"}}) + b"\0", MalformedError, "bytes after its end"),
    ],
)
def test_an_answer_that_is_no_document_is_refused(
    tmp_path: Path, answer: bytes, kind: type[KeyquorumError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        source(tmp_path, Nsm(lambda request: answer)).collect(BINDING)


@pytest.mark.parametrize("length", [0, 0x3001, 1 << 63])
def test_an_impossible_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(MalformedError, match="impossible size"):
        source(tmp_path, Nsm(attested, length=length)).collect(BINDING)


def unavailable(call: Callable[[], object], words: str) -> KeyquorumError:
    with pytest.raises(UnavailableError, match=words) as caught:
        call()
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    return caught.value


def test_a_machine_without_the_device_is_told_what_was_looked_for(tmp_path: Path) -> None:
    error = unavailable(lambda: Nitro(tmp_path / "nsm").collect(BINDING), "nsm cannot be opened")
    assert str(tmp_path / "nsm") in str(error.expected)
    assert "Nitro enclave" in error.next_step


def test_a_failing_ioctl_is_said_to_fail(tmp_path: Path) -> None:
    def refuse(descriptor: int, request: int, argument: bytearray) -> None:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    unavailable(lambda: source(tmp_path, refuse).collect(BINDING), "gave no attestation document")
    (tmp_path / "plain").touch()
    unavailable(lambda: Nitro(tmp_path / "plain").collect(BINDING), "gave no attestation document")
