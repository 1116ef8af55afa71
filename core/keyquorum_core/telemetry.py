"""A worker's telemetry of one job: batches of records, chained by digest, signed with the attested worker key.

The records say what happened and what the job used; they are encrypted under the job's ``telemetry`` key, so that only
the owner reads them. Each batch's statement names its place, the batch before it and the digest of its records, and
the ledger has its digest: a batch that is dropped, exchanged or reordered breaks the chain, and a chain that is cut
short has no last batch. Exact bytes: docs/spec/telemetry.md.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.artifact import binding, decrypt_stream, encrypt_stream
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import JOB_ID, SHA256_HEX, check, within
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "MAX_BATCHES",
    "MAX_CONTENT",
    "MAX_RECORDS",
    "MAX_STATEMENT",
    "NO_BATCH",
    "TELEMETRY_TYPE",
    "Batch",
    "Chain",
    "Record",
    "check_content",
    "open_batch",
    "open_records",
    "seal_records",
    "sign_batch",
    "worker_digest",
]

TELEMETRY_TYPE: Final = "application/vnd.keyquorum.telemetry.v1+json"
NO_BATCH: Final = hashlib.sha256(b"").hexdigest()
"""What the first batch names as the one before it."""
MAX_RECORDS: Final = 256
MAX_CONTENT: Final = 256 << 10
"""Bytes of a batch's encrypted records."""
MAX_STATEMENT: Final = 16 << 10
"""Bytes of a batch's statement, signatures included."""
MAX_BATCHES: Final = 4096
"""Batches of one worker about one job."""
_MAX_RECORD: Final = 768
_EVENT: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")
_WORD: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_REASON: Final = re.compile(r"(?:[A-Z][A-Z0-9_]{1,39})?")
_WHAT: Final = "telemetry batch"


@dataclass(frozen=True, slots=True)
class Record:
    """Something that happened at ``time`` (unix seconds by the worker's clock): a word, and values by name: text of up
    to 256 printable characters, or integers. Raises :class:`MalformedError` when made with anything else."""

    time: int
    event: str
    values: Mapping[str, str | int]

    def __post_init__(self) -> None:
        within(self.time, "time of a telemetry record")
        check(_EVENT, self.event, "telemetry event")
        for name, value in self.values.items():
            check(_WORD, name, "name of a telemetry value")
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise _bad("a value of another type", "text or an integer", type(value).__name__)
            if isinstance(value, str) and (len(value) > 256 or not value.isprintable()):
                raise _bad("a value that is too long or does not print", "256 printable characters", len(value))
            if isinstance(value, int):
                within(value, "telemetry value", -(2**53) + 1)
        if len(self.to_bytes()) > _MAX_RECORD:
            raise _bad("a record that is too large", f"{_MAX_RECORD} bytes", len(self.to_bytes()))

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps({"time": self.time, "event": self.event, "values": dict(self.values)})

    @staticmethod
    def parse(data: bytes) -> Record:
        fields = Fields(loads(data, "telemetry record", max_bytes=_MAX_RECORD, max_depth=2), "telemetry record")
        values = fields.object("values")
        record = Record(
            fields.integer("time"), fields.text("event"), {name: _value(values.raw(name)) for name in values.names()}
        )
        fields.done()
        if record.to_bytes() != data:
            raise _bad("a record that is not canonical", "RFC 8785 JSON", "other JSON")
        return record


def _value(value: object) -> str | int:
    if not isinstance(value, str | int):
        raise _bad("a value of another type", "text or an integer", type(value).__name__)
    return value


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's statement. ``worker`` is the digest of the signing key (:func:`worker_digest`), ``previous_sha256`` of
    the envelope before it or :data:`NO_BATCH`; ``content_sha256`` and ``content_size`` are of the encrypted records.
    ``last``: no batch follows; then ``reason`` may say why the key had to go: ``LEASE``. Times are unix seconds.

    Raises :class:`MalformedError` when made with anything else.
    """

    job_id: str
    worker: str
    sequence: int
    previous_sha256: str
    first_at: int
    last_at: int
    records: int
    content_sha256: str
    content_size: int
    last: bool
    reason: str = ""

    def __post_init__(self) -> None:
        check(JOB_ID, self.job_id, "job id")
        for name in ("worker", "previous_sha256", "content_sha256"):
            check(SHA256_HEX, getattr(self, name), name)
        within(self.sequence, "sequence", 0, MAX_BATCHES - 1)
        within(self.first_at, "first_at")
        within(self.last_at, "last_at", self.first_at)
        within(self.records, "records", 1, MAX_RECORDS)
        within(self.content_size, "content_size", 1, MAX_CONTENT)
        check(_REASON, self.reason, "reason")
        if (self.sequence == 0) != (self.previous_sha256 == NO_BATCH) or (self.reason and not self.last):
            raise _bad("a batch at no place in a chain", "one before it but for the first, a reason for the last only")

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps({name: getattr(self, name) for name in Batch.__slots__})

    @staticmethod
    def parse(data: bytes) -> Batch:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`. Not verified: see :func:`open_batch`."""
        fields = Fields(loads(data, _WHAT, max_bytes=MAX_STATEMENT, max_depth=1), _WHAT)
        batch = Batch(
            job_id=fields.text("job_id"),
            worker=fields.text("worker"),
            sequence=fields.integer("sequence"),
            previous_sha256=fields.text("previous_sha256"),
            first_at=fields.integer("first_at"),
            last_at=fields.integer("last_at"),
            records=fields.integer("records"),
            content_sha256=fields.text("content_sha256"),
            content_size=fields.integer("content_size"),
            last=fields.boolean("last"),
            reason=fields.text("reason", allow_empty=True),
        )
        fields.done()
        if batch.payload() != data:
            raise _bad("a statement that is not canonical", "RFC 8785 JSON", "other JSON")
        return batch


