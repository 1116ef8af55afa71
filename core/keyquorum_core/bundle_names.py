"""Which names a file may have in a bundle, and which names may stand beside each other.

A bundle is unpacked on other people's systems: a name must stay inside the folder, mean one file also where the file
system folds case or normalises Unicode, and show itself as what it is.
"""

from __future__ import annotations

import unicodedata

from keyquorum_core.errors import Reason, RefusedError

__all__ = ["MAX_NAME_BYTES", "NameSet", "check_name", "split_name"]

MAX_NAME_BYTES = 255
MAX_DEPTH = 32
_NAME_FIELD = 100
_PREFIX_FIELD = 155
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_NOT_SHOWN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def check_name(name: str) -> None:
    """Raises :class:`RefusedError` (``BUNDLE``) unless ``name`` is a relative path that every system reads alike."""
    components = name.split("/")
    faults = (
        (not name, "an empty name"),
        (name.startswith("/"), "an absolute path"),
        ("\\" in name, "a backslash"),
        (len(name) >= 2 and name[1] == ":" and name[0].isascii() and name[0].isalpha(), "a drive letter"),
        (".." in components, "a parent folder (..)"),
        ("" in components or "." in components, "an empty component or a single dot"),
        (any(unicodedata.category(c) in _NOT_SHOWN for c in name), "a control character or half a character"),
        (not _BIDI_CONTROLS.isdisjoint(name), "a character that reverses the writing direction"),
        (len(components) > MAX_DEPTH, f"more than {MAX_DEPTH} components"),
        (len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES, f"more than {MAX_NAME_BYTES} bytes"),
    )
    for faulty, what in faults:
        if faulty:
            raise RefusedError(
                Reason.BUNDLE,
                "a file's name is not allowed in a bundle",
                expected="a relative path of plain components",
                actual=f"{ascii(name)[:80]}: {what}",
            )


def split_name(name: str) -> tuple[bytes, bytes]:
    """ustar's prefix and name fields for a path: no prefix if it fits the name field, else the shortest that will do.

    Raises :class:`RefusedError` (``BUNDLE``) if the name is not allowed, or no ``/`` splits it into at most 155 and 100
    bytes: a last component, say, of over 100.
    """
    check_name(name)
    encoded = name.encode("utf-8")
    if len(encoded) <= _NAME_FIELD:
        return b"", encoded
    at = encoded.find(b"/", len(encoded) - _NAME_FIELD - 1)
    if not 0 < at <= _PREFIX_FIELD:
        raise RefusedError(
            Reason.BUNDLE,
            "a file's name does not fit a bundle",
            expected=f"a / that leaves at most {_PREFIX_FIELD} bytes before and {_NAME_FIELD} after it",
            actual=ascii(name)[:80],
            next_step="Shorten the name.",
        )
    return encoded[:at], encoded[at + 1 :]


class NameSet:
    """The names of one bundle, none of which may meet another on any file system."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def add(self, name: str) -> None:
        """Raises :class:`RefusedError` (``BUNDLE``) if the name is not allowed or meets another."""
        check_name(name)
        folded = _fold(name)
        if name == self._files.get(folded):
            raise RefusedError(Reason.BUNDLE, "the bundle names a file twice", actual=ascii(name)[:80])
        self._meets(name, self._files.get(folded), "two files that differ only in case or Unicode form")
        self._meets(name, self._folders.get(folded), "a file and a folder of one name")
        self._files[folded] = name
        for at in (i for i, c in enumerate(name) if c == "/"):
            folder, folded = name[:at], _fold(name[:at])
            self._meets(folder, self._files.get(folded), "a file and a folder of one name")
            if self._folders.setdefault(folded, folder) != folder:
                self._meets(folder, self._folders[folded], "two folders that differ only in case or Unicode form")

    @staticmethod
    def _meets(name: str, other: str | None, what: str) -> None:
        if other is not None:
            raise RefusedError(
                Reason.BUNDLE, f"the bundle holds {what}", actual=f"{ascii(other)[:80]} and {ascii(name)[:80]}"
            )


def _fold(name: str) -> str:
    """One string for all names that some file system takes for the same (Unicode §3.13, D145)."""
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", folded))
