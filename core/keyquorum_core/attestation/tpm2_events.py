"""The firmware's event log of a PC, and its replay into PCRs.

The log is what Linux shows as ``binary_bios_measurements``, in the TCG's crypto-agile form (PC Client Platform Firmware
Profile 1.06, §10): one header event in the SHA-1 form that names the banks' algorithms, then events, little-endian::

    u32 PCR ‖ u32 type ‖ u32 count ‖ count × ( u16 algorithm ‖ digest ) ‖ u32 size ‖ data

each with one digest of every algorithm in the header. A PCR begins as zeros (PCR 0 ends in the locality of a
``StartupLocality`` event), and an event makes it H(PCR ‖ digest).

The log itself is signed by nobody: PCRs are, by the quote, and only events that replay into quoted PCRs count for
anything. Nor does a digest say that it belongs to the type and the data beside it. For the event types whose digest is
defined over their own data it is computed anew, and a log where one differs is refused. For all others (code, tables,
kernels) the data only describes what was measured; :attr:`Event.data_is_measured` tells which is which. Nothing may be
concluded from data that is not measured, nor from a type: whoever shows the log may write another one there.
"""

from __future__ import annotations

import hmac
import struct
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keyquorum_core.attestation.tpm2_structures import HashAlgorithm, hash_by_id
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["MAX_EVENT_LOG_BYTES", "Event", "EventLog", "check_event_log", "parse_event_log", "replay", "secure_boot"]

MAX_EVENT_LOG_BYTES = 256 << 10
_MAX_EVENTS = 4096
_MAX_ALGORITHMS = 8
_MAX_DIGEST_BYTES = 64
_PCRS = 24
_FIRMWARE_PCRS = range(8)
"""What a PC's firmware measures; the log explains these, whether or not it names them."""

EV_NO_ACTION = 0x3
EV_SEPARATOR = 0x4
EV_ACTION = 0x5
EV_S_CRTM_VERSION = 0x8
EV_OMIT_BOOT_DEVICE_EVENTS = 0x12
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_VARIABLE_BOOT = 0x80000002
EV_EFI_GPT_EVENT = 0x80000006
EV_EFI_ACTION = 0x80000007
EV_EFI_VARIABLE_BOOT2 = 0x8000000C
EV_EFI_GPT_EVENT2 = 0x8000000D
EV_EFI_VARIABLE_AUTHORITY = 0x800000E0

_HASHES_ITS_DATA = {
    EV_SEPARATOR,
    EV_ACTION,
    EV_S_CRTM_VERSION,
    EV_OMIT_BOOT_DEVICE_EVENTS,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EFI_GPT_EVENT,
    EV_EFI_ACTION,
    EV_EFI_VARIABLE_BOOT2,
    EV_EFI_GPT_EVENT2,
}
_HASHES_A_VARIABLE = {EV_EFI_VARIABLE_BOOT, EV_EFI_VARIABLE_AUTHORITY}
"""Firmware hashes the whole structure for some of these, and only the variable's value for others."""
_SEPARATORS = (b"\0\0\0\0", b"\xff\xff\xff\xff")
"""What ends the firmware's part of a PCR; any other value is a firmware's error."""

