"""The keystore's tables, and how an older file becomes a newer one.

``PRAGMA user_version`` counts the migrations that ran. A file of a newer version is refused, never guessed at. Columns
named ``sealed`` hold AES-256-GCM ciphertext (``keystore.py`` says under what); everything else may be read by whoever
has the file.
"""

from __future__ import annotations

import sqlite3

from keyquorum_core.errors import Reason, StateError, UnavailableError

__all__ = ["VERSION", "migrate", "refuse_empty"]

_V1 = """
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- The custodian's own private keys.
CREATE TABLE secrets (
    name   TEXT PRIMARY KEY,
    sealed BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- Every roster this custodian served under, so that a certificate is checked against the roster it names.
CREATE TABLE rosters (
    digest  TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    payload BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- Each step's request digest and answer are kept: a repeated request gets the stored answer.
CREATE TABLE ceremonies (
    ceremony_id     TEXT PRIMARY KEY,
    key_id          TEXT NOT NULL,
    epoch           INTEGER NOT NULL,
    state           TEXT NOT NULL CHECK (state IN ('proposed', 'delivered', 'confirmed', 'active', 'cancelled')),
    cancelled_from  TEXT,
    plan            BLOB NOT NULL,
    proposal        BLOB NOT NULL,
    deliver_request BLOB,
    commitments     BLOB,
    confirm_request BLOB,
    confirmation    BLOB,
    updated_at      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- At most one ceremony at a time may be under way, or have ended well, for an epoch of a key.
CREATE UNIQUE INDEX one_live_ceremony ON ceremonies (key_id, epoch) WHERE state <> 'cancelled';

-- This custodian's own random parts, between propose and deliver.
CREATE TABLE parts (
    ceremony_id TEXT NOT NULL,
    idx         INTEGER NOT NULL,
    sealed      BLOB NOT NULL,
    PRIMARY KEY (ceremony_id, idx)
) STRICT, WITHOUT ROWID;

CREATE TABLE seeds (
    ceremony_id TEXT NOT NULL,
    idx         INTEGER NOT NULL,
    sealed      BLOB NOT NULL,
    PRIMARY KEY (ceremony_id, idx)
) STRICT, WITHOUT ROWID;

-- Epochs with a complete certificate: the only ones that keys are released from.
CREATE TABLE epochs (
    key_id       TEXT NOT NULL,
    epoch        INTEGER NOT NULL,
    ceremony_id  TEXT NOT NULL UNIQUE,
    certificate  BLOB NOT NULL,
    activated_at INTEGER NOT NULL,
    PRIMARY KEY (key_id, epoch)
) STRICT, WITHOUT ROWID;

-- One row per leaf this custodian answered.
CREATE TABLE releases (
    number      INTEGER PRIMARY KEY,
    leaf_hash   BLOB NOT NULL UNIQUE,
    leaf        BLOB NOT NULL,
    owner       TEXT NOT NULL,
    released_at INTEGER NOT NULL,
    window      INTEGER NOT NULL,
    development INTEGER NOT NULL CHECK (development IN (0, 1))
) STRICT;

-- Verdicts on evidence, so that one appraisal serves until the evidence is too old, across restarts.
CREATE TABLE appraisals (
    evidence_digest  BLOB NOT NULL,
    reference_digest BLOB NOT NULL,
    expires_at       INTEGER NOT NULL,
    sealed           BLOB NOT NULL,
    PRIMARY KEY (evidence_digest, reference_digest)
) STRICT, WITHOUT ROWID;
"""

_V2 = """
-- The last signed operator document of each kind that was accepted: nothing older is taken again.
CREATE TABLE bulletins (
    kind        TEXT PRIMARY KEY,
    version     INTEGER NOT NULL,
    digest      TEXT NOT NULL,
    envelope    BLOB NOT NULL,
    accepted_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

_V3 = """
-- By which policy each release was decided: the bundle, its version, the decision.
ALTER TABLE releases ADD COLUMN policy_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE releases ADD COLUMN policy_version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE releases ADD COLUMN decision_sha256 TEXT NOT NULL DEFAULT '';
"""

_V4 = """
-- Appraisals were kept under the digest of an unsigned file: those are not found any more, and not missed.
DROP TABLE appraisals;
CREATE TABLE appraisals (
    evidence_digest BLOB NOT NULL,
    context         BLOB NOT NULL,
    expires_at      INTEGER NOT NULL,
    sealed          BLOB NOT NULL,
    PRIMARY KEY (evidence_digest, context)
) STRICT, WITHOUT ROWID;

