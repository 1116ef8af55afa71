"""TPM collection against a library that answers as tpm2-pytss does, with keys in software; a real TPM is in
tests/integration/test_swtpm.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from keyquorum_core.attestation.tpm2 import Tpm2Evidence, qualifying_data, verify
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.tpm2 import Tpm2, persistent_handle
from keyquorum_gpu_worker.tss import Tss
from tests.support.bindings import BINDING
from tests.support.soft_tpm import EK_ATTRIBUTES, QuoteFields, SoftKey, secure_boot_log, soft_key

HANDLE = 0x81010100
PCRS = {index: bytes([0x10 + index]) * 32 for index in range(12)}


class TSS2Exception(RuntimeError):
    """What tpm2-pytss raises, by another name."""


@dataclass
class Structure:
    """One of tpm2-pytss's: its bytes, and itself as the TPM would marshal it."""

    data: bytes

    def __bytes__(self) -> bytes:
        return self.data

    def marshal(self) -> bytes:
        return self.data


@dataclass
class SoftTpm:
    """The library and the TPM at once. Each thing that a test makes wrong is a field."""

    key: SoftKey = field(default_factory=soft_key)
    signing_key: SoftKey | None = None
    """Instead of ``key``."""
    attributes: int | None = None
    pcrs: Sequence[Mapping[int, bytes]] = (PCRS,)
    """As they are at each quote; the last ones stay. What is read is always what they are one step later."""
    signs: Callable[[bytes], bytes] = lambda asked: asked
    bank: str = "sha256"
    fails: frozenset[str] = frozenset()
    asked: list[tuple[str, object]] = field(default_factory=list)
    _quotes: int = 0

    TSS2_Exception = TSS2Exception

    def ESAPI(self, tcti: str) -> SoftTpm:
        self._call("open", tcti)
        return self

    def __enter__(self) -> SoftTpm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.asked.append(("close", None))

    def _call(self, name: str, value: object) -> None:
        self.asked.append((name, value))
        if name in self.fails:
            raise TSS2Exception("tcti:IO failure")

    def tr_from_tpmpublic(self, handle: int) -> str:
        self._call("handle", handle)
        return "the key"

    def read_public(self, handle: object) -> tuple[Structure, None, None]:
        assert handle == "the key"
        area = self.key.area() if self.attributes is None else self.key.area(self.attributes)
        return Structure(area), None, None

    def quote(self, handle: object, selection: str, data: bytes) -> tuple[Structure, Structure]:
        self._call("quote", (selection, data))
        chosen = [int(each) for each in selection.partition(":")[2].split(",")]
        values = self.pcrs[min(self._quotes, len(self.pcrs) - 1)]
        self._quotes += 1
        fields = QuoteFields(
            extra_data=self.signs(data),
            selections=((self.bank, chosen),),
            pcrs={index: values[index] for index in chosen},
        ).to_bytes()
        return Structure(fields), Structure((self.signing_key or self.key).sign(fields))

    def pcr_read(self, selection: str) -> tuple[int, None, list[Structure]]:
        self._call("pcrs", selection)
        bank, _, indices = selection.partition(":")
        values = self.pcrs[min(self._quotes, len(self.pcrs) - 1)]
        found = [Structure(values[int(each)]) for each in indices.split(",") if int(each) in values]
        return 1, None, found[:8] if bank == self.bank else []


def source(tpm: SoftTpm, pcrs: Sequence[int] = tuple(PCRS), **options: Any) -> Tpm2:
    return Tpm2(Tss("swtpm:path=x", tpm), HANDLE, pcrs, **options)


def test_quote_values_and_key_make_evidence_that_verifies() -> None:
    tpm = SoftTpm()
    item = source(tpm, [7, 0, 4]).collect(BINDING)
    assert (item.type, item.endorsements) == ("tpm2", ())
    verified = verify(item.evidence)
    assert verified.quote.extra_data == qualifying_data(BINDING.report_data)
    assert verified.pcrs == {index: PCRS[index] for index in (0, 4, 7)}
    assert verified.ak.fingerprint == soft_key().fingerprint
    assert Tpm2Evidence.parse(item.evidence).ak_area == soft_key().area()
    assert tpm.asked == [
        ("open", "swtpm:path=x"), ("handle", HANDLE),
        ("quote", ("sha256:0,4,7", qualifying_data(BINDING.report_data))), ("pcrs", "sha256:0,4,7"), ("close", None),
    ]  # fmt: skip


def test_more_pcrs_than_a_tpm_gives_at_once_are_read_in_pieces() -> None:
    tpm = SoftTpm()
    assert len(verify(source(tpm).collect(BINDING).evidence).pcrs) == 12
    assert [value for name, value in tpm.asked if name == "pcrs"] == ["sha256:0,1,2,3,4,5,6,7", "sha256:8,9,10,11"]


