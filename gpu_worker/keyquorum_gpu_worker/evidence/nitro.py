"""Nitro attestation documents, from the Nitro Security Module behind ``/dev/nsm`` (include/uapi/linux/nsm.h).

One ioctl takes a CBOR request and gives a CBOR response; what the response's ``document`` holds is the COSE_Sign1
structure. The module takes at most 1024 bytes as ``public_key``, so that holds the commitment to both public keys and
not the keys (docs/spec/evidence-nitro.md).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from keyquorum_core.attestation import cbor
from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.device import Device, Ioctl, iowr, kernel_ioctl
from keyquorum_gpu_worker.evidence.source import Binding, unavailable

__all__ = ["Nitro", "attestation_request"]

_DEVICE = Path("/dev/nsm")
_MAX_RESPONSE = 0x3000
_MESSAGE = struct.Struct("<QQQQ")  # struct nsm_raw: address and length of request and response
_WHAT = "the Nitro Security Module's answer"


class Nitro:
    """The evidence of this enclave."""

    type: ClassVar[str] = "nitro"
    development: ClassVar[bool] = False
    RAW: ClassVar[int] = iowr(0x0A, 0, _MESSAGE.size)

    def __init__(self, path: Path = _DEVICE, ioctl: Ioctl = kernel_ioctl) -> None:
        self._device = Device(path, "Run the worker inside a Nitro enclave, as root, with the nsm driver.", ioctl)

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], Nitro]:
        """``[nitro]`` of worker.toml."""
        device = base / section.text("device") if "device" in section else _DEVICE
        section.done()
        return lambda: cls(device)

    def collect(self, binding: Binding) -> EvidenceItem:
        answer = self._exchange(attestation_request(binding.report_data, binding.challenge))
        found = cbor.loads(answer, _WHAT, max_bytes=_MAX_RESPONSE, max_depth=3, indefinite_maps=True)
        if isinstance(found, dict) and isinstance(found.get("Error"), str):
            raise unavailable(
                "the Nitro Security Module refused",
                expected="an attestation document",
                actual=f"error {str(found['Error'])[:60]}",
                next_step="See the NSM's error codes; a worker asks for 64 bytes of public_key and 32 of nonce.",
            )
        inner = found.get("Attestation") if isinstance(found, dict) else None
        document = inner.get("document") if isinstance(inner, dict) else None
        if not isinstance(document, bytes) or not document:
            raise MalformedError(
                Reason.MALFORMED, f"{_WHAT} holds no document", expected="{Attestation: {document: bytes}}"
            )
        return EvidenceItem(self.type, document, ())

    def _exchange(self, request: bytes) -> bytes:
        asked = ctypes.create_string_buffer(request, len(request))
        answer = ctypes.create_string_buffer(_MAX_RESPONSE)
        message = bytearray(
            _MESSAGE.pack(ctypes.addressof(asked), len(request), ctypes.addressof(answer), _MAX_RESPONSE)
        )
        with self._device.opened() as exchange:
            try:
                exchange(self.RAW, message)
            except OSError as error:
                raise self._device.failed("gave no attestation document", error) from None
        length = _MESSAGE.unpack(message)[3]
        if not 0 < length <= _MAX_RESPONSE:
            raise MalformedError(
                Reason.MALFORMED,
                f"{_WHAT} has an impossible size",
                expected=f"1 … {_MAX_RESPONSE} bytes",
                actual=length,
            )
        return answer.raw[:length]


def attestation_request(public_key: bytes, nonce: bytes) -> bytes:
    """``{"Attestation": {"user_data": null, "nonce": …, "public_key": …}}`` in CBOR, members in the order in which the
    NSM's own library writes them."""
    members = _text("user_data") + b"\xf6" + _text("nonce") + _bytes(nonce) + _text("public_key") + _bytes(public_key)
    return b"\xa1" + _text("Attestation") + b"\xa3" + members


def _text(value: str) -> bytes:
    """At most 23 ASCII characters."""
    return bytes([0x60 + len(value)]) + value.encode("ascii")


def _bytes(value: bytes) -> bytes:
    """24 … 255 of them."""
    return bytes([0x58, len(value)]) + value
