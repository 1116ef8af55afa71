"""SEV-SNP collection: configfs-tsm and ``/dev/sev-guest`` byte for byte, and what is said where they are missing."""

from __future__ import annotations

import errno
import os
import stat
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keyquorum_core.attestation import sev_snp
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_gpu_worker.evidence.development import DevelopmentPlatform
from keyquorum_gpu_worker.evidence.sev_snp import SevSnp, SnpDevice, certificate_table
from keyquorum_gpu_worker.evidence.tsm import TsmReports
from tests.support.bindings import BINDING
from tests.support.kernel import SevGuest, Tsm
from tests.support.vendor import CREATED_AT, MEASUREMENT, development_chip, development_vendor

BOUND = BINDING.report_data
GUIDS = ("63da758d-e664-4564-adc5-f4b93be8accd", "4ab7b379-bbac-4fe4-a02f-05aef327c782")
Make = Callable[..., SevSnp]


def sign(report_data: bytes) -> bytes:
    return development_chip().sign_report(report_data, MEASUREMENT)


def table(order: Callable[[uuid.UUID], bytes]) -> bytes:
    vek, ask, _ = development_chip().endorsements
    header = b""
    offset = 24 * 3
    for guid, data in zip(GUIDS, (vek, ask), strict=True):
        header += order(uuid.UUID(guid)) + offset.to_bytes(4, "little") + len(data).to_bytes(4, "little")
        offset += len(data)
    return header + bytes(24) + vek + ask


TABLE = table(lambda guid: guid.bytes_le)


def endorsements(tmp_path: Path) -> Path:
    folder = tmp_path / "endorsements"
    folder.mkdir()
    for name, data in zip(("1-vek.der", "2-ask.der", "3-ark.der"), development_chip().endorsements, strict=True):
        (folder / name).write_bytes(data)
    (folder / "README").write_text("no certificate")
    return folder


def refused(source: SevSnp, words: str) -> KeyquorumError:
    with pytest.raises(UnavailableError, match=words) as caught:
        source.collect(BINDING)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert caught.value.next_step
    return caught.value


# configfs-tsm


@pytest.fixture
def tsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[SevSnp, Tsm]]]:
    """Makes a source over a folder that behaves as configfs does."""

    def make(certificates: Path | None = None, vmpl: int | None = None, **how: object) -> tuple[SevSnp, Tsm]:
        root = tmp_path / "tsm"
        root.mkdir()
        kernel = Tsm(root, how.pop("sign", sign), privileged=vmpl is not None, **how)  # type: ignore[arg-type]
        kernel.install(monkeypatch)
        no_device = SnpDevice(tmp_path / "sev-guest")
        return SevSnp(TsmReports("sev_guest", root), no_device, endorsements=certificates, vmpl=vmpl), kernel

    yield make
    monkeypatch.undo()
    assert list((tmp_path / "tsm").iterdir()) == []


@pytest.mark.parametrize("order", [lambda guid: guid.bytes, lambda guid: guid.bytes_le])
def test_tsm_report_comes_with_the_hosts_certificates(
    tsm: Callable[..., tuple[SevSnp, Tsm]], order: Callable[[uuid.UUID], bytes]
) -> None:
    source, kernel = tsm(table=table(order))
    item = source.collect(BINDING)
    assert item.type == "sev-snp"
    assert item.evidence[0x50:0x90] == BOUND
    assert item.endorsements == development_chip().endorsements[:2]
    assert kernel.written == [("inblob", BOUND)]


def test_tsm_report_takes_configured_endorsements_where_the_host_has_none(
    tsm: Callable[..., tuple[SevSnp, Tsm]], tmp_path: Path
) -> None:
    item = tsm(endorsements(tmp_path))[0].collect(BINDING)
    verified = sev_snp.verify(
        item.evidence, item.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT + 1000
    )
    assert verified.report.report_data == BOUND


def test_a_vmpl_is_asked_for_where_one_is_configured(tsm: Callable[..., tuple[SevSnp, Tsm]]) -> None:
    source, kernel = tsm(vmpl=2, table=TABLE)
    source.collect(BINDING)
    assert kernel.written == [("privlevel", b"2"), ("inblob", BOUND)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "no endorsements"),
        ({"provider": "tdx_guest", "table": b"x" * 30}, "by other means"),
        ({"intruder": True, "table": TABLE}, "somebody else wrote"),
        ({"generation": "many", "table": TABLE}, "could not be read"),
        ({"sign": lambda data: sign(data)[:-1], "table": TABLE}, "no SEV-SNP report"),
        ({"sign": lambda data: sign(data) * 2, "table": TABLE}, "no SEV-SNP report"),
        ({"sign": lambda data: b"", "table": TABLE}, "no SEV-SNP report"),
    ],
)
def test_tsm_says_what_is_wrong(tsm: Callable[..., tuple[SevSnp, Tsm]], how: dict[str, object], words: str) -> None:
    refused(tsm(**how)[0], words)


def test_an_endless_blob_is_not_read_to_its_end(tsm: Callable[..., tuple[SevSnp, Tsm]]) -> None:
    source, _ = tsm(sign=lambda data: bytes((256 << 10) + 2))
    error = refused(source, "could not be read")
    assert "outblob" in str(error.actual)


def test_tsm_folder_that_may_not_be_written_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    error = refused(SevSnp(TsmReports("sev_guest", tmp_path), SnpDevice(tmp_path / "none")), "gives this process no")
    assert error.actual == "Permission denied"


