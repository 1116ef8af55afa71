"""Write docs/spec/vectors/{manifest,release,key-request,telemetry}.json from fixed seeds: name those to write.

Each vector says what to do (``operation``), with what, and ``expect``: ``ok`` or the reason code. Short values are hex,
blobs are base64 or, where most of it repeats an earlier vector's, a splice. See :mod:`vector_files` before running it:
what is signed or sealed comes out differently each time.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core import key_request as k
from keyquorum_core import manifest as m
from keyquorum_core import release as r
from keyquorum_core import telemetry as t
from keyquorum_core.provenance import PROVENANCE_TYPE, ProvenanceStatement, sign_provenance
from keyquorum_core.signing import Identity, sign
from vector_files import NOW, Vector, b64, edited, fixed, flip, identity, make_named, recipient, write


def example_manifest(owner: Identity) -> m.Manifest:
    digest = hashlib.sha256(b"file").hexdigest()
    return m.Manifest(
        subjects=(m.Subject("data/h2.json", digest), m.Subject("main.py", digest)),
        key_id="chem-2027",
        epoch=1,
        classification="internal",
        export_control="",
        regions=("CH", "eu-central-1"),
        evidence_types=("nvidia-gpu", "sev-snp"),
        resources=m.Resources(cpus=2, memory_mib=2048, gpus=0, wall_seconds=600, output_mib=64),
        owner="alice",
        owner_identity=owner.public,
        owner_hpke=recipient("alice", "MLKEM768_X25519").public,
        entrypoint=("python", "main.py", "--bond", "0.735"),
        not_before=NOW,
        not_after=NOW + 86400,
        issued_at=NOW - 60,
        nonce="0f" * 16,
        purposes=("chemistry", "research"),
        provenance=(example_provenance().entry("data/h2.json"),),
    )


def example_provenance() -> ProvenanceStatement:
    return ProvenanceStatement(
        pipeline_sha256="11" * 32,
        inputs=("22" * 32, "33" * 32),
        output_sha256=hashlib.sha256(b"file").hexdigest(),
        columns_in=("age", "name", "zip"),
        columns_out=("age", "zip3"),
        rows_in=1000,
        rows_out=1000,
        tool="keyquorum 0.1.0",
        epsilon_micro=500_000,
        issued_at=NOW - 3600,
    )


def manifest() -> None:
    owner, stranger = identity("alice"), identity("mallory")
    job = example_manifest(owner)
    data, envelope = m.payload(job), m.sign_manifest(job, owner)
    tree = json.loads(data)
    vectors: list[Vector] = []

    def parses(name: str, payload: bytes, expect: str) -> None:
        vectors.append({"name": name, "operation": "parse", "payload": b64(payload), "expect": expect})

    def with_(expect: str, name: str, **changes: Any) -> None:
        changed = {**tree, "predicate": {**tree["predicate"], **changes}}
        parses(name, json.dumps(changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(), expect)

    def subjects(name: str, *names: str, digest: str = "00" * 32) -> None:
        items = [{"name": n, "digest": {"sha256": digest}} for n in names]
        changed = {**tree, "subject": items, "predicate": {**tree["predicate"], "provenance": []}}
        parses(name, json.dumps(changed, sort_keys=True, separators=(",", ":")).encode(), "MALFORMED")

    def opens(name: str, blob: bytes, expect: str, by: Identity = owner, **more: Any) -> None:
        vector = {"name": name, "operation": "open", "owner": b64(by.public.to_bytes()), "envelope": b64(blob)}
        vectors.append(vector | {"expect": expect} | more)

    parses("a manifest", data, "ok")
    vectors[-1] |= {"job_id": m.job_id(data), "subject": m.subject(data).hex()}
    with_("ok", "an export control class", export_control="5A002")
    with_("ok", "neither purpose nor provenance", purposes=[], provenance=[])
    with_("MALFORMED", "purposes out of order", purposes=["research", "chemistry"])
    with_("MALFORMED", "purpose twice", purposes=["research", "research"])
    with_("MALFORMED", "bad purpose", purposes=["Research"])
    with_("MALFORMED", "17 purposes", purposes=sorted(f"p{i}" for i in range(17)))
    entry = tree["predicate"]["provenance"][0]
    with_("MALFORMED", "provenance of no subject", provenance=[{**entry, "subject": "other"}])
    with_("MALFORMED", "provenance twice", provenance=[entry, entry])
    with_("MALFORMED", "provenance entry: unknown member", provenance=[{**entry, "rows": 7}])
    with_("MALFORMED", "provenance entry: columns out of order", provenance=[{**entry, "columns": ["zip3", "age"]}])
    with_("MALFORMED", "provenance entry: epsilon below zero", provenance=[{**entry, "epsilon_micro": -1}])
    with_("MALFORMED", "provenance entry: pipeline in capitals", provenance=[{**entry, "pipeline_sha256": "AB" * 32}])
    with_("MALFORMED", "unknown member", surprise=1)
    parses("unknown member of the statement", data[:-1] + b',"x":1}', "MALFORMED")
    parses("duplicate member", data.replace(b'"epoch":1,', b'"epoch":1,"epoch":1,'), "MALFORMED")
    parses("member missing", data.replace(b'"epoch":1,', b""), "MALFORMED")
    parses("another predicate type", data.replace(b"job-manifest:v1", b"job-manifest:v2"), "MALFORMED")
    parses("another statement type", data.replace(b"Statement/v1", b"Statement/v0"), "MALFORMED")
    parses("whitespace", data.replace(b":1,", b": 1,", 1), "MALFORMED")
    parses("needless escape", data.replace(b"internal", b"\\u0069nternal"), "MALFORMED")
    parses("a float", data.replace(b'"epoch":1,', b'"epoch":1.0,'), "MALFORMED")
    parses("minus zero", data.replace(b'"gpus":0', b'"gpus":-0'), "MALFORMED")
    parses("integer beyond 2^53", data.replace(b'"epoch":1,', b'"epoch":9007199254740992,'), "MALFORMED")
    parses("truncated", data[:-1], "MALFORMED")
    parses("trailing newline", data + b"\n", "MALFORMED")
    subjects("no subject")
    subjects("subjects out of order", "b", "a")
    subjects("subject twice", "a", "a")
    subjects("file and folder", "a", "a/b")
    subjects("absolute name", "/etc/passwd")
    subjects("parent folder", "a/../../b")
    subjects("dot part", "./a")
    subjects("empty part", "a//b")
    subjects("backslash", "a\\b")
    subjects("control character", "a\u0007b")
    subjects("lone surrogate", "a\ud800b")
    subjects("name too long", "a" * 256)
    subjects("digest in capitals", "a", digest="AB" * 32)
    subjects("digest too short", "a", digest="ab" * 31)
    with_("MALFORMED", "bad region", regions=["Europe"])
    with_("MALFORMED", "no region", regions=[])
    with_("MALFORMED", "regions out of order", regions=["eu-central-1", "CH"])
    with_("MALFORMED", "region twice", regions=["CH", "CH"])
    with_("MALFORMED", "unknown evidence type", evidence_types=["sgx"])
    with_("MALFORMED", "no evidence type", evidence_types=[])
    with_("MALFORMED", "classification in capitals", classification="Internal")
    with_("MALFORMED", "bad key id", key_id="../key")
    with_("MALFORMED", "bad owner name", owner="Alice")
    with_("MALFORMED", "no entrypoint", entrypoint=[])
    with_("MALFORMED", "entrypoint with NUL", entrypoint=["a\0b"])
    with_("MALFORMED", "65 arguments", entrypoint=["a"] * 65)
    with_("MALFORMED", "no CPU", resources={**tree["predicate"]["resources"], "cpus": 0})
    with_("MALFORMED", "unknown resource", resources={**tree["predicate"]["resources"], "tpus": 1})
    with_("MALFORMED", "window ends before it begins", not_after=NOW)
    with_("MALFORMED", "window of more than 30 days", not_after=NOW + m.MAX_LIFETIME + 1)
    with_("MALFORMED", "issued after its end", issued_at=NOW + 86400)
    with_("MALFORMED", "owner identity truncated", owner_identity=b64(owner.public.to_bytes()[:-1]))
    with_("UNSUPPORTED", "owner HPKE key of unknown suite", owner_hpke=b64(b"\x00\x03FOO" + bytes(1216)))
    opens("signed by its owner", envelope, "ok")
    opens("signed by another", sign(stranger, m.MANIFEST_TYPE, data), "SIGNATURE")
    opens("names another owner", sign(stranger, m.MANIFEST_TYPE, data), "UNKNOWN_OWNER", by=stranger)
    opens("one byte changed", edited(envelope, payload=b64(data.replace(b'"epoch":1', b'"epoch":2'))), "SIGNATURE")
    opens("signed as another type", sign(owner, m.OPENING_TYPE, data), "MALFORMED")
    for name, now, expect in (
        ("window not begun", NOW - 1, "NOT_YET_VALID"),
        ("window begins", NOW, "ok"),
        ("window's last second", NOW + 86399, "ok"),
        ("window over", NOW + 86400, "EXPIRED"),
    ):
        opens(name, envelope, expect, now=now)
    opening = m.Opening(m.job_id(data), "0f" * 16, "ab" * 32, 4096, True)
    result = m.ResultStatement(
        job_id=m.job_id(data),
        worker=stranger.public.fingerprint,
        exit_code=0,
        outcome="completed",
        reason="",
        artifacts={"result": m.ArtifactDigest("cd" * 32, 1234), "log": m.ArtifactDigest("ef" * 32, 99)},
        started_at=NOW,
        finished_at=NOW + 5,
    )
    for kind, by, blob, statement in (
        ("opening", owner, m.sign_opening(opening, owner), opening.payload()),
        ("result", stranger, m.sign_result(result, stranger), result.payload()),
    ):

        def states(name: str, what: bytes, expect: str, job_id: str = "", k: str = kind, i: Identity = by) -> None:
            vector = {"name": f"{k}: {name}", "operation": f"open_{k}", "signer": b64(i.public.to_bytes())}
            vectors.append(vector | {"job_id": job_id or m.job_id(data), "envelope": b64(what), "expect": expect})

        kind_type = m.OPENING_TYPE if kind == "opening" else m.RESULT_TYPE
        states("valid", blob, "ok")
        vectors[-1]["payload"] = b64(statement)
        states("another job", blob, "WRONG_JOB", job_id="a" * 26)
        states("one byte changed", edited(blob, payload=b64(flip(statement, 30))), "SIGNATURE")
        states("unknown member", sign(by, kind_type, statement[:-1] + b',"x":1}'), "MALFORMED")
        states("not canonical", sign(by, kind_type, statement + b" "), "MALFORMED")
    forged = sign(owner, m.RESULT_TYPE, result.payload())
    vectors.append(
        {"name": "result: names another signing key", "operation": "open_result", "job_id": m.job_id(data),
         "signer": b64(owner.public.to_bytes()), "envelope": b64(forged), "expect": "DIGEST"})  # fmt: skip
    prepared = example_provenance()
    signed = sign_provenance(prepared, owner)

    def provenance(name: str, blob: bytes, expect: str, by: Identity = owner) -> None:
        vector = {"name": name, "operation": "open_provenance", "signer": b64(by.public.to_bytes())}
        vector |= {"envelope": b64(blob), "expect": expect}
        vectors.append(vector | ({"payload": b64(prepared.payload())} if expect == "ok" else {}))

    def restated(**changes: Any) -> bytes:
        members = {**json.loads(prepared.payload()), **changes}
        return sign(owner, PROVENANCE_TYPE, json.dumps(members, sort_keys=True, separators=(",", ":")).encode())

    provenance("provenance: valid", signed, "ok")
    provenance("provenance: signed by another", signed, "SIGNATURE", by=stranger)
    provenance("provenance: unknown member", restated(rows=7), "MALFORMED")
    provenance("provenance: no inputs", restated(inputs=[]), "MALFORMED")
    provenance("provenance: inputs out of order", restated(inputs=["33" * 32, "22" * 32]), "MALFORMED")
    provenance("provenance: no tool", restated(tool=""), "MALFORMED")
    provenance("provenance: rows are text", restated(rows_out="7"), "MALFORMED")
    provenance("provenance: columns twice", restated(columns_out=["age", "age"]), "MALFORMED")
    write("manifest", "Manifests, openings, result and provenance statements; docs/spec/manifest.md", vectors)


def release() -> None:
    vectors: list[Vector] = []
    custodian, stranger = identity("custodian ch-1"), identity("mallory")
    subject, answer_key = fixed("subject"), Ed25519PrivateKey.from_private_bytes(fixed("answer key"))
    leaf = r.Leaf("abcdefghijklmnopqrstuvwxyz", subject.hex(), "11" * 32, "22" * 32, "chem-2027", 1, NOW, "worker")
    data = leaf.to_bytes()

    def leaves(name: str, blob: bytes, expect: str) -> None:
        vectors.append({"name": f"leaf: {name}", "operation": "leaf", "leaf": b64(blob), "expect": expect})

    owner = r.Leaf(leaf.job_id, subject.hex(), "11" * 32, r.Leaf.NO_EVIDENCE, "chem-2027", 1, NOW, "owner").to_bytes()
    for name, blob in (("for a worker", data), ("for the owner", owner)):
        leaves(name, blob, "ok")
        vectors[-1]["hash"] = r.Leaf.parse(blob).hash().hex()
    leaves("owner with evidence", data.replace(b'"worker"', b'"owner"'), "LEAF")
    leaves("worker without evidence", owner.replace(b'"owner"', b'"worker"'), "LEAF")
    leaves("another recipient", data.replace(b'"worker"', b'"friend"'), "LEAF")
    leaves("another type", data.replace(b"release.intent", b"job.submitted"), "LEAF")
    leaves("unknown member", data[:-1] + b',"x":1}', "MALFORMED")
    leaves("duplicate member", data[:-1] + b',"epoch":1}', "MALFORMED")
    leaves("member missing", data.replace(b'"epoch":1,', b""), "MALFORMED")
    leaves("members out of order", b'{"time":1800000000,' + data[1:].replace(b'"time":1800000000,', b""), "LEAF")
    leaves("whitespace", data + b" ", "LEAF")
    leaves("digest in capitals", data.replace(b"11" * 32, b"AB" * 32), "MALFORMED")
    leaves("bad job id", data.replace(b"abcdef", b"ABCDEF"), "MALFORMED")
    leaves("negative epoch", data.replace(b'"epoch":1', b'"epoch":-1'), "MALFORMED")
    leaves("truncated", data[:-1], "MALFORMED")

    public = recipient("worker", "MLKEM768_X25519").public
    info = r.share_info(leaf.hash(), "ch-1", public).hex()
    fields: Vector = {"leaf_hash": leaf.hash().hex(), "custodian": "ch-1", "recipient": b64(public), "expect": "ok"}
    vectors.append({"name": "share info", "operation": "share_info", **fields, "info": info})
    values = {0: fixed("contribution 0"), 2: fixed("contribution 2")}

    def share(name: str, plaintext: bytes, expect: str, indices: tuple[int, ...] = (0, 2), **terms: int) -> None:
        fields: Vector = {"plaintext": plaintext.hex(), "indices": list(indices), "expect": expect}
        vectors.append(
            {"name": f"share: {name}", "operation": "share", **fields, **({"terms": terms} if terms else {})}
        )

    plaintext = r.encode_share(values, r.LeaseTerms(3600, 1800))
    share("a worker's", plaintext, "ok", lease_seconds=3600, reattest_seconds=1800)
    share("an owner's", r.encode_share(values, r.NO_LEASE), "ok", lease_seconds=0, reattest_seconds=0)
    share("without terms", plaintext[8:], "MALFORMED")
    share("a lease under 5 s", bytes([0, 0, 0, 4, 0, 0, 0, 1]) + plaintext[8:], "MALFORMED")
    share("a lease over 7 days", (604801).to_bytes(4, "big") + plaintext[4:], "MALFORMED")
    share("attested anew after the lease", plaintext[:4] + (3601).to_bytes(4, "big") + plaintext[8:], "MALFORMED")
    share("a lease that is never renewed", plaintext[:4] + bytes(4) + plaintext[8:], "MALFORMED")
    share("other seeds", plaintext, "MALFORMED", (0, 1))
    share("trailing byte", plaintext + b"\0", "MALFORMED")
    share("empty", b"", "MALFORMED")

    boot, number = fixed("boot secret"), NOW // 30
    nonce = r.make_nonce(boot, number)
    fields = {"boot_secret": boot.hex(), "window": number, "nonce": nonce.hex(), "expect": "ok"}
    vectors.append({"name": "nonce", "operation": "nonce", **fields})
    nonces = {"us-1": fixed("nonce us-1"), "ch-1": nonce, "de-1": fixed("nonce de-1")}
    fields = {"nonces": {k: v.hex() for k, v in nonces.items()}, "challenge": r.challenge(nonces).hex(), "expect": "ok"}
    vectors.append({"name": "challenge", "operation": "challenge", **fields})

    window = r.make_window("demo", "ch-1", number, boot, answer_key.public_key().public_bytes_raw())
    statement, envelope = window.payload(), r.sign_window(window, custodian)

    def windows(name: str, blob: bytes, expect: str, now: int = NOW, by: str = "ch-1", cluster: str = "demo") -> None:
        vector: Vector = {
            "name": f"window: {name}",
            "operation": "window",
            "identity": b64(custodian.public.to_bytes()),
        }
        vector |= {"custodian": by, "cluster": cluster, "now": now, "skew": 30, "envelope": b64(blob), "expect": expect}
        vectors.append(vector | ({"payload": b64(statement)} if expect == "ok" else {}))

    windows("current", envelope, "ok")
    windows("next window", envelope, "ok", now=NOW + 59)
    windows("within the skew", envelope, "ok", now=NOW - 30)
    windows("too late", envelope, "STALE", now=NOW + 90)
    windows("too early", envelope, "STALE", now=NOW - 31)
    windows("of another custodian", envelope, "UNKNOWN_CUSTODIAN", by="de-1")
    windows("of another cluster", envelope, "UNKNOWN_CUSTODIAN", cluster="prod")
    windows("signed by another", r.sign_window(window, stranger), "SIGNATURE")
    windows("one bit of the nonce", edited(envelope, payload=b64(statement.replace(b'"nonce":"', b'"nonce":"0')[:-1])),
            "SIGNATURE")  # fmt: skip
    longer = statement.replace(str(NOW + 60).encode(), str(NOW + 3600).encode())
    windows("lives longer than two windows", sign(custodian, r.WINDOW_TYPE, longer), "MALFORMED")
    weak = statement.replace(window.answer_key.encode(), b"01" + b"00" * 31)
    windows("small-order answer key", sign(custodian, r.WINDOW_TYPE, weak), "MALFORMED")
    windows("unknown member", sign(custodian, r.WINDOW_TYPE, statement[:-1] + b',"x":1}'), "MALFORMED")
    windows("not canonical", sign(custodian, r.WINDOW_TYPE, statement + b" "), "MALFORMED")

    sealed = fixed("sealed", 100)
    good = r.sign_answer(answer_key, subject, leaf.hash(), "ch-1", "chem-2027", 1, number, sealed)
    fields = {"subject": subject.hex(), "leaf_hash": leaf.hash().hex(), "key_id": "chem-2027", "epoch": 1}

    def answers(name: str, expect: str, answer: dict[str, Any] | None = None, **expected: Any) -> None:
        claim = {"custodian": "ch-1", "key_id": "chem-2027", "epoch": 1, "window": number, "sealed": b64(sealed)}
        claim |= {"signature": good.signature.hex()} | (answer or {})
        vector = {"name": f"answer: {name}", "operation": "answer", "window": b64(statement), "answer": claim}
        vectors.append(vector | fields | expected | {"expect": expect})

    answers("valid", "ok")
    message = r.answer_message(subject, leaf.hash(), "ch-1", "chem-2027", 1, number, sealed)
    vectors[-1]["message"] = b64(message)
    answers("another custodian", "UNKNOWN_CUSTODIAN", {"custodian": "de-1"})
    answers("another window", "STALE", {"window": number + 1})
    answers("another key", "UNKNOWN_KEY", {"key_id": "chem-2028"})
    answers("another epoch", "EPOCH", {"epoch": 2})
    answers("asked for another epoch", "EPOCH", epoch=2)
    answers("another leaf", "SIGNATURE", leaf_hash="00" * 32)
    answers("another job", "SIGNATURE", subject="00" * 32)
    answers("one bit of the ciphertext", "SIGNATURE", {"sealed": b64(flip(sealed, 50))})
    answers("ciphertext truncated", "SIGNATURE", {"sealed": b64(sealed[:-1])})
    answers("one bit of R", "SIGNATURE", {"signature": flip(good.signature, 1).hex()})
    answers("one bit of S", "SIGNATURE", {"signature": flip(good.signature, 33).hex()})
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(good.signature[32:], "little") + order
    answers("S not reduced", "SIGNATURE", {"signature": (good.signature[:32] + s.to_bytes(32, "little")).hex()})
    answers("signature truncated", "SIGNATURE", {"signature": good.signature[:-1].hex()})
    answers("no signature", "SIGNATURE", {"signature": ""})
    other = Ed25519PrivateKey.from_private_bytes(fixed("another answer key")).sign(message)
    answers("another answer key", "SIGNATURE", {"signature": other.hex()})
    write("release", "Leaves, windows, nonces, challenges and answers; docs/spec/release.md", vectors)


def key_request() -> None:
    owner, stranger = identity("alice"), identity("mallory")
    request = k.KeyRequest(
        key_id="chem-2027",
        epoch=3,
        purpose="tokenize",
        name="patients",
        classification="personal",
        export_control="",
        owner="alice",
        owner_identity=owner.public,
        owner_hpke=recipient("alice", "MLKEM768_X25519").public,
        not_before=NOW,
        not_after=NOW + 600,
        issued_at=NOW + 5,
        nonce="0f" * 16,
    )
    data, envelope = request.payload(), k.sign_key_request(request, owner)
    tree = json.loads(data)
    vectors: list[Vector] = []

    def parses(name: str, payload: bytes, expect: str, **more: Any) -> None:
        vectors.append({"name": name, "operation": "parse", "payload": b64(payload), "expect": expect} | more)

    def with_(title: str, expect: str = "MALFORMED", **changes: Any) -> None:
        parses(title, rfc8785.dumps({**tree, **changes}), expect)

    def opens(name: str, blob: bytes, expect: str, by: Identity = owner, **more: Any) -> None:
        vector = {"name": name, "operation": "open", "owner": b64(by.public.to_bytes()), "envelope": b64(blob)}
        vectors.append(vector | {"expect": expect} | more)

    parses("a key request", data, "ok", job_id=m.job_id(data), context=request.context().hex())
    other = k.KeyRequest(**{each: getattr(request, each) for each in k.KeyRequest.__slots__} | {"purpose": "data"})
    parses("purpose data", other.payload(), "ok", job_id=m.job_id(other.payload()), context=other.context().hex())
    with_("of another owner's name", "ok", owner="bob")
    vectors[-1]["context"] = k.KeyRequest.parse(rfc8785.dumps({**tree, "owner": "bob"})).context().hex()
    with_("a job's purpose", purpose="job")
    with_("an unknown purpose", purpose="bundle")
    with_("a purpose in capitals", purpose="Tokenize")
    with_("no name", name="")
    with_("a name with a slash", name="a/b")
    with_("no classification", classification="")
    with_("longer than a day", not_after=NOW + 86401)
    with_("ends before it begins", not_after=NOW)
    with_("issued after its end", issued_at=NOW + 600)
    with_("a negative epoch", epoch=-1)
    with_("a short nonce", nonce="0f")
    with_("an unknown member", regions=[])
    parses("a member is missing", data.replace(b'"name":"patients",', b""), "MALFORMED")
    parses("a member twice", data.replace(b'"epoch":3', b'"epoch":3,"epoch":3'), "MALFORMED")
    parses("not canonical", data + b" ", "MALFORMED")
    opens("signed", envelope, "ok")
    opens("in time", envelope, "ok", now=NOW + 599)
    opens("too early", envelope, "NOT_YET_VALID", now=NOW - 1)
    opens("expired", envelope, "EXPIRED", now=NOW + 600)
    opens("signed by another", envelope, "SIGNATURE", by=stranger)
    opens("names another identity", sign(stranger, k.KEY_REQUEST_TYPE, data), "UNKNOWN_OWNER", by=stranger)
    opens("as a manifest", sign(owner, m.MANIFEST_TYPE, data), "MALFORMED")
    opens("one byte changed", edited(envelope, payload=b64(data.replace(b"patients", b"patientz"))), "SIGNATURE")
    write("key-request", "Key requests; docs/spec/key-request.md", vectors)


def telemetry() -> None:
    worker, other = identity("worker"), identity("mallory")
    maker, key, job = worker.public.to_bytes(), fixed("telemetry key"), "abcdefghijklmnopqrstuvwxyz"
    records = (
        t.Record(NOW, "key-released", {"custodians": 3, "lease_seconds": 3600}),
        t.Record(NOW + 10, "usage", {"memory_bytes": 1 << 30, "seconds": 10}),
    )
    content = t.seal_records(key, records, job, maker, 0)
    digest = hashlib.sha256(content).hexdigest()
    members: dict[str, Any] = {
        "job_id": job,
        "worker": t.worker_digest(worker.public),
        "sequence": 0,
        "previous_sha256": t.NO_BATCH,
        "first_at": NOW,
        "last_at": NOW + 10,
        "records": 2,
        "content_sha256": digest,
        "content_size": len(content),
        "last": False,
        "reason": "",
    }
    first = t.Batch(**members)
    envelope = t.sign_batch(first, worker)
    vectors: list[Vector] = []

    def batch(name: str, envelope: bytes, expect: str, payload: bytes = b"", **changes: str) -> None:
        fields: Vector = {"job": job, "signer": b64(maker), "envelope": b64(envelope), **changes}
        result = {"payload": b64(payload)} if expect == "ok" else {}
        vectors.append({"name": name, "operation": "batch", **fields, "expect": expect, **result})

    batch("first", envelope, "ok", first.payload())
    after = {**members, "sequence": 1, "previous_sha256": hashlib.sha256(envelope).hexdigest()}
    last = t.Batch(**{**after, "last": True, "reason": "LEASE"})
    batch("last, the lease is over", t.sign_batch(last, worker), "ok", last.payload())
    batch("another job", envelope, "WRONG_JOB", job="b" * 26)
    batch("another signer", envelope, "SIGNATURE", signer=b64(other.public.to_bytes()))

    def signed(name: str, expect: str, **changes: Any) -> None:
        batch(name, sign(worker, t.TELEMETRY_TYPE, rfc8785.dumps({**members, **changes})), expect)

    signed("names another key", "DIGEST", worker=t.worker_digest(other.public))
    signed("first with one before it", "MALFORMED", previous_sha256="11" * 32)
    signed("second with none before it", "MALFORMED", sequence=1)
    signed("too far", "MALFORMED", sequence=4096, previous_sha256="11" * 32)
    signed("a reason that is not the last's", "MALFORMED", reason="LEASE")
    signed("no records", "MALFORMED", records=0)
    signed("too many records", "MALFORMED", records=257)
    signed("too large", "MALFORMED", content_size=262145)
    signed("ends before it begins", "MALFORMED", last_at=NOW - 1)
    signed("another member", "MALFORMED", region="CH")
    batch("not canonical", sign(worker, t.TELEMETRY_TYPE, b" " + first.payload()), "MALFORMED")
    batch("another type", sign(worker, m.RESULT_TYPE, first.payload()), "MALFORMED")

    def opened(name: str, content: bytes, expect: str, changed: bytes = first.payload(), using: bytes = key) -> None:
        fields: Vector = {"content": content.hex(), "key": using.hex(), "signer": b64(maker), "payload": b64(changed)}
        plain = b"".join(record.to_bytes() + b"\n" for record in records)
        result = {"plaintext_sha256": hashlib.sha256(plain).hexdigest()} if expect == "ok" else {}
        vectors.append({"name": f"records: {name}", "operation": "records", **fields, "expect": expect, **result})

    opened("good", content, "ok")
    opened("a bit flipped", flip(content, 60), "DIGEST")
    opened("truncated", content[:-1], "DIGEST")
    opened("another key", content, "ARTIFACT", using=fixed("another key"))
    opened("of another batch", content, "ARTIFACT", t.Batch(**after).payload())
    opened("fewer than named", content, "MALFORMED", t.Batch(**{**members, "records": 3}).payload())
    write("telemetry", "docs/spec/telemetry.md", vectors)


if __name__ == "__main__":
    make_named(manifest, release, key_request, telemetry)
