"""TDX event logs: replay into the registers, digests computed anew, and logs of another form."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import tdx_events as events
from keyquorum_core.attestation.tdx_quote import Quote, parse_quote
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.intel_vendor import intel_vendor

KERNEL = 0x80000003  # EV_EFI_BOOT_SERVICES_APPLICATION: the digest is the image's, the data names it
SPECIFICATION = struct.pack("<16sI4BIHHB", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 1, 0x0C, 48, 0)


def first(data: bytes = SPECIFICATION, *, index: int = 1, kind: int = 3, digest: bytes = bytes(20)) -> bytes:
    return struct.pack("<II20sI", index, kind, digest, len(data)) + data


def event(index: int, kind: int, data: bytes, digest: bytes | None = None) -> bytes:
    digest = hashlib.sha384(data).digest() if digest is None else digest
    return struct.pack("<IIIH", index, kind, 1, 0x0C) + digest + struct.pack("<I", len(data)) + data


def variable(value: bytes) -> bytes:
    name = "BootOrder".encode("utf-16-le")
    return bytes(16) + struct.pack("<QQ", len(name) // 2, len(value)) + name + value


LOG = first() + b"".join(
    (
        event(1, events.EV_EFI_VARIABLE_DRIVER_CONFIG, variable(b"SecureBoot on")),
        event(1, events.EV_SEPARATOR, bytes(4)),
        event(2, KERNEL, b"vmlinuz", b"\x11" * 48),
        event(2, events.EV_EFI_VARIABLE_BOOT, variable(b"\x01\x00"), hashlib.sha384(b"\x01\x00").digest()),
        event(2, events.EV_EFI_ACTION, b"Calling EFI Application from Boot Option"),
        event(0, events.EV_NO_ACTION, b"a remark", bytes(48)),
        event(3, 0x0D, b"grub_cmd: boot", b"\x22" * 48),
    )
)


def quote_of(log: bytes) -> Quote:
    return replace(parse_quote(intel_vendor().quote()), rtmrs=events.replay(events.parse_event_log(log)))


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def test_a_log_replays_into_the_registers() -> None:
    register = bytes(48)
    for digest in (hashlib.sha384(variable(b"SecureBoot on")).digest(), hashlib.sha384(bytes(4)).digest()):
        register = hashlib.sha384(register + digest).digest()
    replayed = events.replay(events.parse_event_log(LOG))
    assert replayed[0] == register
    assert replayed[2] == hashlib.sha384(bytes(48) + b"\x22" * 48).digest()
    assert replayed[3] == bytes(48)
    found = events.check_event_log(quote_of(LOG), LOG)
    assert [each.register for each in found] == [0, 0, 1, 1, 1, 2]
    assert [each.data_is_measured for each in found] == [True, True, False, True, True, False]


@pytest.mark.parametrize("filler", [b"\0" * 500, b"\xff" * 500, b"\0", b"\xff" * 4])
def test_the_filler_of_the_area_is_not_part_of_the_log(filler: bytes) -> None:
    assert events.parse_event_log(LOG + filler) == events.parse_event_log(LOG)


@pytest.mark.parametrize("register", range(4))
def test_a_log_that_does_not_replay_is_refused(register: int) -> None:
    quote = quote_of(LOG)
    rtmrs = list(quote.rtmrs)
    rtmrs[register] = b"\x99" * 48
    other = replace(quote, rtmrs=(rtmrs[0], rtmrs[1], rtmrs[2], rtmrs[3]))
    error = refused(Reason.MEASUREMENT, lambda: events.check_event_log(other, LOG))
    assert error.message.endswith(f"RTMR{register}")


def test_leaving_out_adding_or_swapping_events_is_refused() -> None:
    quote = quote_of(LOG)
    one, two = event(4, KERNEL, b"a", b"\x33" * 48), event(4, KERNEL, b"b", b"\x44" * 48)
    refused(Reason.MEASUREMENT, lambda: events.check_event_log(quote, LOG + one))
    swapped = quote_of(LOG + one + two)
    refused(Reason.MEASUREMENT, lambda: events.check_event_log(swapped, LOG + two + one))
    refused(Reason.MEASUREMENT, lambda: events.check_event_log(swapped, LOG + one))


@pytest.mark.parametrize(
    "kind",
    [
        events.EV_SEPARATOR,
        events.EV_ACTION,
        events.EV_S_CRTM_VERSION,
        events.EV_EFI_ACTION,
        events.EV_EFI_GPT_EVENT,
        events.EV_EFI_VARIABLE_DRIVER_CONFIG,
        events.EV_EFI_VARIABLE_BOOT,
        events.EV_EFI_VARIABLE_AUTHORITY,
    ],
)
def test_a_digest_that_is_not_that_of_its_data_is_refused_though_it_replays(kind: int) -> None:
    data = variable(b"value")
    assert events.parse_event_log(first() + event(1, kind, data))[0].data_is_measured
    forged = first() + event(1, kind, data, hashlib.sha384(b"another").digest())
    refused(Reason.MEASUREMENT, lambda: events.parse_event_log(forged))


@pytest.mark.parametrize(
    "log",
    [
        b"",
        LOG[:-1],
        LOG[:40],
        LOG + b"\0\0\0\1",
        LOG + b"\xff\xff\xff\xff\0",
        LOG * 2,
        bytes(1 << 19),
        first(kind=4),
        first(digest=b"\1" * 20),
        first(SPECIFICATION[:-1]),
        first(SPECIFICATION + b"\0"),
        first(b"Spec ID Event02\0" + SPECIFICATION[16:]),
        first(SPECIFICATION[:28] + struct.pack("<HH", 0x04, 20) + b"\0"),  # SHA-1
        first() + event(0, KERNEL, b""),
        first() + event(5, KERNEL, b""),
        first() + struct.pack("<III", 1, 4, 0) + struct.pack("<I", 0),
        first() + struct.pack("<IIIH", 1, 4, 2, 0x0C) + bytes(48) + struct.pack("<I", 0),
        first() + event(1, events.EV_EFI_VARIABLE_BOOT, b"short", bytes(48)),
        first() + event(1, events.EV_EFI_VARIABLE_BOOT, variable(b"v") + b"\0", bytes(48)),
        first() + event(1, KERNEL, b"") * 4097,
    ],
)
def test_a_log_of_another_form_is_malformed(log: bytes) -> None:
    refused(Reason.MALFORMED, lambda: events.parse_event_log(log))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, len(LOG)))
def test_any_log_raises_nothing_but_ours(data: bytes, at: int) -> None:
    for log in (data, LOG[:at] + data, LOG[:at] + data + LOG[at:]):
        try:
            events.parse_event_log(log)
        except KeyquorumError:
            continue
