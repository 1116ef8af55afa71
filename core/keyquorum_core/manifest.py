"""The job manifest (DESIGN §5): what an owner signs to have a job run. Exact bytes: docs/spec/manifest.md.

A manifest is an in-toto Statement v1 in a DSSE envelope: its subjects are the bundle's files, its predicate says under
which key, where, on what evidence and when the job may run. The job's id and its derivation subject come from the
SHA-256 of the payload exactly as signed. A :class:`Manifest` is valid from the moment it exists: construction checks
everything and raises :class:`MalformedError`; :func:`parse` is the strict inverse of :func:`payload`. The statements
that follow a manifest are in :mod:`keyquorum_core.statements` and can be had from here.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import KEY_ID, PRINCIPAL, SHA256_HEX, check, within
from keyquorum_core.provenance import MAX_PROVENANCE, Provenance, read_provenance
from keyquorum_core.sealing import check_public, suite_of
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign
from keyquorum_core.statements import (
    OPENING_TYPE,
    OUTCOMES,
    RESULT_TYPE,
    ArtifactDigest,
    Opening,
    ResultStatement,
    open_opening,
    open_result,
    sign_opening,
    sign_result,
)
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "EVIDENCE_TYPES",
    "KEY_PURPOSES",
    "MANIFEST_TYPE",
    "MAX_LIFETIME",
    "OPENING_TYPE",
    "OUTCOMES",
    "PREDICATE_TYPE",
    "RESULT_TYPE",
    "ArtifactDigest",
    "Manifest",
    "Opening",
    "Provenance",
    "Resources",
    "ResultStatement",
    "Subject",
    "check_window",
    "job_id",
    "open_manifest",
    "open_opening",
    "open_result",
    "parse",
    "payload",
    "sign_manifest",
    "sign_opening",
    "sign_result",
    "subject",
]

MANIFEST_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:keyquorum:job-manifest:v1"

EVIDENCE_TYPES: Final = frozenset({"sev-snp", "tdx", "tpm2", "nvidia-gpu", "nitro"})

KEY_PURPOSES: Final = frozenset({"data", "tokenize"})
"""Purposes that only a key request names (:mod:`keyquorum_core.key_request`): a job can't pass for one."""

MAX_LIFETIME: Final = 30 * 24 * 3600
"""Seconds from ``not_before`` to ``not_after`` at most: a forgotten manifest dies within a month."""
MAX_SUBJECTS: Final = 4096
MAX_ARGUMENTS: Final = 64
_MAX_ARGUMENT: Final = 4096
_MAX_HPKE: Final = 320 << 10
_CACHED: Final = 32 << 10
_MAX_PAYLOAD: Final = 768 << 10  # in base64 this is the 1 MiB that an envelope may have

_REGION: Final = re.compile(r"[A-Z]{2}|[a-z0-9-]{2,32}", re.ASCII)
_NONCE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CLASSIFICATION: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_EXPORT_CONTROL: Final = re.compile(r"[A-Za-z0-9. -]{0,64}", re.ASCII)
_PURPOSE: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_MAX_PURPOSES: Final = 16


def _bad(what: str, expected: str, actual: object = None) -> MalformedError:
    return MalformedError(Reason.MALFORMED, what, expected=expected, actual=actual)


@dataclass(frozen=True, slots=True, order=True)
class Subject:
    """One file of the bundle: a relative POSIX path and the lower-case hex SHA-256 of its plaintext."""

    name: str
    sha256: str

    def __post_init__(self) -> None:
        check(SHA256_HEX, self.sha256, "subject digest")
        _check_path(self.name)


