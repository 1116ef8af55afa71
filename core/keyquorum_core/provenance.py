"""Where a job's data came from: the signed statement of its preparation, and what a manifest says of it.

A :class:`ProvenanceStatement` is what the owner signs when data was prepared at home: which pipeline made which file
from which, the columns in and out, and the privacy budget it spent. A :class:`Provenance` is the part that policies
decide by, in the manifest beside the file it is about, with the statement's digest. Both are the owner's word: a reader
learns what the owner answers for, not that it is so. Exact bytes: docs/spec/manifest.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.names import SHA256_HEX, check, within
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "MAX_COLUMNS",
    "MAX_PROVENANCE",
    "PROVENANCE_TYPE",
    "Provenance",
    "ProvenanceStatement",
    "open_provenance",
    "read_provenance",
    "sign_provenance",
]

PROVENANCE_TYPE: Final = "application/vnd.keyquorum.provenance.v1+json"
MAX_PROVENANCE: Final = 64
"""Prepared files of one manifest."""
MAX_COLUMNS: Final = 1024
_MAX_COLUMN: Final = 128
_MAX_INPUTS: Final = 1024
_TOOL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ./+_-]{0,63}", re.ASCII)
_MAX_STATEMENT: Final = 1 << 20


def _bad(what: str, expected: str, actual: object = None) -> MalformedError:
    return MalformedError(Reason.MALFORMED, what, expected=expected, actual=actual)


def _check_columns(columns: tuple[str, ...], what: str) -> None:
    if len(columns) > MAX_COLUMNS or len(set(columns)) != len(columns):
        raise _bad(f"bad {what}", f"at most {MAX_COLUMNS} different names", f"{len(columns)} names")
    for column in columns:
        if not 0 < len(column) <= _MAX_COLUMN or not column.isprintable():
            raise _bad(f"bad {what}", f"names of 1…{_MAX_COLUMN} printable characters", ascii(column[:40]))


@dataclass(frozen=True, slots=True, order=True)
class Provenance:
    """What a manifest says about one prepared file of the bundle. Digests are lower-case hex SHA-256.

    ``epsilon_micro`` is the differential-privacy budget spent on the file, in millionths, rounded up; 0 where none was.
    ``columns`` are the names of the columns that are left, sorted here.
    """

    subject: str
    statement_sha256: str
    pipeline_sha256: str
    columns: tuple[str, ...]
    epsilon_micro: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(sorted(self.columns)))
        check(SHA256_HEX, self.statement_sha256, "provenance statement digest")
        check(SHA256_HEX, self.pipeline_sha256, "pipeline digest")
        _check_columns(self.columns, "provenance columns")
        within(self.epsilon_micro, "provenance epsilon_micro")

    def as_json(self) -> dict[str, object]:
        return {
            "columns": list(self.columns),
            "epsilon_micro": self.epsilon_micro,
            "pipeline_sha256": self.pipeline_sha256,
            "statement_sha256": self.statement_sha256,
            "subject": self.subject,
        }

    @staticmethod
    def read(value: object) -> Provenance:
        """From one item of the manifest's ``provenance``. Raises :class:`MalformedError`."""
        fields = Fields(value, "manifest provenance")
        out = Provenance(
            subject=fields.text("subject", max_length=1024),
            statement_sha256=fields.text("statement_sha256"),
            pipeline_sha256=fields.text("pipeline_sha256"),
            columns=fields.texts("columns", max_items=MAX_COLUMNS, max_length=_MAX_COLUMN),
            epsilon_micro=fields.integer("epsilon_micro"),
        )
        fields.done()
        return out


def read_provenance(items: Iterable[object]) -> tuple[Provenance, ...]:
    """The manifest's ``provenance`` member, as it stands there."""
    return tuple(Provenance.read(item) for item in items)


@dataclass(frozen=True, slots=True)
class ProvenanceStatement:
    """What one run of a pipeline did; ``output_sha256`` is the digest of the file as in the manifest's subjects."""

    pipeline_sha256: str
    inputs: tuple[str, ...]
    output_sha256: str
    columns_in: tuple[str, ...]
    columns_out: tuple[str, ...]
    rows_in: int
    rows_out: int
    epsilon_micro: int
    tool: str
    """What did it, with its version."""
    issued_at: int

    def __post_init__(self) -> None:
        for name in ("inputs", "columns_in", "columns_out"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        check(SHA256_HEX, self.pipeline_sha256, "pipeline digest")
        check(SHA256_HEX, self.output_sha256, "output digest")
        if not 1 <= len(self.inputs) <= _MAX_INPUTS or len(set(self.inputs)) != len(self.inputs):
            raise _bad("bad provenance inputs", f"1…{_MAX_INPUTS} different digests", len(self.inputs))
        for digest in self.inputs:
            check(SHA256_HEX, digest, "input digest")
        _check_columns(self.columns_in, "columns in")
        _check_columns(self.columns_out, "columns out")
        for name in ("rows_in", "rows_out", "epsilon_micro", "issued_at"):
            within(getattr(self, name), name)
        check(_TOOL, self.tool, "tool")

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "columns_in": list(self.columns_in),
                "columns_out": list(self.columns_out),
                "epsilon_micro": self.epsilon_micro,
                "inputs": list(self.inputs),
                "issued_at": self.issued_at,
                "output_sha256": self.output_sha256,
                "pipeline_sha256": self.pipeline_sha256,
                "rows_in": self.rows_in,
                "rows_out": self.rows_out,
                "tool": self.tool,
            }
        )

    def entry(self, subject: str) -> Provenance:
        """What a manifest says of it, about its file ``subject``."""
        digest = hashlib.sha256(self.payload()).hexdigest()
        return Provenance(subject, digest, self.pipeline_sha256, self.columns_out, self.epsilon_micro)

    @staticmethod
    def parse(data: bytes) -> ProvenanceStatement:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        what = "provenance statement"
        fields = Fields(loads(data, what, max_bytes=_MAX_STATEMENT, max_depth=2), what)
        statement = ProvenanceStatement(
            pipeline_sha256=fields.text("pipeline_sha256"),
            inputs=fields.texts("inputs", max_items=_MAX_INPUTS, min_items=1),
            output_sha256=fields.text("output_sha256"),
            columns_in=fields.texts("columns_in", max_items=MAX_COLUMNS, max_length=_MAX_COLUMN),
            columns_out=fields.texts("columns_out", max_items=MAX_COLUMNS, max_length=_MAX_COLUMN),
            rows_in=fields.integer("rows_in"),
            rows_out=fields.integer("rows_out"),
            epsilon_micro=fields.integer("epsilon_micro"),
            tool=fields.text("tool", max_length=64),
            issued_at=fields.integer("issued_at"),
        )
        fields.done()
        if statement.payload() != data:
            raise _bad(
                f"the {what} is not canonical", "RFC 8785 JSON, sorted sets", "the same values written otherwise"
            )
        return statement


def sign_provenance(statement: ProvenanceStatement, owner: Identity) -> bytes:
    """DSSE envelope by the owner who prepared the data."""
    return sign(owner, PROVENANCE_TYPE, statement.payload())


def open_provenance(envelope: bytes, owner: PublicIdentity) -> ProvenanceStatement:
    """The statement, signed by ``owner``. Raises as :func:`open_envelope`."""
    payload = open_envelope(envelope, PROVENANCE_TYPE, owner, "provenance statement", max_bytes=2 * _MAX_STATEMENT)
    return ProvenanceStatement.parse(payload)
