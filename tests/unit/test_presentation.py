"""A worker's word that it hands in evidence: its bytes, and everything that is not it."""

from __future__ import annotations

import base64
import json

import pytest

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.presentation import (
    MAX_PRESENTATION,
    PRESENTATION_TYPE,
    check_presentation,
    sign_presentation,
)
from keyquorum_core.signing import Identity, sign

WORKER = Identity.from_seeds(bytes(range(32)), bytes(range(32, 64)))
JOB, EVIDENCE = "a" * 26, "5e" * 32


def test_the_exact_bytes_that_are_signed() -> None:
    envelope = json.loads(sign_presentation(WORKER, JOB, EVIDENCE))
    assert envelope["payloadType"] == "application/vnd.keyquorum.presentation.v1+json"
    payload = base64.b64decode(envelope["payload"])
    assert payload == b'{"evidence_sha256":"' + b"5e" * 32 + b'","job_id":"' + b"a" * 26 + b'"}'


def test_it_counts_for_its_worker_job_and_evidence_only() -> None:
    envelope = sign_presentation(WORKER, JOB, EVIDENCE)
    check_presentation(envelope, WORKER.public, JOB, EVIDENCE)
    for reason, arguments in (
        (Reason.SIGNATURE, (Identity.generate().public, JOB, EVIDENCE)),
        (Reason.WRONG_JOB, (WORKER.public, "b" * 26, EVIDENCE)),
        (Reason.WRONG_JOB, (WORKER.public, JOB, "5f" * 32)),
    ):
        with pytest.raises(KeyquorumError) as caught:
            check_presentation(envelope, *arguments)
        assert caught.value.reason is reason


def test_other_documents_of_the_worker_s_and_other_bytes_are_refused() -> None:
    payload = b'{"evidence_sha256":"' + b"5e" * 32 + b'","job_id":"' + b"a" * 26 + b'"}'
    good = sign(WORKER, PRESENTATION_TYPE, payload)
    for envelope in (
        b"",
        good.replace(b"presentation", b"representation"),
        sign(WORKER, "application/vnd.keyquorum.result.v1+json", payload),
        sign(WORKER, PRESENTATION_TYPE, payload.replace(b",", b", ")),
        sign(WORKER, PRESENTATION_TYPE, b"x" * MAX_PRESENTATION),
    ):
        with pytest.raises(KeyquorumError):
            check_presentation(envelope, WORKER.public, JOB, EVIDENCE)


def test_nothing_is_signed_for_what_is_no_job_or_no_digest() -> None:
    for job, evidence in (("A" * 26, EVIDENCE), (JOB, "5E" * 32), (JOB, "")):
        with pytest.raises(MalformedError):
            sign_presentation(WORKER, job, evidence)
