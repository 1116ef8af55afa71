"""What this custodian remembers of TPMs: where the last accepted quote by each attestation key left its TPM.

A quote says how often its TPM was reset and how long it has run. Both only ever go on, so that a custodian notices a
machine that was restarted under a lease, or an old quote of one that was put back.
"""

from __future__ import annotations

from collections.abc import Iterable

from keyquorum_core import jcs
from keyquorum_core.attestation.tpm2_state import QuoteState
from keyquorum_core.strictjson import Fields, loads
from keyquorum_custodian.keystore import Keystore

__all__ = ["Tpms", "decode_state", "encode_state"]

_WHAT = "kept state of a TPM"


class Tpms:
    """Implements :class:`~keyquorum_core.attestation.appraisers.TpmRecords` on a keystore."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._unsaved: dict[str, QuoteState] = {}

    def last(self, ak: str) -> QuoteState | None:
        if ak in self._unsaved:
            return self._unsaved[ak]
        row = self._keystore.tpm_state(ak)
        return None if row is None else decode_state(loads(row, _WHAT))

    def remember(self, states: Iterable[QuoteState]) -> None:
        """The quotes behind these were accepted; they are written with the appraisals."""
        for each in states:
            self._unsaved[each.ak] = each

    def unsaved(self) -> list[tuple[str, bytes]]:
        return [(ak, jcs.dumps({**encode_state(each)})) for ak, each in self._unsaved.items()]

    def saved(self) -> None:
        self._unsaved.clear()


def encode_state(state: QuoteState) -> dict[str, str | int]:
    """JSON members; the two 64-bit numbers as hex."""
    return {
        "ak": state.ak,
        "reset_count": state.reset_count,
        "restart_count": state.restart_count,
        "clock": f"{state.clock:016x}",
        "firmware_version": f"{state.firmware_version:016x}",
    }


def decode_state(value: object) -> QuoteState:
    """Raises :class:`MalformedError`."""
    fields = Fields(value, _WHAT)
    state = QuoteState(
        ak=fields.text("ak"),
        reset_count=fields.integer("reset_count"),
        restart_count=fields.integer("restart_count"),
        clock=int.from_bytes(fields.hex("clock", 8), "big"),
        firmware_version=int.from_bytes(fields.hex("firmware_version", 8), "big"),
    )
    fields.done()
    return state
