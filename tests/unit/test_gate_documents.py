"""The gate by the documents in force: reference values and inventory, replaced, expired, or never accepted (G2)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.attestation.inventory import HardwareId
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import Reason
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from tests.support import composite
from tests.support.custodian import Committee, build_committee
from tests.support.gate import Clock, evidence_refused, signed
from tests.support.vendor import (
    bulletin,
    development_chip,
    inventory_json,
    reference_json,
)


@pytest.fixture(scope="module")
def worker() -> tuple[RecipientKey, Identity]:
    return RecipientKey.generate(), Identity.generate()


def put(committee: Committee, kind: str, body: dict[str, Any], version: int) -> None:
    """A new document, as the operator drops it into the folder of ``ch-1``."""
    document = bulletin(kind, body, version)
    target = committee.directory("ch-1") / "bulletins" / f"{kind}.json"
    partial = target.with_suffix(".partial")
    partial.write_bytes(sign_bulletin(document, [committee.operator.identity]))
    partial.replace(target)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Committee]:
    """A committee whose documents one test may replace."""
    committee = build_committee(tmp_path, clock=Clock())
    committee.open_all()
    committee.generate()
    yield committee
    committee.close()


def test_new_reference_values_count_at_once_and_drop_what_was_kept(
    own: Committee, worker: tuple[RecipientKey, Identity]
) -> None:
    committee, node = own, own.nodes["ch-1"]
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    put(committee, "reference-values", reference_json() | {"max_evidence_age": 700}, 2)
    node.gate.release(committee.worker_request(evidence))  # fresh still, and appraised again
    other = reference_json()
    other["sev-snp"]["images"][0]["measurement"] = "ab" * 48
    put(committee, "reference-values", other, 3)
    evidence_refused(committee, node, evidence, Reason.MEASUREMENT)


def test_a_machine_taken_out_of_the_inventory_gets_no_share_any_more(
    own: Committee, worker: tuple[RecipientKey, Identity]
) -> None:
    committee, node = own, own.nodes["ch-1"]
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    body = inventory_json()
    body["machines"][0]["hardware"] = {"sev-snp": ["01" * 64]}
    put(committee, "inventory", body, 2)
    evidence_refused(committee, node, evidence, Reason.PROVENANCE)
    moved = inventory_json()
    moved["machines"][0]["region"] = "US"
    put(committee, "inventory", moved, 3)
    evidence_refused(committee, node, evidence, Reason.REGION)


@pytest.mark.parametrize("kind", ["reference-values", "inventory"])
def test_without_reference_values_or_inventory_no_worker_gets_a_share(
    tmp_path: Path, worker: tuple[RecipientKey, Identity], kind: str
) -> None:
    committee = build_committee(tmp_path)
    (committee.directory("ch-1") / "bulletins" / f"{kind}.json").unlink()
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    assert any(kind in warning for warning in node.warnings())
    node.gate.release(committee.owner_request())
    evidence_refused(committee, node, committee.evidence(*worker), Reason.NOT_FOUND)
    committee.close()


def test_expired_reference_values_release_nothing_to_a_worker_also_on_a_kept_appraisal(
    tmp_path: Path, worker: tuple[RecipientKey, Identity]
) -> None:
    clock = Clock()
    committee = build_committee(tmp_path, clock=clock)
    path = committee.directory("ch-1") / "bulletins" / "reference-values.json"
    short = dataclasses.replace(bulletin("reference-values", reference_json(), 2), expires_at=int(clock()) + 60)
    path.write_bytes(sign_bulletin(short, [committee.operator.identity]))
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    clock.now += 60
    evidence_refused(committee, node, evidence, Reason.EXPIRED)
    committee.close()


def test_a_kept_appraisal_is_dropped_by_hardware_and_by_evidence_and_survives_a_restart_until_then(
    tmp_path: Path, worker: tuple[RecipientKey, Identity]
) -> None:
    clock = Clock()
    committee = build_committee(tmp_path, clock=clock)
    committee.open_all()
    committee.generate()
    evidence = committee.evidence(*worker)
    committee.nodes["ch-1"].gate.release(committee.worker_request(evidence))
    committee.nodes["ch-1"].gate.flush()
    chip = HardwareId("sev-snp", development_chip().chip_id.hex())
    for by_hardware in (True, False):
        committee.nodes.pop("ch-1").close()
        node = committee.open("ch-1")
        clock.now += 1
        node.gate.release(committee.worker_request(evidence))  # on the kept appraisal: the nonce died with the process
        appraisals = node.gate._appraisals
        assert appraisals.drop(hardware=HardwareId("sev-snp", "01" * 64), evidence=bytes(32)) == 0
        digest = hashlib.sha256(evidence).digest()
        gone = appraisals.drop(hardware=chip) if by_hardware else appraisals.drop(evidence=digest)
        assert gone == 1
        evidence_refused(committee, node, evidence, Reason.STALE)
        evidence = committee.evidence(*worker, nodes=["ch-1"])
        node.gate.release(committee.worker_request(evidence))
        node.gate.flush()
    committee.close()


def test_all_five_types_in_one_document_release_a_share_once_and_again_after_a_restart(
    tmp_path: Path, worker: tuple[RecipientKey, Identity]
) -> None:
    clock = Clock()
    clock.now = composite.NOW
    committee = build_committee(
        tmp_path, clock=clock, reference=composite.reference_body(), inventory=composite.inventory_body()
    )
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    nonces = {"ch-1": (node.windows.number(), node.windows.current_nonces()[node.windows.number()])}
    keys: dict[str, Any] = {"hpke_key": worker[0].public, "signing_key": worker[1].public.to_bytes()}
    evidence = composite.worker_document(composite.ALL, nonces, **keys)
    envelope = signed(committee, evidence_types=composite.ALL)
    request = committee.worker_request(evidence, envelope)
    node.gate.release(request)
    node.gate.flush()
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1")
    node.gate.release(request)
    # The TPM's last quote is remembered, too: an older one is refused, however fresh the challenge.
    nonces = {"ch-1": (node.windows.number(), node.windows.current_nonces()[node.windows.number()])}
    old = composite.worker_document(("tpm2",), nonces, **keys, quote={"clock": 999_999})
    evidence_refused(committee, node, old, Reason.STALE, signed(committee, evidence_types=("tpm2",)))
    newer = composite.worker_document(("tpm2",), nonces, **keys, quote={"clock": 1_000_001})
    request = committee.worker_request(newer, signed(committee, evidence_types=("tpm2",)), development=False)
    node.gate.release(request)
    committee.close()