def worker_digest(identity: PublicIdentity) -> str:
    """A worker's signing key as batches and leaves name it: SHA-256 of its encoding, hex."""
    return hashlib.sha256(identity.to_bytes()).hexdigest()


def sign_batch(batch: Batch, identity: Identity) -> bytes:
    """DSSE envelope by the worker's signing key, which the batch must name."""
    if batch.worker != worker_digest(identity.public):
        raise _bad("a batch that names another worker key", worker_digest(identity.public), batch.worker)
    return sign(identity, TELEMETRY_TYPE, batch.payload())


def open_batch(envelope: bytes, worker: PublicIdentity, job: str) -> Batch:
    """A batch of job ``job`` by this key. Raises as :func:`open_envelope`; ``WRONG_JOB``, ``DIGEST`` (another key)."""
    batch = Batch.parse(open_envelope(envelope, TELEMETRY_TYPE, worker, _WHAT, max_bytes=MAX_STATEMENT))
    if batch.job_id != job:
        raise RefusedError(Reason.WRONG_JOB, f"the {_WHAT} is of another job", expected=job, actual=batch.job_id)
    if batch.worker != worker_digest(worker):
        raise RefusedError(
            Reason.DIGEST, f"the {_WHAT} names another key", expected=worker_digest(worker), actual=batch.worker
        )
    return batch


def seal_records(key: bytes, records: Iterable[Record], job: str, maker: bytes, sequence: int) -> bytes:
    """The encrypted records of batch ``sequence``: an artifact (docs/spec/artifact.md) of one record a line, under the
    job's ``telemetry`` key, bound to job, batch and ``maker``, the worker's encoded public identity."""
    out = io.BytesIO()
    plain = b"".join(record.to_bytes() + b"\n" for record in records)
    encrypt_stream(key, io.BytesIO(plain), out, binding(job, f"telemetry/{sequence}", maker))
    return out.getvalue()


def open_records(key: bytes, content: bytes, batch: Batch, maker: bytes) -> tuple[Record, ...]:
    """Inverse of :func:`seal_records`. Raises :class:`RefusedError` (``DIGEST``: not the content that the batch names;
    ``ARTIFACT``) and :class:`MalformedError`."""
    check_content(content, batch)
    out = io.BytesIO()
    decrypt_stream(key, io.BytesIO(content), out, binding(batch.job_id, f"telemetry/{batch.sequence}", maker))
    *lines, rest = out.getvalue().split(b"\n")
    if rest or len(lines) != batch.records:
        raise _bad("other records than the batch names", f"{batch.records} lines", len(lines))
    return tuple(Record.parse(line) for line in lines)


def check_content(content: bytes, batch: Batch) -> None:
    """Raises :class:`RefusedError` (``DIGEST``) unless these are the encrypted records that the batch names."""
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != batch.content_size or not hmac.compare_digest(digest, batch.content_sha256):
        raise RefusedError(
            Reason.DIGEST,
            f"the records of a {_WHAT} are not those that were signed",
            expected=f"{batch.content_size} bytes, SHA-256 {batch.content_sha256}",
            actual=f"{len(content)} bytes, SHA-256 {digest}",
        )


class Chain:
    """The batches of one worker about one job, one after the other."""

    def __init__(self, job: str, worker: PublicIdentity) -> None:
        self._job = job
        self._worker = worker
        self._previous = NO_BATCH
        self.length = 0
        self.last: Batch | None = None
        """The batch taken last."""

    def take(self, envelope: bytes) -> Batch:
        """The next batch. Raises as :func:`open_batch`, and :class:`RefusedError` (``DIGEST``) for any but the next:
        one is missing, was exchanged, or comes twice."""
        batch = open_batch(envelope, self._worker, self._job)
        if self.last is not None and self.last.last:
            raise RefusedError(Reason.DIGEST, "a telemetry batch follows the last one", actual=batch.sequence)
        if batch.sequence != self.length or not hmac.compare_digest(batch.previous_sha256, self._previous):
            raise RefusedError(
                Reason.DIGEST,
                "the telemetry's chain is broken",
                expected=f"batch {self.length} after {self._previous}",
                actual=f"batch {batch.sequence} after {batch.previous_sha256}",
            )
        self._previous = hashlib.sha256(envelope).hexdigest()
        self.length += 1
        self.last = batch
        return batch

    @property
    def complete(self) -> bool:
        """The worker said that nothing follows."""
        return self.last is not None and self.last.last


def _bad(what: str, expected: object, actual: object = None) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: {what}", expected=expected, actual=actual)
