"""Appraisals kept: evidence that was accepted once is not taken apart again until it is too old, across restarts.

An appraisal is found by the digest of the evidence document and the digests of the reference values, the inventory and
the policy in force: where one of them changes, nothing is found. It was made while this custodian's nonce was current;
what is asked anew each time is only whether it still holds, and what the manifest at hand requires of it (the gate does
that). New ones are written to the keystore after the answer (:meth:`Appraisals.flush`), sealed there: a row that this
custodian did not write does not open. Revocation drops them (:meth:`Appraisals.drop`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from keyquorum_core.attestation.appraisal import Appraisal, appraise
from keyquorum_core.attestation.inventory import INVENTORY, HardwareId
from keyquorum_core.attestation.reference import REFERENCE_VALUES
from keyquorum_core.transcript import H
from keyquorum_custodian.appraisal_rows import decode, encode
from keyquorum_custodian.bulletins import Bulletins
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.tpms import Tpms
from keyquorum_custodian.windows import Windows

__all__ = ["CONTEXT_KINDS", "Appraisals"]

_CAPACITY = 1024
CONTEXT_KINDS = (REFERENCE_VALUES.name, INVENTORY.name, "policy")
"""The documents under whose digests an appraisal is kept."""


class Appraisals:
    """One custodian's appraisals under the documents of its operators."""

    def __init__(self, bulletins: Bulletins, own_id: str, windows: Windows, keystore: Keystore, tpms: Tpms) -> None:
        self._bulletins = bulletins
        self._own_id = own_id
        self._windows = windows
        self._keystore = keystore
        self._tpms = tpms
        self._digests: tuple[str, ...] = ()
        self._context = b""
        self._kept: OrderedDict[bytes, Appraisal] = OrderedDict()
        self._unsaved: dict[bytes, Appraisal] = {}

    def appraise(self, document: bytes, digest: bytes, required_types: Collection[str], now: int) -> Appraisal:
        """The appraisal of ``document``, whose SHA-256 is ``digest``, at ``now``.

        Raises what :func:`keyquorum_core.attestation.appraisal.appraise` raises, and what
        :meth:`~keyquorum_custodian.bulletins.Bulletins.get` does where reference values or inventory are not in force.
        """
        reference = self._bulletins.get(REFERENCE_VALUES).value
        inventory = self._bulletins.get(INVENTORY).value
        self._follow()
        kept = self._kept.get(digest)
        if kept is None:
            kept = self._load(digest, now)
        if kept is None or not kept.holds_at(now):
            kept = appraise(
                document,
                reference,
                inventory,
                required_types=required_types,
                now=now,
                own_id=self._own_id,
                current_nonces=self._windows.current_nonces(),
                tpm=self._tpms,
            )
            self._tpms.remember(kept.tpm_states)
            self._unsaved[digest] = kept
            self._kept[digest] = kept
            if len(self._unsaved) > _CAPACITY:  # the disk is full: what is not kept is appraised again, or is stale
                del self._unsaved[next(iter(self._unsaved))]
        else:
            self._kept[digest] = kept
            kept.require_types(required_types)
        self._kept.move_to_end(digest)
        if len(self._kept) > _CAPACITY:
            self._kept.popitem(last=False)
        return kept

    def flush(self, now: int) -> None:
        """Write what is new to the keystore. Raises ``STORAGE`` and keeps it for the next try."""
        states = self._tpms.unsaved()
        if not self._unsaved and not states:
            return
        rows = [(digest, self._context, kept.not_after, encode(kept)) for digest, kept in self._unsaved.items()]
        self._keystore.save_appraisals(rows, states, now)
        self._unsaved.clear()
        self._tpms.saved()

    def drop(self, *, hardware: HardwareId | None = None, evidence: bytes | None = None) -> int:
        """Forget, in memory and on the disk, every appraisal of this hardware, or of the document with this SHA-256;
        how many there were. What revokes hardware or evidence also has to refuse it from then on: a dropped appraisal
        can be made again. Raises ``STORAGE``; then nothing on the disk was dropped."""

        def meant(digest: bytes, kept: Appraisal) -> bool:
            return digest == evidence or (hardware is not None and hardware in kept.hardware)

        gone = {digest for digest, kept in {**self._kept, **self._unsaved}.items() if meant(digest, kept)}
        gone |= {digest for digest, row in self._keystore.appraisals() if meant(digest, decode(row))}
        for digest in gone:
            self._kept.pop(digest, None)
            self._unsaved.pop(digest, None)
        self._keystore.drop_appraisals(gone)
        return len(gone)

    def _follow(self) -> None:
        """Forget what was kept in memory under other documents than those in force."""
        digests = tuple(self._bulletins.digest(kind) for kind in CONTEXT_KINDS)
        if digests != self._digests:
            self._digests = digests
            self._context = H("keyquorum/v1/appraisal-context", *(each.encode() for each in digests))
            self._kept.clear()
            self._unsaved.clear()

    def _load(self, digest: bytes, now: int) -> Appraisal | None:
        row = self._keystore.appraisal(digest, self._context, now)
        return None if row is None else decode(row)
