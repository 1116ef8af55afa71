"""TDX collection: configfs-tsm, ``/dev/tdx_guest`` and the quoting service byte for byte, with hostile answers."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keyquorum_core.attestation import tdx
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_gpu_worker.evidence.quoting import QuotingService
from keyquorum_gpu_worker.evidence.tdx import Tdx, TdxDevice, cut_quote
from keyquorum_gpu_worker.evidence.tsm import TsmReports
from tests.support.bindings import BINDING
from tests.support.intel_vendor import NOW, good_collateral, intel_vendor
from tests.support.kernel import TdxGuest, Tsm

BOUND = BINDING.report_data


def sign(report_data: bytes) -> bytes:
    return intel_vendor().quote(report_data=report_data)


def collateral(tmp_path: Path) -> Path:
    path = tmp_path / "collateral.json"
    path.write_bytes(good_collateral())
    return path


def refused(source: Tdx, words: str) -> KeyquorumError:
    with pytest.raises(UnavailableError, match=words) as caught:
        source.collect(BINDING)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert caught.value.next_step
    return caught.value


# configfs-tsm


@pytest.fixture
def tsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tdx]]:
    def make(event_log: Path | None = None, **how: object) -> Tdx:
        root = tmp_path / "tsm"
        root.mkdir()
        signer = how.pop("sign", sign)
        kernel = Tsm(root, signer, **({"provider": "tdx_guest", "expected": "tdx_guest"} | how))  # type: ignore[arg-type]
        kernel.install(monkeypatch)
        no_device = TdxDevice(tmp_path / "tdx_guest")
        return Tdx(TsmReports("tdx_guest", root), no_device, collateral(tmp_path), event_log=event_log)

    yield make
    monkeypatch.undo()


@pytest.mark.parametrize("filler", [b"", bytes(4096)])
def test_a_quote_comes_with_collateral_and_verifies(tsm: Callable[..., Tdx], filler: bytes) -> None:
    item = tsm(sign=lambda data: sign(data) + filler).collect(BINDING)
    (document,) = item.endorsements
    verified = tdx.verify(item.evidence, document, pinned_roots={intel_vendor().fingerprint}, now=NOW)
    assert verified.quote.report_data == BOUND
    assert document == good_collateral()


def test_the_event_log_goes_along_where_it_is_configured(tsm: Callable[..., Tdx], tmp_path: Path) -> None:
    (tmp_path / "CCEL").write_bytes(b"a log")
    assert tsm(tmp_path / "CCEL").collect(BINDING).endorsements == (good_collateral(), b"a log")


def test_an_event_log_that_is_not_there_is_named(tsm: Callable[..., Tdx], tmp_path: Path) -> None:
    error = refused(tsm(tmp_path / "CCEL"), "event log cannot be read")
    assert str(tmp_path / "CCEL") in str(error.expected)


@pytest.mark.parametrize("content", [None, b"", b"{" * ((256 << 10) + 1)])
def test_collateral_must_be_there(tsm: Callable[..., Tdx], tmp_path: Path, content: bytes | None) -> None:
    source = tsm()
    (tmp_path / "collateral.json").unlink()
    if content is not None:
        (tmp_path / "collateral.json").write_bytes(content)
    assert "PCS" in refused(source, "TDX collateral").next_step


def test_another_provider_is_named(tsm: Callable[..., Tdx]) -> None:
    assert refused(tsm(provider="sev_guest"), "by other means").actual == "provider sev_guest"


@pytest.mark.parametrize(
    "change",
    [
        lambda quote: quote[:-1],
        lambda quote: quote[:100],
        lambda quote: b"",
        lambda quote: b"\x03" + quote[1:],
        lambda quote: quote + b"\x01",
        lambda quote: quote + bytes(9) + b"\x01",
        lambda quote: quote[:632] + b"\xff\xff\xff\xff" + quote[636:],
    ],
)
def test_what_is_no_quote_is_refused(tsm: Callable[..., Tdx], change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MalformedError, match="no TDX quote"):
        tsm(sign=lambda data: change(sign(data))).collect(BINDING)


@pytest.mark.parametrize(("version", "body"), [(4, 2), (5, 2), (5, 3), (5, 4)])
def test_quotes_of_every_layout_are_cut_to_their_length(version: int, body: int) -> None:
    quote = intel_vendor().quote(version=version, body_type=body)
    assert cut_quote(quote + bytes(300)) == quote


# The device, and the quoting service behind it


class Service:
    """Intel's qgsd on one end of a socket pair: ``answer`` makes the message of a request's."""

    def __init__(self, answer: Callable[[bytes], bytes], *, prefix: bytes | None = None) -> None:
        self.asked = b""
        self._answer = answer
        self._prefix = prefix

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(5)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            length = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
            self.asked = connection.recv(length, socket.MSG_WAITALL)
            message = self._answer(self.asked)
            connection.sendall((len(message).to_bytes(4, "big") if self._prefix is None else self._prefix) + message)


def response(
    quote: bytes, *, error: int = 0, kind: int = 1, major: int = 1, chosen: bytes = b"", size: int | None = None
) -> bytes:
    body = struct.pack("<II", len(chosen), len(quote)) + chosen + quote
    return struct.pack("<HHIII", major, 1, kind, 16 + len(body) if size is None else size, error) + body


def quoted(request: bytes) -> bytes:
    td_report = request[24:]
    return response(sign(td_report[128:192]))


def device(tmp_path: Path, kernel: TdxGuest, service: Service | None) -> Tdx:
    (tmp_path / "tdx_guest").touch()
    quoting = None if service is None else QuotingService(4050, service.connect)
    return Tdx(
        TsmReports("tdx_guest", tmp_path / "none"),
        TdxDevice(tmp_path / "tdx_guest", kernel),
        collateral(tmp_path),
        quoting=quoting,
    )


def test_the_device_gives_a_tdreport_and_the_service_a_quote_of_it(tmp_path: Path) -> None:
    kernel, service = TdxGuest(), Service(quoted)
    item = device(tmp_path, kernel, service).collect(BINDING)
    assert tdx.parse_quote(item.evidence).report_data == BOUND
    assert kernel.asked == [(0xC4405401, BOUND + bytes(1024))]  # _IOWR('T', 1, 1088 bytes)
    header = struct.pack("<HHIIIII", 1, 1, 0, 16 + 8 + 1024, 0, 1024, 0)
    assert service.asked == header + kernel.report(BOUND)


def test_a_tdreport_alone_is_no_evidence_and_is_said_to_be_none(tmp_path: Path) -> None:
    error = refused(device(tmp_path, TdxGuest(), None), "only this machine's CPU can check")
    assert "quoting_port" in str(error.expected)


@pytest.mark.parametrize(
    ("kernel", "actual"), [(TdxGuest(tee_type=0), "type 0x0 with ours"), (TdxGuest(data=bytes(64)), "other data")]
)
def test_a_tdreport_that_is_not_ours_is_refused(tmp_path: Path, kernel: TdxGuest, actual: str) -> None:
    assert actual in str(refused(device(tmp_path, kernel, Service(quoted)), "not the one asked for").actual)


@pytest.mark.parametrize(
    ("answer", "actual"),
    [
        (lambda request: response(b"", error=0x12009), "error 0x12009"),
        (lambda request: response(b"q", kind=3), "type 3"),
        (lambda request: response(b"q", major=2), "version 2"),
        (lambda request: response(b"q", size=99), "size 99"),
        (lambda request: response(b""), "a quote of 0 bytes"),
        (lambda request: response(b"q")[:-5] + b"\xff\xff\xff\xff" + b"q", "bytes in 25"),
        (lambda request: b"x" * 23, "a message of 23 bytes"),
    ],
)
def test_hostile_answers_of_the_service_are_refused(
    tmp_path: Path, answer: Callable[[bytes], bytes], actual: str
) -> None:
    assert actual in str(refused(device(tmp_path, TdxGuest(), Service(answer)), "gave no quote").actual)


def test_an_answer_with_a_chosen_id_is_read(tmp_path: Path) -> None:
    service = Service(lambda request: response(sign(request[24 + 128 : 24 + 192]), chosen=b"\x01" * 16))
    assert tdx.parse_quote(device(tmp_path, TdxGuest(), service).collect(BINDING).evidence).report_data == BOUND


@pytest.mark.parametrize("prefix", [b"\0\0", b"\0\0\x10\0", b"\x7f\xff\xff\xff"])
def test_an_answer_cut_short_or_without_end_is_refused(tmp_path: Path, prefix: bytes) -> None:
    refused(device(tmp_path, TdxGuest(), Service(lambda request: b"", prefix=prefix)), "does not answer|gave no quote")


def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    def connect() -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    (tmp_path / "tdx_guest").touch()
    source = Tdx(
        TsmReports("tdx_guest", tmp_path / "none"),
        TdxDevice(tmp_path / "tdx_guest", TdxGuest()),
        collateral(tmp_path),
        quoting=QuotingService(4050, connect),
    )
    assert "vsock port 4050" in str(refused(source, "does not answer").expected)


def test_a_machine_without_either_is_told_what_was_looked_for(tmp_path: Path) -> None:
    source = Tdx(TsmReports("tdx_guest", tmp_path / "report"), TdxDevice(tmp_path / "tdx_guest"), collateral(tmp_path))
    error = refused(source, "offers no TDX quotes")
    assert str(tmp_path / "report") in str(error.expected)
    assert str(tmp_path / "tdx_guest") in str(error.expected)


def test_the_real_ioctl_on_a_file_that_is_no_device_fails_cleanly(tmp_path: Path) -> None:
    (tmp_path / "tdx_guest").touch()
    source = Tdx(
        TsmReports("tdx_guest", tmp_path / "none"),
        TdxDevice(tmp_path / "tdx_guest"),
        collateral(tmp_path),
        quoting=QuotingService(4050, Service(quoted).connect),
    )
    refused(source, "gave no TDREPORT")
