"""A real TPM: enrolment with credential activation, quotes, and what must end a worker's standing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.attestation.findings import require
from keyquorum_core.attestation.tpm2 import Tpm2Evidence, qualifying_data, verify
from keyquorum_core.attestation.tpm2_appraisal import begin, check_binding, check_enrolled, evaluate
from keyquorum_core.attestation.tpm2_credential import make_credential
from keyquorum_core.attestation.tpm2_enrolment import Candidate, EnrolledKey, challenge
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState, proceed
from keyquorum_core.attestation.tpm2_structures import parse_public
from keyquorum_core.attestation.tpm2_verdict import judge_tpm2
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.swtpm import AttestationKey, Manufacturer, Swtpm

BINDING = bytes(range(64))
BOOT = {0: b"\x10" * 32, 4: b"\x14" * 32, 7: b"\x17" * 32}
"""What a machine's firmware measures, by PCR."""


@pytest.fixture(scope="module")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    return Manufacturer(tmp_path_factory.mktemp("tpm"))


@pytest.fixture(scope="module")
def tpm(manufacturer: Manufacturer) -> Iterator[Swtpm]:
    made = manufacturer.make("a")
    try:
        made.boot(BOOT)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def other_tpm(manufacturer: Manufacturer, tpm: Swtpm) -> Iterator[Swtpm]:
    """Of the same maker, booted alike."""
    made = manufacturer.make("b")
    try:
        made.boot(BOOT)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def ak(tpm: Swtpm) -> AttestationKey:
    return tpm.create_ak()


def root_of(manufacturer: Manufacturer) -> str:
    key = x509.load_pem_x509_certificate(manufacturer.certificates[1]).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def candidate(manufacturer: Manufacturer, tpm: Swtpm, ak: AttestationKey, kind: str = "rsa") -> Candidate:
    return Candidate((tpm.ek_certificate(kind), *manufacturer.certificates), tpm.ek_public(kind), ak.area)


def enrol(manufacturer: Manufacturer, tpm: Swtpm, ak: AttestationKey, kind: str = "rsa") -> EnrolledKey:
    now = int(time.time())
    credential, pending = challenge(
        candidate(manufacturer, tpm, ak, kind), pinned_roots={root_of(manufacturer)}, now=now
    )
    return pending.confirm(tpm.activate(ak, credential.to_tools_file(), kind), now=now)


def evidence(
    tpm: Swtpm,
    ak: AttestationKey,
    indices: Sequence[int] = tuple(BOOT),
    *,
    bank: str = "sha256",
    form: str = "tss",
    extra_data: bytes = qualifying_data(BINDING),
) -> bytes:
    quote, signature = tpm.quote(ak, extra_data, indices, bank=bank, form=form)
    return Tpm2Evidence(
        ak_public=ak.pem,
        quote=quote,
        signature=signature,
        bank=bank,
        pcrs=tpm.pcrs(indices, bank),
        ak_area=ak.area,
    ).to_bytes()


def reference() -> Tpm2ReferenceValues:
    """What a machine that booted like :data:`BOOT` shows."""
    values = {index: hashlib.sha256(bytes(32) + digest).hexdigest() for index, digest in BOOT.items()}
    return Tpm2ReferenceValues.parse(
        {
            "bank": "sha256",
            "pcrs": {str(index): [value] for index, value in values.items()},
            "firmware_versions": ["2019102300163636"],
            "event_log_required": False,
            "secure_boot_required": False,
            "grace": [],
        }
    )


def accept(raw: bytes, enrolled: EnrolledKey, previous: QuoteState | None = None) -> QuoteState:
    """All that a custodian asks of a worker's quote."""
    verified = verify(raw)
    findings, _ = evaluate(verified, reference(), now=int(time.time()))
    own = [check_enrolled(verified, {enrolled.ak_fingerprint}), check_binding(verified, qualifying_data(BINDING))]
    require([*own, *findings])
    state = begin(None, verified)
    if previous is not None:
        proceed(previous, state)
    return state


def reason_of(raw: bytes, enrolled: EnrolledKey, previous: QuoteState | None = None) -> Reason:
    with pytest.raises(KeyquorumError) as caught:
        accept(raw, enrolled, previous)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_an_ak_is_enrolled_by_activating_a_credential(
    manufacturer: Manufacturer, tpm: Swtpm, ak: AttestationKey, kind: str
) -> None:
    enrolled = enrol(manufacturer, tpm, ak, kind)
    assert enrolled.ak_name == ak.name.hex()
    assert (enrolled.ek.model, enrolled.ek.root) == ("swtpm", root_of(manufacturer))


def test_a_tpm_does_not_open_a_credential_for_a_key_it_does_not_hold(
    tpm: Swtpm, other_tpm: Swtpm, ak: AttestationKey
) -> None:
    foreign = other_tpm.create_ak()
    ek = parse_public(tpm.ek_public())
    for_foreign_ak = make_credential(ek, parse_public(foreign.area).name, bytes(32))
    with pytest.raises(AssertionError, match="integrity check failed"):
        tpm.activate(ak, for_foreign_ak.to_tools_file())
    for_foreign_ek = make_credential(parse_public(other_tpm.ek_public()), ak.name, bytes(32))
    with pytest.raises(AssertionError, match="tpm2_activatecredential"):
        tpm.activate(ak, for_foreign_ek.to_tools_file())


