"""Evidence sources: configfs-tsm as the kernel behaves, what is said where it is missing, the development platform."""

from __future__ import annotations

import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keyquorum_core.attestation import sev_snp
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_gpu_worker.evidence import DevelopmentPlatform, TsmReports, certificate_table
from tests.support.vendor import CREATED_AT, MEASUREMENT, development_chip, development_vendor

BOUND = bytes(range(64))
GUIDS = ("63da758d-e664-4564-adc5-f4b93be8accd", "4ab7b379-bbac-4fe4-a02f-05aef327c782")


class Tsm:
    """configfs-tsm as a folder: the attributes appear in each folder made below it, and behave as the kernel's do.

    Attributes whose content depends on what was written are FIFOs, served by a thread.
    """

    def __init__(self, root: Path, *, table: bytes = b"", provider: str = "sev_guest", intruder: bool = False) -> None:
        self.root = root
        self._table = table
        self._provider = provider
        self._intruder = intruder

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        (path / "provider").write_text(self._provider + "\n")
        for name in ("generation", "inblob", "outblob"):
            os.mkfifo(path / name)
        if self._table:
            (path / "auxblob").write_bytes(self._table)
        if self._provider == "sev_guest":  # otherwise nobody reads on
            threading.Thread(target=self._serve, args=(path,), daemon=True).start()

    def _serve(self, path: Path) -> None:
        (path / "generation").write_text("4\n")
        data = (path / "inblob").read_bytes()
        (path / "outblob").write_bytes(development_chip().sign_report(data, MEASUREMENT))
        (path / "generation").write_text("6\n" if self._intruder else "5\n")


@pytest.fixture
def tsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TsmReports]]:
    """Makes a source over a folder that behaves as configfs does: mkdir fills, rmdir empties."""

    def make(endorsements: Path | None = None, **how: object) -> TsmReports:
        root = tmp_path / "tsm"
        root.mkdir()
        kernel = Tsm(root, **how)  # type: ignore[arg-type]

        def rmdir(path: Path) -> None:
            for each in path.iterdir():
                each.unlink()
            os.rmdir(path)

        monkeypatch.setattr(Path, "mkdir", lambda path: kernel.mkdir(path))
        monkeypatch.setattr(Path, "rmdir", rmdir)
        return TsmReports(root, endorsements)

    yield make
    monkeypatch.undo()
    assert list((tmp_path / "tsm").iterdir()) == []


def table(order: Callable[[uuid.UUID], bytes]) -> bytes:
    vek, ask, _ = development_chip().endorsements
    header = b""
    offset = 24 * 3
    for guid, data in zip(GUIDS, (vek, ask), strict=True):
        header += order(uuid.UUID(guid)) + offset.to_bytes(4, "little") + len(data).to_bytes(4, "little")
        offset += len(data)
    return header + bytes(24) + vek + ask


@pytest.mark.parametrize("order", [lambda guid: guid.bytes, lambda guid: guid.bytes_le])
def test_tsm_report_comes_with_the_hosts_certificates(
    tsm: Callable[..., TsmReports], order: Callable[[uuid.UUID], bytes]
) -> None:
    item = tsm(table=table(order)).collect(BOUND)
    assert item.type == "sev-snp"
    assert item.evidence[0x50:0x90] == BOUND
    assert item.endorsements == development_chip().endorsements[:2]


def test_tsm_report_takes_configured_endorsements_where_the_host_has_none(
    tsm: Callable[..., TsmReports], tmp_path: Path
) -> None:
    folder = tmp_path / "endorsements"
    folder.mkdir()
    for name, data in zip(("1-vek.der", "2-ask.der", "3-ark.der"), development_chip().endorsements, strict=True):
        (folder / name).write_bytes(data)
    item = tsm(folder).collect(BOUND)
    verified = sev_snp.verify(
        item.evidence, item.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT + 1000
    )
    assert verified.report.report_data == BOUND


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "no endorsements"),
        ({"provider": "tdx_guest", "table": b"x" * 30}, "other means than SEV-SNP"),
        ({"intruder": True, "table": b"x" * 30}, "somebody else wrote"),
    ],
)
def test_tsm_says_what_is_wrong(tsm: Callable[..., TsmReports], how: dict[str, object], words: str) -> None:
    with pytest.raises(UnavailableError, match=words) as caught:
        tsm(**how).collect(BOUND)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert caught.value.next_step


def test_machine_without_tsm_is_told_what_was_looked_for(tmp_path: Path) -> None:
    missing = tmp_path / "config" / "tsm" / "report"
    with pytest.raises(UnavailableError) as caught:
        TsmReports(missing).collect(BOUND)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert str(missing) in caught.value.expected
    assert "SEV-SNP guest" in caught.value.next_step
    with pytest.raises(MalformedError, match="report data"):
        TsmReports(missing).collect(b"short")


def test_tsm_folder_that_may_not_be_written_is_said_to_be(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may make folders anywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UnavailableError, match="gives this process no attestation report"):
        TsmReports(tmp_path).collect(BOUND)


def test_certificate_table_is_bounded() -> None:
    assert certificate_table(b"") == ()
    assert certificate_table(bytes(48)) == ()
    unknown = b"\x07" * 16 + (24).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"x"
    assert certificate_table(unknown) == ()
    for offset, length in ((24, 2), (1 << 31, 1), (0, 1 << 31)):
        entry = uuid.UUID(GUIDS[0]).bytes + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + b"x"
        with pytest.raises(MalformedError, match="points outside"):
            certificate_table(entry)


def platform(folder: Path) -> Path:
    for name, data in {**development_chip().to_files(), "measurement": MEASUREMENT.hex().encode() + b"\n"}.items():
        (folder / name).write_bytes(data)
    return folder


def test_development_platform_makes_evidence_of_the_real_shape(tmp_path: Path) -> None:
    source = DevelopmentPlatform.load(platform(tmp_path))
    item = source.collect(BOUND)
    verified = sev_snp.verify(
        item.evidence, item.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT + 1000
    )
    assert verified.report.report_data == BOUND
    assert verified.report.measurement == MEASUREMENT
    assert verified.endorsement.development
    assert source.kind == "development"


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
