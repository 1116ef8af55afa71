"""A custodian's backup as a file: encrypted to offline recipients, signed by the custodian, streamed both ways.

::

    "keyquorum/v1/backup\\n" ‖ block(opening) ‖ frame… ‖ u32be(0) ‖ block(statement)

A block is u32be(length) ‖ bytes, a frame u32be(1 … 1 MiB) ‖ bytes of the body. The **opening** says whose backup it is
and holds the body's key, HPKE-sealed to each recipient. The **body** is an artifact (:mod:`keyquorum_core.artifact`) of
records (:mod:`keyquorum_core.backup_body`) under that key. The **statement**, a DSSE envelope by the custodian's
identity, comes last, since it holds the body's digest: whoever has no recipient key can tell by it what the backup is
of and that it is whole. Exact bytes: docs/spec/backup.md.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.artifact import KEY_BYTES, DecryptingReader, EncryptingWriter
from keyquorum_core.backup_body import Record, read_records, write_record
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.names import CLUSTER, CUSTODIAN_ID, KEY_ID, SHA256_HEX, check, within
from keyquorum_core.quorum import MAX_SEEDS_EACH
from keyquorum_core.sealing import RecipientKey, check_public, seal
from keyquorum_core.signing import Identity, PublicIdentity, Unverified, sign
from keyquorum_core.streams import Sink, Source, fill, write_all
from keyquorum_core.strictjson import Fields, canonical
from keyquorum_core.transcript import transcript

__all__ = [
    "BACKUP_TYPE",
    "KEYSTORE",
    "MAGIC",
    "MAX_RECIPIENTS",
    "TOKEN",
    "BackedEpoch",
    "BackupReader",
    "BackupWriter",
    "Opening",
    "Statement",
    "fingerprint",
    "open_statement",
]

BACKUP_TYPE: Final = "application/vnd.keyquorum.backup.v1+json"
MAGIC: Final = b"keyquorum/v1/backup\n"
MAX_RECIPIENTS: Final = 16
KEYSTORE: Final = "keystore"
TOKEN: Final = "token"  # noqa: S105 - a place
"""Where an epoch's seeds are held: a token gives none out, so that no backup has them."""

_FRAME: Final = 1 << 20
_MAX_OPENING: Final = 8 << 20
_MAX_STATEMENT: Final = 8 << 20
_MAX_SEALED: Final = 256 << 10
_MAX_EPOCHS: Final = 4096
_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_STATES: Final = ("active", "retired", "destroyed")


def fingerprint(public: bytes) -> str:
    """How a recipient's encoded HPKE key is named in a backup: the hex SHA-256 of it."""
    return hashlib.sha256(public).hexdigest()