def test_an_event_log_goes_along(tmp_path: Path) -> None:
    log, pcrs = secure_boot_log()
    (tmp_path / "log").write_bytes(log)
    item = source(SoftTpm(pcrs=(pcrs,)), tuple(pcrs), event_log=tmp_path / "log").collect(BINDING)
    assert verify(item.evidence).secure_boot


def test_a_log_that_does_not_explain_the_pcrs_or_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(secure_boot_log()[0])
    with pytest.raises(RefusedError) as caught:
        source(SoftTpm(), [0, 4, 7], event_log=tmp_path / "log").collect(BINDING)
    assert caught.value.reason is Reason.MEASUREMENT
    with pytest.raises(UnavailableError, match="event log cannot be read"):
        source(SoftTpm(), event_log=tmp_path / "none").collect(BINDING)


def moved(step: int) -> dict[int, bytes]:
    return PCRS | {10: bytes([0xA0 + step]) * 32}


def test_a_pcr_that_moves_between_quote_and_reading_is_read_anew() -> None:
    tpm = SoftTpm(pcrs=(PCRS, moved(1), moved(1)))
    verified = verify(source(tpm).collect(BINDING).evidence)
    assert verified.pcrs[10] == moved(1)[10]
    assert len([name for name, _ in tpm.asked if name == "quote"]) == 2


def test_a_pcr_that_never_rests_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        source(SoftTpm(pcrs=[moved(step) for step in range(9)])).collect(BINDING)
    assert caught.value.reason is Reason.MEASUREMENT


@pytest.mark.parametrize(
    ("tpm", "reason"),
    [
        (SoftTpm(signs=lambda asked: b"\x01" * 32), Reason.MALFORMED),
        (SoftTpm(signs=lambda asked: b""), Reason.BINDING),
        (SoftTpm(attributes=EK_ATTRIBUTES), Reason.PROVENANCE),
        (SoftTpm(signing_key=soft_key("rsa", 1)), Reason.SIGNATURE),
        (SoftTpm(bank="sha384"), Reason.MALFORMED),
        (SoftTpm(pcrs=({index: PCRS[index] for index in range(12)} | {3: b""},)), Reason.MALFORMED),
    ],
)
def test_hostile_answers_are_refused(tpm: SoftTpm, reason: Reason) -> None:
    with pytest.raises(KeyquorumError) as caught:
        source(tpm).collect(BINDING)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("fails", "words"), [("open", "did not do"), ("handle", "does not hold"), ("quote", "did not do"), ("pcrs", "did")]
)
def test_a_tpm_that_fails_is_named(fails: str, words: str) -> None:
    with pytest.raises(UnavailableError, match=words) as caught:
        source(SoftTpm(fails=frozenset({fails}))).collect(BINDING)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert "0x81010100" in str(caught.value.expected) or "swtpm:path=x" in str(caught.value.expected)
    assert caught.value.next_step


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tpm2_pytss", None)
    with pytest.raises(UnavailableError, match="cannot be asked") as caught:
        Tpm2(Tss(), HANDLE, [0]).collect(BINDING)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    assert "keyquorum-gpu-worker[tpm]" in caught.value.next_step


def test_a_library_without_its_c_libraries_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libtss2-esys.so.0: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UnavailableError) as caught:
        Tpm2(Tss(), HANDLE, [0]).collect(BINDING)
    assert "libtss2-esys" in str(caught.value.actual)


@pytest.mark.parametrize(
    "section",
    [
        {"pcrs": [0]},
        {"ak_handle": "0x80000000", "pcrs": [0]},
        {"ak_handle": "2164326656", "pcrs": [0]},
        {"ak_handle": "0x81010100"},
        {"ak_handle": "0x81010100", "pcrs": []},
        {"ak_handle": "0x81010100", "pcrs": [0, 0]},
        {"ak_handle": "0x81010100", "pcrs": [24]},
        {"ak_handle": "0x81010100", "pcrs": [True]},
        {"ak_handle": "0x81010100", "pcrs": [0], "bank": "sha1"},
        {"ak_handle": "0x81010100", "pcrs": [0], "extra": 1},
    ],
)
def test_a_section_that_says_less_or_other_does_not_load(section: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(MalformedError):
        Tpm2.from_section(Fields(section, "worker.toml"), tmp_path)


def test_a_section_names_handle_bank_and_log(tmp_path: Path) -> None:
    section = {"ak_handle": "0x81010100", "pcrs": [7, 0], "bank": "sha384", "event_log": "log", "tcti": "swtpm:"}
    made = Tpm2.from_section(Fields(section, "worker.toml"), tmp_path)()
    assert (made.handle, made.tss.tcti) == (HANDLE, "swtpm:")
    assert persistent_handle(Fields({"ak_handle": "0x81ffffff"}, "worker.toml")) == 0x81FFFFFF
    assert made.event_log == tmp_path / "log"
