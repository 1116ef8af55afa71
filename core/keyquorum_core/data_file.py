"""The front of a data file: under which key of its owner the rest is encrypted (docs/spec/data.md).

A data file is ``preamble (4096) ‖ artifact``. The preamble holds the header and the file's own key, wrapped under the
owner's data key; the artifact is encrypted under the file's own key, and bound to what of the header never changes. So
a file goes from one epoch to the next by a new preamble alone, and no byte of the artifact is touched. The preamble is
of a fixed size, and a file system's block, so that a copy can share the artifact's blocks with the original.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from keyquorum_core import jcs
from keyquorum_core.artifact import KEY_BYTES
from keyquorum_core.derivation import KEY_CHECK_SIZE
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import CLUSTER, KEY_ID, PRINCIPAL, SHA256_HEX, check, within
from keyquorum_core.streams import Source, fill
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import transcript

__all__ = ["MAGIC", "PREAMBLE_BYTES", "PURPOSE", "DataHeader", "Preamble", "read_preamble", "wrap_key"]

MAGIC: Final = b"keyquorum-data-v1\n"
PREAMBLE_BYTES: Final = 4096
PURPOSE: Final = "data"

_WRAP: Final = "AES-256-GCM-SIV"
_CIPHER: Final = "AES256-GCM-HKDF-1MB"
_NONCE_BYTES: Final = 12
_WRAPPED_BYTES: Final = _NONCE_BYTES + KEY_BYTES + 16
_LENGTH_AT: Final = len(MAGIC)
_HEADER_AT: Final = _LENGTH_AT + 2
_MAX_HEADER: Final = 2048
_CLASSIFICATION: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_EXPORT_CONTROL: Final = re.compile(r"[A-Za-z0-9. -]{0,64}", re.ASCII)
_KEY_CHECK: Final = re.compile(rf"[0-9a-f]{{{2 * KEY_CHECK_SIZE}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class DataHeader:
    """Whose file it is, and which key opens it: what a key request of purpose ``data`` is made from.

    Raises :class:`MalformedError` when made with anything that a header can't say.
    """

    cluster: str
    owner: str
    key_id: str
    epoch: int
    name: str
    """Which of the owner's data keys."""
    classification: str
    export_control: str
    file_id: str
    """32 random bytes, hex: no two files are bound alike."""
    key_check: str
    """Of the data key in this epoch, hex."""

    def __post_init__(self) -> None:
        check(CLUSTER, self.cluster, "cluster")
        check(PRINCIPAL, self.owner, "owner name")
        check(KEY_ID, self.key_id, "key id")
        within(self.epoch, "epoch", 1)
        check(KEY_ID, self.name, "name of the data key")
        check(_CLASSIFICATION, self.classification, "classification")
        check(_EXPORT_CONTROL, self.export_control, "export control class")
        check(SHA256_HEX, self.file_id, "file id")
        check(_KEY_CHECK, self.key_check, "key check")

    def _lasting(self) -> dict[str, Any]:
        return {
            "cipher": _CIPHER,
            "classification": self.classification,
            "cluster": self.cluster,
            "export_control": self.export_control,
            "file_id": self.file_id,
            "key_id": self.key_id,
            "name": self.name,
            "owner": self.owner,
            "purpose": PURPOSE,
        }

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON."""
        changing = {"epoch": self.epoch, "key_check": self.key_check, "wrap": _WRAP}
        return jcs.dumps(self._lasting() | changing)

    @staticmethod
    def parse(data: bytes) -> DataHeader:
        """Strict inverse of :meth:`to_bytes`; raises :class:`MalformedError`."""
        fields = Fields(loads(data, "data header", max_bytes=_MAX_HEADER, max_depth=1), "data header")
        for member, value in (("cipher", _CIPHER), ("purpose", PURPOSE), ("wrap", _WRAP)):
            fields.literal(member, value)
        header = DataHeader(
            cluster=fields.text("cluster"),
            owner=fields.text("owner"),
            key_id=fields.text("key_id"),
            epoch=fields.integer("epoch"),
            name=fields.text("name"),
            classification=fields.text("classification"),
            export_control=fields.text("export_control", allow_empty=True),
            file_id=fields.text("file_id"),
            key_check=fields.text("key_check"),
        )
        fields.done()
        if header.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, "the data header is not canonical", expected="RFC 8785 JSON")
        return header

    def at(self, epoch: int, key_check: bytes) -> DataHeader:
        """The same file's header under another epoch of its key."""
        return replace(self, epoch=epoch, key_check=key_check.hex())

    def binding(self) -> bytes:
        """The associated data of the artifact: everything but the epoch and what goes with it."""
        return transcript("keyquorum/v1/data", jcs.dumps(self._lasting()))

    def wrapping(self) -> bytes:
        """The associated data of the wrapped key: the whole header."""
        return transcript("keyquorum/v1/data-wrap", self.to_bytes())


