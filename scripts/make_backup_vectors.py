#!/usr/bin/env python3
"""Write docs/spec/vectors/backup.json and testimony.json: put together as JSON and bytes alone.

    python scripts/make_backup_vectors.py [--check]

With ``--check``, write nothing and fail when a file is not what this script makes. A whole backup, sealed and signed
with fresh randomness, can't be made the same twice: ``frozen`` is made once, by the release that is installed, and
then kept as it is.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors"
BACKUP, TESTIMONY = FOLDER / "backup.json", FOLDER / "testimony.json"

MAGIC = b"keyquorum/v1/backup\n"
STATEMENT_TYPE = "application/vnd.keyquorum.backup.v1+json"
BACKUP_ID = "0b" * 16
OPENING: dict[str, Any] = {
    "backup_id": BACKUP_ID,
    "cluster": "demo",
    "custodian": "ch-1",
    "format": 1,
    "recipients": [{"fingerprint": "aa" * 32, "sealed": "AQI="}, {"fingerprint": "bb" * 32, "sealed": "Aw=="}],
}
EPOCH = {"certificate": "0a" * 32, "epoch": 3, "held": "keystore", "key_id": "demo", "seeds": 6, "state": "active"}
STATEMENT: dict[str, Any] = {
    "backup_id": BACKUP_ID,
    "body_bytes": 5,
    "body_sha256": hashlib.sha256(b"abcde").hexdigest(),
    "cluster": "demo",
    "created_at": 1_800_000_000,
    "custodian": "ch-1",
    "epochs": [EPOCH, {**EPOCH, "epoch": 4, "held": "token", "seeds": 0}],
    "highest_time": 1_800_000_001,
    "jurisdiction": "CH",
    "ledger_size": 20411,
    "opening_sha256": "",
    "roster_digest": "5e" * 32,
    "roster_version": 2,
    "sequence": 41,
}


def canonical(members: dict[str, Any]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


STATEMENT["opening_sha256"] = hashlib.sha256(canonical(OPENING)).hexdigest()


def block(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def transcript(label: str, *parts: bytes) -> bytes:
    out = len(label).to_bytes(2, "big") + label.encode()
    return out + b"".join(len(part).to_bytes(8, "big") + part for part in parts)


# -- backup.json -------------------------------------------------------------------------------------------------------


def openings() -> list[tuple[str, str, bytes]]:
    first, second = OPENING["recipients"]
    return [
        ("two recipients", "ok", canonical(OPENING)),
        ("one recipient", "ok", canonical({**OPENING, "recipients": [first]})),
        ("no recipient", "MALFORMED", canonical({**OPENING, "recipients": []})),
        ("a recipient twice", "MALFORMED", canonical({**OPENING, "recipients": [first, first]})),
        ("recipients out of order", "MALFORMED", canonical({**OPENING, "recipients": [second, first]})),
        ("nothing sealed", "MALFORMED", canonical({**OPENING, "recipients": [{**first, "sealed": ""}]})),
        ("an empty fingerprint", "MALFORMED", canonical({**OPENING, "recipients": [{**first, "fingerprint": ""}]})),
        ("an empty custodian", "MALFORMED", canonical({**OPENING, "custodian": ""})),
        ("a custodian like a path", "MALFORMED", canonical({**OPENING, "custodian": "../ch-1"})),
        ("another format", "UNSUPPORTED", canonical({**OPENING, "format": 2})),
        ("an unknown member", "MALFORMED", canonical({**OPENING, "more": 1})),
        ("not canonical", "MALFORMED", canonical(OPENING).replace(b",", b", ", 1)),
    ]


def statements() -> list[tuple[str, str, bytes]]:
    def changed(**of_epoch: object) -> bytes:
        return canonical({**STATEMENT, "epochs": [{**EPOCH, **of_epoch}]})

    return [
        ("two epochs", "ok", canonical(STATEMENT)),
        ("no epochs, no ledger", "ok", canonical({**STATEMENT, "epochs": [], "ledger_size": 0})),
        ("an epoch twice", "MALFORMED", canonical({**STATEMENT, "epochs": [EPOCH, EPOCH]})),
        ("epochs out of order", "MALFORMED", canonical({**STATEMENT, "epochs": STATEMENT["epochs"][::-1]})),
        ("an epoch's state", "MALFORMED", changed(state="asleep")),
        ("where an epoch is held", "MALFORMED", changed(held="cloud")),
        ("an epoch without a certificate", "MALFORMED", changed(certificate="")),
        ("epoch 0", "MALFORMED", changed(epoch=0)),
        ("fewer than no seeds", "MALFORMED", changed(seeds=-1)),
        ("the first has number 1", "MALFORMED", canonical({**STATEMENT, "sequence": 0})),
        ("an empty digest of the body", "MALFORMED", canonical({**STATEMENT, "body_sha256": ""})),
        ("an empty digest of the roster", "MALFORMED", canonical({**STATEMENT, "roster_digest": ""})),
        ("no sequence", "MALFORMED", canonical({k: v for k, v in STATEMENT.items() if k != "sequence"})),
        ("not canonical", "MALFORMED", canonical(STATEMENT).replace(b",", b", ", 1)),
    ]


def record(kind: str, data: bytes = b"", **members: object) -> bytes:
    return block(canonical({**members, "record": kind})) + block(data)


def bodies() -> list[tuple[str, str | list[str], bytes]]:
    file = record("file", b"[]", name="operators")
    tpm = record("tpm", b"clock", ak="ab")
    epoch = record(
        "epoch", b"certificate", activated_at=1, ceremony_id="0c", ended_at=0, epoch=1, held="keystore", key_id="demo",
        retired_at=0, state="active",
    )  # fmt: skip
    seeds = record("seeds", (3).to_bytes(4, "big") + bytes(32), epoch=1, key_id="demo")
    return [
        ("nothing", [], b""),
        ("one record", ["file"], file),
        ("in order", ["file", "epoch", "seeds", "epoch", "tpm"], file + epoch + seeds + epoch + tpm),
        ("out of order", "MALFORMED", tpm + file),
        ("an epoch behind what follows epochs", "MALFORMED", tpm + epoch),
        ("no such record", "MALFORMED", record("mood", b"good")),
        ("a member too few", "MALFORMED", record("file", b"[]")),
        ("a member too many", "MALFORMED", record("file", b"[]", name="operators", more=1)),
        ("a member of another type", "MALFORMED", record("file", b"[]", name=1)),
        ("a number that is true", "MALFORMED", record("roster-file", b"[]", version=True)),
        ("a negative number", "MALFORMED", record("roster-file", b"[]", version=-1)),
        ("a short digest", "MALFORMED", record("evidence", b"[]", sha256="ab")),
        ("an empty digest", "MALFORMED", record("evidence", b"[]", sha256="")),
        ("no kind", "MALFORMED", block(b'{"name":"x"}') + block(b"")),
        ("members not canonical", "MALFORMED", block(b'{"name":"x", "record":"file"}') + block(b"")),
        ("cut in a length", "MALFORMED", file + b"\0"),
        ("cut in members", "MALFORMED", file[:20]),
        ("cut in data", "MALFORMED", file[:-1]),
        ("cut between members and data", "MALFORMED", file[:-6]),
        ("members too large", "TOO_LARGE", (65537).to_bytes(4, "big") + bytes(8)),
        ("data too large", "TOO_LARGE", block(canonical({"name": "x", "record": "file"})) + b"\xff" * 4),
    ]


def seed_runs() -> list[tuple[str, str | dict[str, str], bytes]]:
    def one(index: int, fill: int = 7) -> bytes:
        return index.to_bytes(4, "big") + bytes([fill]) * 32

    return [
        ("two", {"0": "01" * 32, "5": "02" * 32}, one(0, 1) + one(5, 2)),
        ("none", "MALFORMED", b""),
        ("one twice", "MALFORMED", one(3) + one(3)),
        ("descending", "MALFORMED", one(5) + one(3)),
        ("one byte less", "MALFORMED", one(3)[:-1]),
        ("an index that no rule has", "MALFORMED", one((1 << 18) + 1)),
    ]


def file_of(
    opening: bytes = canonical(OPENING), frames: tuple[bytes, ...] = (b"abc", b"de"), tail: bytes = b"", **said: object
) -> bytes:
    payload = canonical({**STATEMENT, "opening_sha256": hashlib.sha256(opening).hexdigest(), **said})
    envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": STATEMENT_TYPE, "signatures": []}
    body = b"".join(map(block, frames)) + bytes(4)
    return MAGIC + block(opening) + body + block(canonical(envelope)) + tail


def files() -> list[tuple[str, str, bytes]]:
    """Whole files with a body that no key opens and a statement that nobody signed: what is checked without either."""
    good = file_of()
    other = canonical({**OPENING, "backup_id": "0c" * 16})
    return [
        ("two frames", "ok", good),
        ("one frame", "ok", file_of(frames=(b"abcde",))),
        ("another first line", "MALFORMED", good.replace(b"v1/backup\n", b"v2/backup\n", 1)),
        ("empty", "MALFORMED", b""),
        ("the first line alone", "MALFORMED", MAGIC),
        ("an empty opening", "TOO_LARGE", MAGIC + bytes(4)),
        ("an opening too large", "TOO_LARGE", MAGIC + b"\xff" * 4),
        ("a frame too large", "TOO_LARGE", MAGIC + block(canonical(OPENING)) + ((1 << 20) + 1).to_bytes(4, "big")),
        ("cut in a frame", "MALFORMED", good[: len(MAGIC) + len(block(canonical(OPENING))) + 5]),
        ("no statement", "MALFORMED", good[: good.index(bytes(4) + b"\0\0") + 4]),
        ("cut in the statement", "MALFORMED", good[:-1]),
        ("more behind the statement", "MALFORMED", file_of(tail=b"\0")),
        ("two backups in a row", "MALFORMED", good + good),
        ("another body", "DIGEST", file_of(frames=(b"abcdf",))),
        ("a frame twice", "DIGEST", file_of(frames=(b"abc", b"abc", b"de"))),
        ("a frame less", "DIGEST", file_of(frames=(b"abc",))),
        ("another size of the body", "DIGEST", file_of(body_bytes=6)),
        ("another opening", "DIGEST", file_of(opening_sha256="01" * 32)),
        ("the opening of another backup", "DIGEST", file_of(opening=other)),
        ("the statement of another custodian", "DIGEST", file_of(custodian="de-1")),
        ("the statement of another cluster", "DIGEST", file_of(cluster="prod")),
    ]


def frozen() -> dict[str, Any]:
    """Made once by the product, then kept: what one release wrote, later ones read."""
    if BACKUP.exists():
        kept: dict[str, Any] = json.loads(BACKUP.read_text(encoding="utf-8"))["frozen"]
        return kept
    from keyquorum_core.backup import BackedEpoch, BackupWriter, Statement
    from keyquorum_core.backup_body import Record, pack_seeds
    from keyquorum_core.sealing import RecipientKey
    from keyquorum_core.signing import Identity

    recipient, sink = RecipientKey.generate(), io.BytesIO()
    writer = BackupWriter(sink, [recipient.public], cluster="demo", custodian="ch-1")
    epoch: dict[str, str | int] = {
        "activated_at": 1_799_999_000, "ceremony_id": "0c" * 16, "ended_at": 0, "epoch": 1, "held": "keystore",
        "key_id": "demo", "retired_at": 0, "state": "active",
    }  # fmt: skip
    records = [
        Record("file", {"name": "operators"}, b"[]"),
        Record("epoch", epoch, b"a certificate"),
        Record("seeds", {"epoch": 1, "key_id": "demo"}, pack_seeds({0: b"\x01" * 32, 2: b"\x02" * 32})),
        Record("tpm", {"ak": "ab" * 32}, b"where it was"),
    ]
    for each in records:
        writer.add(each)
    digest, size = writer.close_body()
    members = {**STATEMENT, "epochs": (BackedEpoch("demo", 1, "active", "0a" * 32, 2),)}
    members |= {"backup_id": writer.opening.backup_id, "opening_sha256": writer.opening_sha256}
    statement = Statement(**{**members, "body_sha256": digest, "body_bytes": size})
    signer = bytes(range(32)), bytes(range(32, 64))
    writer.finish(statement, Identity.from_seeds(*signer))
    return {
        "backup_id": writer.opening.backup_id,
        "recipient_public": recipient.public.hex(),
        "recipient": recipient.to_seed_bytes().hex(),
        "signer_seeds": [each.hex() for each in signer],
        "records": [[each.kind, dict(each.members), each.data.hex()] for each in records],
        "statement": statement.payload().decode(),
        "file": base64.b64encode(sink.getvalue()).decode(),
    }


def backup_document() -> dict[str, Any]:
    kept = frozen()
    ids = kept["backup_id"].encode(), b"demo", b"ch-1"
    return {
        "about": "Backups of custodians; docs/spec/backup.md",
        "bindings": {
            "key": transcript("keyquorum/v1/backup-key", *ids, bytes.fromhex(kept["recipient_public"])).hex(),
            "body": transcript("keyquorum/v1/backup-body", *ids).hex(),
        },
        "openings": [{"name": n, "expect": e, "payload": p.decode()} for n, e, p in openings()],
        "statements": [
            {"name": n, "expect": e, "payload": p.decode(), "sha256": hashlib.sha256(p).hexdigest()}
            for n, e, p in statements()
        ],
        "bodies": [{"name": n, "expect": e, "body": p.hex()} for n, e, p in bodies()],
        "seeds": [{"name": n, "expect": e, "data": p.hex()} for n, e, p in seed_runs()],
        "files": [{"name": n, "expect": e, "file": base64.b64encode(p).decode()} for n, e, p in files()],
        "frozen": kept,
    }


# -- testimony.json ----------------------------------------------------------------------------------------------------

KNOWN = {"certificate": "0a" * 32, "epoch": 3, "key_id": "demo", "retired_at": 0, "state": "active"}
RETIRED = {**KNOWN, "retired_at": 1_799_999_000, "state": "retired"}
DESTROYED = {**RETIRED, "state": "destroyed"}
SAID: dict[str, Any] = {
    "custodian": "de-1",
    "documents": {"inventory": {"digest": "0e" * 32, "version": 7}},
    "epochs": [KNOWN],
    "ledger": {"log": "0f" * 32, "root": "10" * 32, "size": 20411},
    "nonce": "0d" * 32,
    "restored": False,
    "roster": {"digest": "5e" * 32, "version": 2},
    "subject": "ch-1",
    "time": 1_800_000_002,
}
COMMITTEE = [["ch-1", "CH"], ["de-1", "DE"], ["fr-1", "FR"], ["is-1", "IS"], ["no-1", "NO"]]
OTHERS = ["de-1", "fr-1", "is-1", "no-1"]


def said(custodian: str = "de-1", **changes: object) -> dict[str, Any]:
    return {**copy.deepcopy(SAID), "custodian": custodian, **changes}


def testimonies() -> list[tuple[str, str, bytes]]:
    def of_epoch(**changes: object) -> bytes:
        return canonical(said(epochs=[{**KNOWN, **changes}]))

    ledger, document = SAID["ledger"], SAID["documents"]["inventory"]
    return [
        ("it knows everything", "ok", canonical(said())),
        ("retired", "ok", canonical(said(epochs=[RETIRED]))),
        ("destroyed", "ok", canonical(said(epochs=[DESTROYED]))),
        ("it knows nothing", "ok", canonical(said(epochs=[], documents={}, ledger={"log": "", "root": "", "size": 0}))),
        ("restored itself", "ok", canonical(said(restored=True))),
        ("an epoch twice", "MALFORMED", canonical(said(epochs=[KNOWN, RETIRED]))),
        ("epochs out of order", "MALFORMED", canonical(said(epochs=[{**KNOWN, "epoch": 4}, KNOWN]))),
        ("epoch 0", "MALFORMED", of_epoch(epoch=0)),
        ("an empty certificate", "MALFORMED", of_epoch(certificate="")),
        ("an empty state", "MALFORMED", of_epoch(state="")),
        ("no such state", "MALFORMED", of_epoch(state="asleep")),
        ("retired at no time", "MALFORMED", of_epoch(state="retired")),
        ("active since it was retired", "MALFORMED", of_epoch(retired_at=5)),
        ("an empty nonce", "MALFORMED", canonical(said(nonce=""))),
        ("a short nonce", "MALFORMED", canonical(said(nonce="0d" * 31))),
        ("an empty author", "MALFORMED", canonical(said(custodian=""))),
        ("an empty subject", "MALFORMED", canonical(said(subject=""))),
        ("an empty digest of a roster", "MALFORMED", canonical(said(roster={"digest": "", "version": 2}))),
        ("roster 0", "MALFORMED", canonical(said(roster={"digest": "5e" * 32, "version": 0}))),
        ("an empty digest of a document", "MALFORMED",
         canonical(said(documents={"inventory": {**document, "digest": ""}}))),
        ("document version 0", "MALFORMED", canonical(said(documents={"inventory": {**document, "version": 0}}))),
        ("more kinds of document than there can be", "MALFORMED",
         canonical(said(documents={f"kind-{number:02}": document for number in range(66)}))),
        ("leaves without a root", "MALFORMED", canonical(said(ledger={**ledger, "root": ""}))),
        ("leaves of no log", "MALFORMED", canonical(said(ledger={**ledger, "log": ""}))),
        ("a root without leaves", "MALFORMED", canonical(said(ledger={**ledger, "size": 0}))),
        ("restored: 0", "MALFORMED", canonical(said(restored=0))),
        ("an unknown member", "MALFORMED", canonical(said(more=1))),
        ("not canonical", "MALFORMED", canonical(said()).replace(b",", b", ", 1)),
    ]  # fmt: skip


def sufficient() -> list[tuple[str, dict[str, Any], list[str], list[str], bool]]:
    """name, rule, proved, unproved, whether they suffice for ch-1 among the five of COMMITTEE."""
    three, two, four = {"at_least": 3}, {"at_least": 2}, {"at_least": 4}
    home = {"all_of": [{"at_least": 2}, {"include": {"custodian": "de-1"}}]}
    return [
        ("3 of 5: nobody", three, [], [], False),
        ("3 of 5: two", three, OTHERS[:2], [], False),
        ("3 of 5: three", three, OTHERS[:3], [], True),
        ("3 of 5: two, and two restored: everybody else", three, OTHERS[:2], OTHERS[2:], True),
        ("3 of 5: two, and one restored", three, OTHERS[:2], OTHERS[2:3], False),
        ("3 of 5: one of them is the subject", three, ["ch-1", *OTHERS[:2]], [], True),
        ("2 of 5: two leave a quorum out", two, OTHERS[:2], [], False),
        ("2 of 5: three leave one and the subject out", two, OTHERS[:3], [], False),
        ("2 of 5: all others", two, OTHERS, [], True),
        ("4 of 5: three are no quorum", four, OTHERS[:3], [], False),
        ("4 of 5: all others", four, OTHERS, [], True),
        ("de-1 and another: without de-1", home, OTHERS[1:], [], False),
        ("de-1 and another: de-1 alone", home, OTHERS[:1], [], False),
        ("de-1 and another: those two", home, OTHERS[:2], [], True),
    ]


def judgements() -> list[dict[str, Any]]:
    """What ch-1 of COMMITTEE makes of testimonies under 3 of 5. ``by`` signs; a name of no custodian's is a stranger's
    identity, "attacker" one that the roster doesn't know."""

    def case(name: str, expect: str, given: list[tuple[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
        payloads = [{"by": by, "payload": canonical(each).decode()} for by, each in given]
        return {"name": name, "expect": expect, "given": payloads, **more}

    def those(*names: str, **changes: object) -> list[tuple[str, dict[str, Any]]]:
        return [(name, said(name, **changes)) for name in names]

    ledger, document, roster = SAID["ledger"], SAID["documents"]["inventory"], SAID["roster"]
    two, three = those("fr-1", "is-1"), those("de-1", "fr-1", "is-1")
    proof: dict[str, Any] = {"testified": ["de-1", "fr-1", "is-1"], "retire": [], "withhold": [], "lacking": []}
    return [
        case("nothing newer", "ok", three, proof=proof),
        case("an older roster", "ok", [*two, *those("de-1", roster={**roster, "version": 1})], proof=proof),
        case("retired since, by the earliest word", "ok",
             [*those("de-1", epochs=[RETIRED]), *those("fr-1", epochs=[{**RETIRED, "retired_at": 1_799_998_000}]),
              *those("is-1")],
             proof={**proof, "retire": [["demo", 3, 1_799_998_000]]}),
        case("destroyed, by one's word", "ok", [*those("de-1", epochs=[DESTROYED]), *two],
             proof={**proof, "withhold": [["demo", 3, ["de-1"]]]}),
        case("made since", "ok", [*those("de-1", epochs=[KNOWN, {**KNOWN, "epoch": 4}]), *two],
             proof={**proof, "lacking": [["demo", 4]]}),
        case("made and destroyed since", "ok", [*those("de-1", epochs=[KNOWN, {**DESTROYED, "epoch": 4}]), *two],
             proof=proof),
        case("everybody else, two of them restored", "ok",
             [*those("de-1", "fr-1"), *those("is-1", "no-1", restored=True)],
             proof={**proof, "testified": OTHERS}),
        case("no testimony", "RESTORED", []),
        case("too few", "RESTORED", two),
        case("one peer three times", "RESTORED", [two[0]] * 3),
        case("one peer twice, saying different things", "RESTORED",
             [*two, ("fr-1", said("fr-1", epochs=[]))]),
        case("three, one of them restored", "RESTORED", [*two, *those("de-1", restored=True)]),
        case("the subject for itself", "RESTORED", [*two, ("ch-1", said("ch-1"))]),
        case("in a peer's name by the subject's key", "SIGNATURE", [*two, ("ch-1", said("de-1"))]),
        case("in a peer's name by another peer's key", "SIGNATURE", [*two, ("fr-1", said("de-1"))]),
        case("in a peer's name by the attacker's key", "SIGNATURE", [*two, ("attacker", said("de-1"))]),
        case("by somebody who is not in the roster", "UNKNOWN_CUSTODIAN", [*three, ("attacker", said("xx-1"))]),
        case("replayed: to another nonce", "RESTORED", [*two, *those("de-1", nonce="0c" * 32)]),
        case("replayed: of an hour ago", "RESTORED", [*two, *those("de-1", time=SAID["time"] - 3600)]),
        case("of a clock an hour ahead", "RESTORED", [*two, *those("de-1", time=SAID["time"] + 3600)]),
        case("replayed: to another custodian", "RESTORED", [*two, *those("de-1", subject="no-1")]),
        case("a newer roster", "RESTORED", [*two, *those("de-1", roster={**roster, "version": 3})]),
        case("another roster of that version", "RESTORED",
             [*two, *those("de-1", roster={**roster, "digest": "5f" * 32})]),
        case("a longer ledger", "RESTORED", [*two, *those("de-1", ledger={**ledger, "size": 20412})]),
        case("another ledger of that size", "RESTORED", [*two, *those("de-1", ledger={**ledger, "root": "11" * 32})]),
        case("another log", "RESTORED", [*two, *those("de-1", ledger={**ledger, "log": "11" * 32})]),
        case("a newer document", "RESTORED",
             [*two, *those("de-1", documents={"inventory": {**document, "version": 8}})]),
        case("another document of that version", "RESTORED",
             [*two, *those("de-1", documents={"inventory": {**document, "digest": "11" * 32}})]),
        case("a document that is not here", "RESTORED", [*two, *those("de-1", documents={"revocations": document})]),
        case("another certificate of an epoch", "RESTORED",
             [*two, *those("de-1", epochs=[{**KNOWN, "certificate": "11" * 32}])]),
        case("destroyed, by another certificate", "RESTORED",
             [*two, *those("de-1", epochs=[{**DESTROYED, "certificate": "11" * 32}])]),
    ]  # fmt: skip


def testimony_document() -> dict[str, Any]:
    return {
        "about": "What peers say to a restored custodian; docs/spec/backup.md, Testimony",
        "committee": COMMITTEE,
        "rule": {"at_least": 3},
        "subject": "ch-1",
        "now": SAID["time"] + 30,
        "nonce": SAID["nonce"],
        "mine": canonical(said("ch-1", subject="de-1")).decode(),
        "testimonies": [
            {"name": n, "expect": e, "payload": p.decode(), "sha256": hashlib.sha256(p).hexdigest()}
            for n, e, p in testimonies()
        ],
        "sufficient": [
            {"name": n, "rule": r, "proved": p, "unproved": u, "sufficient": s} for n, r, p, u, s in sufficient()
        ],
        "judgements": judgements(),
    }


def main() -> int:
    made = {BACKUP: backup_document(), TESTIMONY: testimony_document()}
    rendered = {path: json.dumps(document, indent=1) + "\n" for path, document in made.items()}
    if "--check" in sys.argv[1:]:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in rendered.items()))
    for path, text in rendered.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
