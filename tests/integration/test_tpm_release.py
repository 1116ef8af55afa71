"""A job's key goes to a worker on its TPM's word, and to nobody else's (guarantees G1 and G2).

All of it is real: the TPM (in software, through tpm2-pytss), its enrolment by the two people's commands, the operator's
signed inventory, the custodians with their keystores, gates and ledger. Then the worker's host does what it can: it
extends a PCR, resets the TPM, brings another TPM's quote, or an old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from keyquorum_core import manifest
from keyquorum_core.attestation.appraisal import Appraisal, check_continues
from keyquorum_core.attestation.evidence import EvidenceDocument, WindowNonce
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.derivation import Combination, Combiner, context
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.release import Leaf, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.tpms import Tpms
from keyquorum_gpu_worker.evidence import Collection
from keyquorum_gpu_worker.evidence.development import DevelopmentPlatform
from keyquorum_gpu_worker.evidence.tpm2 import Tpm2
from keyquorum_gpu_worker.keys import JobKeys
from keyquorum_gpu_worker.tss import Tss
from tests.support.custodian import Committee, build_committee
from tests.support.swtpm import Manufacturer, require_pytss
from tests.support.tpm_worker import BOOT, HANDLE, Machine, Registrar, activate, machine, show
from tests.support.vendor import MEASUREMENT, bulletin, development_chip, inventory_json, reference_json

FIRMWARE = "2019102300163636"
"""What swtpm says in quotes by a key below the endorsement key."""


def tpm_reference() -> dict[str, object]:
    """What a machine that booted as :data:`BOOT` shows."""
    values = {str(index): [hashlib.sha256(bytes(32) + digest).hexdigest()] for index, digest in BOOT.items()}
    return {
        "bank": "sha256",
        "pcrs": values,
        "firmware_versions": [FIRMWARE],
        "grace": [],
        "event_log_required": False,
        "secure_boot_required": False,
    }


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    require_pytss()
    made = build_committee(
        tmp_path_factory.mktemp("custodians"), reference=reference_json() | {"tpm2": tpm_reference()}
    )
    made.open_all()
    made.generate()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    require_pytss()
    return Manufacturer(tmp_path_factory.mktemp("tpm"))


@pytest.fixture(scope="module")
def stranger(manufacturer: Manufacturer) -> Iterator[Machine]:
    """A machine of the same maker, booted alike, with an attestation key that nobody enrolled."""
    made = machine(manufacturer, "stranger")
    try:
        made.worker("tpm", "create-ak")
        yield made
    finally:
        made.tpm.stop()


@pytest.fixture(scope="module")
def enrolled(
    manufacturer: Manufacturer, committee: Committee, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """Enrolled by credential activation; what follows from it is that the operator signs an inventory with its key."""
    made = machine(manufacturer, "worker")
    try:
        made.worker("tpm", "create-ak")
        registrar = Registrar(manufacturer, tmp_path_factory.mktemp("registrar"))
        show(made, registrar)
        assert registrar.challenge()[0] == 0
        assert activate(made, registrar) == 0
        status, proven = registrar.confirm()
        assert status == 0
        listed = sign_bulletin(
            bulletin("inventory", inventory_json(tpm2=[proven["ak"]]), 2), [committee.operator.identity]
        )
        for node in committee.nodes.values():
            node.bulletins.accept(listed)
        yield made
    finally:
        made.tpm.stop()


@pytest.fixture
def worker(enrolled: Machine) -> Iterator[Machine]:
    """The enrolled machine, booted as it should be; whatever a test does to it, the next test finds it so again."""
    yield enrolled
    enrolled.tpm.reset()
    enrolled.tpm.boot(BOOT)


@dataclass
class Release:
    """One worker's try at one job's key."""

    committee: Committee
    worker: Machine
    types: tuple[str, ...] = ("tpm2",)
    keys: JobKeys = field(default_factory=lambda: JobKeys.generate("MLKEM768_X25519"))
    envelope: bytes = b""

    def __post_init__(self) -> None:
        made = self.committee.manifest(evidence_types=self.types)
        self.envelope = manifest.sign_manifest(made, self.committee.owner.identity)

    def evidence(self, machine: Machine | None = None) -> bytes:
        """Collected now, over nonces that are current now, as the worker's process does it."""
        tpm = Tpm2(Tss(f"swtpm:path={(machine or self.worker).tpm.folder}/tpm"), int(HANDLE, 16), tuple(BOOT))
        platform = DevelopmentPlatform(development_chip(), MEASUREMENT)
        sources = Collection([platform, tpm] if "sev-snp" in self.types else [tpm])
        nonces = []
        for name, node in self.committee.nodes.items():
            window = node.windows.number()
            nonces.append(WindowNonce(name, window, node.windows.current_nonces()[window]))
        return sources.document(nonces, self.keys.recipient.public, self.keys.identity.public.to_bytes()).to_bytes()

    def request(self, evidence: bytes) -> ReleaseRequest:
        development = "sev-snp" in self.types
        return self.committee.worker_request(evidence, self.envelope, development=development)

    def key(self, request: ReleaseRequest, recipient: RecipientKey | None = None) -> Combination:
        """What the worker combines out of all custodians' sealed shares."""
        recipient = recipient or self.keys.recipient
        _, payload = manifest.open_manifest(self.envelope, self.committee.owner.identity.public)
        combiner = Combiner(self.committee.quorum, context("key-1", 1, "job", manifest.subject(payload)))
        for name, node in self.committee.nodes.items():
            leaf = Leaf.parse(request.leaf).hash()
            combiner.add(
                name, open_share(node.gate.release(request), recipient, leaf, self.committee.quorum).contributions
            )
        found = combiner.result(require_confirmed=True)
        assert found is not None
        return found

    def owners_key(self) -> Combination:
        return self.key(self.committee.owner_request(self.envelope), self.committee.owner.recipient)

    def appraised(self, evidence: bytes) -> Appraisal:
        """What one custodian makes of it."""
        node = self.committee.nodes["ch-1"]
        tpms = Tpms(node.keystore)
        appraisals = Appraisals(node.bulletins, "ch-1", node.windows, node.keystore, tpms)
        digest = hashlib.sha256(evidence).digest()
        return appraisals.appraise(evidence, digest, self.types, int(self.committee.clock()))

    def refusals(self, evidence: bytes) -> set[Reason]:
        """What the custodians say, each for itself."""
        request, reasons = self.request(evidence), set()
        for node in self.committee.nodes.values():
            with pytest.raises(KeyquorumError) as caught:
                node.gate.release(request)
            assert caught.value.details["check"] == "recipient"
            reasons.add(caught.value.reason)
        return reasons


