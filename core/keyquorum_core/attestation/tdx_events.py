"""The event log of a TD, and its replay into RTMR0–3.

The log is the CCEL area of ACPI (UEFI 2.10 §38.4.1; ACPI 6.5 §5.2.34) in the TCG's crypto-agile form (PC Client
Platform Firmware Profile 1.06 §10): one header event in the SHA-1 form that names SHA-384 as the only algorithm, then
events, little-endian::

    u32 index ‖ u32 type ‖ u32 1 ‖ u16 0x000c ‖ SHA-384 digest 48 ‖ u32 size ‖ data

Index 1–4 stands for RTMR0–3. A register begins as 48 zero bytes, and an event makes it SHA-384(register ‖ digest).

The log itself is signed by nobody: the registers are, and only events that replay into the quote's registers count for
anything. Nor does a digest say that it belongs to the data beside it. For the event types whose digest is defined over
their own data it is computed anew, and a log where one differs is refused. For all others (measured images, tables,
kernels) the data only describes what was measured; :attr:`Event.data_is_measured` tells which is which, and nothing may
be concluded from data that is not measured.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from keyquorum_core.attestation.tdx_quote import MEASUREMENT_BYTES, RTMR_COUNT, Quote
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["MAX_EVENT_LOG_BYTES", "Event", "check_event_log", "parse_event_log", "replay"]

MAX_EVENT_LOG_BYTES = 256 << 10
_MAX_EVENTS = 4096

EV_NO_ACTION = 0x3
EV_SEPARATOR = 0x4
EV_ACTION = 0x5
EV_S_CRTM_VERSION = 0x8
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_VARIABLE_BOOT = 0x80000002
EV_EFI_GPT_EVENT = 0x80000006
EV_EFI_ACTION = 0x80000007
EV_EFI_VARIABLE_AUTHORITY = 0x800000E0

_HASHES_ITS_DATA = {
    EV_SEPARATOR,
    EV_ACTION,
    EV_S_CRTM_VERSION,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EFI_GPT_EVENT,
    EV_EFI_ACTION,
}
_HASHES_A_VARIABLE = {EV_EFI_VARIABLE_BOOT, EV_EFI_VARIABLE_AUTHORITY}
"""Firmware hashes the whole structure for some of these, and only the variable's value for others."""

_SHA384 = 0x000C
_SPECIFICATION_ID = b"Spec ID Event03\0"
_FIRST = struct.Struct("<II20sI")  # index, type, SHA-1 digest, size
_EVENT = struct.Struct("<IIIH48sI")  # index, type, count of digests, algorithm, digest, size
_SPECIFICATION = struct.Struct("<16sI4BIHH")  # signature, platform, version and word size, algorithms, id, digest size
_VARIABLE = struct.Struct("<16sQQ")  # vendor GUID, characters in the name, bytes of the value
_END_OF_LOG = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Event:
    """One event that extended a register."""

    register: int
    """0 … 3, for RTMR0–3."""
    type: int
    digest: bytes
    data: bytes
    data_is_measured: bool
    """The digest is that of the data, or of the variable's value in it."""


def parse_event_log(log: bytes) -> tuple[Event, ...]:
    """Parse a log of at most 256 KiB. Raises :class:`MalformedError` ``MALFORMED``, and :class:`RefusedError`
    ``MEASUREMENT`` where an event's digest is not that of its data though its type says so.

    The log ends with its last event, at an index of all ones, or where nothing but the area's filler (bytes 0x00 or
    0xff) is left.
    """
    if len(log) > MAX_EVENT_LOG_BYTES:
        raise _malformed("too large", f"at most {MAX_EVENT_LOG_BYTES} bytes", f"{len(log)} bytes")
    at = _check_specification(log)
    events: list[Event] = []
    end = len(log.rstrip(b"\0"))
    while at < end and not _ends(log, at):
        if len(events) >= _MAX_EVENTS:
            raise _malformed("too many events", f"at most {_MAX_EVENTS}", "more")
        index, kind, count, algorithm, digest, size = _EVENT.unpack(_take(log, at, _EVENT.size))
        if count != 1 or algorithm != _SHA384:
            raise _malformed(f"digests at {at}", "one of SHA-384", f"{count}, the first of {algorithm:#06x}")
        at += _EVENT.size
        data = _take(log, at, size)
        at += size
        if kind == EV_NO_ACTION:
            continue  # informs, and extends nothing
        if not 1 <= index <= RTMR_COUNT:
            raise _malformed(f"index of event {len(events)}", f"1 … {RTMR_COUNT}", index)
        events.append(Event(index - 1, kind, digest, data, _check_digest(kind, digest, data, len(events))))
    return tuple(events)


