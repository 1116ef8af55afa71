"""TPM 2.0 quotes by an attestation key that was enrolled, through ``tpm2-pytss`` (the extra ``tpm``) and its ESAPI.

A quote, the values of the quoted PCRs and the firmware's event log are read one after another, while the operating
system may go on measuring. So what was read is verified here as a custodian would, and read anew where it does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.attestation.tpm2 import Tpm2Evidence, qualifying_data, verify_parsed
from keyquorum_core.attestation.tpm2_events import MAX_EVENT_LOG_BYTES
from keyquorum_core.attestation.tpm2_structures import HASHES, HashAlgorithm, hash_by_name
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.source import Binding, read_bounded
from keyquorum_gpu_worker.tss import DEFAULT_TCTI, Tss

__all__ = ["Tpm2", "persistent_handle"]

SHA256 = next(each for each in HASHES if each.name == "sha256")

_ATTEMPTS = 3
_PCRS = 24
_PCRS_A_READ = 8  # a TPM gives as many digests at once as fit its TPML_DIGEST
_HANDLE = re.compile(r"0x81[0-9a-f]{6}", re.ASCII)


class Tpm2:
    """The evidence of this machine's TPM."""

    type: ClassVar[str] = "tpm2"
    development: ClassVar[bool] = False
    EVENT_LOG: ClassVar[Path] = Path("/sys/kernel/security/tpm0/binary_bios_measurements")

    def __init__(
        self,
        tss: Tss,
        ak_handle: int,
        pcrs: Sequence[int],
        *,
        bank: HashAlgorithm = SHA256,
        event_log: Path | None = None,
    ) -> None:
        self.tss = tss
        self.handle = ak_handle
        self._pcrs = tuple(sorted(pcrs))
        self._bank = bank.name
        self._size = bank.size
        self.event_log = event_log

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], Tpm2]:
        """``[tpm2]`` of worker.toml."""
        tcti = section.text("tcti") if "tcti" in section else DEFAULT_TCTI
        handle = persistent_handle(section)
        named = section.text("bank", max_length=16) if "bank" in section else SHA256.name
        bank = hash_by_name(named)
        if bank is None or not bank.strong:
            raise _bad("bank", "sha256, sha384 or sha512", named)
        pcrs = section.list("pcrs", min_items=1, max_items=_PCRS)
        chosen = [each for each in pcrs if isinstance(each, int) and not isinstance(each, bool) and 0 <= each < _PCRS]
        if len(set(chosen)) != len(pcrs):
            raise _bad("pcrs", f"distinct PCRs out of 0 … {_PCRS - 1}", pcrs)
        event_log = base / section.text("event_log", max_length=4096) if "event_log" in section else None
        section.done()
        return lambda: cls(Tss(tcti), handle, chosen, bank=bank, event_log=event_log)

    def collect(self, binding: Binding) -> EvidenceItem:
        asked = qualifying_data(binding.report_data)
        for attempt in range(1, _ATTEMPTS + 1):
            evidence = self._read(asked)
            try:
                verified = verify_parsed(evidence)
            except RefusedError as error:
                if error.reason is not Reason.MEASUREMENT or attempt == _ATTEMPTS:
                    raise
            else:
                if verified.quote.extra_data != asked:
                    raise MalformedError(
                        Reason.MALFORMED,
                        "the TPM quoted something else than it was asked to",
                        expected=asked.hex(),
                        actual=verified.quote.extra_data.hex(),
                    )
                break
        return EvidenceItem(self.type, evidence.to_bytes(), ())

    def _read(self, asked: bytes) -> Tpm2Evidence:
        with self.tss.session() as tpm:
            key = self.tss.persistent(tpm, self.handle, "the attestation key")
            area, _, _ = tpm.read_public(key)
            quote, signature = tpm.quote(key, self._selection(self._pcrs), asked)
            pcrs = self._values(tpm)
            log = b"" if self.event_log is None else self._read_log(self.event_log)
        return Tpm2Evidence(
            ak_public=self.tss.spki(area.marshal()),
            quote=bytes(quote),
            signature=signature.marshal(),
            bank=self._bank,
            pcrs=pcrs,
            event_log=log,
            ak_area=area.marshal(),
        )

    @staticmethod
    def _read_log(path: Path) -> bytes:
        return read_bounded(
            path,
            "the TPM's event log",
            MAX_EVENT_LOG_BYTES,
            f"Linux has it in {Tpm2.EVENT_LOG}, for root; without a log, leave `event_log` out of worker.toml.",
        )

    def _values(self, tpm: Any) -> dict[int, bytes]:
        values: dict[int, bytes] = {}
        for start in range(0, len(self._pcrs), _PCRS_A_READ):
            chosen = self._pcrs[start : start + _PCRS_A_READ]
            _, _, digests = tpm.pcr_read(self._selection(chosen))
            found = [bytes(each) for each in digests]
            if len(found) != len(chosen) or any(len(each) != self._size for each in found):
                raise MalformedError(
                    Reason.MALFORMED,
                    f"the TPM does not keep these PCRs in the bank {self._bank}",
                    expected=f"a value of {self._size} bytes for each of {', '.join(map(str, chosen))}",
                    actual=", ".join(f"{len(each)} bytes" for each in found) or "none",
                    next_step="Allocate the bank in the firmware's settings, or configure one that is.",
                )
            values |= zip(chosen, found, strict=True)
        return values

    def _selection(self, pcrs: Sequence[int]) -> str:
        return f"{self._bank}:{','.join(map(str, pcrs))}"


def persistent_handle(section: Fields) -> int:
    """``ak_handle`` of ``[tpm2]``, as 0x81 and six hex digits. Raises :class:`MalformedError`."""
    text = section.text("ak_handle", max_length=10)
    if not _HANDLE.fullmatch(text):
        raise _bad("ak_handle", "a persistent handle, such as 0x81010100", text)
    return int(text, 16)


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"worker.toml: bad {member} in [tpm2]", expected=expected, actual=actual)