@pytest.mark.parametrize("types", [("tpm2",), ("sev-snp", "tpm2")])
def test_an_enrolled_tpm_gets_its_worker_the_job_key(
    committee: Committee, worker: Machine, types: tuple[str, ...]
) -> None:
    release = Release(committee, worker, types)
    found = release.key(release.request(release.evidence()))
    assert found.confirmed
    assert found.key.purpose_key("bundle") == release.owners_key().key.purpose_key("bundle")


def test_after_a_pcr_extends_no_key_is_released(committee: Committee, worker: Machine) -> None:
    release = Release(committee, worker)
    release.key(release.request(release.evidence()))
    worker.tpm.extend(4, b"\x66" * 32)
    assert Release(committee, worker).refusals(release.evidence()) == {Reason.MEASUREMENT}


def test_after_a_reset_no_key_is_released_and_the_worker_does_not_go_on(committee: Committee, worker: Machine) -> None:
    """The host resets the TPM, and then measures again just what a good boot would have measured: a machine that did
    that is a new worker, with keys of its own, and never the one that was appraised."""
    release = Release(committee, worker)
    before = release.appraised(release.evidence())
    worker.tpm.reset()
    assert release.refusals(release.evidence()) == {Reason.MEASUREMENT}
    worker.tpm.boot(BOOT)
    with pytest.raises(KeyquorumError) as caught:
        check_continues(before, release.appraised(release.evidence()))
    assert caught.value.reason is Reason.STALE
    assert "reset" in caught.value.message


def test_another_tpms_quote_is_refused(committee: Committee, worker: Machine, stranger: Machine) -> None:
    """By itself, and in place of the enrolled one's in a document of its worker's."""
    release = Release(committee, worker)
    assert release.refusals(release.evidence(stranger)) == {Reason.PROVENANCE}
    ours, theirs = EvidenceDocument.parse(release.evidence()), EvidenceDocument.parse(release.evidence(stranger))
    mixed = EvidenceDocument(ours.nonces, ours.hpke_key, ours.signing_key, theirs.items)
    assert release.refusals(mixed.to_bytes()) == {Reason.PROVENANCE}


def test_an_enrolled_tpms_quote_for_another_key_or_an_old_challenge_is_refused(
    committee: Committee, worker: Machine
) -> None:
    release, thief = Release(committee, worker), Release(committee, worker)
    ours, theirs = EvidenceDocument.parse(release.evidence()), EvidenceDocument.parse(thief.evidence())
    stolen = EvidenceDocument(theirs.nonces, theirs.hpke_key, theirs.signing_key, ours.items)
    assert thief.refusals(stolen.to_bytes()) == {Reason.BINDING}
    old = tuple(WindowNonce(each.custodian, each.window - 10, each.nonce) for each in ours.nonces)
    late = EvidenceDocument(old, ours.hpke_key, ours.signing_key, ours.items)
    assert release.refusals(late.to_bytes()) == {Reason.STALE}
