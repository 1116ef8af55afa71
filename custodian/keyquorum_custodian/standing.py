"""Whether this custodian may act at all: one that was restored from a backup has to prove itself first.

The mark is in the keystore from the moment that it is written, so that no death between restoring and serving loses it.
Until it is proved nothing is released or cosigned and no ceremony is taken part in; until its operator approved the
restore nothing is proved either. What a proof found to be over, epochs that a peer says are destroyed, is withheld from
then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import Reason, StateError
from keyquorum_core.strictjson import Fields, canonical
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.vault import blob

__all__ = ["RESTORE", "Mark", "Standing", "write_mark"]

RESTORE: Final = "restore"
"""The kind of approval that a restore waits for."""
_META: Final = "restored"
_MAX_MARK: Final = 1 << 20
_MAX_WITHHELD: Final = 8192


@dataclass(frozen=True, slots=True)
class Mark:
    """That the keystore came out of the backup of that id, whose statement has that digest; ``request_id`` names the
    approval that it waits for. Times are unix seconds; ``proved_at`` is 0 until it has proved itself, ``withheld`` has,
    for an epoch that others say is destroyed, who says so."""

    backup_id: str
    statement: str
    request_id: str
    restored_at: int
    proved_at: int = 0
    withheld: Mapping[tuple[str, int], tuple[str, ...]] | None = None

    def payload(self) -> bytes:
        return jcs.dumps(
            {
                "backup_id": self.backup_id,
                "proved_at": self.proved_at,
                "request_id": self.request_id,
                "restored_at": self.restored_at,
                "statement": self.statement,
                "withheld": [
                    {"epoch": epoch, "key_id": key_id, "said_by": list(names)}
                    for (key_id, epoch), names in sorted((self.withheld or {}).items())
                ],
            }
        )

    @staticmethod
    def parse(data: bytes) -> Mark:
        """Raises :class:`MalformedError`."""
        fields = canonical(data, "mark of a restore", _MAX_MARK)
        withheld = {}
        for value in fields.list("withheld", max_items=_MAX_WITHHELD):
            entry = Fields(value, "mark of a restore")
            withheld[entry.text("key_id"), entry.integer("epoch")] = entry.texts("said_by", max_items=256)
            entry.done()
        mark = Mark(
            fields.text("backup_id"),
            fields.text("statement"),
            fields.text("request_id"),
            fields.integer("restored_at"),
            fields.integer("proved_at"),
            withheld,
        )
        fields.done()
        return mark


def write_mark(keystore: Keystore, mark: Mark) -> None:
    """Inside a transaction."""
    keystore.change("INSERT OR REPLACE INTO meta VALUES (?, ?)", _META, mark.payload())


class Standing:
    """One custodian's; used from the keystore's thread. Raises :class:`MalformedError` for a mark that was changed."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        rows = keystore.select("SELECT value FROM meta WHERE name = ?", _META)
        self.mark = Mark.parse(blob(rows[0][0])) if rows else None

    @property
    def restored(self) -> bool:
        """From a backup, and not proved yet."""
        return self.mark is not None and not self.mark.proved_at

    @property
    def withheld(self) -> Mapping[tuple[str, int], tuple[str, ...]]:
        """Epochs that are here and are not served, since the custodians named say that they are destroyed."""
        return (self.mark.withheld if self.mark is not None else None) or {}

    def require_proved(self) -> None:
        """Raise ``RESTORED`` while this custodian must not act."""
        if self.restored:
            raise StateError(
                Reason.RESTORED,
                "this custodian was restored from a backup and has not proved yet that it serves nothing old",
                expected="its operator's approval, and the testimony of its peers",
                actual="not yet",
                next_step="Approve the restore with `keyquorum-custodian approve`; a coordinator brings the rest.",
            )

    def require_served(self, key_id: str, epoch: int) -> None:
        """Raise ``KEY_STATE`` for an epoch that is withheld."""
        names = self.withheld.get((key_id, epoch))
        if names is not None:
            raise StateError(
                Reason.KEY_STATE,
                f"epoch {epoch} of key {key_id} is withheld: it is in the backup that this custodian was restored from,"
                " and was destroyed since",
                expected="an epoch that no peer says is destroyed",
                actual=f"destroyed, by the word of {', '.join(names)}",
                next_step="Have the operators destroy it once more: `keyquorum key destroy`.",
            )

    def proved(self, mark: Mark) -> None:
        """After the transaction in which :func:`write_mark` wrote it."""
        self.mark = mark
