"""The parsers of what the project itself defines: the ledger's files, signed documents, bundles, artifacts, rules."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from keyquorum.prepare.pipeline import parse_pipeline
from keyquorum_admission.manifests import read_manifests
from keyquorum_admission.review import Seat
from keyquorum_core.artifact import DecryptingReader, encrypt_stream
from keyquorum_core.backup import Opening, Statement
from keyquorum_core.bundle import read_bundle, write_bundle
from keyquorum_core.ceremony import Commitments, EpochCertificate, PartsHeader
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.data_file import PREAMBLE_BYTES, Preamble
from keyquorum_core.derivation import decode_contributions, encode_contributions
from keyquorum_core.drill_report import FULL, DrillReport
from keyquorum_core.key_request import KeyRequest
from keyquorum_core.ledger.add_checkpoint import AddCheckpoint
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.leaves import parse_leaf
from keyquorum_core.ledger.log_keys import LogKeys, open_checkpoint
from keyquorum_core.ledger.notes import parse_note, parse_signature_lines
from keyquorum_core.ledger.tiles import decode_bundle, decode_tile, parse_path
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.ledger.verifier_keys import VerifierKey
from keyquorum_core.ledger.witness_policy import WitnessPolicy
from keyquorum_core.manifest import parse as parse_manifest
from keyquorum_core.policy.bundle import PolicyBundle
from keyquorum_core.provenance import ProvenanceStatement
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.release import NO_LEASE, Leaf, LeaseTerms, Window, decode_share, encode_share
from keyquorum_core.roster import EnrolmentCard, Roster, parse_operators
from keyquorum_core.sealing import check_public
from keyquorum_core.signing import PublicIdentity, peek_payload
from keyquorum_core.statements import Opening as JobOpening
from keyquorum_core.statements import ResultStatement
from keyquorum_core.strictjson import loads
from keyquorum_core.telemetry import Batch, Record
from keyquorum_core.testimony import Testimony
from keyquorum_custodian.sealing.record import scheme_of
from tests.fuzz.target import Target, one_of
from tests.support import admission, signed_vectors
from tests.support.backup_samples import OPENING, STATEMENT, TESTIMONY
from tests.support.client_world import MANIFEST_TYPE, the_world
from tests.support.fake_drills import report_of

__all__ = ["DOCUMENTS"]

_VECTORS = Path(__file__).resolve().parents[2] / "docs" / "spec" / "vectors"
_LEDGER = _VECTORS / "ledger.json"
_KEY = bytes(range(32))
PIPELINE = (
    b'name = "p"\n[keys]\nkey = "k"\nclassification = "c"\n[columns.a]\ndo = "tokenize"\n[columns.b]\n'
    b'do = "generalise"\nbins = [1, 2.5]\n[columns.c]\ndo = "mask"\nkeep_last = 2\n[types]\nb = "int64"\n'
)
_COMMITTEE = (Custodian("ch-1", "CH"), Custodian("de-1", "DE"), Custodian("fr-1", "FR"), Custodian("is-1", "IS"))


def sealing_records() -> list[bytes]:
    """How keystores are sealed: the records of the vectors, the good ones first."""
    vectors = json.loads((_VECTORS / "keystore-sealing.json").read_text("utf-8"))["vectors"]
    vectors.sort(key=lambda vector: vector["expect"] != "ok")
    return [base64.b64decode(vector["record"]) for vector in vectors]


@cache
def ledger_vectors() -> dict[str, list[tuple[dict[str, Any], bytes]]]:
    """Those that hold data, by operation, the good ones first."""
    known: dict[str, bytes] = {}

    def resolve(value: Any) -> bytes:
        if isinstance(value, str):
            return value.encode()
        if "hex" in value:
            return bytes.fromhex(value["hex"])
        base = known[value["base"]]
        return base[: value["at"]] + resolve(value["insert"]) + base[value["at"] + value["remove"] :]

    found: dict[str, list[tuple[dict[str, Any], bytes]]] = {}
    for vector in json.loads(_LEDGER.read_text("utf-8"))["vectors"]:
        if "data" in vector:
            known[vector["name"]] = resolve(vector["data"])
            found.setdefault(vector["operation"], []).append((vector, known[vector["name"]]))
    for each in found.values():
        each.sort(key=lambda pair: pair[0]["expect"] != "ok")
    return found


def of_ledger(operation: str) -> list[bytes]:
    return [data for _, data in ledger_vectors()[operation]]


def log_keys() -> LogKeys:
    return LogKeys.parse(json.loads(_LEDGER.read_text("utf-8"))["log"])


def checkpoint_text(data: bytes) -> object:
    return Checkpoint.parse(data)


def checkpoint_texts() -> list[tuple[int, bytes]]:
    signed = of_ledger("checkpoint")
    found = [(0, each) for each in signed] + [(1, each.partition(b"\n\n")[0] + b"\n") for each in signed[:8]]
    return found + [(2, each) for each in signed[:8]] + [(3, each.partition(b"\n\n")[2]) for each in signed[:8]]


def tile_file(data: bytes) -> object:
    """The first byte is the width."""
    return decode_tile(data[1:], data[0]) if data else None


def entry_bundle(data: bytes) -> object:
    return decode_bundle(data[1:], data[0]) if data else None


def tile_files() -> list[tuple[int, bytes]]:
    """Widths that fit a byte."""
    found: list[tuple[int, bytes]] = []
    for which, operation in enumerate(("tile", "bundle")):
        found += [
            (which, bytes([vector["width"]]) + data)
            for vector, data in ledger_vectors()[operation]
            if 0 < vector["width"] < 256
        ]
    return [*found, (2, b"tile/0/x001/234.p/7"), (2, b"tile/entries/000")]


def leaves() -> list[bytes]:
    vectors = json.loads((_VECTORS / "leaves.json").read_text("utf-8"))["vectors"]
    return [each["data"].encode() for each in vectors if isinstance(each["data"], str)]


def policies(data: bytes) -> object:
    """Text in Cedar, in the one file of a bundle."""
    return PolicyBundle.make("coordinator", (), {"main.cedar": data.decode("utf-8", "replace")})


def policy_texts() -> list[bytes]:
    return [
        b'@id("everything")\npermit (principal, action, resource);\n',
        b'@id("no-export")\nforbid (principal, action, resource)\nwhen { context has classification };\n',
    ]


def of_signed(name: str, operation: str, member: str) -> list[bytes]:
    vectors = [each for each in signed_vectors.load(name)["vectors"] if each["operation"] == operation]
    vectors.sort(key=lambda vector: vector["expect"] != "ok")
    return [vector[member] for vector in vectors if member in vector]


def envelopes() -> list[bytes]:
    return of_signed("manifest", "open", "envelope")


def provenance_statements() -> list[bytes]:
    found = [vector["payload"] for vector in signed_vectors.load("manifest")["vectors"] if "payload" in vector]
    return [each for each in found if b"pipeline_sha256" in each and b"_type" not in each]


def ceremony_documents() -> list[tuple[int, bytes]]:
    plan = the_world().plan("demo")
    header = PartsHeader(plan.digest, "ch-1", {"de-1": "11" * 32})
    stated = Commitments(plan.digest, "ch-1", {0: b"\x22" * 32, 1: b"\x33" * 32}, {"ch-1": "44" * 32})
    certificate = EpochCertificate(plan, tuple(bytes([index]) * 32 for index in range(plan.quorum.seed_count)))
    made = (plan.to_payload(), header.to_payload(), stated.to_payload(), certificate.to_payload())
    return list(enumerate(made))


def rosters() -> list[tuple[int, bytes]]:
    world = the_world()
    card = EnrolmentCard(world.roster.cluster, world.roster.custodians[0], 1_700_000_000)
    operator = base64.b64encode(world.operator.public.to_bytes()).decode()
    operators = json.dumps({"threshold": 1, "operators": {"oscar": operator}}).encode()
    return [(0, world.roster.payload()), (1, operators), (2, card.payload())]


def rule(data: bytes) -> object:
    read = loads(data, "a rule")
    return Quorum(read, _COMMITTEE).resilience() if isinstance(read, dict) else None


def rules() -> list[bytes]:
    texts: tuple[object, ...] = (
        {"at_least": 2},
        {"all_of": [{"at_least": 2}, {"jurisdictions": 2}], "include": [{"jurisdiction": "CH"}]},
        {
            "any_of": [
                {"at_least": 2, "of": ["ch-1", "de-1", "fr-1"]},
                {"include": {"custodian": "is-1"}, "at_least": 2},
            ]
        },
    )
    return [json.dumps(each).encode() for each in texts]


def bundle(data: bytes) -> object:
    return [each.reader.read() for each in read_bundle(io.BytesIO(data))]


def bundles() -> list[bytes]:
    sink = io.BytesIO()
    files = {"main.py": b"print()", "data/a": b"", "data/" + "n" * 90 + "/x": b"1" * 600}
    write_bundle([(name, len(data), io.BytesIO(data)) for name, data in files.items()], sink)
    return [sink.getvalue()]


def artifact(data: bytes) -> object:
    return DecryptingReader(_KEY, io.BytesIO(data), b"fuzz").readall()


def artifacts() -> list[bytes]:
    found = []
    for size in (0, 1, 100):
        sink = io.BytesIO()
        encrypt_stream(_KEY, io.BytesIO(bytes(size)), sink, b"fuzz")
        found.append(sink.getvalue())
    return found


def data_file(data: bytes) -> object:
    """What stands before the zeros."""
    return Preamble.parse(data.ljust(PREAMBLE_BYTES, b"\0"))


def data_files() -> list[bytes]:
    vectors = json.loads((_VECTORS / "data.json").read_text("utf-8"))["vectors"]
    return [base64.b64decode(each["file"])[:PREAMBLE_BYTES].rstrip(b"\0") for each in vectors]


def contributions(data: bytes) -> object:
    return decode_contributions(data, (0, 3, 7))


def public_values() -> list[tuple[int, bytes]]:
    found = [(0, each) for each in of_signed("sealing", "public", "public")]
    return found + [(1, each) for each in of_signed("signatures", "parse_identity", "public")]


def admission_review(data: bytes) -> object:
    """Every seat answers any bytes; what could not be read is the typed error that the denial holds."""
    for seat in Seat:
        given = admission.ask(seat, data)
        assert given.document["response"]["allowed"] is (given.outcome in ("allowed", "patched"))
        if given.error is not None:
            raise given.error
    return None


def admission_reviews() -> list[tuple[int, bytes]]:
    plain = admission.pod()
    found = [admission.review(each) for each in (admission.completed(plain), plain, admission.wrap("CronJob", plain))]
    manifest = json.dumps(plain).encode()
    return [*((0, json.dumps(each, separators=(",", ":")).encode()) for each in found), (1, manifest)]


def shares() -> list[bytes]:
    values = {0: _KEY, 3: _KEY}
    return [encode_share(values, NO_LEASE), encode_share(values, LeaseTerms(3600, 1800))]


def telemetry() -> list[tuple[int, bytes]]:
    record = Record(1_800_000_000, "lease-renewed", {"seconds": 3600, "by": "a quorum"})
    return [*((0, each) for each in of_signed("telemetry", "batch", "payload")), (1, record.to_bytes())]


def backups() -> list[tuple[int, bytes]]:
    return [(0, OPENING.payload()), (1, STATEMENT.payload()), (2, TESTIMONY.payload())]


def drill_reports() -> list[bytes]:
    return [report_of("0d" * 16, kind).payload() for kind in ("rotation", FULL)]


def text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


DOCUMENTS: Sequence[Target] = (
    one_of("ledger-checkpoint",
           [lambda data: open_checkpoint(data, log_keys()), checkpoint_text, parse_note, parse_signature_lines],
           checkpoint_texts),
    Target("ledger-leaf", parse_leaf, leaves),
    Target("policy", policies, policy_texts, 4096),
    one_of("ledger-tile", [tile_file, entry_bundle, text(parse_path)], tile_files),
    Target("ledger-tlog-proof", TlogProof.parse, lambda: of_ledger("tlog_proof")),
    Target("ledger-add-checkpoint", AddCheckpoint.parse, lambda: of_ledger("add_checkpoint"), 1 << 15),
    one_of("ledger-keys", [text(VerifierKey.parse), WitnessPolicy.parse],
           lambda: [(0, each) for each in of_ledger("vkey")] + [(1, each) for each in of_ledger("policy")]),
    Target("manifest", parse_manifest, lambda: of_signed("manifest", "parse", "payload")),
    one_of("statements", [JobOpening.parse, ResultStatement.parse],
           lambda: [(0, each) for each in of_signed("manifest", "open_opening", "payload")]
           + [(1, each) for each in of_signed("manifest", "open_result", "payload")]),
    one_of("release", [Leaf.parse, Window.parse],
           lambda: [(0, each) for each in of_signed("release", "leaf", "leaf")]
           + [(1, each) for each in of_signed("release", "window", "payload")]),
    Target("key-request", KeyRequest.parse, lambda: of_signed("key-request", "parse", "payload")),
    Target("provenance", ProvenanceStatement.parse, provenance_statements),
    Target("pipeline", parse_pipeline, lambda: [PIPELINE], 2048),
    Target("envelope", lambda data: peek_payload(data, MANIFEST_TYPE, "fuzz"), envelopes),
    one_of("roster", [Roster.parse, parse_operators, EnrolmentCard.parse], rosters, 1 << 16),
    one_of("ceremony", [CeremonyPlan.parse, PartsHeader.parse, Commitments.parse, EpochCertificate.parse],
           ceremony_documents),
    Target("sealing-record", scheme_of, sealing_records, 1024),
    Target("quorum-rule", rule, rules, 1024),
    Target("strictjson", lambda data: loads(data, "fuzz"), lambda: [b'{"a":[1,"\\u00e9",null,true]}', *rules()], 2048),
    Target("bundle", bundle, bundles),
    Target("artifact", artifact, artifacts, 512),
    Target("data-file", data_file, data_files, 4096),
    one_of("keys", [check_public, PublicIdentity.from_bytes], public_values, 4096),
    one_of("admission", [admission_review, lambda data: read_manifests(data, "fuzz")], admission_reviews),
    Target("contributions", contributions, lambda: [encode_contributions({0: _KEY, 3: _KEY, 7: _KEY})], 256),
    Target("share", lambda data: decode_share(data, (0, 3)), shares, 256),
    one_of("telemetry", [Batch.parse, Record.parse], telemetry),
    Target("drill-report", DrillReport.parse, drill_reports, 1 << 14),
    one_of("backup", [Opening.parse, Statement.parse, Testimony.parse], backups),
)  # fmt: skip
"""What a coordinator, a peer, an owner or a file on disk can give us."""
