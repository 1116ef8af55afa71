"""The operator's side of ledger alarms: look at the evidence, then clear it, running or not.

Evidence stays for good, with who cleared it when and why.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from keyquorum_custodian.admin import admin_stub
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore, open_keystore
from keyquorum_custodian.ledger_store import LedgerStore
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["clear", "clear_offline", "fetch", "read_offline", "show"]

_TIMEOUT = 5.0


async def fetch(directory: Path) -> list[dict[str, Any]]:
    """The alarms of the custodian serving ``directory``, oldest first. Raises ``UNAVAILABLE`` without one."""
    async with admin_stub(directory) as stub:
        return _told(await stub.ListLedgerAlarms(pb.ListLedgerAlarmsRequest(), timeout=_TIMEOUT))


async def clear(directory: Path, number: int, why: str) -> list[dict[str, Any]]:
    """Have the running custodian clear an alarm. Raises ``NOT_FOUND``, ``MALFORMED``, ``UNAVAILABLE``."""
    async with admin_stub(directory) as stub:
        request = pb.ClearLedgerAlarmRequest(number=max(0, number), why=why)
        return _told(await stub.ClearLedgerAlarm(request, timeout=_TIMEOUT))


def read_offline(directory: Path, passphrase: str) -> list[dict[str, Any]]:
    """The same from the keystore of a custodian that isn't running. Raises as :meth:`Keystore.open`."""
    keystore = open_keystore(load_config(directory), passphrase)
    try:
        return _stored(keystore)
    finally:
        keystore.close()


def clear_offline(directory: Path, passphrase: str, number: int, why: str, now: int) -> list[dict[str, Any]]:
    """The same as :func:`clear`, in the keystore of a custodian that isn't running."""
    keystore = open_keystore(load_config(directory), passphrase)
    try:
        LedgerStore(keystore).clear_alarm(number, why, now)
        return _stored(keystore)
    finally:
        keystore.close()


def _stored(keystore: Keystore) -> list[dict[str, Any]]:
    return [
        _alarm(each.number, each.kind, each.known, each.shown, each.raised_at, each.cleared_at or 0, each.why or "")
        for each in LedgerStore(keystore).alarms()
    ]


def _told(answer: pb.ListLedgerAlarmsResponse) -> list[dict[str, Any]]:
    return [
        _alarm(each.number, each.kind, each.known, each.shown, each.raised_at, each.cleared_at, each.why)
        for each in answer.alarms
    ]


def _alarm(
    number: int, kind: str, known: bytes, shown: bytes, raised_at: int, cleared_at: int, why: str
) -> dict[str, Any]:
    return {
        "number": number,
        "kind": kind,
        "known": known.decode("utf-8", "replace"),
        "shown": shown.decode("utf-8", "replace"),
        "raised_at": raised_at,
        "cleared_at": cleared_at,
        "why": why,
    }


def show(alarms: list[dict[str, Any]]) -> str:
    """For people: which trees contradict each other. The notes themselves are in the JSON."""
    if not alarms:
        return "no ledger alarms"
    lines = []
    for each in alarms:
        state = f"cleared {_when(each['cleared_at'])}: {each['why']}" if each["cleared_at"] else "OPEN"
        lines.append(f"alarm {each['number']}: {each['kind']}, raised {_when(each['raised_at'])}, {state}")
        lines += [f"  {label:<6} {_tree(each[label])}" for label in ("known", "shown")]
    return "\n".join(lines)


def _tree(note: str) -> str:
    lines = note.split("\n")
    return f"{lines[0]}, {lines[1]} leaves, root {lines[2]}" if len(lines) > 3 else "nothing"


def _when(unix: int) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat()