def replay(events: tuple[Event, ...]) -> tuple[bytes, bytes, bytes, bytes]:
    """The values of RTMR0–3 after these events."""
    registers = [bytes(MEASUREMENT_BYTES)] * RTMR_COUNT
    for event in events:
        registers[event.register] = hashlib.sha384(registers[event.register] + event.digest).digest()
    return registers[0], registers[1], registers[2], registers[3]


def check_event_log(quote: Quote, log: bytes) -> tuple[Event, ...]:
    """The events of a log that replays into the quote's registers, all four.

    Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``MEASUREMENT``.
    """
    events = parse_event_log(log)
    for index, (replayed, quoted) in enumerate(zip(replay(events), quote.rtmrs, strict=True)):
        if not hmac.compare_digest(replayed, quoted):
            raise RefusedError(
                Reason.MEASUREMENT,
                f"the event log does not replay into RTMR{index}",
                expected=quoted.hex(),
                actual=replayed.hex(),
            )
    return events


def _check_specification(log: bytes) -> int:
    """Check the header event; returns where the next one begins."""
    index, kind, digest, size = _FIRST.unpack(_take(log, 0, _FIRST.size))
    if index not in (0, 1) or kind != EV_NO_ACTION or any(digest):
        raise _malformed("first event", "EV_NO_ACTION with a digest of zeros", f"type {kind:#x}")
    data = _take(log, _FIRST.size, size)
    if len(data) <= _SPECIFICATION.size:
        raise _malformed("specification event", f"more than {_SPECIFICATION.size} bytes", f"{len(data)} bytes")
    signature, _, _, _, _, _, algorithms, algorithm, digest_size = _SPECIFICATION.unpack_from(data)
    if signature != _SPECIFICATION_ID or (algorithms, algorithm, digest_size) != (1, _SHA384, MEASUREMENT_BYTES):
        raise _malformed("specification event", "SHA-384 alone", f"{algorithms} algorithms, {algorithm:#06x} first")
    if len(data) != _SPECIFICATION.size + 1 + data[_SPECIFICATION.size]:
        raise _malformed("specification event", "vendor information to its end", f"{len(data)} bytes")
    return _FIRST.size + int(size)


def _check_digest(kind: int, digest: bytes, data: bytes, number: int) -> bool:
    """Whether the digest is over the data. Raises :class:`RefusedError` where it should be and is not."""
    if kind not in _HASHES_ITS_DATA | _HASHES_A_VARIABLE:
        return False
    expected = hashlib.sha384(data).digest()
    if kind in _HASHES_A_VARIABLE and not hmac.compare_digest(expected, digest):
        expected = hashlib.sha384(_variable_value(data, number)).digest()
    if not hmac.compare_digest(expected, digest):
        raise RefusedError(
            Reason.MEASUREMENT,
            f"event {number} of the log, of type {kind:#x}, does not have the digest of its data",
            expected=expected.hex(),
            actual=digest.hex(),
        )
    return True


def _variable_value(data: bytes, number: int) -> bytes:
    if len(data) < _VARIABLE.size:
        raise _malformed(f"variable in event {number}", f"at least {_VARIABLE.size} bytes", f"{len(data)} bytes")
    _, characters, size = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * int(characters)
    if start + size != len(data):
        raise _malformed(f"variable in event {number}", f"{start + size} bytes", f"{len(data)} bytes")
    return data[start:]


def _ends(log: bytes, at: int) -> bool:
    if log[at : at + 4] != _END_OF_LOG.to_bytes(4, "little"):
        return False
    if log.count(0xFF, at) != len(log) - at:
        raise _malformed("bytes after its end", "0xff to the end of the area", "others")
    return True


def _take(log: bytes, at: int, size: int) -> bytes:
    part = log[at : at + size]
    if len(part) != size:
        raise _malformed(f"it ends in the event at {at}", f"{size} bytes", f"{len(part)} bytes")
    return part


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"TDX event log: {what}", expected=expected, actual=actual)
