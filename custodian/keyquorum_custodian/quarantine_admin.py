"""The operator's side of quarantine: look at the entries and their evidence, then lift one, running or not."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian.admin import admin_stub
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import open_keystore
from keyquorum_custodian.quarantine import Quarantine
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["Entry", "fetch", "lift", "lift_offline", "read_offline", "show", "write_evidence"]

_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as an operator sees it; ``lifted_at`` is 0 while it is in force."""

    number: int
    subjects: tuple[str, ...]
    reason: str
    message: str
    job_id: str
    evidence_sha256: str
    raised_at: int
    lifted_at: int
    why: str
    evidence: bytes = field(default=b"", repr=False)

    def as_dict(self) -> dict[str, object]:
        """For ``--json``: all but the document."""
        return {
            "number": self.number,
            "subjects": list(self.subjects),
            "reason": self.reason,
            "message": self.message,
            "job_id": self.job_id,
            "evidence_sha256": self.evidence_sha256,
            "raised_at": self.raised_at,
            "lifted_at": self.lifted_at,
            "why": self.why,
        }


async def fetch(directory: Path, *, evidence: bool = False) -> list[Entry]:
    """The entries of the custodian serving ``directory``, oldest first. Raises ``UNAVAILABLE`` without one."""
    async with admin_stub(directory) as stub:
        return _told(await stub.ListQuarantine(pb.ListQuarantineRequest(evidence=evidence), timeout=_TIMEOUT))


async def lift(directory: Path, number: int, why: str) -> list[Entry]:
    """Have the running custodian lift an entry. Raises ``NOT_FOUND``, ``MALFORMED``, ``UNAVAILABLE``."""
    async with admin_stub(directory) as stub:
        request = pb.LiftQuarantineRequest(number=max(0, number), why=why)
        return _told(await stub.LiftQuarantine(request, timeout=_TIMEOUT))


def read_offline(directory: Path, passphrase: str) -> list[Entry]:
    """The same from the keystore of a custodian that isn't running. Raises as :meth:`Keystore.open`."""
    keystore = open_keystore(load_config(directory), passphrase)
    try:
        return _stored(Quarantine(keystore))
    finally:
        keystore.close()


def lift_offline(directory: Path, passphrase: str, number: int, why: str, now: int) -> list[Entry]:
    """The same as :func:`lift`, in the keystore of a custodian that isn't running."""
    keystore = open_keystore(load_config(directory), passphrase)
    try:
        quarantine = Quarantine(keystore)
        quarantine.lift(number, why, now)
        return _stored(quarantine)
    finally:
        keystore.close()


def _stored(quarantine: Quarantine) -> list[Entry]:
    return [
        Entry(
            each.number,
            each.subjects,
            each.reason,
            each.message,
            each.job_id,
            each.evidence_sha256,
            each.raised_at,
            each.lifted_at or 0,
            each.why or "",
            quarantine.evidence(each.number) if each.evidence_sha256 else b"",
        )
        for each in quarantine.entries()
    ]


def _told(answer: pb.ListQuarantineResponse) -> list[Entry]:
    return [
        Entry(
            each.number,
            tuple(each.subjects),
            each.reason,
            each.message,
            each.job_id,
            each.evidence_sha256,
            each.raised_at,
            each.lifted_at,
            each.why,
            each.evidence,
        )
        for each in answer.entries
    ]


def write_evidence(entries: Iterable[Entry], folder: Path) -> None:
    """``NUMBER-evidence.json`` for each entry that has evidence. Raises ``STORAGE``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            if entry.evidence:
                (folder / f"{entry.number}-evidence.json").write_bytes(entry.evidence)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, "the evidence cannot be written", expected=f"a folder {folder}", actual=error.strerror
        ) from None


def show(entries: list[Entry]) -> str:
    """For people."""
    if not entries:
        return "nobody is or was in quarantine"
    lines = []
    for each in entries:
        state = f"lifted {_when(each.lifted_at)}: {each.why}" if each.lifted_at else "IN FORCE"
        lines.append(f"entry {each.number}: {each.reason}, since {_when(each.raised_at)}, {state}")
        lines.append(f"  {each.message}")
        lines += [f"  {subject}" for subject in each.subjects]
        if each.job_id:
            lines.append(f"  in job {each.job_id}")
        if each.evidence_sha256:
            lines.append(f"  evidence {each.evidence_sha256}")
    return "\n".join(lines)


def _when(unix: int) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat()
