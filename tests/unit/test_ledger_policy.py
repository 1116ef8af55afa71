"""Witness policies, tlog-proofs and add-checkpoint requests: what auditors and witnesses read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.add_checkpoint import MAX_ADD_CHECKPOINT, AddCheckpoint
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.notes import Note
from keyquorum_core.ledger.proofs import inclusion_proof, reader_of
from keyquorum_core.ledger.tlog_proof import MAX_EXTRA, MAX_TLOG_PROOF, TlogProof
from keyquorum_core.ledger.witness_policy import MAX_WITNESSES, WitnessPolicy, witness_policy

NOW = 1_800_000_000
ORIGIN = "log.example/keyquorum"


def ed25519(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def ml_dsa_44(name: str) -> MLDSA44PrivateKey:
    return MLDSA44PrivateKey.from_seed_bytes(hashlib.sha256(name.encode()).digest())


LOG = LogSigner(ORIGIN, ed25519("log"), ml_dsa_44("log"))
NAMES = ("ch-1", "de-1", "fr-1", "se-1")
WITNESSES = {name: Cosigner(f"{name}.example", ed25519(name), ml_dsa_44(name)) for name in NAMES}
POLICY_FILE = witness_policy(LOG.keys, {name: witness.keys for name, witness in WITNESSES.items()}, 3)
POLICY = WitnessPolicy.parse(POLICY_FILE)

LEAVES = [leaf_hash(b"leaf %d" % number) for number in range(11)]
TREE = CompactRange()
NODES: dict[tuple[int, int], bytes] = {}
for _leaf in LEAVES:
    TREE.append(_leaf, lambda level, index, value: NODES.__setitem__((level, index), value))
SIGNED = LOG.sign(TREE.end, TREE.root(), NOW)


def cosigned(*names: str, at: int = NOW) -> bytes:
    lines = [line for name in names for line in WITNESSES[name].cosign(SIGNED.checkpoint, at)]
    return SIGNED.with_signatures(*lines).encode()


VKEY = {name: witness.keys[0].encode() for name, witness in WITNESSES.items()}
LOG_LINES = f"log {LOG.keys.ed25519.encode()}\nlog {LOG.keys.ml_dsa_44.encode()}\n"
WITNESS_LINES = "".join(f"witness {name} {VKEY[name]}\n" for name in NAMES)


def policy(rest: str, logs: str = LOG_LINES, witnesses: str = WITNESS_LINES) -> WitnessPolicy:
    return WitnessPolicy.parse((logs + witnesses + rest).encode("utf-8", "surrogateescape"))


# Policies


def test_a_written_policy_counts_witnesses_by_both_their_keys() -> None:
    assert len(POLICY.witnesses) == 8
    done = POLICY.verify(cosigned("ch-1", "de-1", "fr-1"), now=NOW, oldest=NOW - 60)
    assert done.checkpoint == SIGNED.checkpoint
    assert set(done.times) == {f"{name}/{key}" for name in ("ch-1", "de-1", "fr-1") for key in ("0x04", "0x06")}
    for names in ((), ("ch-1",), ("ch-1", "de-1")):
        with pytest.raises(RefusedError) as caught:
            POLICY.verify(cosigned(*names), now=NOW, oldest=NOW - 60)
        assert caught.value.reason is Reason.NO_QUORUM
    halves = [line for witness in WITNESSES.values() for line in witness.cosign(SIGNED.checkpoint, NOW)[:1]]
    with pytest.raises(RefusedError) as caught:
        POLICY.verify(SIGNED.with_signatures(*halves).encode(), now=NOW, oldest=0)
    assert caught.value.reason is Reason.NO_QUORUM


@pytest.mark.parametrize(
    ("now", "oldest", "met"),
    [(NOW, NOW, True), (NOW + 10**6, 0, True), (NOW - 60, 0, True), (NOW, NOW + 1, False), (NOW - 61, 0, False)],
)
def test_cosignatures_out_of_their_time_are_stale(now: int, oldest: int, met: bool) -> None:
    data = cosigned(*NAMES)
    if met:
        assert POLICY.verify(data, now=now, oldest=oldest).checkpoint == SIGNED.checkpoint
    else:
        with pytest.raises(RefusedError) as caught:
            POLICY.verify(data, now=now, oldest=oldest)
        assert caught.value.reason is Reason.STALE


def test_groups_nest_and_count() -> None:
    nested = policy("group west 2 ch-1 fr-1\ngroup north any de-1 se-1\ngroup both all west north\nquorum both\n")
    for size in range(5):
        for names in itertools.combinations(NAMES, size):
            expected = {"ch-1", "fr-1"} <= set(names) and bool({"de-1", "se-1"} & set(names))
            assert nested.is_met_by({*names, "unknown"}) == expected


def test_a_single_witness_can_be_the_quorum() -> None:
    single = policy("quorum de-1\n")
    assert single.is_met_by({"de-1"})
    assert not single.is_met_by({"ch-1", "both", "quorum"})


def test_group_names_are_no_cosignatures() -> None:
    assert not policy("group both all ch-1 de-1\nquorum both\n").is_met_by({"both"})


def test_spacing_comments_order_and_urls() -> None:
    file = (
        "# who watches\n\n \t \n  # indented\n"
        + f" witness  a\t{VKEY['ch-1']}   https://w.example/prefix \n"
        + "quorum a\n"
        + f"log {LOG.keys.ed25519.encode()} https://log.example/\n"
    )
    read = WitnessPolicy.parse(file.encode())
    assert read.quorum == "a"
    assert read.urls == {VKEY["ch-1"]: "https://w.example/prefix", LOG.keys.ed25519.encode(): "https://log.example/"}
    assert read.groups == {}


def test_names_are_octets() -> None:
    read = WitnessPolicy.parse(
        b"witness \xe2\x84\xaa %s\nwitness K %s\nwitness \xff %s\n" % tuple(VKEY[name].encode() for name in NAMES[:3])
        + b"group g all \xe2\x84\xaa K \xff\nquorum g\n"
    )
    assert len(read.witnesses) == 3


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("", Reason.MALFORMED),
        ("quorum none\n", Reason.UNSUPPORTED),
        ("quorum ch-1", Reason.MALFORMED),
        ("quorum ch-1\nquorum ch-1\n", Reason.MALFORMED),
        ("quorum ch-1 de-1\n", Reason.MALFORMED),
        ("quorum\n", Reason.MALFORMED),
        ("quorum unknown\n", Reason.MALFORMED),
        ("quorum later\ngroup later any ch-1\n", Reason.MALFORMED),
        ("group g 3 ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g 0 ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g -1 ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g 01 ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g \u0661 ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g most ch-1 de-1\nquorum g\n", Reason.MALFORMED),
        ("group g any\nquorum g\n", Reason.MALFORMED),
        ("group g any ch-1 ch-1\nquorum g\n", Reason.MALFORMED),
        ("group g any ch-1\ngroup h any ch-1\nquorum g\n", Reason.MALFORMED),
        ("group g any g\nquorum g\n", Reason.MALFORMED),
        ("group g any none\nquorum g\n", Reason.MALFORMED),
        ("group g any unknown\nquorum g\n", Reason.MALFORMED),
        ("group ch-1 any de-1\nquorum ch-1\n", Reason.MALFORMED),
        ("group none any de-1\nquorum ch-1\n", Reason.MALFORMED),
        ("group g any ch-1\ngroup g any de-1\nquorum g\n", Reason.MALFORMED),
        ("Quorum ch-1\n", Reason.MALFORMED),
        ("policy 1\nquorum ch-1\n", Reason.MALFORMED),
        ("quorum ch-1\r\n", Reason.MALFORMED),
        ("quorum\u00a0ch-1\n", Reason.MALFORMED),
        ("# \x7f\nquorum ch-1\n", Reason.MALFORMED),
        (f"witness other {VKEY['ch-1']}\nquorum ch-1\n", Reason.MALFORMED),
        (f"witness ch-1 {WITNESSES['ch-1'].keys[1].encode()}\nquorum ch-1\n", Reason.MALFORMED),
        (f"witness log {LOG.keys.ed25519.encode()}\nquorum ch-1\n", Reason.UNSUPPORTED),
        (f"witness log {LOG.keys.ml_dsa_44.encode()}\nquorum ch-1\n", Reason.MALFORMED),
        (f"log {VKEY['ch-1']}\nquorum ch-1\n", Reason.UNSUPPORTED),
        (f"{LOG_LINES}quorum ch-1\n", Reason.MALFORMED),
        ("log\nquorum ch-1\n", Reason.MALFORMED),
        ("log x y z\nquorum ch-1\n", Reason.MALFORMED),
        ("log x\nquorum ch-1\n", Reason.MALFORMED),
        ("witness x\nquorum ch-1\n", Reason.MALFORMED),
        (f"quorum ch-1\nquorum {'x' * 5000}\n", Reason.MALFORMED),
        ("#\n" * 300_000, Reason.TOO_LARGE),
        (
            "".join(f"group g{n} any {'ch-1' if n == 0 else f'g{n - 1}'}\n" for n in range(70)) + "quorum g0\n",
            Reason.TOO_LARGE,
        ),
    ],
)
def test_malformed_policies(rest: str, reason: Reason) -> None:
    with pytest.raises(MalformedError) as caught:
        policy(rest)
    assert caught.value.reason is reason


def test_too_many_witnesses_and_logs() -> None:
    keys = [ed25519(f"w{number}").public_key().public_bytes_raw() for number in range(MAX_WITNESSES + 1)]
    for kind, signature_type in (("witness", 4), ("log", 1)):
        lines = []
        for number, public in enumerate(keys):
            prefix = f"w{number}\n".encode() + bytes([signature_type])
            key_id = hashlib.sha256(prefix + public).hexdigest()[:8]
            material = base64.b64encode(bytes([signature_type]) + public).decode()
            name = f"w{number} " if kind == "witness" else ""
            lines.append(f"{kind} {name}w{number}+{key_id}+{material}\n")
        policy("quorum ch-1\n" + "".join(lines[:60]))
        with pytest.raises(MalformedError) as caught:
            policy("quorum ch-1\n" + "".join(lines))
        assert caught.value.reason is Reason.TOO_LARGE


def test_every_listed_key_of_the_log_must_have_signed() -> None:
    both, one = policy("quorum ch-1\n"), policy("quorum ch-1\n", logs=LOG_LINES.split("\n", maxsplit=1)[0] + "\n")
    data = cosigned("ch-1")
    assert both.verify(data, now=NOW, oldest=0).checkpoint == one.verify(data, now=NOW, oldest=0).checkpoint
    note = SIGNED.with_signatures(*WITNESSES["ch-1"].cosign(SIGNED.checkpoint, NOW)).note
    without = Note(note.text, (note.signatures[0], *note.signatures[2:])).encode()
    assert one.verify(without, now=NOW, oldest=0).checkpoint == SIGNED.checkpoint
    with pytest.raises(RefusedError) as caught:
        both.verify(without, now=NOW, oldest=0)
    assert caught.value.reason is Reason.SIGNATURE_MISSING


def test_a_log_that_the_policy_does_not_name() -> None:
    other = LogSigner("other.example", ed25519("log"), ml_dsa_44("log")).sign(TREE.end, TREE.root(), NOW)
    for rules in (POLICY, policy("quorum ch-1\n", logs="")):
        with pytest.raises(RefusedError) as caught:
            rules.verify(other.encode(), now=NOW, oldest=0)
        assert caught.value.reason is Reason.LEDGER_ORIGIN


def test_a_bad_cosignature_of_a_known_witness_spoils_a_quorum() -> None:
    wrong = WITNESSES["se-1"].cosign(LOG.sign(5, TREE.root(), NOW).checkpoint, NOW)
    lines = [line for name in NAMES[:3] for line in WITNESSES[name].cosign(SIGNED.checkpoint, NOW)]
    with pytest.raises(RefusedError) as caught:
        POLICY.verify(SIGNED.with_signatures(*lines, *wrong).encode(), now=NOW, oldest=0)
    assert caught.value.reason is Reason.SIGNATURE


def test_an_impossible_policy_is_not_written() -> None:
    keys = {name: witness.keys for name, witness in WITNESSES.items()}
    for threshold in (0, 5):
        with pytest.raises(MalformedError):
            witness_policy(LOG.keys, keys, threshold)


@given(st.lists(st.sampled_from(["group", "quorum", "any", "2", "g", "ch-1", "de-1", "none", "\n"]), max_size=12))
@settings(max_examples=80, deadline=None)
def test_any_policy_is_read_or_refused(items: list[str]) -> None:
    with contextlib.suppress(KeyquorumError):
        policy(" ".join(items).replace(" \n ", "\n") + "\n")


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_any_bytes_as_a_policy(data: bytes) -> None:
    for candidate in (data, POLICY_FILE + data, POLICY_FILE[: -len(data) or None]):
        with contextlib.suppress(KeyquorumError):
            WitnessPolicy.parse(candidate)


# Proofs as files


def proof(index: int, extra: bytes | None = None) -> TlogProof:
    hashes = inclusion_proof(index, TREE.end, reader_of(NODES))
    return TlogProof(index, hashes, cosigned("ch-1", "de-1", "fr-1"), extra)


PROOF = proof(6, b"extra")


@pytest.mark.parametrize("index", range(len(LEAVES)))
def test_a_proof_verifies_by_log_keys_and_by_policy(index: int) -> None:
    read = TlogProof.parse(proof(index).encode())
    assert read == proof(index) or read.checkpoint != proof(index).checkpoint  # ML-DSA-44 signs with fresh randomness
    assert read.verify(LEAVES[index], LOG.keys).checkpoint == SIGNED.checkpoint
    assert read.verify_witnessed(LEAVES[index], POLICY, now=NOW).checkpoint == SIGNED.checkpoint
    for check in (
        lambda: read.verify(LEAVES[index - 1], LOG.keys),
        lambda: read.verify_witnessed(LEAVES[index - 1], POLICY, now=NOW),
    ):
        with pytest.raises(RefusedError) as caught:
            check()
        assert caught.value.reason is Reason.LEDGER_PROOF


def test_layout_of_a_proof_is_pinned() -> None:
    lines = [base64.b64encode(value) for value in PROOF.proof]
    head = [b"c2sp.org/tlog-proof@v1", b"extra ZXh0cmE=", b"index 6", *lines]
    assert PROOF.encode() == b"\n".join(head) + b"\n\n" + PROOF.checkpoint
    assert TlogProof.parse(PROOF.encode()) == PROOF


def test_a_tree_of_one_leaf_has_an_empty_proof() -> None:
    lone = TlogProof(0, (), LOG.sign(1, LEAVES[0], NOW).encode())
    assert lone.encode().startswith(b"c2sp.org/tlog-proof@v1\nindex 0\n\nlog.example")
    assert TlogProof.parse(lone.encode()).verify(LEAVES[0], LOG.keys).checkpoint.size == 1


def test_a_proof_without_a_quorum_is_refused() -> None:
    lonely = TlogProof(6, PROOF.proof, cosigned("ch-1"))
    assert lonely.verify(LEAVES[6], LOG.keys).checkpoint == SIGNED.checkpoint
    with pytest.raises(RefusedError) as caught:
        lonely.verify_witnessed(LEAVES[6], POLICY, now=NOW)
    assert caught.value.reason is Reason.NO_QUORUM
    with pytest.raises(RefusedError) as caught:
        PROOF.verify_witnessed(LEAVES[6], POLICY, now=NOW + 100, oldest=NOW + 1)
    assert caught.value.reason is Reason.STALE


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"c2sp.org/tlog-proof@v1", b"c2sp.org/tlog-proof@v2", Reason.MALFORMED),
        (b"c2sp.org/tlog-proof@v1", b"c2sp.org/tlog-proof@v1 ", Reason.MALFORMED),
        (b"c2sp.org/tlog-proof@v1\n", b"", Reason.MALFORMED),
        (b"c2sp.org/tlog-proof@v1\n", b"c2sp.org/tlog-proof@v1\r\n", Reason.MALFORMED),
        (b"c2sp.org/tlog-proof@v1\n", b"\nc2sp.org/tlog-proof@v1\n", Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"extra ZXh0cmE", Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"extra ", Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"extra ZXh0cmE=\nextra ZXh0cmE=", Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"note ZXh0cmE=", Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"extra " + base64.b64encode(b"x" * (MAX_EXTRA + 1)), Reason.TOO_LARGE),
        (b"extra ZXh0cmE=", b"extra " + b"AAAA" * 40_000, Reason.MALFORMED),
        (b"extra ZXh0cmE=", b"extra " + b"AAAA" * 70_000, Reason.TOO_LARGE),
        (b"index 6", b"index 06", Reason.MALFORMED),
        (b"index 6", b"index -6", Reason.MALFORMED),
        (b"index 6", b"index  6", Reason.MALFORMED),
        (b"index 6", b"index \xd9\xa6", Reason.MALFORMED),
        (b"index 6", b"index 11", Reason.LEDGER_PROOF),
        (b"index 6", b"index 10", Reason.LEDGER_PROOF),
        (b"index 6\n", b"", Reason.MALFORMED),
        (b"index 6\n", b"index 6\n" + b"A" * 43 + b"=\n", Reason.LEDGER_PROOF),
        (b"index 6\n", b"index 6\n" + (b"A" * 43 + b"=\n") * 60, Reason.LEDGER_PROOF),
        (b"index 6\n", b"index 6\nAAAA\n", Reason.MALFORMED),
        (b"index 6\n", b"index 6\n\n", Reason.MALFORMED),
        (b"\n11\n", b"\n011\n", Reason.MALFORMED),
        (b"=\n\nlog.example", b"=\nlog.example", Reason.MALFORMED),
    ],
)
def test_malformed_proofs(old: bytes, new: bytes, reason: Reason) -> None:
    assert old in PROOF.encode()
    with pytest.raises(MalformedError) as caught:
        TlogProof.parse(PROOF.encode().replace(old, new, 1))
    assert caught.value.reason is reason


def test_a_proof_too_short_is_refused() -> None:
    with pytest.raises(MalformedError) as caught:
        TlogProof(6, PROOF.proof[:-1], PROOF.checkpoint)
    assert caught.value.reason is Reason.LEDGER_PROOF


@given(st.binary(max_size=60), st.integers(0, len(PROOF.encode())))
@settings(max_examples=60, deadline=None)
def test_any_proof_is_read_or_refused(junk: bytes, at: int) -> None:
    whole = PROOF.encode()
    for candidate in (junk, whole[:at] + junk + whole[at:], whole[:at], b"c2sp.org/tlog-proof@v1\n" + junk):
        with contextlib.suppress(KeyquorumError):
            assert TlogProof.parse(candidate).encode() == candidate
    assert len(whole) < MAX_TLOG_PROOF


# What a witness is asked


REQUEST = AddCheckpoint(7, tuple(LEAVES[:3]), SIGNED.encode())


def test_layout_of_a_request_is_pinned() -> None:
    lines = b"\n".join([b"old 7", *(base64.b64encode(value) for value in LEAVES[:3])])
    assert REQUEST.encode() == lines + b"\n\n" + SIGNED.encode()
    assert AddCheckpoint.parse(REQUEST.encode()) == REQUEST
    first = AddCheckpoint(0, (), SIGNED.encode())
    assert first.encode().startswith(b"old 0\n\nlog.example")
    assert AddCheckpoint.parse(first.encode()) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"old 7\n", b"old 07\n"),
        (b"old 7\n", b"old -7\n"),
        (b"old 7\n", b"old\n"),
        (b"old 7\n", b"old 7 \n"),
        (b"old 7\n", b"Old 7\n"),
        (b"old 7\n", b"old 7\r\n"),
        (b"old 7\n", b"old 9223372036854775808\n"),
        (b"old 7\n", b""),
        (b"old 7\n", b"old 7\nAAAA\n"),
        (b"old 7\n", b"old 7\n" + (b"A" * 43 + b"=\n") * 61),
        (b"old 7\n", b"old 7\n" + (b"A" * 43 + b"=\n") * 200),
        (b"old 7\n", b"old 7\n\xc3\xa9\n"),
        (b"\n\n", b"\n"),
    ],
)
def test_malformed_requests(old: bytes, new: bytes) -> None:
    with pytest.raises(MalformedError):
        AddCheckpoint.parse(REQUEST.encode().replace(old, new))


def test_requests_are_bounded() -> None:
    with pytest.raises(MalformedError) as caught:
        AddCheckpoint.parse(REQUEST.encode() + b"x" * MAX_ADD_CHECKPOINT)
    assert caught.value.reason is Reason.TOO_LARGE
    with pytest.raises(MalformedError):
        AddCheckpoint(-1, (), b"")
    with pytest.raises(MalformedError):
        AddCheckpoint(1, (LEAVES[0],) * 64, b"")
    with pytest.raises(MalformedError):
        AddCheckpoint(1, (b"short",), b"")


@given(st.binary(max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_request_is_read_or_refused(data: bytes) -> None:
    for candidate in (data, b"old 7\n" + data, b"old " + data + b"\n\nx"):
        with contextlib.suppress(KeyquorumError):
            assert AddCheckpoint.parse(candidate).encode() == candidate
