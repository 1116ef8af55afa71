"""Provenance statements on the way into a manifest: each is checked against the owner and the folder it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.manifest import Subject
from keyquorum_core.provenance import Provenance, open_provenance
from keyquorum_protos.wire.files import read_bytes

__all__ = ["read_statements"]


def read_statements(paths: Sequence[Path], owner: LoadedKeys, subjects: Sequence[Subject]) -> tuple[Provenance, ...]:
    """The manifest's entries for the statements in ``paths``: one for each file of the bundle that one of them made.

    Raises :class:`RefusedError` ``SIGNATURE…`` for a statement that ``owner`` didn't sign, ``PROVENANCE`` for one about
    no file of the bundle, or two about the same.
    """
    out: dict[str, Provenance] = {}
    for path in paths:
        statement = open_provenance(read_bytes(path, "provenance statement"), owner.identity.public)
        made = [subject.name for subject in subjects if subject.sha256 == statement.output_sha256]
        if not made:
            raise RefusedError(
                Reason.PROVENANCE,
                f"{path.name} speaks of a file that is not in the job's folder",
                expected=f"a file with SHA-256 {statement.output_sha256}",
                actual=f"none of the {len(subjects)} files has it",
                next_step="Put the prepared file into the folder as it was made, or leave the statement out.",
            )
        for name in made:
            if name in out:
                raise RefusedError(Reason.PROVENANCE, "two statements speak of one file", actual=name)
            out[name] = statement.entry(name)
    return tuple(out.values())
