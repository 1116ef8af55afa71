"""The operator's side of ``CustodianAdmin``: asks the running custodian over mTLS, with its folder's certificates."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from keyquorum_core.ceremony_states import FINAL, REBUILDING, State
from keyquorum_custodian.config import load_config
from keyquorum_custodian.init import ADMIN_CERTIFICATE, ADMIN_KEY, TLS_CERTIFICATE
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "accept_bulletin",
    "admin_channel",
    "admin_stub",
    "decide",
    "fetch_approvals",
    "fetch_status",
    "send_seal",
    "send_secret",
    "show_approval",
    "show_bulletin",
    "show_status",
]


@asynccontextmanager
async def admin_channel(directory: Path) -> AsyncIterator[tuple[grpc.aio.Channel, str]]:
    """A channel to the operator's listener of the custodian serving ``directory``, and what to call it in errors."""
    config = load_config(directory)
    identity = tls.TlsIdentity(
        read_bytes(config.path(ADMIN_CERTIFICATE), "the operator's certificate", 64 << 10),
        read_bytes(config.path(ADMIN_KEY), "the operator's TLS key", 64 << 10),
    )
    root = read_bytes(config.path(TLS_CERTIFICATE), "the custodian's TLS certificate", 64 << 10)
    name = tls.dns_name(config.cluster, "custodian", config.id)
    async with tls.open_channel(config.admin_listen, identity, [root], name) as channel:
        yield channel, f"custodian {config.id} at {config.admin_listen}"


@asynccontextmanager
async def admin_stub(directory: Path) -> AsyncIterator[Any]:
    """The operator's service of the custodian serving ``directory``; errors inside become typed ones."""
    async with admin_channel(directory) as (channel, what):
        try:
            yield rpc.CustodianAdminStub(channel)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, what) from None


async def accept_bulletin(directory: Path, envelope: bytes, timeout: float = 30.0) -> dict[str, Any]:
    """Have the custodian serving ``directory`` accept a signed document. Raises its error, or ``UNAVAILABLE``."""
    async with admin_stub(directory) as stub:
        found = await stub.AcceptBulletin(pb.AcceptBulletinRequest(envelope=envelope), timeout=timeout)
    return {**_bulletin(found.accepted), "changes": list(found.changes)}


async def fetch_approvals(directory: Path, timeout: float = 5.0) -> list[dict[str, Any]]:
    """What waits for the operator of the custodian serving ``directory``."""
    async with admin_stub(directory) as stub:
        found = await stub.ListApprovals(pb.ListApprovalsRequest(), timeout=timeout)
    return [_approval(each) for each in found.pending]


async def decide(
    directory: Path, request_id: str, subject: str, *, approve: bool, timeout: float = 10.0
) -> dict[str, Any]:
    """Approve or reject exactly what was listed. Raises ``NOT_FOUND``, ``APPROVAL``, or ``UNAVAILABLE``."""
    async with admin_stub(directory) as stub:
        request = pb.DecideRequest(request_id=request_id, subject=subject, approve=approve)
        found = await stub.Decide(request, timeout=timeout)
    return _approval(found.decided)


def _approval(message: Any) -> dict[str, Any]:
    return {
        "request_id": message.request_id,
        "kind": message.kind,
        "subject": message.subject,
        "asked_by": message.asked_by,
        "difference": list(message.difference),
        "requested_at": message.requested_at,
    }


def show_approval(each: dict[str, Any]) -> str:
    """One request, with what would change."""
    asked = datetime.datetime.fromtimestamp(each["requested_at"], datetime.UTC).isoformat()
    head = f"{each['request_id']}  {each['kind']}, asked by {each['asked_by']} at {asked}"
    return "\n".join([head, *(f"  {line}" for line in each["difference"])])


async def send_secret(directory: Path, secret: str, timeout: float = 60.0) -> dict[str, Any]:
    """One passphrase, PIN or share for the sealed custodian serving ``directory``; how far it then is from being open.

    Raises ``STATE`` (open already), ``ATTEMPTS``, ``PASSPHRASE``, ``UNSEAL``, or ``UNAVAILABLE``."""
    async with admin_stub(directory) as stub:
        found = await stub.Unseal(pb.UnsealRequest(secret=secret), timeout=timeout)
    return {"open": found.open, **_sealing(found.sealing)}


async def send_seal(directory: Path, timeout: float = 10.0) -> None:
    """Have the custodian serving ``directory`` forget its keys."""
    async with admin_stub(directory) as stub:
        await stub.Seal(pb.SealRequest(), timeout=timeout)


def _sealing(message: Any) -> dict[str, Any]:
    return {
        "shares_held": message.shares_held,
        "shares_needed": message.shares_needed,
        "forgotten_at": message.forgotten_at,
        "failed_attempts": message.failed_attempts,
        "next_attempt_at": message.next_attempt_at,
    }


