"""C2SP signed-note: a text, an empty line, and lines that sign the text.

A signature line is ``— <key name> base64(key id ‖ signature)``. Parsing says nothing about who signed: a line counts
once :mod:`keyquorum_core.ledger.cosignatures` has verified it under a key the reader knows. Lines of other keys are
carried along and mean nothing, up to sixteen lines in all, none of them twice.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.verifier_keys import VerifierKey, check_key_name, decode_base64

__all__ = [
    "MAX_LINE",
    "MAX_NOTE",
    "MAX_SIGNATURES",
    "Note",
    "NoteSignature",
    "parse_note",
    "parse_signature_lines",
]

MAX_SIGNATURES: Final = 16
MAX_LINE: Final = 8192
"""Bytes in the longest line: a signature of ML-DSA-87, the largest in use, takes 6.2 kB."""
MAX_NOTE: Final = 1 << 17

_DASH: Final = "— "
_ALLOWED: Final = bytes({0x0A, *range(0x20, 0x100)})


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """One signature line: ``key_id`` is 4 bytes, ``signature`` what follows it, timestamp included where there is one.

    Raises :class:`MalformedError` when made with anything else.
    """

    name: str
    key_id: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_key_name(self.name, "key name in a signature line")
        if len(self.key_id) != 4 or not self.signature:
            raise MalformedError(
                Reason.MALFORMED,
                "a signature line without a signature",
                expected="4 bytes of key id, then the signature",
                actual=f"{len(self.key_id)} and {len(self.signature)} bytes",
            )

    def line(self) -> str:
        """With its newline."""
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"

    @staticmethod
    def parse(line: str) -> NoteSignature:
        """A line without its newline. Raises :class:`MalformedError`."""
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "—":
            raise MalformedError(
                Reason.MALFORMED,
                "not a signature line",
                expected="em dash, key name, base64",
                actual=ascii(line[:40]),
            )
        data = decode_base64(parts[2], "a signature line")
        return NoteSignature(parts[1], data[:4], data[4:])


@dataclass(frozen=True, slots=True)
class Note:
    """``text`` is the signed bytes, final newline included. Verifies nothing, see :func:`parse_note`."""

    text: bytes
    signatures: tuple[NoteSignature, ...]

    def signature_of(self, key: VerifierKey) -> NoteSignature | None:
        """The line that claims to be by ``key``: same name and same key id, both."""
        for signature in self.signatures:
            if signature.name == key.name and signature.key_id == key.key_id:
                return signature
        return None

    def with_signatures(self, *signatures: NoteSignature) -> Note:
        """The note with these lines after its own; a line of the same name and key id is replaced.

        Raises :class:`MalformedError` (``TOO_LARGE``) past sixteen lines.
        """
        lines = {(s.name, s.key_id): s for s in (*self.signatures, *signatures)}
        _check_count(len(lines))
        return Note(self.text, tuple(lines.values()))

    def encode(self) -> bytes:
        return self.text + b"\n" + "".join(signature.line() for signature in self.signatures).encode()


def _check_count(count: int) -> None:
    if count > MAX_SIGNATURES:
        raise MalformedError(
            Reason.TOO_LARGE,
            "too many signature lines",
            expected=f"at most {MAX_SIGNATURES}",
            actual=count,
        )


def _text(data: bytes, what: str) -> str:
    """Bounded UTF-8 without control characters, ending in a newline, no line too long."""
    if len(data) > MAX_NOTE:
        raise MalformedError(
            Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {MAX_NOTE} bytes", actual=f"{len(data)} bytes"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError(Reason.MALFORMED, f"{what} is not UTF-8") from None
    if control := data.translate(None, _ALLOWED):
        raise MalformedError(
            Reason.MALFORMED,
            f"{what} holds a control character",
            expected="newlines only",
            actual=f"{control[0]:#04x}",
        )
    if not data.endswith(b"\n"):
        raise MalformedError(Reason.MALFORMED, f"{what} does not end in a newline", actual=ascii(text[-20:]))
    if (longest := max(map(len, data.split(b"\n")))) > MAX_LINE:
        raise MalformedError(
            Reason.TOO_LARGE,
            f"{what} has an over-long line",
            expected=f"at most {MAX_LINE} bytes",
            actual=f"{longest} bytes",
        )
    return text


def _lines(text: str, what: str) -> tuple[NoteSignature, ...]:
    lines = text[:-1].split("\n")
    _check_count(len(lines))
    signatures = tuple(NoteSignature.parse(line) for line in lines)
    if len({(s.name, s.key_id) for s in signatures}) != len(signatures):
        raise MalformedError(
            Reason.SIGNATURE_EXTRA, f"{what} repeats a signature line", expected="one line for each key"
        )
    return signatures


def parse_signature_lines(data: bytes, what: str = "a list of signatures") -> tuple[NoteSignature, ...]:
    """1 … 16 signature lines and nothing else: what a witness answers. Raises :class:`MalformedError`."""
    return _lines(_text(data, what), what)


def parse_note(data: bytes, what: str = "a note") -> Note:
    """Read a signed note, strictly: its bytes are those that :meth:`Note.encode` would give back.

    Raises :class:`MalformedError`: ``SIGNATURE_MISSING`` without signature lines, ``SIGNATURE_EXTRA`` for a line of the
    same name and key id twice, ``TOO_LARGE`` past sixteen lines, 8 KiB in a line or 128 KiB in all, else ``MALFORMED``.
    """
    text = _text(data, what)
    body, separator, rest = text.rpartition("\n\n")
    if not separator or not rest:
        raise MalformedError(
            Reason.SIGNATURE_MISSING,
            f"{what} is not signed",
            expected="a text, an empty line, signature lines",
            actual="no empty line" if not separator else "nothing after the last empty line",
        )
    return Note((body + "\n").encode(), _lines(rest, what))
