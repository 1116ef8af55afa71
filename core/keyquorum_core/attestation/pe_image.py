"""The Authenticode digest of a PE/COFF image: what firmware measures of a program before it runs it.

Microsoft, "Windows Authenticode Portable Executable Signature Format" (2008), as edk2 computes it: the headers without
the checksum and the directory entry of certificates, the sections in the order in which they lie in the file, then what
follows them without the certificates. A Linux kernel (bzImage) is such an image.
"""

from __future__ import annotations

import hashlib

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["authenticode_sha384"]

_MAX_IMAGE = 1 << 30
_PE_OFFSET = 0x3C
_COFF_BYTES, _SECTION_BYTES = 20, 40
_PE32, _PE32_PLUS = 0x10B, 0x20B
_CERTIFICATES = 4  # index of the directory entry
_CHECKSUM, _SIZE_OF_HEADERS = 64, 60  # in the optional header
_COUNT_OF_DIRECTORIES = {_PE32: 92, _PE32_PLUS: 108}


def authenticode_sha384(image: bytes) -> bytes:
    """48 bytes. Raises :class:`MalformedError` for what is no PE image."""
    if len(image) > _MAX_IMAGE:
        raise _malformed("size", f"at most {_MAX_IMAGE} bytes", f"{len(image)} bytes")
    pe = _number(image, _PE_OFFSET, 4)
    if image[:2] != b"MZ" or image[pe : pe + 4] != b"PE\0\0":
        raise _malformed("signature", "MZ, and PE where it points", image[:2].hex())
    coff = pe + 4
    sections, optional_bytes = _number(image, coff + 2, 2), _number(image, coff + 16, 2)
    optional = coff + _COFF_BYTES
    magic = _number(image, optional, 2)
    if magic not in _COUNT_OF_DIRECTORIES:
        raise _malformed("optional header", "PE32 or PE32+", f"{magic:#x}")
    headers = _number(image, optional + _SIZE_OF_HEADERS, 4)
    checksum = optional + _CHECKSUM
    directories = optional + _COUNT_OF_DIRECTORIES[magic]
    certificates, certificate_bytes = checksum + 4, 0
    holes = [(checksum, checksum + 4)]
    if _number(image, directories, 4) > _CERTIFICATES:
        certificates = directories + 4 + 8 * _CERTIFICATES
        certificate_bytes = _number(image, certificates + 4, 4)
        holes.append((certificates, certificates + 8))
    if not holes[-1][1] <= headers <= len(image):
        raise _malformed("headers", "all of them inside the image", f"{headers} bytes")
    digest = hashlib.sha384()
    at = 0
    for start, end in holes:
        digest.update(image[at:start])
        at = end
    digest.update(image[at:headers])
    hashed = headers
    table = optional + optional_bytes
    parts = []
    for number in range(sections):
        size, start = (_number(image, table + number * _SECTION_BYTES + field, 4) for field in (16, 20))
        if size:
            parts.append((start, size))
    for start, size in sorted(parts, key=lambda part: part[0]):
        if start + size > len(image):
            raise _malformed("section", "inside the image", f"{size} bytes at {start}")
        digest.update(image[start : start + size])
        hashed += size
    if len(image) > hashed:
        if len(image) - hashed < certificate_bytes:
            raise _malformed("certificates", f"at most {len(image) - hashed} bytes", f"{certificate_bytes} bytes")
        digest.update(image[hashed : len(image) - certificate_bytes])
    return digest.digest()


def _number(image: bytes, at: int, size: int) -> int:
    part = image[at : at + size]
    if len(part) != size:
        raise _malformed("header", f"{size} bytes at {at:#x}", f"{len(part)} bytes")
    return int.from_bytes(part, "little")


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"PE image: {what}", expected=expected, actual=actual)
