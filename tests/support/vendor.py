"""A development vendor for the whole test run, and the reference values and evidence that go with it.

RSA-4096 keys take a second each, so there is one vendor in a process, made when a test first asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from keyquorum_core.attestation.binding import report_data
from keyquorum_core.attestation.development import DEVELOPMENT_TCB, DevelopmentChip, DevelopmentVendor
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.attestation.inventory import Inventory
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.bulletin import Bulletin
from keyquorum_core.release import challenge

__all__ = [
    "CREATED_AT",
    "MACHINE",
    "MEASUREMENT",
    "bulletin",
    "development_chip",
    "development_vendor",
    "evidence_document",
    "inventory",
    "inventory_json",
    "read_inventory",
    "read_reference",
    "reference_json",
    "reference_values",
]

CREATED_AT = 1_700_000_000
"""When the vendor's and the chip's certificates begin; they last 25 and 7 years."""
MEASUREMENT = bytes(range(48))
MACHINE = {"name": "zrh-1", "region": "CH", "provider": "example-cloud", "model": "gpu.8", "owner": "example"}
"""Where the inventory of :func:`inventory_json` says that the chip stands."""


def development_vendor(product: Product = Product.MILAN) -> DevelopmentVendor:
    """One vendor for each product, all with the same two RSA keys."""
    return _vendor(product)


def development_chip(product: Product = Product.MILAN) -> DevelopmentChip:
    """One chip for each product, with :data:`DEVELOPMENT_TCB`."""
    return _chip(product)


@cache
def _vendor(product: Product) -> DevelopmentVendor:
    if product is Product.MILAN:
        return DevelopmentVendor.create(now=CREATED_AT)
    first = _vendor(Product.MILAN)
    return DevelopmentVendor.create(now=CREATED_AT, product=product, ark_key=first.ark_key, ask_key=first.ask_key)


@cache
def _chip(product: Product) -> DevelopmentChip:
    return _vendor(product).chip(now=CREATED_AT)


def reference_json(chip: DevelopmentChip | None = None) -> dict[str, Any]:
    """The body of reference values that accept ``chip`` (default: :func:`development_chip`) and :data:`MEASUREMENT`."""
    chip = chip or development_chip()
    minimum = {name: level for name, level in DEVELOPMENT_TCB.items() if name in chip.product.layout}
    image = {
        "name": "worker",
        "measurement": MEASUREMENT.hex(),
        "host_data": ["00" * 32],
        "id_key_digests": ["00" * 48],
        "author_key_digests": ["00" * 48],
        "minimum_guest_svn": 0,
    }
    return {
        "max_evidence_age": 600,
        "sev-snp": {
            "roots": [],
            "development_roots": [development_vendor().root],
            "images": [image],
            "minimum_tcb": {chip.product.value: minimum},
            "tcb_grace": [],
            "vmpl": [0],
            "platform_info": {"required": [], "allowed": ["SMT_EN"]},
            "revocation": "when-given",
            "max_revocation_age": 86400,
        },
    }


def inventory_json(chip: DevelopmentChip | None = None, **hardware: list[str]) -> dict[str, Any]:
    """The body of an inventory with one machine, :data:`MACHINE`, that has ``chip`` (default: :func:`development_chip`)
    and further ``hardware``, by kind with underscores."""
    chip_id = (chip or development_chip()).chip_id
    ids = {"sev-snp": [(chip_id if any(chip_id) else b"\x01" * 64).hex()]}
    ids |= {kind.replace("_", "-"): each for kind, each in hardware.items()}
    return {"machines": [{**MACHINE, "hardware": ids}]}


def bulletin(
    kind: str, body: Mapping[str, Any], version: int = 1, *, cluster: str = "demo", now: int = CREATED_AT
) -> Bulletin:
    """A document that is in date for a hundred years."""
    return Bulletin(cluster, kind, version, now, now + 100 * 365 * 86400, body)


def reference_values(chip: DevelopmentChip | None = None) -> ReferenceValues:
    return read_reference(reference_json(chip))


def read_reference(body: Mapping[str, Any]) -> ReferenceValues:
    return ReferenceValues.read(bulletin("reference-values", body))


def inventory(chip: DevelopmentChip | None = None) -> Inventory:
    return read_inventory(inventory_json(chip))


def read_inventory(body: Mapping[str, Any]) -> Inventory:
    return Inventory.read(bulletin("inventory", body))


def evidence_document(
    nonces: Mapping[str, tuple[int, bytes]],
    *,
    hpke_key: bytes = b"an encoded HPKE key",
    signing_key: bytes = b"\x05" * 1984,
    chip: DevelopmentChip | None = None,
    measurement: bytes = MEASUREMENT,
    **report: Any,
) -> bytes:
    """An evidence document bound to the keys and to ``nonces`` (custodian id to window and nonce).

    ``report`` goes to :meth:`DevelopmentChip.sign_report`.
    """
    chip = chip or development_chip()
    bound = report_data(hpke_key, signing_key, challenge({name: nonce for name, (_, nonce) in nonces.items()}))
    evidence = chip.sign_report(report.pop("report_data", bound), measurement, **report)
    return EvidenceDocument(
        nonces=tuple(WindowNonce(name, window, nonce) for name, (window, nonce) in sorted(nonces.items())),
        hpke_key=hpke_key,
        signing_key=signing_key,
        items=(EvidenceItem("sev-snp", evidence, chip.endorsements),),
    ).to_bytes()
