"""The firmware's event log: it counts only as far as it replays, and only for what was measured."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.attestation.tpm2_events import (
    MAX_EVENT_LOG_BYTES,
    check_event_log,
    parse_event_log,
    replay,
    secure_boot,
)
from keyquorum_core.attestation.tpm2_structures import HASHES
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.soft_tpm import event_log, secure_boot_log, variable

SHA256 = next(each for each in HASHES if each.name == "sha256")
SHA384 = next(each for each in HASHES if each.name == "sha384")


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def test_a_log_replays_into_the_pcrs_of_its_boot() -> None:
    log, pcrs = secure_boot_log()
    events = check_event_log(log, SHA256, pcrs)
    assert [event.pcr for event in events] == [0, 7, 7, 7, 0, 4, 7, 4, 7]
    assert [event.data_is_measured for event in events].count(False) == 1  # the boot loader's code
    assert replay(parse_event_log(log, SHA256))[0] == pcrs[0]


def test_a_log_replays_in_the_bank_that_is_quoted() -> None:
    log, _ = secure_boot_log(banks=("sha1", "sha256", "sha384"))
    assert len(replay(parse_event_log(log, SHA384))[7]) == 48
    refused(Reason.MALFORMED, lambda: parse_event_log(secure_boot_log()[0], SHA384))


@pytest.mark.parametrize("pcr", [0, 4, 7])
def test_a_log_of_another_boot_is_refused(pcr: int) -> None:
    log, pcrs = secure_boot_log()
    refused(Reason.MEASUREMENT, lambda: check_event_log(log, SHA256, {**pcrs, pcr: bytes(32)}))


def test_a_firmware_pcr_that_the_log_does_not_name_must_be_untouched() -> None:
    log, pcrs = secure_boot_log()
    check_event_log(log, SHA256, {**pcrs, 6: bytes(32)})
    refused(Reason.MEASUREMENT, lambda: check_event_log(log, SHA256, {**pcrs, 6: b"\1" * 32}))


def test_a_pcr_that_is_not_the_firmwares_must_replay_where_the_log_names_it() -> None:
    log, pcrs = secure_boot_log()
    nine = hashlib.sha256(bytes(32) + hashlib.sha256(b"kernel").digest()).digest()
    check_event_log(log, SHA256, {**pcrs, 9: nine, 10: b"\1" * 32})
    refused(Reason.MEASUREMENT, lambda: check_event_log(log, SHA256, {**pcrs, 9: bytes(32)}))


def test_a_log_that_explains_no_quoted_pcr_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: check_event_log(secure_boot_log()[0], SHA256, {10: b"\1" * 32}))


def test_the_startup_locality_is_where_pcr_0_begins() -> None:
    for locality in (0, 3, 4):
        log = event_log([(0, 0x3, None, b"StartupLocality\0" + bytes([locality]))])
        assert replay(parse_event_log(log, SHA256))[0] == bytes(31) + bytes([locality])
    for events in ([b"\x01"], [b""], [b"\x03\x00"], [b"\x03", b"\x04"]):
        log = event_log([(0, 0x3, None, b"StartupLocality\0" + each) for each in events])
        refused(Reason.MALFORMED, lambda log=log: parse_event_log(log, SHA256))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (0x4, bytes(4)),
        (0x5, b"Calling EFI Application"),
        (0x8, b"version"),
        (0x12, b"BOOT ATTEMPTS OMITTED"),
        (0x80000001, variable("SecureBoot", b"\1")),
        (0x80000002, variable("BootOrder", b"\1\0")),
        (0x80000006, b"partition table"),
        (0x80000007, b"Exit Boot Services"),
        (0x8000000C, variable("BootOrder", b"\1\0")),
        (0x800000E0, variable("db", b"signer")),
    ],
)
def test_an_events_own_digest_is_recomputed(kind: int, data: bytes) -> None:
    assert parse_event_log(event_log([(5, kind, None, data)]), SHA256).events[0].data_is_measured
    refused(Reason.MEASUREMENT, lambda: parse_event_log(event_log([(5, kind, b"other", data)]), SHA256))


@pytest.mark.parametrize("kind", [0x80000002, 0x800000E0])
def test_the_value_of_a_boot_variable_may_be_what_is_measured(kind: int) -> None:
    log = event_log([(1, kind, b"value", variable("Boot0001", b"value"))])
    assert not parse_event_log(log, SHA256).events[0].data_is_measured


@pytest.mark.parametrize("kind", [0x1, 0x7, 0xD, 0x80000003, 0x80000004, 0x80000008, 0x12345])
def test_what_only_describes_is_not_taken_for_what_was_measured(kind: int) -> None:
    event = parse_event_log(event_log([(2, kind, b"measured", b"description")]), SHA256).events[0]
    assert not event.data_is_measured


def test_a_separator_that_reports_an_error_is_refused() -> None:
    for data in (b"\1\0\0\0", b"", bytes(5)):
        log = event_log([(0, 0x4, None, data)])
        refused(Reason.MEASUREMENT, lambda log=log: parse_event_log(log, SHA256))  # type: ignore[misc]
    assert parse_event_log(event_log([(0, 0x4, None, b"\xff" * 4)]), SHA256).events


def test_secure_boot_is_read_from_what_firmware_measured_before_the_separator() -> None:
    def said(*events: tuple[int, int, bytes | None, bytes]) -> bool | None:
        return secure_boot(parse_event_log(event_log(events), SHA256).events)

    on, off = ((7, 0x80000001, None, variable("SecureBoot", value)) for value in (b"\1", b"\0"))
    other = (7, 0x80000001, None, variable("dbxDefault", b"\0"))
    separator = (7, 0x4, None, bytes(4))
    assert said(on, other, separator) is True
    assert said(other, off, separator) is False
    assert said(on, separator, off) is True
    assert said(on, off, separator) is False
    assert said(separator, on) is None
    assert said(on) is None
    assert said((1, *on[1:]), separator) is None
    assert said((7, 0x80000001, None, variable("SecureBoot", b"\1", "00" * 16)), separator) is None
    assert said((7, 0x80000001, None, variable("SecureBoot", b"\1\0")), separator) is False


def test_a_log_with_false_types_does_not_hide_that_secure_boot_was_off() -> None:
    """A worker's host may write types and descriptions as it likes: only digests are measured."""
    off = variable("SecureBoot", b"\0")
    on = (7, 0x80000001, None, variable("SecureBoot", b"\1"))
    separator = (7, 0x4, None, bytes(4))
    late = (separator, on, separator)  # what an operating system adds to PCR 7 afterwards
    for events, expected in (
        ([(7, 0x80000001, None, off), *late], False),
        ([(7, 0x12345, None, off), *late], False),  # another type
        ([(7, 0x12345, off, b"something else"), *late], None),  # other data
        ([(7, 0x80000002, off, variable("Boot0001", off)), *late], None),  # inside another variable
        ([(7, 0x80000001, None, off), (7, 0x12345, None, bytes(4)), on, separator], False),  # a separator's type
        ([(7, 0x12345, bytes(4), b"no separator"), on, separator], None),
    ):
        assert secure_boot(parse_event_log(event_log(events), SHA256).events) is expected


