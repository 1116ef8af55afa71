"""What every source of evidence is: a binding goes in, an item of the evidence document comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from keyquorum_core.attestation.binding import gpu_nonce, report_data
from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["Binding", "EvidenceSource", "read_bounded", "read_folder", "unavailable"]

_MAX_FILES = 64
_MAX_FILE = 512 << 10


@dataclass(frozen=True, slots=True)
class Binding:
    """What a worker's evidence must be tied to: its two public keys, the challenge, and what its GPUs said."""

    hpke_key: bytes
    """Encoded HPKE public key."""
    signing_key: bytes
    """The public identity, 1984 bytes."""
    challenge: bytes
    """32 bytes."""
    gpu_digest: bytes = b""
    """Of the GPU evidence, 32 bytes; empty where there is none."""

    def with_gpus(self, digest: bytes) -> Self:
        return replace(self, gpu_digest=digest)

    @property
    def report_data(self) -> bytes:
        """64 bytes, for everything but GPUs."""
        return report_data(self.hpke_key, self.signing_key, self.challenge, self.gpu_digest)

    @property
    def gpu_nonce(self) -> bytes:
        """32 bytes, for GPUs."""
        return gpu_nonce(self.challenge, self.hpke_key)


class EvidenceSource(Protocol):
    """Makes evidence on demand."""

    @property
    def type(self) -> str:
        """The item's type in the evidence document."""
        ...

    @property
    def development(self) -> bool:
        """Whether no hardware stands behind it."""
        ...

    def collect(self, binding: Binding) -> EvidenceItem:
        """One item. Blocking. Raises :class:`UnavailableError` (``EVIDENCE_TYPE``) naming what was looked for, and
        :class:`MalformedError` for an answer that has not the form that the hardware's makers give it."""
        ...


def unavailable(message: str, *, expected: str, actual: object, next_step: str) -> UnavailableError:
    """The one error of a machine that cannot attest."""
    return UnavailableError(Reason.EVIDENCE_TYPE, message, expected=expected, actual=actual, next_step=next_step)


def read_bounded(path: Path, what: str, max_bytes: int, next_step: str) -> bytes:
    """A file of at most ``max_bytes``, which must be there. Raises :class:`UnavailableError`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise unavailable(
            f"{what} cannot be read", expected=f"a readable file {path}", actual=error.strerror, next_step=next_step
        ) from None
    if not data or len(data) > max_bytes:
        raise unavailable(
            f"{what} has an impossible size",
            expected=f"1 … {max_bytes} bytes in {path}",
            actual=f"{len(data)} bytes" if len(data) <= max_bytes else "more",
            next_step=next_step,
        )
    return data


def read_folder(folder: Path, what: str, suffixes: frozenset[str], next_step: str) -> tuple[bytes, ...]:
    """The files of a configured folder that have one of the suffixes, by name. Raises :class:`UnavailableError`."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise unavailable(
            f"{what} cannot be read", expected=f"a folder {folder}", actual=error.strerror, next_step=next_step
        ) from None
    if len(paths) > _MAX_FILES:
        raise unavailable(
            f"there are too many files for {what}",
            expected=f"at most {_MAX_FILES} in {folder}",
            actual=len(paths),
            next_step=next_step,
        )
    return tuple(read_bounded(path, what, _MAX_FILE, next_step) for path in paths)
