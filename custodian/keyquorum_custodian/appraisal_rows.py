"""How an appraisal stands in the keystore: RFC 8785 JSON, read back strictly."""

from __future__ import annotations

import base64
from types import MappingProxyType

from keyquorum_core import jcs
from keyquorum_core.attestation.appraisal import Appraisal
from keyquorum_core.attestation.appraisers import AppraisedItem
from keyquorum_core.attestation.inventory import HardwareId, Machine
from keyquorum_core.strictjson import Fields, loads
from keyquorum_custodian.tpms import decode_state, encode_state

__all__ = ["decode", "encode"]

_WHAT = "kept appraisal"
_MAX_KEY = 1 << 20
_MAX_ITEMS = 16
_MAX_HARDWARE = 512


def encode(appraisal: Appraisal) -> bytes:
    machine = appraisal.machine
    return jcs.dumps(
        {
            "hpke_key": base64.b64encode(appraisal.hpke_key).decode(),
            "signing_key": base64.b64encode(appraisal.signing_key).decode(),
            "items": [
                {
                    "type": item.type,
                    "hardware": [[each.kind, each.id] for each in item.hardware],
                    "product": item.product,
                    "image": item.image,
                    "measurement": item.measurement,
                    "tcb": dict(item.tcb),
                    "development": item.development,
                    "not_before": item.not_before,
                    "not_after": item.not_after,
                }
                for item in appraisal.items
            ],
            "machine": [machine.name, machine.region, machine.provider, machine.model, machine.owner],
            "evidence_sha256": appraisal.evidence_sha256,
            "reference_version": appraisal.reference_version,
            "reference_digest": appraisal.reference_digest,
            "inventory_version": appraisal.inventory_version,
            "inventory_digest": appraisal.inventory_digest,
            "attested_at": appraisal.attested_at,
            "not_before": appraisal.not_before,
            "not_after": appraisal.not_after,
            "tpm_states": [encode_state(each) for each in appraisal.tpm_states],
        }
    )


def decode(data: bytes) -> Appraisal:
    """Raises :class:`MalformedError` for what :func:`encode` did not write."""
    fields = Fields(loads(data, _WHAT, max_bytes=4 << 20), _WHAT)
    appraisal = Appraisal(
        hpke_key=fields.base64("hpke_key", max_bytes=_MAX_KEY),
        signing_key=fields.base64("signing_key", max_bytes=_MAX_KEY),
        items=tuple(_item(each) for each in fields.list("items", min_items=1, max_items=_MAX_ITEMS)),
        machine=Machine(*fields.texts("machine", min_items=5, max_items=5)),
        evidence_sha256=fields.text("evidence_sha256"),
        reference_version=fields.integer("reference_version"),
        reference_digest=fields.text("reference_digest"),
        inventory_version=fields.integer("inventory_version"),
        inventory_digest=fields.text("inventory_digest"),
        attested_at=fields.integer("attested_at"),
        not_before=fields.integer("not_before"),
        not_after=fields.integer("not_after"),
        tpm_states=tuple(decode_state(each) for each in fields.list("tpm_states", max_items=_MAX_ITEMS)),
    )
    fields.done()
    return appraisal


def _item(value: object) -> AppraisedItem:
    fields = Fields(value, _WHAT)
    tcb = fields.object("tcb")
    item = AppraisedItem(
        type=fields.text("type"),
        hardware=tuple(
            HardwareId(*Fields({"id": each}, _WHAT).texts("id", min_items=2, max_items=2))
            for each in fields.list("hardware", min_items=1, max_items=_MAX_HARDWARE)
        ),
        product=fields.text("product", max_length=1024),
        image=fields.text("image", max_length=4096, allow_empty=True),
        measurement=fields.text("measurement", allow_empty=True),
        tcb=MappingProxyType({name: tcb.integer(name) for name in tcb.names()}),
        development=fields.boolean("development"),
        not_before=fields.integer("not_before"),
        not_after=fields.integer("not_after"),
    )
    fields.done()
    return item
