"""Appraisals kept: evidence that was accepted once is not taken apart again until it is too old, across restarts.

An appraisal is found by the digests of the evidence document and of the reference values, so changed reference values
find nothing. It was made while this custodian's nonce was current; what is asked anew each time is only whether
it still holds, and what the manifest at hand requires of it (the gate does that). New ones are written to the keystore
after the answer (:meth:`Appraisals.flush`), sealed there: a row that this custodian did not write does not open.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from types import MappingProxyType

import rfc8785

from keyquorum_core.attestation.appraisal import Appraisal, appraise
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields, loads
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.windows import Windows

__all__ = ["Appraisals"]

_CAPACITY = 1024
_WHAT = "kept appraisal"


class Appraisals:
    """One custodian's appraisals under one set of reference values."""

    def __init__(self, reference: ReferenceValues, own_id: str, windows: Windows, keystore: Keystore) -> None:
        self.reference = reference
        self._own_id = own_id
        self._windows = windows
        self._keystore = keystore
        self._kept: OrderedDict[bytes, Appraisal] = OrderedDict()
        self._unsaved: dict[bytes, Appraisal] = {}

    def appraise(self, document: bytes, digest: bytes, required_types: Collection[str], now: int) -> Appraisal:
        """The appraisal of ``document``, whose SHA-256 is ``digest``, at ``now``.

        Raises what :func:`keyquorum_core.attestation.appraisal.appraise` raises.
        """
        kept = self._kept.get(digest)
        if kept is None:
            kept = self._load(digest, now)
        if kept is None or not kept.holds_at(now):
            kept = appraise(
                document,
                self.reference,
                required_types=required_types,
                now=now,
                own_id=self._own_id,
                current_nonces=self._windows.current_nonces(),
            )
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
        if not self._unsaved:
            return
        reference = bytes.fromhex(self.reference.digest)
        rows = [(digest, reference, kept.not_after, _encode(kept)) for digest, kept in self._unsaved.items()]
        self._keystore.save_appraisals(rows, now)
        self._unsaved.clear()

    def _load(self, digest: bytes, now: int) -> Appraisal | None:
        row = self._keystore.appraisal(digest, bytes.fromhex(self.reference.digest), now)
        return None if row is None else _decode(row)


def _encode(appraisal: Appraisal) -> bytes:
    return rfc8785.dumps(
        {
            "hpke_key": appraisal.hpke_key.hex(),
            "signing_key": appraisal.signing_key.hex(),
            "types": list(appraisal.types),
            "hardware_ids": dict(appraisal.hardware_ids),
            "region": appraisal.region,
            "provider": appraisal.provider,
            "product": appraisal.product,
            "measurement": appraisal.measurement,
            "tcb": dict(appraisal.tcb),
            "development": appraisal.development,
            "evidence_sha256": appraisal.evidence_sha256,
            "reference_version": appraisal.reference_version,
            "reference_digest": appraisal.reference_digest,
            "not_before": appraisal.not_before,
            "not_after": appraisal.not_after,
        }
    )


def _decode(data: bytes) -> Appraisal:
    fields = Fields(loads(data, _WHAT, max_bytes=4 << 20), _WHAT)
    hardware = fields.object("hardware_ids")
    tcb = fields.object("tcb")
    try:
        keys = {name: bytes.fromhex(fields.text(name, max_length=2 << 20)) for name in ("hpke_key", "signing_key")}
    except ValueError:
        raise MalformedError(Reason.MALFORMED, f"{_WHAT}: a key is not hex") from None
    appraisal = Appraisal(
        **keys,
        types=fields.texts("types", max_items=16, min_items=1),
        hardware_ids=MappingProxyType({name: hardware.text(name, max_length=1024) for name in hardware.names()}),
        region=fields.text("region"),
        provider=fields.text("provider"),
        product=fields.text("product"),
        measurement=fields.text("measurement"),
        tcb=MappingProxyType({name: tcb.integer(name) for name in tcb.names()}),
        development=fields.boolean("development"),
        evidence_sha256=fields.text("evidence_sha256"),
        reference_version=fields.integer("reference_version"),
        reference_digest=fields.text("reference_digest"),
        not_before=fields.integer("not_before"),
        not_after=fields.integer("not_after"),
    )
    fields.done()
    return appraisal
