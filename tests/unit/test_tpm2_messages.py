"""The files of a TPM's enrolment: their bytes, and that nothing else is read as one."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from keyquorum_core.attestation.tpm2_credential import Credential
from keyquorum_core.attestation.tpm2_enrolment import Candidate, challenge
from keyquorum_core.attestation.tpm2_messages import (
    answer_bytes,
    candidate_bytes,
    credential_bytes,
    parse_answer,
    parse_candidate,
    parse_credential,
    parse_pending,
    pending_bytes,
)
from keyquorum_core.errors import MalformedError
from tests.support.tpm_maker import NOW, maker

CANDIDATE = Candidate((b"ek", b"issuer"), b"\x00\x01e", b"\x00\x01a")
CREDENTIAL = Credential(b"\x00\x01i", b"\x00\x01s")
PENDING = challenge(maker().candidate(), pinned_roots={maker().root}, now=NOW)[1]


def test_layouts_are_pinned() -> None:
    assert candidate_bytes(CANDIDATE) == (
        b'{"ak_public":"AAFh","ek_certificates":["ZWs=","aXNzdWVy"],"ek_public":"AAFl","kind":"tpm2-candidate","v":1}'
    )
    assert credential_bytes(CREDENTIAL) == (
        b'{"encrypted_secret":"AAFz","id_object":"AAFp","kind":"tpm2-credential","v":1}'
    )
    assert answer_bytes(b"\x0f" * 32) == b'{"kind":"tpm2-answer","secret":"' + b"0f" * 32 + b'","v":1}'


def test_what_was_written_is_read() -> None:
    assert parse_candidate(candidate_bytes(CANDIDATE)) == CANDIDATE
    assert parse_credential(credential_bytes(CREDENTIAL)) == CREDENTIAL
    assert parse_answer(answer_bytes(b"\x0f" * 32)) == b"\x0f" * 32
    assert parse_pending(pending_bytes(PENDING)) == PENDING


Parse = Callable[[bytes], object]
MESSAGES: list[tuple[Parse, bytes]] = [
    (parse_candidate, candidate_bytes(CANDIDATE)),
    (parse_credential, credential_bytes(CREDENTIAL)),
    (parse_answer, answer_bytes(bytes(32))),
    (parse_pending, pending_bytes(PENDING)),
]


@pytest.mark.parametrize(("parse", "data"), MESSAGES, ids=["candidate", "credential", "answer", "pending"])
def test_members_missing_added_or_wrong_are_refused(parse: Parse, data: bytes) -> None:
    whole = json.loads(data)
    forms = [{key: value for key, value in whole.items() if key != name} for name in whole]
    forms += [{**whole, "extra": 1}, {**whole, "v": 2}, {**whole, "kind": "tpm2-other"}]
    wrongs: tuple[object, ...] = (None, "", "!", -1, [], {})
    forms += [{**whole, name: wrong} for name in whole for wrong in wrongs]
    for form in forms:
        with pytest.raises(MalformedError):
            parse(json.dumps(form).encode())
    for other, message in MESSAGES:
        if other is not parse:
            with pytest.raises(MalformedError):
                parse(message)