@dataclass(frozen=True, slots=True)
class Preamble:
    """A header and the wrapped key: nonce (12) ‖ ciphertext (32) ‖ tag (16). Nothing of it is verified before
    :meth:`unwrap`."""

    header: DataHeader
    wrapped: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """magic ‖ u16be(length) ‖ header ‖ wrapped key ‖ zeros, 4096 bytes."""
        header = self.header.to_bytes()
        front = MAGIC + len(header).to_bytes(2, "big") + header + self.wrapped
        return front.ljust(PREAMBLE_BYTES, b"\0")

    @staticmethod
    def parse(data: bytes) -> Preamble:
        """Strict inverse of :meth:`to_bytes`; raises :class:`MalformedError`."""
        if not data.startswith(MAGIC):
            raise MalformedError(
                Reason.MALFORMED,
                "this is no data file",
                expected=repr(MAGIC.decode()),
                actual=ascii(data[: len(MAGIC)]),
                next_step="Only what keyquorum encrypted is decrypted or rewrapped.",
            )
        if len(data) != PREAMBLE_BYTES:
            raise MalformedError(
                Reason.MALFORMED,
                "the data file ends in its preamble",
                expected=f"{PREAMBLE_BYTES} bytes",
                actual=f"{len(data)} bytes",
            )
        size = int.from_bytes(data[_LENGTH_AT:_HEADER_AT], "big")
        if size > _MAX_HEADER:
            raise MalformedError(
                Reason.TOO_LARGE, "the data header is too large", expected=f"at most {_MAX_HEADER} bytes", actual=size
            )
        header = DataHeader.parse(data[_HEADER_AT : _HEADER_AT + size])
        preamble = Preamble(header, data[_HEADER_AT + size : _HEADER_AT + size + _WRAPPED_BYTES])
        if preamble.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, "the preamble does not end in zeros", expected="zeros")
        return preamble

    def unwrap(self, data_key: bytes | bytearray) -> bytes:
        """The file's own key, 32 bytes. Raises :class:`RefusedError` (``UNSEAL``) for another key or header."""
        nonce, sealed = self.wrapped[:_NONCE_BYTES], self.wrapped[_NONCE_BYTES:]
        try:
            return AESGCMSIV(data_key).decrypt(nonce, sealed, self.header.wrapping())
        except (InvalidTag, ValueError):
            raise RefusedError(
                Reason.UNSEAL,
                "the file's key does not unwrap",
                expected="the header as it was written, and the data key it names",
                actual="a changed header, or another key",
                next_step="Restore the file from a backup; its header was changed.",
            ) from None


def wrap_key(
    header: DataHeader,
    file_key: bytes,
    data_key: bytes | bytearray,
    *,
    rng: Callable[[int], bytes] = secrets.token_bytes,
) -> Preamble:
    """``file_key`` (32 bytes) wrapped under ``data_key`` (32 bytes), which must be the one that ``header`` names."""
    if len(file_key) != KEY_BYTES or len(data_key) != KEY_BYTES:
        raise MalformedError(Reason.MALFORMED, "a key has another length", expected=f"{KEY_BYTES} bytes")
    nonce = rng(_NONCE_BYTES)
    return Preamble(header, nonce + AESGCMSIV(data_key).encrypt(nonce, file_key, header.wrapping()))


def read_preamble(source: Source) -> Preamble:
    """The preamble, UNVERIFIED; leaves ``source`` at the artifact. Raises :class:`MalformedError`."""
    front = bytearray(PREAMBLE_BYTES)
    size = fill(source, memoryview(front))
    return Preamble.parse(bytes(front[:size]))
