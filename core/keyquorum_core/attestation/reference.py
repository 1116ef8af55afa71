"""Reference values: what this custodian accepts, from one strict JSON file (docs/spec/evidence.md).

Every member is required and none may be empty: there is no value whose absence turns a check off. A file that says less
does not load, and a custodian without reference values releases nothing to a worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_report import CHIP_ID_BYTES, MEASUREMENT_BYTES
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields, loads

__all__ = ["Machine", "ReferenceValues"]

_WHAT = "reference values"
_MAX_BYTES = 16 << 20
_MAX_ROOTS = 64
_MAX_MEASUREMENTS = 4096
_MAX_INVENTORY = 65536
_MAX_EVIDENCE_AGE = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a chip stands and who runs it, as the inventory says."""

    region: str
    provider: str


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    version: int
    digest: str
    """SHA-256 of the file, hex: with ``version``, the key under which appraisals are kept."""
    roots: frozenset[str]
    """AMD roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    measurements: frozenset[bytes]
    """Launch measurements, 48 bytes each."""
    minimum_tcb: Mapping[Product, Mapping[str, int]]
    vmpl: frozenset[int]
    inventory: Mapping[bytes, Machine]
    """By the 64-byte chip id of the report."""
    max_evidence_age: int
    """Seconds that an appraisal may be kept, counted from the start of the nonce's window."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, data: bytes) -> ReferenceValues:
        """Read the file. Raises :class:`MalformedError` naming the member, also for one that is absent or empty."""
        top = Fields(loads(data, _WHAT, max_bytes=_MAX_BYTES), _WHAT)
        version = top.integer("version", 1)
        sev_snp = top.object("sev-snp")
        inventory = _inventory(top)
        max_evidence_age = top.integer("max_evidence_age", 1, _MAX_EVIDENCE_AGE)
        top.done()
        roots = _digests(sev_snp, "roots", 32, minimum=0, maximum=_MAX_ROOTS)
        development_roots = _digests(sev_snp, "development_roots", 32, minimum=0, maximum=_MAX_ROOTS)
        measurements = _digests(sev_snp, "measurements", MEASUREMENT_BYTES, minimum=1, maximum=_MAX_MEASUREMENTS)
        minimum_tcb = _minimum_tcb(sev_snp.object("minimum_tcb"))
        vmpl = _vmpl(sev_snp)
        sev_snp.done()
        unknown = roots - AMD_ROOTS.keys()
        if unknown:
            raise _bad("roots", "fingerprints of AMD's roots; others belong in development_roots", min(unknown))
        if development_roots & AMD_ROOTS.keys():
            raise _bad("development_roots", "no root of AMD's", min(development_roots & AMD_ROOTS.keys()))
        if not roots | development_roots:
            raise _bad("roots", "at least one root, here or in development_roots", "none")
        without = {AMD_ROOTS[root] for root in roots} - {str(product) for product in minimum_tcb}
        if without:
            raise _bad(
                "minimum_tcb", "a minimum for the product of each root", f"none for {', '.join(sorted(without))}"
            )
        return cls(
            version=version,
            digest=hashlib.sha256(data).hexdigest(),
            roots=roots,
            development_roots=development_roots,
            measurements=frozenset(bytes.fromhex(each) for each in measurements),
            minimum_tcb=minimum_tcb,
            vmpl=vmpl,
            inventory=inventory,
            max_evidence_age=max_evidence_age,
        )


def _bad(member: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"{_WHAT}: bad member {member!r}", expected=expected, actual=actual)


def _digests(fields: Fields, name: str, size: int, *, minimum: int, maximum: int) -> frozenset[str]:
    values = fields.texts(name, min_items=minimum, max_items=maximum, max_length=2 * size)
    for value in values:
        if len(value) != 2 * size or any(c not in "0123456789abcdef" for c in value):
            raise _bad(name, f"{size} bytes each as lower-case hex", value)
        if value == "0" * len(value):
            raise _bad(name, "no value of zeros", value)
    if len(set(values)) != len(values):
        raise _bad(name, "each value once", "a repetition")
    return frozenset(values)


def _minimum_tcb(fields: Fields) -> Mapping[Product, Mapping[str, int]]:
    minimum: dict[Product, Mapping[str, int]] = {}
    for product in Product:
        if product.value in fields:
            levels = fields.object(product.value)
            minimum[product] = MappingProxyType({name: levels.integer(name, 0, 255) for name in product.layout})
            levels.done()
    fields.done()
    if not minimum:
        raise _bad("minimum_tcb", f"a minimum for one of {', '.join(Product)}", "none")
    return MappingProxyType(minimum)


def _vmpl(fields: Fields) -> frozenset[int]:
    levels = fields.list("vmpl", min_items=1, max_items=4)
    allowed = [each for each in levels if isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= 3]
    if len(set(allowed)) != len(levels):
        raise _bad("vmpl", "distinct levels out of 0, 1, 2, 3", levels)
    return frozenset(allowed)


def _inventory(fields: Fields) -> Mapping[bytes, Machine]:
    inventory: dict[bytes, Machine] = {}
    for each in fields.list("inventory", min_items=1, max_items=_MAX_INVENTORY):
        entry = Fields(each, f"{_WHAT}.inventory")
        chip_id = entry.hex("chip_id", CHIP_ID_BYTES)
        machine = Machine(entry.text("region", max_length=64), entry.text("provider", max_length=128))
        entry.done()
        if chip_id in inventory or not any(chip_id):
            raise _bad("inventory", "each chip once, and no chip id of zeros", chip_id.hex())
        inventory[chip_id] = machine
    return MappingProxyType(inventory)
