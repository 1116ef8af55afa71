"""Artifacts: streaming AEAD in the layout of Tink's AES256-GCM-HKDF with 1 MiB segments (docs/spec/artifact.md).

``header ‖ segment 0 ‖ segment 1 ‖ …``, where the header is ``40 ‖ salt (32) ‖ nonce prefix (7)``, the segments' key is
HKDF-SHA-256(ikm = key, salt, info = associated data, 32), and segment *i* is AES-256-GCM without further associated
data under the nonce ``prefix ‖ u32be(i) ‖ (1 if last else 0)``. A ciphertext segment is 1 MiB, tag included; the first
is shorter by the header, the last is as long as it needs to be. Position and end are in the nonce, so that segments
cannot be cut off, swapped, repeated or added (Hoang–Reyhanitabar–Rogaway–Vizár, CRYPTO 2015).

Memory is two buffers of 1 MiB at any size, and nothing is copied between source, cipher and sink: the byte that tells
whether a segment is the last one is read with it, and moves to the front of the buffer for the next.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.streams import Sink, Source, fill, write_all

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
from keyquorum_core.transcript import transcript

__all__ = [
    "HEADER_BYTES",
    "KEY_BYTES",
    "SEGMENT_BYTES",
    "DecryptingReader",
    "EncryptingWriter",
    "binding",
    "ciphertext_size",
    "decrypt_stream",
    "encrypt_stream",
    "plaintext_size",
]

KEY_BYTES = 32
SEGMENT_BYTES = 1 << 20  # of ciphertext, tag included
_TAG_BYTES = 16
_SALT_BYTES = 32
_PREFIX_BYTES = 7
HEADER_BYTES = 1 + _SALT_BYTES + _PREFIX_BYTES
_MAX_SEGMENTS = 2**32 - 1  # Tink stops before the counter 2³²-1

_FIRST = SEGMENT_BYTES - HEADER_BYTES - _TAG_BYTES  # plaintext bytes in a full first segment
_FULL = SEGMENT_BYTES - _TAG_BYTES  # and in every other full one

Progress = Callable[[int], None]
"""Called after each segment with the plaintext bytes so far."""


def binding(job_id: str, kind: str, maker: bytes = b"") -> bytes:
    """The associated data of a job's artifact: transcript("keyquorum/v1/artifact", job id, kind, maker).

    ``kind`` is ``bundle``, ``result``, ``log``, or ``telemetry/N`` for a worker's Nth batch of telemetry. ``maker`` is
    empty for the owner's bundle; for a worker's artifacts it is the worker's encoded public identity, so that they
    decrypt only under a statement by the worker that held the job's key, whatever becomes of the signatures that name
    it.
    """
    return transcript("keyquorum/v1/artifact", job_id.encode(), kind.encode(), maker)


def ciphertext_size(plaintext_bytes: int) -> int:
    """Bytes of the artifact that holds ``plaintext_bytes`` bytes. Raises :class:`MalformedError` outside its range."""
    further = -(-max(0, plaintext_bytes - _FIRST) // _FULL)
    if plaintext_bytes < 0 or 1 + further > _MAX_SEGMENTS:
        raise MalformedError(Reason.ARTIFACT, "no artifact holds that many bytes", actual=plaintext_bytes)
    return HEADER_BYTES + plaintext_bytes + _TAG_BYTES * (1 + further)


def plaintext_size(ciphertext_bytes: int) -> int:
    """The inverse of :func:`ciphertext_size`. Raises :class:`MalformedError` where no artifact has that size."""
    segments = -(-ciphertext_bytes // SEGMENT_BYTES)
    size = ciphertext_bytes - HEADER_BYTES - _TAG_BYTES * segments
    if size < 0 or segments > _MAX_SEGMENTS or ciphertext_size(size) != ciphertext_bytes:
        raise MalformedError(Reason.ARTIFACT, "no artifact has that size", actual=f"{ciphertext_bytes} bytes")
    return size


def encrypt_stream(
    key: bytes,
    source: Source,
    sink: Sink,
    associated_data: bytes,
    *,
    progress: Progress | None = None,
    rng: Callable[[int], bytes] = secrets.token_bytes,
) -> int:
    """Encrypt ``source`` to its end into ``sink`` under a 32-byte key; returns the plaintext bytes.

    The associated data is bound to every byte but not stored. Raises :class:`MalformedError` for a key of another
    length; errors of the two streams pass through, and what the sink then holds does not decrypt to its end.
    """
    with EncryptingWriter(key, sink, associated_data, progress=progress, rng=rng) as writer:
        writer.copy_from(source)
    return writer.plaintext_bytes


def decrypt_stream(
    key: bytes,
    source: Source,
    sink: Sink,
    associated_data: bytes,
    *,
    progress: Progress | None = None,
) -> int:
    """Decrypt the artifact that ``source`` is, to its end, into ``sink``; returns the plaintext bytes.

    The sink gets a segment only after it verified. That the artifact is complete is known only on return: after an
    error, discard what the sink holds. Raises :class:`MalformedError` for what is not an artifact or a key, and
    :class:`RefusedError` (``ARTIFACT``) at the first segment that is not the right one.
    """
    with DecryptingReader(key, source, associated_data, progress=progress) as reader:
        while len(segment := reader.read_segment()):
            write_all(sink, segment)
    return reader.plaintext_bytes


class _Segments:
    """The cipher of one artifact: its segments' key, and a nonce for each segment once, in order."""

    def __init__(self, key: bytes, header: memoryview, associated_data: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise MalformedError(
                Reason.ARTIFACT, "an artifact key has another length", expected=KEY_BYTES, actual=len(key)
            )
        salt = bytes(header[1 : 1 + _SALT_BYTES])
        self.cipher = AESGCM(HKDF(SHA256(), KEY_BYTES, salt=salt, info=associated_data).derive(key))
        self._prefix = bytes(header[1 + _SALT_BYTES : HEADER_BYTES])
        self.count = 0

    def next_nonce(self, *, last: bool) -> bytes:
        if self.count >= _MAX_SEGMENTS:
            raise RefusedError(
                Reason.ARTIFACT, "too many segments", expected=f"at most {_MAX_SEGMENTS}", actual="one more"
            )
        nonce = self._prefix + self.count.to_bytes(4, "big") + (b"\x01" if last else b"\x00")
        self.count += 1
        return nonce


class EncryptingWriter:
    """A sink that encrypts what is written to it into another sink.

    Only :meth:`close` makes the artifact complete. Leaving a ``with`` block by an exception aborts instead, and so
    does dropping the writer: a half-written artifact must never pass for a whole one. After a failed write the writer
    is spent, since the same nonce must not be used twice. The inner sink is never closed.
    """

    def __init__(
        self,
        key: bytes,
        sink: Sink,
        associated_data: bytes,
        *,
        progress: Progress | None = None,
        rng: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        header = memoryview(bytes([HEADER_BYTES]) + rng(_SALT_BYTES) + rng(_PREFIX_BYTES))
        self._segments = _Segments(key, header, associated_data)
        self._sink = sink
        self._progress = progress
        self._plain = memoryview(bytearray(_FULL + 1))
        self._cipher = memoryview(bytearray(SEGMENT_BYTES))
        self._held = 0
        self._usable = True
        self._closed = False
        self.plaintext_bytes = 0
        """Encrypted so far."""
        write_all(sink, header)

    def write(self, data: ReadableBuffer, /) -> int:
        """Take all of ``data``. Raises :class:`StateError` after :meth:`close`, :meth:`abort` or a failure."""
        self._check_usable()
        view = memoryview(data).cast("B")
        size = len(view)
        # A segment is sealed only once a byte after it is there: the last one has another nonce.
        while self._held + len(view) > (room := self._room()):
            if self._held == 0:
                self._seal(view[:room], last=False)
                view = view[room:]
            else:
                missing = room - self._held
                self._plain[self._held : room] = view[:missing]
                view = view[missing:]
                self._seal(self._plain[:room], last=False)
                self._held = 0
        self._plain[self._held : self._held + len(view)] = view
        self._held += len(view)
        return size

    def copy_from(self, source: Source) -> int:
        """Take all of ``source``, read straight into the cipher's buffer; returns the bytes taken."""
        self._check_usable()
        before = self.plaintext_bytes + self._held
        while True:
            room = self._room()
            self._held += fill(source, self._plain[self._held : room + 1])
            if self._held <= room:
                return self.plaintext_bytes + self._held - before
            self._seal(self._plain[:room], last=False)
            self._plain[0] = self._plain[room]
            self._held = 1

    def close(self) -> None:
        """Write the last segment; the artifact is complete. Does nothing the second time."""
        if self._closed:
            return
        self._check_usable()
        self._seal(self._plain[: self._held], last=True)
        self.abort()

    def abort(self) -> None:
        """Write no more and wipe the plaintext buffer; without :meth:`close` before it, nobody can read the end."""
        self._usable = False
        self._closed = True
        self._plain[:] = bytes(len(self._plain))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _room(self) -> int:
        return _FULL if self._segments.count else _FIRST

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        self._usable = False  # until the segment is out: a failure here must not lead to a second try
        sealed = self._cipher[: len(plain) + _TAG_BYTES]
        self._segments.cipher.encrypt_into(self._segments.next_nonce(last=last), plain, None, sealed)
        write_all(self._sink, sealed)
        self.plaintext_bytes += len(plain)
        self._usable = True
        if self._progress is not None:
            self._progress(self.plaintext_bytes)

    def _check_usable(self) -> None:
        if not self._usable:
            raise StateError(
                Reason.ARTIFACT, "this artifact's writer is closed, or failed before", next_step="Encrypt it anew."
            )


class DecryptingReader(io.RawIOBase):
    """A readable stream of an artifact's plaintext; it never hands out a byte of a segment that has not verified.

    The header is read on construction. :class:`RefusedError` comes at the first segment that is not the right one,
    so a truncated artifact reads well until its end: rely on what was read only when :attr:`finished` is true, which
    it is once the end was read. The inner source is never closed.
    """

    def __init__(self, key: bytes, source: Source, associated_data: bytes, *, progress: Progress | None = None) -> None:
        header = memoryview(bytearray(HEADER_BYTES))
        got = fill(source, header)
        if got < HEADER_BYTES:
            raise RefusedError(
                Reason.ARTIFACT,
                "the artifact ends in its header",
                expected=f"{HEADER_BYTES} bytes",
                actual=f"{got} bytes",
            )
        if header[0] != HEADER_BYTES:
            raise MalformedError(
                Reason.ARTIFACT, "this is no artifact", expected=f"first byte {HEADER_BYTES}", actual=header[0]
            )
        self._segments = _Segments(key, header, associated_data)
        self._source = source
        self._progress = progress
        self._cipher = memoryview(bytearray(SEGMENT_BYTES + 1))
        self._plain = memoryview(bytearray(_FULL))
        self._held = 0
        self._ready = self._plain[:0]  # verified, not yet handed out
        self._usable = True
        self.finished = False
        """Whether the last segment was met and verified."""
        self.plaintext_bytes = 0
        """Verified so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Up to a segment of plaintext; 0 at the verified end. Raises :class:`RefusedError`."""
        self._check_usable()
        out = memoryview(buffer).cast("B")
        if not len(self._ready) and len(out):
            self._ready = self._verify_next()
        count = min(len(out), len(self._ready))
        out[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def read_segment(self) -> memoryview:
        """The next plaintext, uncopied: valid until the next call, empty at the verified end."""
        self._check_usable()
        segment = self._ready if len(self._ready) else self._verify_next()
        self._ready = self._plain[:0]
        return segment

    def close(self) -> None:
        """Wipe the plaintext buffer."""
        if not self.closed and hasattr(self, "_ready"):  # io closes objects whose construction failed, too
            self._usable = False
            self._plain[:] = bytes(len(self._plain))
        super().close()

    def _verify_next(self) -> memoryview:
        if self.finished:
            return self._plain[:0]
        self._usable = False  # until the segment verified: after any failure here, nothing more can be read
        index = self._segments.count
        limit = SEGMENT_BYTES if index else SEGMENT_BYTES - HEADER_BYTES
        got = self._held + fill(self._source, self._cipher[self._held : limit + 1])
        last = got <= limit
        sealed = self._cipher[: min(got, limit)]
        # A last segment is empty only in an empty artifact, so that a plaintext has one segmentation only.
        if len(sealed) < _TAG_BYTES + (index > 0):
            self._refuse(index, f"{len(sealed)} bytes and the end")
        plain = self._plain[: len(sealed) - _TAG_BYTES]
        try:
            self._segments.cipher.decrypt_into(self._segments.next_nonce(last=last), sealed, None, plain)
        except InvalidTag:
            plain[:] = bytes(len(plain))
            self._refuse(index, f"{len(sealed)} bytes{' and the end' if last else ''} that do not verify")
        if not last:
            self._cipher[0] = self._cipher[limit]
            self._held = 1
        self.finished = last
        self.plaintext_bytes += len(plain)
        self._usable = True
        if self._progress is not None:
            self._progress(self.plaintext_bytes)
        return plain

    def _refuse(self, index: int, actual: str) -> NoReturn:
        raise RefusedError(
            Reason.ARTIFACT,
            f"segment {index} of the artifact does not verify",
            expected="a segment of this key, associated data and position",
            actual=actual,
            next_step="It was changed, cut off or extended, or is another job's or kind's: fetch it again.",
        )

    def _check_usable(self) -> None:
        if not self._usable:
            raise StateError(Reason.ARTIFACT, "this artifact's reader is closed, or failed before")