async def fetch_status(directory: Path, timeout: float = 5.0) -> dict[str, Any]:
    """What the custodian serving ``directory`` says of itself. Raises its error, or ``UNAVAILABLE`` without one."""
    async with admin_stub(directory) as stub:
        found = await stub.Status(pb.StatusRequest(), timeout=timeout)
    described = found.description
    return {
        "custodian": described.custodian,
        "jurisdiction": described.jurisdiction,
        "cluster": described.cluster,
        "version": described.version,
        "sealed": described.sealed,
        "scheme": described.scheme,
        "sealing": _sealing(found.sealing) if described.sealed else None,
        "roster_version": described.roster_version,
        "roster_digest": described.roster_digest,
        "trusts_development_hardware": described.trusts_development_hardware,
        "started_at": found.started_at,
        "now": described.now,
        "ledger_size": described.ledger_size,
        "ledger_witnessed_at": described.ledger_witnessed_at,
        "ledger_alarms": described.ledger_alarms,
        "releases": found.releases,
        "refusals": found.refusals,
        "warnings": list(found.warnings),
        "keys": [
            {
                "key_id": key.key_id,
                "epoch": key.epoch,
                "state": key.state,
                "seeds": key.seeds,
                "certificate_digest": key.certificate_digest,
                "created_at": key.created_at,
                "retired_at": key.retired_at,
            }
            for key in described.keys
        ],
        "ceremonies": [
            {
                "ceremony_id": each.ceremony_id,
                "kind": each.kind,
                "key_id": each.key_id,
                "epoch": each.epoch,
                "state": each.state,
                "cause": each.cause,
            }
            for each in found.ceremonies
        ],
        "pending": [_approval(each) for each in found.pending],
        "stale": [
            {"key_id": each.key_id, "epoch": each.epoch}
            for each in found.ceremonies
            if each.kind in REBUILDING and each.state in (State.PENDING, State.PROPOSED) and each.about_me
        ],
        "accused": [
            {"ceremony_id": each.ceremony_id, "custodian": each.custodian, "what": each.what} for each in found.accused
        ],
        "bulletins": [_bulletin(each) for each in found.bulletins],
        "quarantined": found.quarantined,
        "leases": [
            {
                "job_id": each.job_id,
                "recipient_sha256": each.recipient_sha256,
                "key_id": each.key_id,
                "epoch": each.epoch,
                "granted_at": each.granted_at,
                "until": each.until,
                "renewals": each.renewals,
                "revoked": each.revoked,
            }
            for each in found.leases
        ],
    }


def _bulletin(state: Any) -> dict[str, Any]:
    return {
        "kind": state.kind,
        "version": state.version,
        "digest": state.digest,
        "issued_at": state.issued_at,
        "expires_at": state.expires_at,
        "signers": list(state.signers),
        "problem": state.problem,
    }


def show_status(found: dict[str, Any]) -> str:
    """The same, for people."""
    started = datetime.datetime.fromtimestamp(found["started_at"], datetime.UTC).isoformat()
    lines = [f"WARNING: {warning}" for warning in found["warnings"]]
    lines += [
        f"custodian {found['custodian']} ({found['jurisdiction']}) of {found['cluster']}, version {found['version']}",
        f"  serving since  {started}",
        f"  roster         version {found['roster_version']}, {found['roster_digest']}",
    ]
    if found["sealed"]:
        return "\n".join([*lines, *_show_sealing(found)])
    lines += [
        f"  opened by      {found['scheme']}",
        f"  releases       {found['releases']} answered, {found['refusals']} refused since then",
        f"  ledger         {found['ledger_size']} leaves, {_vouched(found)}",
    ]
    lines += [
        f"  key            {key['key_id']} epoch {key['epoch']}: {key['state']}, {key['seeds']} seeds,"
        f" certificate {key['certificate_digest'][:16]}"
        for key in found["keys"]
    ] or ["  keys           none"]
    lines += [
        f"  ceremony       {each['ceremony_id']} to {each['kind']} {each['key_id']} epoch {each['epoch']}:"
        f" {each['state']}{' (' + each['cause'] + ')' if each['cause'] else ''}"
        for each in found["ceremonies"]
        if each["state"] not in FINAL
    ]
    lines += [
        f"  STALE          lacks {each['key_id']} epoch {each['epoch']}, and is being rebuilt"
        for each in found["stale"]
    ]
    lines += [
        f"  WAITS FOR YOU  {each['kind']}: keyquorum-custodian approve {each['request_id']}"
        for each in found["pending"]
    ]
    lines += [
        f"  ACCUSED        {each['custodian']}: {each['what']} (ceremony {each['ceremony_id']})"
        for each in found["accused"]
    ]
    good = sum(not each["revoked"] for each in found["leases"])
    lines.append(f"  leases         {good} in force, {found['quarantined']} quarantined")
    lines += [f"  {show_bulletin(each)}" for each in found["bulletins"]]
    return "\n".join(lines)


def _show_sealing(found: dict[str, Any]) -> list[str]:
    state = found["sealing"]
    lines = [f"  SEALED         opened by {found['scheme']}: keyquorum-custodian unseal"]
    if state["shares_needed"]:
        lines.append(f"  shares         {state['shares_held']} of {state['shares_needed']} entered")
    if state["failed_attempts"]:
        wait = max(0, state["next_attempt_at"] - found["now"])
        lines.append(f"  attempts       {state['failed_attempts']} wrong; the next in {wait} s")
    return lines


def _vouched(found: dict[str, Any]) -> str:
    at = found["ledger_witnessed_at"]
    return f"cosigned by a quorum {max(0, found['now'] - at)} s ago" if at else "no quorum's cosignatures seen yet"


def show_bulletin(each: dict[str, Any]) -> str:
    """One document, in a line."""
    if not each["version"]:
        return f"{each['kind']:<14} none"
    until = datetime.datetime.fromtimestamp(each["expires_at"], datetime.UTC).date()
    return (
        f"{each['kind']:<14} version {each['version']}, {each['digest'][:16]}, until {until}, signed by"
        f" {', '.join(each['signers'])}"
    )
