"""Reference values: what a cluster accepts as evidence; a document that operators sign (docs/spec/evidence.md).

One section for each type of evidence. A type without a section is not accepted at all; in a section every member is
required and none may be empty: there is no value whose absence turns a check off. What was accepted before and is to be
accepted a little longer stands in its section with the date on which that ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyquorum_core.attestation.nitro_reference import NitroReferenceValues
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.snp_reference import SnpReferenceValues
from keyquorum_core.attestation.tdx_reference import TdxReferenceValues
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.bulletin import Bulletin, Kind
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields

__all__ = ["REFERENCE_VALUES", "ReferenceValues"]

_WHAT = "reference values"
_MAX_EVIDENCE_AGE = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """Loaded by :meth:`read`, which is what checks them. A type's section is ``None`` where it is not accepted."""

    version: int
    digest: str
    """SHA-256 of the bulletin's payload, hex."""
    max_evidence_age: int
    """Seconds that an appraisal may be kept, counted from the start of the nonce's window."""
    sev_snp: SnpReferenceValues | None
    tdx: TdxReferenceValues | None
    tpm2: Tpm2ReferenceValues | None
    nvidia_gpu: NvidiaReferenceValues | None
    nitro: NitroReferenceValues | None

    @property
    def types(self) -> tuple[str, ...]:
        """The types of evidence that are accepted."""
        return tuple(
            name
            for name, section in (
                ("nitro", self.nitro),
                ("nvidia-gpu", self.nvidia_gpu),
                ("sev-snp", self.sev_snp),
                ("tdx", self.tdx),
                ("tpm2", self.tpm2),
            )
            if section is not None
        )

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        sections = (self.sev_snp, self.tdx, self.nvidia_gpu, self.nitro)
        return any(each.trusts_development for each in sections if each is not None)

    @classmethod
    def read(cls, bulletin: Bulletin) -> ReferenceValues:
        """The body. Raises :class:`MalformedError` naming the member, also for one that is absent or empty."""
        fields = Fields(bulletin.body, _WHAT)

        max_evidence_age = fields.integer("max_evidence_age", 1, _MAX_EVIDENCE_AGE)
        values = cls(
            version=bulletin.version,
            digest=bulletin.digest,
            max_evidence_age=max_evidence_age,
            sev_snp=SnpReferenceValues.parse(fields.raw("sev-snp")) if "sev-snp" in fields else None,
            tdx=TdxReferenceValues.parse(fields.raw("tdx")) if "tdx" in fields else None,
            tpm2=Tpm2ReferenceValues.parse(fields.raw("tpm2")) if "tpm2" in fields else None,
            nvidia_gpu=NvidiaReferenceValues.parse(fields.raw("nvidia-gpu")) if "nvidia-gpu" in fields else None,
            nitro=NitroReferenceValues.parse(fields.raw("nitro")) if "nitro" in fields else None,
        )
        fields.done()
        if not values.types:
            raise MalformedError(
                Reason.MALFORMED, f"{_WHAT} accept nothing", expected="a section for at least one type", actual="none"
            )
        return values


REFERENCE_VALUES: Final = Kind("reference-values", ReferenceValues.read)
