"""What a backup's body is made of: records, each a few members and a run of bytes (docs/spec/backup.md).

``u32be(length) ‖ members (RFC 8785 JSON) ‖ u32be(length) ‖ data``, in the order of :data:`SHAPES`; only ``seeds`` stand
directly behind the ``epoch`` that they are of. A reader takes exactly the members that a kind has, of their types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.ceremony import MAX_CERTIFICATE
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.names import MAX_INTEGER
from keyquorum_core.streams import Sink, Source, fill, write_all
from keyquorum_core.strictjson import canonical

__all__ = [
    "SEEDS_EACH",
    "SHAPES",
    "Record",
    "join",
    "pack_seeds",
    "read_records",
    "split",
    "unpack_seeds",
    "write_record",
]

_INT: Final = "integer"
_TEXT: Final = "text"
_HASH: Final = "32 bytes as hex"

SHAPES: Final[Mapping[str, Mapping[str, str]]] = {
    # data: the roster's payload, as signed
    "roster": {"digest": _HASH, "version": _INT},
    # data: a roster's envelope, as its file holds it
    "roster-file": {"version": _INT},
    # data: a file of the custodian's folder that its operator put there
    "file": {"name": _TEXT},
    # data: the signed note
    "checkpoint": {"accepted_at": _INT, "log": _HASH, "root": _HASH, "size": _INT},
    # data: two signed notes, joined
    "alarm": {"cleared_at": _INT, "evidence": _HASH, "kind": _TEXT, "raised_at": _INT, "why": _TEXT},
    # data: the envelope
    "bulletin": {"accepted_at": _INT, "digest": _HASH, "kind": _TEXT, "version": _INT},
    # data: the certificate's envelope
    "epoch": {
        "activated_at": _INT,
        "ceremony_id": _TEXT,
        "ended_at": _INT,
        "epoch": _INT,
        "held": _TEXT,
        "key_id": _TEXT,
        "retired_at": _INT,
        "state": _TEXT,
    },
    # data: index and seed, again and again
    "seeds": {"epoch": _INT, "key_id": _TEXT},
    # data: the plan's payload
    "ceremony": {
        "cancelled_from": _TEXT,
        "cause": _TEXT,
        "ceremony_id": _TEXT,
        "epoch": _INT,
        "key_id": _TEXT,
        "kind": _TEXT,
        "signers": _TEXT,
        "state": _TEXT,
        "updated_at": _INT,
    },
    # data: the statement and the blob that it is about, joined
    "accusation": {"ceremony_id": _TEXT, "custodian": _TEXT, "found_at": _INT, "what": _TEXT},
    # data: the appraisal that it was given on
    "lease": {
        "epoch": _INT,
        "granted_at": _INT,
        "job_id": _TEXT,
        "key_id": _TEXT,
        "recipient_sha256": _HASH,
        "renewals": _INT,
        "revoked": _TEXT,
        "until": _INT,
    },
    # data: the subjects, RFC 8785 JSON
    "quarantine": {
        "evidence_sha256": _TEXT,
        "job_id": _TEXT,
        "lifted_at": _INT,
        "message": _TEXT,
        "raised_at": _INT,
        "reason": _TEXT,
        "why": _TEXT,
    },
    # data: the document
    "evidence": {"sha256": _HASH},
    # data: where the attestation key's last quote left its TPM
    "tpm": {"ak": _TEXT},
    # data: the leaf
    "release": {
        "decision_sha256": _TEXT,
        "development": _INT,
        "leaf_hash": _HASH,
        "owner": _TEXT,
        "policy_sha256": _TEXT,
        "policy_version": _INT,
        "released_at": _INT,
        "window": _INT,
    },
}
"""The kinds of record in their order, and the members of each. A time that never came is 0."""

SEEDS_EACH: Final = 2048
"""Seeds in one record, at most."""

_ORDER: Final = {kind: number for number, kind in enumerate(SHAPES)}
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_MEMBERS: Final = 64 << 10
_MAX_TEXT: Final = 4096
_MAX_DATA: Final = MAX_CERTIFICATE + 4096
_PIECE: Final = 1 << 20
_SEED: Final = 32


@dataclass(frozen=True, slots=True)
class Record:
    """One record; raises :class:`MalformedError` when made with other members than its kind has."""

    kind: str
    members: Mapping[str, str | int]
    data: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        shape = SHAPES.get(self.kind)
        if shape is None or shape.keys() != self.members.keys():
            raise MalformedError(
                Reason.MALFORMED,
                f"no such record in a backup, or with other members: {self.kind[:32]!a}",
                expected=", ".join(shape or SHAPES),
                actual=ascii(", ".join(self.members)[:200]),
            )
        for name, kind in shape.items():
            value = self.members[name]
            if kind == _INT:
                good = type(value) is int and 0 <= value <= MAX_INTEGER
            elif kind == _HASH:
                good = isinstance(value, str) and _HEX.fullmatch(value) is not None
            else:
                good = isinstance(value, str) and len(value) <= _MAX_TEXT
            if not good:
                raise MalformedError(Reason.MALFORMED, f"{self.kind}: bad member {name!r}", expected=kind)
        if len(self.data) > _MAX_DATA:
            raise MalformedError(Reason.TOO_LARGE, f"{self.kind}: too large", expected=f"at most {_MAX_DATA} bytes")

    def text(self, name: str) -> str:
        return str(self.members[name])

    def number(self, name: str) -> int:
        return int(self.members[name])


def write_record(sink: Sink, record: Record) -> None:
    """Its bytes into ``sink``."""
    members = jcs.dumps({**record.members, "record": record.kind})
    head = len(members).to_bytes(4, "big") + members + len(record.data).to_bytes(4, "big")
    write_all(sink, memoryview(head))
    write_all(sink, memoryview(record.data))


def read_records(source: Source) -> Iterator[Record]:
    """The records to the end of ``source``. Raises :class:`MalformedError`: another form, or out of order."""
    last = 0
    while True:
        length = memoryview(bytearray(4))
        got = fill(source, length)
        if got == 0:
            return
        if got < len(length):
            raise _cut()
        head = _take(source, int.from_bytes(length, "big"), _MAX_MEMBERS)
        fields = canonical(head, "backup record", _MAX_MEMBERS)
        kind = fields.text("record", max_length=32)
        size = int.from_bytes(_take(source, 4, 4), "big")
        record = Record(kind, fields.rest(), _take(source, size, _MAX_DATA))  # type: ignore[arg-type]  # it looks itself
        order = _ORDER["epoch"] if kind == "seeds" else _ORDER[kind]
        if order < last:
            raise MalformedError(Reason.MALFORMED, f"a backup's records are out of order: {kind}")
        last = order
        yield record


def _take(source: Source, size: int, limit: int) -> bytes:
    if size > limit:
        raise MalformedError(
            Reason.TOO_LARGE, "a record of a backup is too large", expected=f"at most {limit} bytes", actual=size
        )
    out = bytearray()
    while len(out) < size:
        piece = memoryview(bytearray(min(_PIECE, size - len(out))))
        got = fill(source, piece)
        out += piece[:got]
        if got < len(piece):
            raise _cut()
    return bytes(out)


def _cut() -> MalformedError:
    return MalformedError(Reason.MALFORMED, "the backup's body ends inside a record")


def join(first: bytes, second: bytes) -> bytes:
    """u32be(length of the first) ‖ first ‖ second."""
    return len(first).to_bytes(4, "big") + first + second


def split(data: bytes) -> tuple[bytes, bytes]:
    """Inverse of :func:`join`. Raises :class:`MalformedError`."""
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 + size:
        raise MalformedError(Reason.MALFORMED, "a record of a backup ends inside its first part")
    return data[4 : 4 + size], data[4 + size :]


def pack_seeds(seeds: Mapping[int, bytes]) -> bytes:
    """u32be(index) ‖ seed (32 bytes), in ascending order of the index."""
    return b"".join(index.to_bytes(4, "big") + seeds[index] for index in sorted(seeds))


def unpack_seeds(data: bytes) -> dict[int, bytes]:
    """Inverse of :func:`pack_seeds`. Raises :class:`MalformedError`."""
    each = 4 + _SEED
    if not data or len(data) % each or len(data) > each * SEEDS_EACH:
        raise MalformedError(
            Reason.MALFORMED, "bad run of seeds", expected=f"1…{SEEDS_EACH} times {each} bytes", actual=len(data)
        )
    out: dict[int, bytes] = {}
    last = -1
    for start in range(0, len(data), each):
        index = int.from_bytes(data[start : start + 4], "big")
        if not last < index <= 1 << 18:
            raise MalformedError(Reason.MALFORMED, "a backup's seeds are out of order", actual=index)
        last = index
        out[index] = data[start + 4 : start + each]
    return out