def test_a_candidate_with_the_ek_certificate_of_another_tpm_is_refused(
    manufacturer: Manufacturer, tpm: Swtpm, other_tpm: Swtpm, ak: AttestationKey
) -> None:
    mixed = Candidate((other_tpm.ek_certificate(), *manufacturer.certificates), tpm.ek_public(), ak.area)
    with pytest.raises(KeyquorumError) as caught:
        challenge(mixed, pinned_roots={root_of(manufacturer)}, now=int(time.time()))
    assert caught.value.reason is Reason.CHAIN


def test_a_quote_verifies_and_is_accepted(manufacturer: Manufacturer, tpm: Swtpm, ak: AttestationKey) -> None:
    enrolled = enrol(manufacturer, tpm, ak)
    first = accept(evidence(tpm, ak), enrolled)
    second = accept(evidence(tpm, ak), enrolled, first)
    assert second.clock > first.clock
    assert verify(evidence(tpm, ak)).quote.safe


@pytest.mark.parametrize(
    ("algorithm", "scheme", "hash_name"),
    [
        ("rsa", "rsapss", "sha256"),
        ("ecc", "ecdsa", "sha256"),
        ("ecc384", "ecdsa", "sha384"),
        ("rsa", "rsassa", "sha384"),
    ],
)
def test_every_kind_of_ak_signs_quotes_that_verify(tpm: Swtpm, algorithm: str, scheme: str, hash_name: str) -> None:
    key = tpm.create_ak(algorithm, scheme, hash_name)
    for form in ("tss", "plain"):
        verified = verify(evidence(tpm, key, form=form, extra_data=BINDING[:64]))
        assert verified.signature_hash.name == hash_name
        assert verified.quote.extra_data == BINDING
    assert verify(evidence(tpm, key, bank="sha384")).bank.name == "sha384"


def test_a_sha1_bank_is_refused(tpm: Swtpm, ak: AttestationKey) -> None:
    verdict = judge_tpm2(evidence(tpm, ak, bank="sha1"), now=0, enrolled_aks=())
    assert (verdict.ok, verdict.reason) == (False, "MEASUREMENT")


def test_a_quote_of_more_or_fewer_pcrs_than_asked_for_is_refused(
    manufacturer: Manufacturer, tpm: Swtpm, ak: AttestationKey
) -> None:
    enrolled = enrol(manufacturer, tpm, ak)
    for indices in ((0, 4), (0, 4, 7, 16)):
        assert reason_of(evidence(tpm, ak, indices), enrolled) is Reason.MEASUREMENT


def test_another_tpms_quote_is_refused(
    manufacturer: Manufacturer, tpm: Swtpm, other_tpm: Swtpm, ak: AttestationKey
) -> None:
    enrolled = enrol(manufacturer, tpm, ak)
    other_ak = other_tpm.create_ak()
    foreign = evidence(other_tpm, other_ak)
    assert reason_of(foreign, enrolled) is Reason.PROVENANCE
    assert judge_tpm2(foreign, now=0, enrolled_aks={enrolled.ak_fingerprint}).verified
    state = accept(evidence(tpm, ak), enrolled)
    assert reason_of(foreign, enrol(manufacturer, other_tpm, other_ak), state) is Reason.PROVENANCE


def test_after_a_pcr_extends_quotes_are_refused_and_a_reset_does_not_bring_the_worker_back(
    manufacturer: Manufacturer,
) -> None:
    """The host extends a PCR, then resets the TPM and measures again what a good boot would have measured."""
    tpm = manufacturer.make("c")
    try:
        tpm.boot(BOOT)
        ak = tpm.create_ak()
        enrolled = enrol(manufacturer, tpm, ak)
        state = accept(evidence(tpm, ak), enrolled)
        old = evidence(tpm, ak)
        tpm.extend(4, b"\x66" * 32)
        assert reason_of(evidence(tpm, ak), enrolled, state) is Reason.MEASUREMENT
        tpm.reset()
        assert reason_of(evidence(tpm, ak), enrolled, state) is Reason.MEASUREMENT
        tpm.boot(BOOT)
        again = evidence(tpm, ak)
        assert reason_of(again, enrolled, state) is Reason.STALE
        fresh = begin(state, verify(again))  # a new lease, by appraisal from the start
        assert fresh.reset_count == state.reset_count + 1
        with pytest.raises(KeyquorumError) as caught:
            begin(fresh, verify(old))
        assert caught.value.reason is Reason.STALE
    finally:
        tpm.stop()


def test_a_reset_without_warning_counts_too(manufacturer: Manufacturer) -> None:
    tpm = manufacturer.make("d")
    try:
        tpm.boot(BOOT)
        ak = tpm.create_ak()
        enrolled = enrol(manufacturer, tpm, ak)
        state = accept(evidence(tpm, ak), enrolled)
        tpm.reset(orderly=False)
        tpm.boot(BOOT)
        again = evidence(tpm, ak)
        assert reason_of(again, enrolled, state) is Reason.STALE
        assert begin(state, verify(again)).reset_count == state.reset_count + 1
    finally:
        tpm.stop()