@dataclass(frozen=True, slots=True)
class Opening:
    """Whose backup, and the body's key for each recipient: (:func:`fingerprint`, sealed key), in ascending order."""

    backup_id: str
    cluster: str
    custodian: str
    recipients: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        check(_ID, self.backup_id, "backup id")
        check(CLUSTER, self.cluster, "cluster name")
        check(CUSTODIAN_ID, self.custodian, "custodian id")
        names = [name for name, _ in self.recipients]
        if not 1 <= len(names) <= MAX_RECIPIENTS or names != sorted(set(names)):
            raise MalformedError(
                Reason.MALFORMED,
                "a backup's recipients are not in order, each once",
                expected=f"1…{MAX_RECIPIENTS}",
                actual=len(names),
            )
        for name in names:
            check(SHA256_HEX, name, "recipient's fingerprint")

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "backup_id": self.backup_id,
                "cluster": self.cluster,
                "custodian": self.custodian,
                "format": 1,
                "recipients": [
                    {"fingerprint": name, "sealed": base64.b64encode(sealed).decode()}
                    for name, sealed in self.recipients
                ],
            }
        )

    @staticmethod
    def parse(data: bytes) -> Opening:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`, ``UNSUPPORTED`` for another format."""
        fields = canonical(data, "backup opening", _MAX_OPENING)
        number = fields.integer("format")
        if number != 1:
            raise MalformedError(
                Reason.UNSUPPORTED,
                "a backup of a format that this release does not know",
                expected="format 1",
                actual=f"format {number}",
                next_step="Use the release that wrote it, or a newer one.",
            )
        recipients = []
        for value in fields.list("recipients", max_items=MAX_RECIPIENTS, min_items=1):
            entry = Fields(value, "recipient")
            recipients.append((entry.text("fingerprint"), entry.base64("sealed", max_bytes=_MAX_SEALED)))
            entry.done()
        opening = Opening(fields.text("backup_id"), fields.text("cluster"), fields.text("custodian"), tuple(recipients))
        fields.done()
        return opening

    def associated_data(self) -> bytes:
        """What the body's encryption is bound to."""
        return transcript(
            "keyquorum/v1/backup-body", self.backup_id.encode(), self.cluster.encode(), self.custodian.encode()
        )

    @staticmethod
    def sealed_to(backup_id: str, cluster: str, custodian: str, key: bytes, recipients: Sequence[bytes]) -> Opening:
        """With ``key`` sealed to each of ``recipients``, encoded HPKE keys. Raises :class:`MalformedError`,
        ``UNSUPPORTED``."""
        sealed = {}
        for public in recipients:
            check_public(public)
            sealed[fingerprint(public)] = seal(public, key, _key_info(backup_id, cluster, custodian, public))
        return Opening(backup_id, cluster, custodian, tuple(sorted(sealed.items())))

    def open_key(self, recipient: RecipientKey) -> bytes:
        """The body's key. Raises :class:`RefusedError` (``RECIPIENT``: sealed to others; ``UNSEAL``)."""
        mine = fingerprint(recipient.public)
        sealed = dict(self.recipients).get(mine)
        if sealed is None:
            raise RefusedError(
                Reason.RECIPIENT,
                "the backup is not encrypted to this key",
                expected=", ".join(name[:16] for name, _ in self.recipients),
                actual=mine[:16],
                next_step="Use the key file of one of those recipients.",
            )
        return recipient.open(sealed, _key_info(self.backup_id, self.cluster, self.custodian, recipient.public))


def _key_info(backup_id: str, cluster: str, custodian: str, public: bytes) -> bytes:
    return transcript("keyquorum/v1/backup-key", backup_id.encode(), cluster.encode(), custodian.encode(), public)


@dataclass(frozen=True, slots=True)
class BackedEpoch:
    """An epoch of which the backup has the certificate (of that digest) and so many seeds: all that the custodian
    holds, or none where it is destroyed or ``held`` in a ``token`` that gives none out (else ``keystore``)."""

    key_id: str
    epoch: int
    state: str
    certificate: str
    seeds: int
    held: str = KEYSTORE

    def __post_init__(self) -> None:
        check(KEY_ID, self.key_id, "key id")
        within(self.epoch, "epoch", 1)
        check(SHA256_HEX, self.certificate, "certificate's digest")
        within(self.seeds, "number of seeds", 0, MAX_SEEDS_EACH)
        if self.state not in _STATES or self.held not in (KEYSTORE, TOKEN):
            raise MalformedError(
                Reason.MALFORMED, "bad state of a backed-up epoch", actual=ascii(f"{self.state}, {self.held}"[:80])
            )

    def as_json(self) -> dict[str, object]:
        return {
            "certificate": self.certificate,
            "epoch": self.epoch,
            "held": self.held,
            "key_id": self.key_id,
            "seeds": self.seeds,
            "state": self.state,
        }


@dataclass(frozen=True, slots=True)
class Statement:
    """What the custodian signs about a backup: what is in it, as of ``created_at`` (unix seconds).

    ``sequence`` counts the custodian's backups, across restores too. Digests are hex SHA-256, of the opening and of the
    body as it stands in the frames; ``ledger_size`` is 0 where none was seen, ``highest_time`` the latest that the
    clock ever showed.
    """

    backup_id: str
    cluster: str
    custodian: str
    jurisdiction: str
    created_at: int
    highest_time: int
    sequence: int
    roster_version: int
    roster_digest: str
    ledger_size: int
    epochs: tuple[BackedEpoch, ...]
    opening_sha256: str
    body_sha256: str
    body_bytes: int

    def __post_init__(self) -> None:
        check(_ID, self.backup_id, "backup id")
        check(CLUSTER, self.cluster, "cluster name")
        check(CUSTODIAN_ID, self.custodian, "custodian id")
        within(self.created_at, "created_at")
        within(self.highest_time, "highest_time")
        within(self.sequence, "sequence number", 1)
        within(self.roster_version, "roster version", 1)
        within(self.ledger_size, "size of the ledger")
        within(self.body_bytes, "size of the body")
        for digest in (self.roster_digest, self.opening_sha256, self.body_sha256):
            check(SHA256_HEX, digest, "digest")
        where = [(each.key_id, each.epoch) for each in self.epochs]
        if where != sorted(set(where)):
            raise MalformedError(Reason.MALFORMED, "the backup's epochs are not in order, each once")

    def payload(self) -> bytes:
        """RFC 8785 JSON of type :data:`BACKUP_TYPE`."""
        return jcs.dumps(
            {
                "backup_id": self.backup_id,
                "body_bytes": self.body_bytes,
                "body_sha256": self.body_sha256,
                "cluster": self.cluster,
                "created_at": self.created_at,
                "custodian": self.custodian,
                "epochs": [each.as_json() for each in self.epochs],
                "highest_time": self.highest_time,
                "jurisdiction": self.jurisdiction,
                "ledger_size": self.ledger_size,
                "opening_sha256": self.opening_sha256,
                "roster_digest": self.roster_digest,
                "roster_version": self.roster_version,
                "sequence": self.sequence,
            }
        )

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the payload: what a restore's approval names."""
        return hashlib.sha256(self.payload()).hexdigest()

    @staticmethod
    def parse(data: bytes) -> Statement:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = canonical(data, "backup statement", _MAX_STATEMENT)
        epochs = []
        for value in fields.list("epochs", max_items=_MAX_EPOCHS):
            entry = Fields(value, "backed-up epoch")
            epochs.append(
                BackedEpoch(
                    entry.text("key_id"),
                    entry.integer("epoch"),
                    entry.text("state"),
                    entry.text("certificate"),
                    entry.integer("seeds"),
                    entry.text("held"),
                )
            )
            entry.done()
        statement = Statement(
            backup_id=fields.text("backup_id"),
            cluster=fields.text("cluster"),
            custodian=fields.text("custodian"),
            jurisdiction=fields.text("jurisdiction", max_length=2),
            created_at=fields.integer("created_at"),
            highest_time=fields.integer("highest_time"),
            sequence=fields.integer("sequence"),
            roster_version=fields.integer("roster_version"),
            roster_digest=fields.text("roster_digest"),
            ledger_size=fields.integer("ledger_size"),
            epochs=tuple(epochs),
            opening_sha256=fields.text("opening_sha256"),
            body_sha256=fields.text("body_sha256"),
            body_bytes=fields.integer("body_bytes"),
        )
        fields.done()
        return statement


def open_statement(envelope: bytes, signer: PublicIdentity) -> Statement:
    """The statement, signed by the custodian of this identity. Raises ``SIGNATURE…`` and :class:`MalformedError`."""
    unverified = Unverified(envelope, BACKUP_TYPE, "backup statement", 2 * _MAX_STATEMENT)
    return Statement.parse(unverified.open(signer, "the backup statement"))


class BackupWriter:
    """Writes one backup into ``sink``; complete only after :meth:`finish`. Used once; holds 2 MiB."""

    def __init__(
        self,
        sink: Sink,
        recipients: Sequence[bytes],
        *,
        cluster: str,
        custodian: str,
        rng: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        key = rng(KEY_BYTES)
        self.opening = Opening.sealed_to(rng(16).hex(), cluster, custodian, key, recipients)
        self._sink = sink
        payload = self.opening.payload()
        self.opening_sha256 = hashlib.sha256(payload).hexdigest()
        write_all(sink, memoryview(MAGIC + _block(payload)))
        self._frames = _FrameSink(sink)
        self._body = EncryptingWriter(key, self._frames, self.opening.associated_data(), rng=rng)

    def add(self, record: Record) -> None:
        """The next record, in the order of :mod:`keyquorum_core.backup_body`."""
        write_record(self._body, record)

    def close_body(self) -> tuple[str, int]:
        """No more records: hex SHA-256 and bytes of the body, for the statement."""
        self._body.close()
        write_all(self._sink, memoryview(bytes(4)))
        return self._frames.digest.hexdigest(), self._frames.size

    def finish(self, statement: Statement, identity: Identity) -> None:
        """The custodian's word on it all: the backup is whole."""
        write_all(self._sink, memoryview(_block(sign(identity, BACKUP_TYPE, statement.payload()))))


class BackupReader:
    """Reads one backup from ``source``, of which nothing is believed: :attr:`opening` at once, then :meth:`records` (or
    :meth:`skip` without a key) to the end, then :attr:`statement` and its :attr:`envelope`.

    Raises :class:`MalformedError` for what is no backup, ``RECIPIENT`` and ``UNSEAL`` for the key, ``ARTIFACT`` where
    the body was changed, ``DIGEST`` where opening, body and statement are not of one backup.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        if _exactly(source, len(MAGIC), "the backup's first line") != MAGIC:
            raise MalformedError(Reason.MALFORMED, "this is no backup of a custodian", expected=MAGIC.decode().strip())
        payload = _read_block(source, "the backup's opening", _MAX_OPENING)
        self.opening = Opening.parse(payload)
        self._opening_sha256 = hashlib.sha256(payload).hexdigest()
        self._frames = _FrameSource(source)
        self._envelope = b""
        self._statement: Statement | None = None

    def records(self, recipient: RecipientKey) -> Iterator[Record]:
        """The body, record by record; at its end everything but the signature was checked."""
        key = self.opening.open_key(recipient)
        with DecryptingReader(key, self._frames, self.opening.associated_data()) as body:
            yield from read_records(body)
            if not body.finished:
                raise RefusedError(Reason.ARTIFACT, "the backup's body has no end")
        self._finish()

    def skip(self) -> None:
        """To the end without a key: digests and structure were checked then."""
        while self._frames.read(_FRAME):
            pass
        self._finish()

    def _finish(self) -> None:
        if self._frames.read(1):
            raise MalformedError(Reason.MALFORMED, "the backup's body goes on after its end")
        self._envelope = _read_block(self._source, "the backup's statement", 2 * _MAX_STATEMENT)
        if self._source.read(1):
            raise MalformedError(Reason.MALFORMED, "the backup goes on after its statement")
        payload = Unverified(self._envelope, BACKUP_TYPE, "backup statement", 2 * _MAX_STATEMENT).payload
        statement = Statement.parse(payload)
        for what, expected, actual in (
            ("id", statement.backup_id, self.opening.backup_id),
            ("cluster", statement.cluster, self.opening.cluster),
            ("custodian", statement.custodian, self.opening.custodian),
            ("opening", statement.opening_sha256, self._opening_sha256),
            ("size of the body", statement.body_bytes, self._frames.size),
            ("body", statement.body_sha256, self._frames.digest.hexdigest()),
        ):
            if expected != actual:
                raise RefusedError(
                    Reason.DIGEST,
                    f"the backup is not what its statement says: another {what}",
                    expected=expected,
                    actual=actual,
                    next_step="It was changed or put together from two: use another copy.",
                )
        self._statement = statement

    @property
    def statement(self) -> Statement:
        """UNVERIFIED until :func:`open_statement`. Raises ``STATE`` before the end."""
        if self._statement is None:
            raise StateError(Reason.STATE, "the backup was not read to its end")
        return self._statement

    @property
    def envelope(self) -> bytes:
        return self._envelope


class _FrameSink:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: memoryview, /) -> int:
        part = data[:_FRAME]
        write_all(self._sink, memoryview(len(part).to_bytes(4, "big")))
        write_all(self._sink, part)
        self.digest.update(part)
        self.size += len(part)
        return len(part)


class _FrameSource:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._ended = False
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int, /) -> bytes:
        if not self._left and not self._ended:
            self._left = int.from_bytes(_exactly(self._source, 4, "a frame of the backup"), "big")
            if self._left > _FRAME:
                raise MalformedError(
                    Reason.TOO_LARGE, "a frame of the backup is too large", expected=_FRAME, actual=self._left
                )
            self._ended = not self._left
        if self._ended or size <= 0:
            return b""
        data = _exactly(self._source, min(size, self._left), "a frame of the backup")
        self._left -= len(data)
        self.digest.update(data)
        self.size += len(data)
        return data


def _block(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _read_block(source: Source, what: str, limit: int) -> bytes:
    size = int.from_bytes(_exactly(source, 4, what), "big")
    if not 1 <= size <= limit:
        raise MalformedError(Reason.TOO_LARGE, f"{what} has a bad length", expected=f"1…{limit} bytes", actual=size)
    return _exactly(source, size, what)


def _exactly(source: Source, size: int, what: str) -> bytes:
    out = bytearray()
    while len(out) < size:  # in pieces: a length that lies takes no memory
        piece = memoryview(bytearray(min(_FRAME, size - len(out))))
        got = fill(source, piece)
        out += piece[:got]
        if got < len(piece):
            raise MalformedError(
                Reason.MALFORMED, f"the backup ends in {what}", expected=f"{size} bytes", actual=len(out)
            )
    return bytes(out)
