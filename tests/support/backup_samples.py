"""One of each document that backups and restored custodians go by, with fixed values."""

from __future__ import annotations

from keyquorum_core.backup import BackedEpoch, Opening, Statement
from keyquorum_core.testimony import Known, KnownEpoch, Testimony

__all__ = ["OPENING", "STATEMENT", "TESTIMONY"]

OPENING = Opening("0b" * 16, "demo", "ch-1", (("aa" * 32, b"\x01\x02"), ("bb" * 32, b"\x03")))
STATEMENT = Statement(
    backup_id="0b" * 16,
    cluster="demo",
    custodian="ch-1",
    jurisdiction="CH",
    created_at=1_800_000_000,
    highest_time=1_800_000_001,
    sequence=41,
    roster_version=2,
    roster_digest="5e" * 32,
    ledger_size=20411,
    epochs=(BackedEpoch("demo", 3, "active", "0a" * 32, 6), BackedEpoch("demo", 4, "active", "0c" * 32, 0, "token")),
    opening_sha256="01" * 32,
    body_sha256="02" * 32,
    body_bytes=4096,
)
TESTIMONY = Testimony(
    custodian="de-1",
    subject="ch-1",
    nonce="0d" * 32,
    time=1_800_000_002,
    restored=False,
    known=Known(
        roster_version=2,
        roster_digest="5e" * 32,
        epochs={("demo", 3): KnownEpoch("retired", "0a" * 32, 1_799_999_000)},
        documents={"inventory": (7, "0e" * 32)},
        log="0f" * 32,
        ledger_size=20411,
        ledger_root="10" * 32,
    ),
)