def test_truncated_and_padded_logs_are_malformed() -> None:
    log, _ = secure_boot_log()
    ends = set()
    for size in range(len(log)):
        try:
            parse_event_log(log[:size], SHA256)
            ends.add(size)  # where an event ends: a shorter log, which replays into other PCRs
        except MalformedError:
            pass
    assert len(ends) == 11
    for padding in (b"\0", bytes(64), b"\xff" * 64):
        refused(Reason.MALFORMED, lambda padding=padding: parse_event_log(log + padding, SHA256))  # type: ignore[misc]
    refused(Reason.MALFORMED, lambda: parse_event_log(bytes(MAX_EVENT_LOG_BYTES + 1), SHA256))


def test_a_header_or_an_event_out_of_form_is_malformed() -> None:
    plain = event_log([(0, 0x8, None, b"v")])
    for wrong in (
        b"\1" + plain[1:],  # not PCR 0
        plain[:4] + b"\5" + plain[5:],  # not EV_NO_ACTION
        plain[:8] + b"\1" + plain[9:],  # a digest
        plain.replace(b"Spec ID Event03", b"Spec ID Event02"),
        plain.replace(b"\x0b\x00\x20\x00", b"\x0b\x00\x21\x00", 1),  # SHA-256 of 33 bytes
        event_log([], ("sha256", "sha256")),
        event_log([], ()),
        event_log([(24, 0x8, None, b"v")]),
        event_log([(0, 0x80000001, None, b"short")] * 4097),
    ):
        refused(Reason.MALFORMED, lambda wrong=wrong: parse_event_log(wrong, SHA256))  # type: ignore[misc]
    assert parse_event_log(event_log([], vendor_info=b"vendor"), SHA256).events == ()


def test_a_variable_whose_lengths_do_not_fit_is_malformed() -> None:
    for data in (b"short", variable("db", b"value")[:-1], variable("db", b"value") + b"\0"):
        log = event_log([(7, 0x800000E0, b"value", data)])
        refused(Reason.MALFORMED, lambda log=log: parse_event_log(log, SHA256))  # type: ignore[misc]


@given(st.data())
def test_any_change_to_a_log_is_parsed_or_gives_the_typed_error(data: st.DataObject) -> None:
    log, pcrs = secure_boot_log()
    at = data.draw(st.integers(0, len(log)))
    changed = log[:at] + data.draw(st.binary(max_size=20)) + log[at + data.draw(st.integers(0, 20)) :]
    with contextlib.suppress(KeyquorumError):
        secure_boot(check_event_log(changed, SHA256, pcrs))