def _check_path(name: str) -> None:
    """Refuse what could leave, or hide in, the folder it is unpacked into."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    parts = name.split("/")
    if (
        not 0 < size <= 1024
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or "\\" in name
        or not name.isprintable()
    ):
        raise _bad(
            "unsafe subject name",
            "a relative POSIX path of at most 1024 bytes, printable, without empty, '.' or '..' parts",
            ascii(name[:80]),
        )


@dataclass(frozen=True, slots=True)
class Resources:
    """What the job may use at most."""

    cpus: int
    memory_mib: int
    gpus: int
    wall_seconds: int
    output_mib: int

    def __post_init__(self) -> None:
        within(self.cpus, "resources.cpus", 1, 1024)
        within(self.memory_mib, "resources.memory_mib", 16, 1 << 24)
        within(self.gpus, "resources.gpus", 0, 64)
        within(self.wall_seconds, "resources.wall_seconds", 1, MAX_LIFETIME)
        within(self.output_mib, "resources.output_mib", 1, 1 << 20)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A job as its owner describes it. Times are unix seconds.

    ``regions`` are cloud regions or places (2–32 of a–z, 0–9, ``-``) or country codes (two capitals);
    ``export_control`` is a class such as ``5A002``, or empty for none; ``owner_hpke`` is an encoded public key.
    Subjects, regions and evidence types are sets: they are put in order here, and must be unique.
    """

    subjects: tuple[Subject, ...]
    key_id: str
    epoch: int
    classification: str
    export_control: str
    regions: tuple[str, ...]
    evidence_types: tuple[str, ...]
    resources: Resources
    owner: str
    owner_identity: PublicIdentity
    owner_hpke: bytes
    entrypoint: tuple[str, ...]
    not_before: int
    not_after: int
    issued_at: int
    nonce: str
    """16 random bytes, hex: the same job submitted twice is two jobs."""
    purposes: tuple[str, ...] = ()
    """What the job is for, in words that policies know (1–32 of a–z, 0–9, ``-``); empty where nothing was said."""
    provenance: tuple[Provenance, ...] = ()
    """Which of the files were prepared, and how."""

    def __post_init__(self) -> None:
        for name in ("subjects", "regions", "evidence_types", "purposes", "provenance"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        object.__setattr__(self, "entrypoint", tuple(self.entrypoint))
        _check_subjects(self.subjects)
        check(KEY_ID, self.key_id, "key id")
        within(self.epoch, "epoch")
        check(_NONCE, self.nonce, "nonce")
        check(_CLASSIFICATION, self.classification, "classification")
        check(_EXPORT_CONTROL, self.export_control, "export control class")
        _check_set(self.regions, "regions", 64)
        for region in self.regions:
            check(_REGION, region, "region")
        _check_set(self.evidence_types, "evidence types", len(EVIDENCE_TYPES))
        unknown = set(self.evidence_types) - EVIDENCE_TYPES
        if unknown:
            raise _bad("unknown evidence type", ", ".join(sorted(EVIDENCE_TYPES)), ascii(sorted(unknown)[0][:40]))
        _check_set(self.purposes, "purposes", _MAX_PURPOSES, least=0)
        for purpose in self.purposes:
            check(_PURPOSE, purpose, "purpose")
            if purpose in KEY_PURPOSES:
                raise _bad("a purpose that only key requests have", "another word", purpose)
        _check_provenance(self.provenance, self.subjects)
        check(PRINCIPAL, self.owner, "owner name")
        if len(self.owner_hpke) > _MAX_HPKE:
            raise _bad("the owner's HPKE key is too large", f"at most {_MAX_HPKE} bytes", len(self.owner_hpke))
        if "+" not in suite_of(self.owner_hpke):  # whoever seals to a nested key checks it; a reader may lack liboqs
            check_public(self.owner_hpke)
        _check_entrypoint(self.entrypoint)
        _check_times(self.not_before, self.not_after, self.issued_at)


def _check_set(values: tuple[str, ...], what: str, most: int, *, least: int = 1) -> None:
    if not least <= len(values) <= most or len(set(values)) != len(values):
        raise _bad(
            f"bad {what}", f"{least}…{most} different ones", f"{len(values)}, {len(set(values))} of them different"
        )


def _check_subjects(subjects: tuple[Subject, ...]) -> None:
    names = {subject.name for subject in subjects}
    if not 1 <= len(subjects) <= MAX_SUBJECTS or len(names) != len(subjects):
        raise _bad(
            "bad subjects", f"1…{MAX_SUBJECTS} files, each named once", f"{len(subjects)} with {len(names)} names"
        )
    for name in names:
        while "/" in name:
            name = name.rpartition("/")[0]
            if name in names:
                raise _bad("a subject is both a file and a folder", "a file or a folder", ascii(name[:80]))


def _check_provenance(entries: tuple[Provenance, ...], subjects: tuple[Subject, ...]) -> None:
    _check_set(tuple(entry.subject for entry in entries), "provenance", MAX_PROVENANCE, least=0)
    names = {subject.name for subject in subjects}
    for entry in entries:
        if entry.subject not in names:
            raise _bad("provenance of a file that is not there", "one of the subjects", ascii(entry.subject[:80]))


def _check_entrypoint(arguments: tuple[str, ...]) -> None:
    for argument in arguments:
        try:
            size = len(argument.encode())
        except UnicodeEncodeError:
            size = 0
        if not 0 < size <= _MAX_ARGUMENT or any(ord(c) < 32 and c != "\n" for c in argument):
            raise _bad(
                "bad entrypoint argument",
                f"1…{_MAX_ARGUMENT} bytes of UTF-8 without control characters",
                f"{size} bytes",
            )
    if not 1 <= len(arguments) <= MAX_ARGUMENTS:
        raise _bad("bad entrypoint", f"1…{MAX_ARGUMENTS} arguments", len(arguments))


def _check_times(not_before: int, not_after: int, issued_at: int) -> None:
    for value, what in ((not_before, "not_before"), (not_after, "not_after"), (issued_at, "issued_at")):
        within(value, what)
    if not not_before < not_after <= not_before + MAX_LIFETIME or issued_at >= not_after:
        raise _bad(
            "bad time window",
            f"not_before < not_after ≤ not_before + {MAX_LIFETIME}, issued_at < not_after",
            f"{not_before}…{not_after}, issued at {issued_at}",
        )


def payload(manifest: Manifest) -> bytes:
    """The in-toto statement, RFC 8785 JSON: what is signed, hashed and named by the job id."""
    out = jcs.dumps(
        {
            "_type": STATEMENT_TYPE,
            "predicateType": PREDICATE_TYPE,
            "subject": [{"name": s.name, "digest": {"sha256": s.sha256}} for s in manifest.subjects],
            "predicate": {
                "classification": manifest.classification,
                "entrypoint": list(manifest.entrypoint),
                "epoch": manifest.epoch,
                "evidence_types": list(manifest.evidence_types),
                "export_control": manifest.export_control,
                "issued_at": manifest.issued_at,
                "key_id": manifest.key_id,
                "nonce": manifest.nonce,
                "not_after": manifest.not_after,
                "not_before": manifest.not_before,
                "owner": manifest.owner,
                "owner_hpke": base64.b64encode(manifest.owner_hpke).decode(),
                "owner_identity": base64.b64encode(manifest.owner_identity.to_bytes()).decode(),
                "provenance": [entry.as_json() for entry in manifest.provenance],
                "purposes": list(manifest.purposes),
                "regions": list(manifest.regions),
                "resources": {
                    "cpus": manifest.resources.cpus,
                    "gpus": manifest.resources.gpus,
                    "memory_mib": manifest.resources.memory_mib,
                    "output_mib": manifest.resources.output_mib,
                    "wall_seconds": manifest.resources.wall_seconds,
                },
            },
        }
    )
    if len(out) > _MAX_PAYLOAD:
        raise MalformedError(
            Reason.TOO_LARGE,
            "the manifest is too large",
            expected=f"at most {_MAX_PAYLOAD} bytes",
            actual=len(out),
            next_step="Pack many small files into one archive file of the bundle.",
        )
    return out


def parse(data: bytes) -> Manifest:
    """Strict inverse of :func:`payload`: canonical bytes only. Raises :class:`MalformedError`."""
    statement = Fields(loads(data, "manifest", max_bytes=_MAX_PAYLOAD), "manifest")
    statement.literal("_type", STATEMENT_TYPE)
    statement.literal("predicateType", PREDICATE_TYPE)
    subjects = []
    for item in statement.list("subject", max_items=MAX_SUBJECTS, min_items=1):
        entry = Fields(item, "manifest subject")
        digest = entry.object("digest")
        subjects.append(Subject(entry.text("name", max_length=1024), digest.hex("sha256", 32).hex()))
        digest.done()
        entry.done()
    predicate = statement.object("predicate")
    statement.done()
    resources = predicate.object("resources")
    manifest = Manifest(
        subjects=tuple(subjects),
        key_id=predicate.text("key_id"),
        epoch=predicate.integer("epoch"),
        classification=predicate.text("classification"),
        export_control=predicate.text("export_control", allow_empty=True),
        regions=predicate.texts("regions", max_items=64, min_items=1),
        evidence_types=predicate.texts("evidence_types", max_items=16, min_items=1),
        resources=Resources(
            cpus=resources.integer("cpus"),
            memory_mib=resources.integer("memory_mib"),
            gpus=resources.integer("gpus"),
            wall_seconds=resources.integer("wall_seconds"),
            output_mib=resources.integer("output_mib"),
        ),
        owner=predicate.text("owner"),
        owner_identity=PublicIdentity.from_bytes(predicate.base64("owner_identity", max_bytes=1984, min_bytes=1984)),
        owner_hpke=predicate.base64("owner_hpke", max_bytes=_MAX_HPKE),
        entrypoint=predicate.texts("entrypoint", max_items=MAX_ARGUMENTS, min_items=1, max_length=_MAX_ARGUMENT),
        not_before=predicate.integer("not_before"),
        not_after=predicate.integer("not_after"),
        issued_at=predicate.integer("issued_at"),
        nonce=predicate.text("nonce", max_length=32),
        purposes=predicate.texts("purposes", max_items=_MAX_PURPOSES),
        provenance=read_provenance(predicate.list("provenance", max_items=MAX_PROVENANCE)),
    )
    resources.done()
    predicate.done()
    _canonical(payload(manifest), data, "manifest")
    return manifest


def _canonical(expected: bytes, data: bytes, what: str) -> None:
    if expected != data:
        raise _bad(f"the {what} is not canonical", "RFC 8785 JSON, sorted sets", "the same values written otherwise")


def subject(data: bytes) -> bytes:
    """SHA-256 of a manifest payload: the subject of the job's derivation context, 32 bytes."""
    return hashlib.sha256(data).digest()


def job_id(data: bytes) -> str:
    """The first 26 characters (130 bits) of base32(SHA-256(payload)), lower case."""
    return base64.b32encode(subject(data)).decode()[:26].lower()


def sign_manifest(manifest: Manifest, identity: Identity) -> bytes:
    """DSSE envelope. Raises :class:`RefusedError` (``UNKNOWN_OWNER``) unless ``identity`` is the manifest's own."""
    _check_owner(manifest, identity.public)
    return sign(identity, MANIFEST_TYPE, payload(manifest))


def open_manifest(envelope: bytes, owner: PublicIdentity) -> tuple[Manifest, bytes]:
    """The manifest and its exact payload, signed by ``owner``, whom it must name. Time is for :func:`check_window`.

    Raises :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``, ``UNKNOWN_OWNER``.
    """
    return (_open_cached if len(envelope) <= _CACHED else _open)(envelope, owner)


def _open(envelope: bytes, owner: PublicIdentity) -> tuple[Manifest, bytes]:
    data = open_envelope(envelope, MANIFEST_TYPE, owner, "manifest")
    manifest = parse(data)
    _check_owner(manifest, owner)
    return manifest, data


# A custodian sees a job's envelope again for each release of its key. Refusals are exceptions and are never kept.
_open_cached = lru_cache(maxsize=128)(_open)


def _check_owner(manifest: Manifest, owner: PublicIdentity) -> None:
    if manifest.owner_identity != owner:
        raise RefusedError(
            Reason.UNKNOWN_OWNER,
            "the manifest names another owner identity than the one that signs it",
            expected=manifest.owner_identity.fingerprint[:16],
            actual=owner.fingerprint[:16],
        )


class _InTime(Protocol):
    """A manifest or a key request."""

    @property
    def not_before(self) -> int: ...

    @property
    def not_after(self) -> int: ...


def check_window(manifest: _InTime, now: int) -> None:
    """Raises :class:`RefusedError` (``NOT_YET_VALID``, ``EXPIRED``) outside ``not_before`` ≤ now < ``not_after``."""
    if manifest.not_before <= now < manifest.not_after:
        return
    early = now < manifest.not_before
    raise RefusedError(
        Reason.NOT_YET_VALID if early else Reason.EXPIRED,
        "the manifest is not yet valid" if early else "the manifest has expired",
        expected=f"{manifest.not_before}…{manifest.not_after}",
        actual=now,
        next_step="Wait until it begins." if early else "Submit the job again with a new time window.",
    )
