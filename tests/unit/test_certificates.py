"""A custodian verifies an epoch certificate once, and another one that looks like it anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.signing import PublicIdentity
from keyquorum_custodian import certificates
from keyquorum_custodian.certificates import Certificates
from tests.support.ceremonies import Make
from tests.support.custodian import Committee, build_committee


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    built = build_committee(tmp_path_factory.mktemp("certificates"))
    built.open_all()
    built.generate()
    yield built
    built.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Signatures that were looked at."""
    found: list[str] = []
    verifies = PublicIdentity._ml_dsa_verifies

    def count(self: PublicIdentity, message: bytes, signature: bytes) -> bool:
        found.append(self.fingerprint)
        return verifies(self, message, signature)

    monkeypatch.setattr(PublicIdentity, "_ml_dsa_verifies", count)
    return found


def certificate(committee: Committee, epoch: int = 1) -> bytes:
    row = committee.nodes["ch-1"].keystore.epoch("key-1", epoch)
    assert row is not None
    return row.certificate


def test_the_same_envelope_is_verified_once(committee: Committee, counted: list[str]) -> None:
    kept = Certificates(committee.nodes["ch-1"].keystore)
    envelope = certificate(committee)
    found = kept.open_now(envelope)
    assert len(counted) == len(committee.ids)
    assert kept.open_now(envelope) is found
    assert len(counted) == len(committee.ids)


@pytest.mark.parametrize("what", ["signature", "payload", "signer"])
def test_what_differs_in_anything_is_verified_and_refused(committee: Committee, what: str) -> None:
    kept = Certificates(committee.nodes["ch-1"].keystore)
    envelope = certificate(committee)
    kept.open_now(envelope)
    tree: dict[str, Any] = json.loads(envelope)
    if what == "signature":
        tree["signatures"][1]["sig"] = tree["signatures"][3]["sig"]
    elif what == "payload":
        payload = bytearray(base64.b64decode(tree["payload"]))
        at = payload.index(b'"commitments":["') + len(b'"commitments":["')
        payload[at] = ord("0") if payload[at] != ord("0") else ord("1")
        tree["payload"] = base64.b64encode(payload).decode()
    else:
        del tree["signatures"][-2:]
    with pytest.raises(KeyquorumError) as caught:
        kept.open_now(json.dumps(tree, separators=(",", ":")).encode())
    assert caught.value.reason in (Reason.SIGNATURE, Reason.SIGNATURE_MISSING)


def test_what_was_opened_by_one_custodian_is_not_by_another(committee: Committee, tmp_path: Path) -> None:
    """Another cluster's custodian never served under the roster that the certificate names."""
    other = build_committee(tmp_path)
    other.open_all()
    try:
        with pytest.raises(KeyquorumError) as caught:
            Certificates(other.nodes["ch-1"].keystore).open_now(certificate(committee))
        assert caught.value.reason is Reason.ROSTER
    finally:
        other.close()


def test_as_many_are_kept_as_fit(committee: Committee, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Make.rotate(committee, "key-1").activate()
    monkeypatch.setattr(certificates, "_KEPT_BYTES", 1)
    kept = Certificates(committee.nodes["ch-1"].keystore)
    counted.clear()
    for epoch in (1, 2, 2, 1):
        assert kept.open_now(certificate(committee, epoch)).plan.epoch == epoch
    assert len(counted) == 3 * len(committee.ids)