_SPECIFICATION_ID = b"Spec ID Event03\0"
_STARTUP_LOCALITY = b"StartupLocality\0"
_LOCALITIES = (0, 3, 4)
_FIRST = struct.Struct("<II20sI")  # PCR, type, SHA-1 digest, size
_SPECIFICATION = struct.Struct("<16sI4BI")  # signature, platform class, minor, major, errata, word size, algorithms
_VARIABLE = struct.Struct("<16sQQ")  # vendor GUID, characters in the name, bytes of the value
_SECURE_BOOT_PCR = 7
_SECURE_BOOT_NAME = "SecureBoot".encode("utf-16-le")
_SECURE_BOOT_VARIABLE = (  # vendor and characters in the name
    uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le + (len(_SECURE_BOOT_NAME) // 2).to_bytes(8, "little")
)
_SECURE_BOOT_ON = _SECURE_BOOT_VARIABLE + (1).to_bytes(8, "little") + _SECURE_BOOT_NAME + b"\x01"


@dataclass(frozen=True, slots=True)
class Event:
    """One event that extended a PCR, in the bank that was asked for."""

    pcr: int
    type: int
    digest: bytes
    data: bytes
    data_is_measured: bool
    """The digest is that of all of the data, whatever the type."""


@dataclass(frozen=True, slots=True)
class EventLog:
    """A log as parsed, for one bank."""

    bank: HashAlgorithm
    locality: int
    """Of the start-up, from ``StartupLocality``; 0 where the log has none."""
    events: tuple[Event, ...]


def parse_event_log(log: bytes, bank: HashAlgorithm) -> EventLog:
    """Parse a log of at most 256 KiB for one bank. Raises :class:`MalformedError` ``MALFORMED``, and
    :class:`RefusedError` ``MEASUREMENT`` where an event's digest is not that of its data though its type says so, or a
    separator reports an error.
    """
    if len(log) > MAX_EVENT_LOG_BYTES:
        raise _malformed("too large", f"at most {MAX_EVENT_LOG_BYTES} bytes", f"{len(log)} bytes")
    at, sizes = _specification(log)
    if sizes.get(bank.id) != bank.size:
        raise _malformed("its algorithms", f"the quoted bank, {bank.name}", [f"{each:#06x}" for each in sizes])
    events: list[Event] = []
    localities: set[int] = set()
    number = 0
    while at < len(log):
        number += 1
        if number > _MAX_EVENTS:
            raise _malformed("too many events", f"at most {_MAX_EVENTS}", "more")
        pcr, kind, count = struct.unpack("<III", _take(log, at, 12))
        at += 12
        at, digests = _digests(log, at, count, sizes, number)
        (size,) = struct.unpack("<I", _take(log, at, 4))
        data = _take(log, at + 4, size)
        at += 4 + size
        if kind == EV_NO_ACTION:  # informs, and extends nothing
            if data[:16] == _STARTUP_LOCALITY:
                localities.add(_locality(data, number))
            continue
        if pcr >= _PCRS:
            raise _malformed(f"PCR of event {number}", f"0 … {_PCRS - 1}", pcr)
        digest = digests[bank.id]
        _check_digest(kind, digest, data, number, bank)
        events.append(Event(pcr, kind, digest, data, hmac.compare_digest(bank.digest(data), digest)))
    if len(localities) > 1:
        raise _malformed("startup locality", "one", sorted(localities))
    return EventLog(bank, max(localities, default=0), tuple(events))


def replay(log: EventLog) -> dict[int, bytes]:
    """The values of PCRs 0 … 7, and of any other that the log extends, after its events."""
    size = log.bank.size
    pcrs = {index: bytes(size) for index in _FIRMWARE_PCRS}
    pcrs[0] = bytes(size - 1) + bytes([log.locality])
    for event in log.events:
        before = pcrs.get(event.pcr)
        if before is None:
            before = (b"\xff" if 17 <= event.pcr <= 22 else b"\0") * size  # PC Client PTP: locality 4 resets these
        pcrs[event.pcr] = log.bank.digest(before + event.digest)
    return pcrs


def check_event_log(log: bytes, bank: HashAlgorithm, pcrs: Mapping[int, bytes]) -> tuple[Event, ...]:
    """The events of a log that replays into quoted PCRs: those only, in their order, whose PCR is quoted.

    Every quoted PCR out of 0 … 7, and every other quoted one that the log extends, must come out as quoted; at least
    one must be among them. Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``MEASUREMENT``.
    """
    parsed = parse_event_log(log, bank)
    replayed = replay(parsed)
    explained = sorted(replayed.keys() & pcrs.keys())
    if not explained:
        raise RefusedError(
            Reason.MEASUREMENT, "the event log explains none of the quoted PCRs", expected="at least one", actual="none"
        )
    for index in explained:
        if not hmac.compare_digest(replayed[index], pcrs[index]):
            raise RefusedError(
                Reason.MEASUREMENT,
                f"the event log does not replay into PCR {index}",
                expected=pcrs[index].hex(),
                actual=replayed[index].hex(),
            )
    return tuple(event for event in parsed.events if event.pcr in pcrs)


def secure_boot(events: Iterable[Event]) -> bool | None:
    """Whether UEFI Secure Boot was on, from events that :func:`check_event_log` gave; ``None`` where they don't say.

    Only what was measured into PCR 7 before its separator counts: later events are not the firmware's. Where the
    variable is measured more than once, each must say that it was on. Types are not looked at, since nothing measures
    them: a separator is known by what was measured, and so is the variable; and where data before the separator is not
    what was measured, the variable may hide behind it, and the log does not say.
    """
    said: list[bool] = []
    for event in events:
        if event.pcr != _SECURE_BOOT_PCR:
            continue
        if not event.data_is_measured:
            return None
        if event.data in _SEPARATORS:
            return all(said) if said else None
        name = event.data[_VARIABLE.size : _VARIABLE.size + len(_SECURE_BOOT_NAME)]
        if event.data.startswith(_SECURE_BOOT_VARIABLE) and name == _SECURE_BOOT_NAME:
            said.append(event.data == _SECURE_BOOT_ON)
    return None


def _specification(log: bytes) -> tuple[int, dict[int, int]]:
    """Check the header event; returns where the next one begins, and digest sizes by algorithm."""
    pcr, kind, digest, size = _FIRST.unpack(_take(log, 0, _FIRST.size))
    if pcr != 0 or kind != EV_NO_ACTION or any(digest):
        raise _malformed("first event", "EV_NO_ACTION of PCR 0 with a digest of zeros", f"PCR {pcr}, type {kind:#x}")
    data = _take(log, _FIRST.size, size)
    signature, _, _, _, _, _, count = _SPECIFICATION.unpack(_take(data, 0, _SPECIFICATION.size))
    if signature != _SPECIFICATION_ID or not 1 <= count <= _MAX_ALGORITHMS:
        raise _malformed("specification event", f"{_SPECIFICATION_ID!r} and 1 … {_MAX_ALGORITHMS} algorithms", count)
    sizes: dict[int, int] = {}
    at = _SPECIFICATION.size
    for _ in range(count):
        algorithm, digest_size = struct.unpack("<HH", _take(data, at, 4))
        known = hash_by_id(algorithm)
        if algorithm in sizes or not 1 <= digest_size <= _MAX_DIGEST_BYTES or (known and known.size != digest_size):
            raise _malformed("specification event", "each algorithm once, with its size", f"{algorithm:#06x}")
        sizes[algorithm] = digest_size
        at += 4
    if len(data) != at + 1 + _take(data, at, 1)[0]:
        raise _malformed("specification event", "vendor information to its end", f"{len(data)} bytes")
    return _FIRST.size + int(size), sizes


def _digests(log: bytes, at: int, count: int, sizes: Mapping[int, int], number: int) -> tuple[int, dict[int, bytes]]:
    if count != len(sizes):
        raise _malformed(f"digests of event {number}", f"{len(sizes)}, as the header says", count)
    digests: dict[int, bytes] = {}
    for _ in range(count):
        (algorithm,) = struct.unpack("<H", _take(log, at, 2))
        if algorithm not in sizes or algorithm in digests:
            raise _malformed(f"digests of event {number}", "one of each algorithm", f"{algorithm:#06x}")
        digests[algorithm] = _take(log, at + 2, sizes[algorithm])
        at += 2 + sizes[algorithm]
    return at, digests


def _check_digest(kind: int, digest: bytes, data: bytes, number: int, bank: HashAlgorithm) -> None:
    """Raises :class:`RefusedError` ``MEASUREMENT`` where the digest should be over the data and is not."""
    if kind == EV_SEPARATOR and data not in _SEPARATORS:
        raise RefusedError(
            Reason.MEASUREMENT,
            f"event {number} of the log is a separator that reports a firmware error",
            expected="4 bytes, all 0x00 or all 0xff",
            actual=data[:16].hex(),
        )
    if kind not in _HASHES_ITS_DATA | _HASHES_A_VARIABLE:
        return
    expected = bank.digest(data)
    if kind in _HASHES_A_VARIABLE and not hmac.compare_digest(expected, digest):
        expected = bank.digest(_variable_value(data, number))
    if not hmac.compare_digest(expected, digest):
        raise RefusedError(
            Reason.MEASUREMENT,
            f"event {number} of the log, of type {kind:#x}, does not have the digest of its data",
            expected=expected.hex(),
            actual=digest.hex(),
        )


def _variable_value(data: bytes, number: int) -> bytes:
    """The value in a ``UEFI_VARIABLE_DATA``."""
    _, characters, size = _VARIABLE.unpack(_take(data, 0, _VARIABLE.size))
    start = _VARIABLE.size + 2 * int(characters)
    if start + size != len(data):
        raise _malformed(f"variable in event {number}", f"{start + size} bytes", f"{len(data)} bytes")
    return data[start:]


def _locality(data: bytes, number: int) -> int:
    if len(data) != 17 or data[16] not in _LOCALITIES:
        raise _malformed(f"startup locality in event {number}", f"one byte out of {_LOCALITIES}", data[16:].hex()[:16])
    return data[16]


def _take(data: bytes, at: int, size: int) -> bytes:
    part = data[at : at + size]
    if len(part) != size:
        raise _malformed(f"it ends in what begins at {at}", f"{size} bytes", f"{len(part)} bytes")
    return part


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"UEFI event log: {what}", expected=expected, actual=actual)