-- Where the last accepted quote by each attestation key left its TPM.
CREATE TABLE tpm_states (
    ak     TEXT PRIMARY KEY,
    sealed BLOB NOT NULL
) STRICT, WITHOUT ROWID;
"""

_V5 = """
-- The newest checkpoint of each log that this custodian accepted. What it accepts next must extend it.
CREATE TABLE ledgers (
    log         TEXT PRIMARY KEY,
    size        INTEGER NOT NULL,
    root        BLOB NOT NULL,
    note        BLOB NOT NULL,
    accepted_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Proof that the log, or this file, was turned back: two signed checkpoints that cannot both be. Never deleted. While
-- one has no cleared_at nothing is released.
CREATE TABLE ledger_alarms (
    number     INTEGER PRIMARY KEY,
    kind       TEXT NOT NULL CHECK (kind IN ('fork', 'rollback')),
    evidence   BLOB NOT NULL UNIQUE,
    known      BLOB NOT NULL,
    shown      BLOB NOT NULL,
    raised_at  INTEGER NOT NULL,
    cleared_at INTEGER,
    why        TEXT
) STRICT;
"""

_V6 = """
-- Ceremonies of every kind; each step's answer beside the digest of what it answered. What an earlier release had under
-- way began under rules that are no longer, so it is not carried over; epochs are.
DROP TABLE ceremonies;
DELETE FROM parts;
DELETE FROM seeds WHERE ceremony_id NOT IN (SELECT ceremony_id FROM epochs);
CREATE TABLE ceremonies (
    ceremony_id    TEXT PRIMARY KEY,
    kind           TEXT NOT NULL CHECK (kind IN ('generate', 'rotate', 'repair', 'replace', 'destroy')),
    key_id         TEXT NOT NULL,
    epoch          INTEGER NOT NULL,
    state          TEXT NOT NULL CHECK (state IN ('pending', 'proposed', 'delivered', 'confirmed', 'active', 'given',
                                                  'restored', 'erased', 'destroyed', 'cancelled')),
    cancelled_from TEXT,
    plan           BLOB NOT NULL,
    signers        TEXT NOT NULL,
    cause          TEXT NOT NULL,
    updated_at     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- At most one ceremony at a time may be making, or have made, an epoch of a key.
CREATE UNIQUE INDEX one_live_ceremony ON ceremonies (key_id, epoch)
    WHERE state <> 'cancelled' AND kind IN ('generate', 'rotate');

CREATE TABLE ceremony_steps (
    ceremony_id TEXT NOT NULL,
    step        TEXT NOT NULL,
    request     BLOB NOT NULL,
    answer      BLOB NOT NULL,
    PRIMARY KEY (ceremony_id, step)
) STRICT, WITHOUT ROWID;

ALTER TABLE epochs ADD COLUMN state TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'retired', 'destroyed'));
ALTER TABLE epochs ADD COLUMN retired_at INTEGER;
ALTER TABLE epochs ADD COLUMN ended_at INTEGER;

-- What this custodian's own operator was asked, and decided.
CREATE TABLE approvals (
    request_id   TEXT PRIMARY KEY,
    kind         TEXT NOT NULL,
    subject      TEXT NOT NULL,
    asked_by     TEXT NOT NULL,
    difference   TEXT NOT NULL,
    requested_at INTEGER NOT NULL,
    decision     TEXT NOT NULL DEFAULT '' CHECK (decision IN ('', 'approved', 'rejected')),
    decided_at   INTEGER
) STRICT, WITHOUT ROWID;

-- Signed statements that proved wrong, with what they are about: evidence against their authors.
CREATE TABLE accusations (
    ceremony_id TEXT NOT NULL,
    custodian   TEXT NOT NULL,
    what        TEXT NOT NULL,
    statement   BLOB NOT NULL,
    sealed      BLOB NOT NULL,
    found_at    INTEGER NOT NULL,
    PRIMARY KEY (ceremony_id, custodian)
) STRICT, WITHOUT ROWID;
"""

_V7 = """
-- Verdicts now say when the evidence was made; older ones are made again.
DELETE FROM appraisals;

-- Which worker holds which job's key until when, with the last appraisal that it was given or renewed on.
CREATE TABLE leases (
    job_id           TEXT NOT NULL,
    recipient_sha256 TEXT NOT NULL,
    key_id           TEXT NOT NULL,
    epoch            INTEGER NOT NULL,
    granted_at       INTEGER NOT NULL,
    until            INTEGER NOT NULL,
    renewals         INTEGER NOT NULL DEFAULT 0,
    revoked          TEXT NOT NULL DEFAULT '',
    sealed           BLOB NOT NULL,
    PRIMARY KEY (job_id, recipient_sha256)
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_until ON leases (until);

-- Workers whose attestation failed anew. Never deleted. While one has no lifted_at its subjects get nothing.
CREATE TABLE quarantine (
    number          INTEGER PRIMARY KEY,
    subjects        TEXT NOT NULL,
    reason          TEXT NOT NULL,
    message         TEXT NOT NULL,
    job_id          TEXT NOT NULL,
    evidence_sha256 TEXT NOT NULL,
    raised_at       INTEGER NOT NULL,
    lifted_at       INTEGER,
    why             TEXT
) STRICT;
CREATE TABLE quarantine_evidence (
    sha256   TEXT PRIMARY KEY,
    document BLOB NOT NULL
) STRICT;
"""

_MIGRATIONS = (_V1, _V2, _V3, _V4, _V5, _V6, _V7)
VERSION = len(_MIGRATIONS)


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring an open keystore to :data:`VERSION`. Raises :class:`StateError` (``UNSUPPORTED``) for a newer file."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > VERSION:
        raise StateError(
            Reason.UNSUPPORTED,
            f"{path} was written by a newer keyquorum-custodian",
            expected=f"schema version {VERSION} or older",
            actual=f"schema version {found}",
            next_step="Run the newer release; nothing was changed.",
        )
    for number in range(found, VERSION):
        # executescript commits by itself, so the version is set inside the same explicit transaction.
        script = f"BEGIN IMMEDIATE;{_MIGRATIONS[number]}PRAGMA user_version = {number + 1};COMMIT;"
        try:
            connection.executescript(script)
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def refuse_empty(connection: sqlite3.Connection, path: str) -> None:
    """Raises :class:`UnavailableError` (``STORAGE``) for a database without tables: opening never makes a keystore."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        raise UnavailableError(
            Reason.STORAGE, f"{path} is empty", expected="a keystore made by `keyquorum-custodian init`"
        )