# The device


def device(tmp_path: Path, kernel: SevGuest, certificates: Path | None = None, vmpl: int | None = None) -> SevSnp:
    (tmp_path / "sev-guest").touch()
    return SevSnp(
        TsmReports("sev_guest", tmp_path / "none"),
        SnpDevice(tmp_path / "sev-guest", kernel),
        endorsements=certificates,
        vmpl=vmpl,
    )


def test_the_device_gives_report_and_certificates_in_one_exchange(tmp_path: Path) -> None:
    kernel = SevGuest(sign, table=TABLE)
    item = device(tmp_path, kernel).collect(BINDING)
    assert item.evidence == item.evidence[:1184]
    assert item.evidence[0x50:0x90] == BOUND
    assert item.endorsements == development_chip().endorsements[:2]
    ((number, request),) = kernel.asked
    assert number == SnpDevice.GET_EXT_REPORT == 0xC0205302  # _IOWR('S', 2, 32 bytes)
    assert request[:96] == BOUND + bytes(4) + bytes(28)
    assert struct.unpack("<QI4x", request[96:])[1] == 0x4000


def test_the_device_is_asked_without_certificates_where_the_hosts_do_not_fit(tmp_path: Path) -> None:
    kernel = SevGuest(sign, table_bytes=0x5000)
    item = device(tmp_path, kernel, endorsements(tmp_path), vmpl=1).collect(BINDING)
    assert item.endorsements == development_chip().endorsements
    assert [number for number, _ in kernel.asked] == [SnpDevice.GET_EXT_REPORT, SnpDevice.GET_REPORT]
    assert SnpDevice.GET_REPORT == 0xC0205300
    assert kernel.asked[1][1] == BOUND + b"\x01\0\0\0" + bytes(28)


@pytest.mark.parametrize(
    ("how", "words", "actual"),
    [
        ({"host_error": 2}, "the host refused", "error 0x2"),
        ({"status": 0x16}, "holds no SEV-SNP report", "status 0x16 and 1184 bytes"),
        ({"report_size": 0}, "holds no SEV-SNP report", "status 0x0 and 0 bytes"),
        ({"report_size": 4000}, "holds no SEV-SNP report", "status 0x0 and 4000 bytes"),
        ({"table": bytes(100)}, "no endorsements", "none"),
    ],
)
def test_the_device_says_what_is_wrong(tmp_path: Path, how: dict[str, int], words: str, actual: str) -> None:
    assert refused(device(tmp_path, SevGuest(sign, **how)), words).actual == actual  # type: ignore[arg-type]


def test_a_failing_ioctl_names_the_device(tmp_path: Path) -> None:
    def refuse(descriptor: int, request: int, argument: bytearray) -> None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    error = refused(device(tmp_path, refuse), "sev-guest gave no report")  # type: ignore[arg-type]
    assert str(tmp_path / "sev-guest") in str(error.expected)


def test_the_real_ioctl_on_a_file_that_is_no_device_fails_cleanly(tmp_path: Path) -> None:
    (tmp_path / "sev-guest").touch()
    refused(SevSnp(TsmReports("sev_guest", tmp_path / "none"), SnpDevice(tmp_path / "sev-guest")), "gave no report")


def test_a_machine_without_either_is_told_what_was_looked_for(tmp_path: Path) -> None:
    missing = tmp_path / "config" / "tsm" / "report"
    error = refused(SevSnp(TsmReports("sev_guest", missing), SnpDevice(tmp_path / "sev-guest")), "offers no SEV-SNP")
    assert str(missing) in str(error.expected)
    assert str(tmp_path / "sev-guest") in str(error.expected)
    assert "SEV-SNP guest" in error.next_step


def test_certificate_table_is_bounded() -> None:
    assert certificate_table(b"") == ()
    assert certificate_table(bytes(48)) == ()
    unknown = b"\x07" * 16 + (24).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"x"
    assert certificate_table(unknown) == ()
    for offset, length in ((24, 2), (1 << 31, 1), (0, 1 << 31)):
        entry = uuid.UUID(GUIDS[0]).bytes + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + b"x"
        with pytest.raises(MalformedError, match="points outside"):
            certificate_table(entry)


# The development platform


def platform(folder: Path) -> Path:
    for name, data in {**development_chip().to_files(), "measurement": MEASUREMENT.hex().encode() + b"\n"}.items():
        (folder / name).write_bytes(data)
    return folder


def test_development_platform_makes_evidence_of_the_real_shape(tmp_path: Path) -> None:
    source = DevelopmentPlatform.load(platform(tmp_path))
    item = source.collect(BINDING)
    verified = sev_snp.verify(
        item.evidence, item.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT + 1000
    )
    assert verified.report.report_data == BOUND
    assert verified.report.measurement == MEASUREMENT
    assert verified.endorsement.development
    assert source.development


@pytest.mark.parametrize("name", ["vek.pem", "ask.pem", "ark.pem", "vek-key.pem", "measurement"])
def test_development_platform_with_a_missing_or_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = platform(tmp_path)
    (folder / name).write_bytes(b"rubbish")
    with pytest.raises(KeyquorumError):
        DevelopmentPlatform.load(folder)
    (folder / name).unlink()
    with pytest.raises(UnavailableError) as caught:
        DevelopmentPlatform.load(folder)
    assert name in caught.value.expected
