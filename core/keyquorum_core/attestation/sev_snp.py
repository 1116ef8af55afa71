"""SEV-SNP attestation reports: verification (AMD SEV-SNP firmware ABI, 56860, §7.3).

Is the report genuine? :func:`verify` makes these checks, in this order, and refuses at the first that fails:

1. form: exactly 1184 bytes, version 2–5, reserved fields zero, ECDSA P-384 with SHA-384    ``MALFORMED``
2. the report says that a VCEK or VLEK signed it                                            ``SIGNATURE``
3. the endorsements chain to a pinned root (:mod:`~keyquorum_core.attestation.snp_certificates`)
                                                   ``MALFORMED``, ``ROOT_NOT_PINNED``, ``CHAIN``
4. the chain endorses the kind of key that the report names                                 ``CHAIN``
5. all three certificates are valid at ``now``                                 ``NOT_YET_VALID``, ``EXPIRED``
6. the signature over bytes 0x000 … 0x29f, r and s 72 bytes each, little-endian             ``SIGNATURE``
7. from version 3: the CPU's family and model are the certificate's product                 ``CHAIN``
8. VCEK: a chip id that is not zero and equals the certificate's hwID                       ``CHIP_ID``
9. the reported TCB equals the certificate's, all eight bytes                               ``TCB``
10. AMD's revocation lists, where they are given, are genuine, in date, and name none of the certificates
    (:mod:`~keyquorum_core.attestation.snp_revocation`)                      that module's reasons

Whether a genuine report is acceptable is :mod:`~keyquorum_core.attestation.appraisal`'s question.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from keyquorum_core.attestation.snp_certificates import Endorsement, SigningKey, verify_endorsements
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_report import CHIP_ID_BYTES, Report, parse_report, read_report
from keyquorum_core.attestation.snp_revocation import SnpRevocation, looks_like_crl, verify_crls
from keyquorum_core.errors import Reason, RefusedError

__all__ = ["Report", "VerifiedReport", "parse_report", "read_report", "verify"]


@dataclass(frozen=True, slots=True)
class VerifiedReport:
    """A genuine report with what its endorsements add."""

    report: Report
    endorsement: Endorsement
    revocation: SnpRevocation

    @property
    def product(self) -> Product:
        return self.endorsement.product

    @property
    def not_after(self) -> int:
        """Unix seconds: the last moment at which all certificates, and revocation lists, are valid."""
        ends = [window.not_after for window in self.endorsement.validity]
        return min(ends + [self.revocation.not_after] * bool(self.revocation.issuers))

    @property
    def not_before(self) -> int:
        return max(window.not_before for window in self.endorsement.validity)

    def tcbs(self) -> dict[str, dict[str, int]]:
        """The four TCBs by component: reported, committed, launch, current."""
        read = self.product.components
        return {
            "reported": read(self.report.reported_tcb),
            "committed": read(self.report.committed_tcb),
            "launch": read(self.report.launch_tcb),
            "current": read(self.report.current_tcb),
        }

    def claims(self) -> dict[str, object]:
        """What the report says, for people and ``--json``."""
        report = self.report
        return {
            "report_version": report.version,
            "product": str(self.product),
            "signing_key": str(self.endorsement.signing_key),
            "csp_id": self.endorsement.csp_id,
            "root": self.endorsement.root,
            "development": self.endorsement.development,
            "debug": report.debug_allowed,
            "migration_agent": report.migration_agent_allowed,
            "policy": f"{report.policy:#x}",
            "platform_info": f"{report.platform_info:#x}",
            "vmpl": report.vmpl,
            "guest_svn": report.guest_svn,
            "measurement": report.measurement.hex(),
            "report_data": report.report_data.hex(),
            "host_data": report.host_data.hex(),
            "id_key_digest": report.id_key_digest.hex(),
            "author_key_digest": report.author_key_digest.hex(),
            "report_id": report.report_id.hex(),
            "chip_id": "" if report.chip_id_masked else report.chip_id.hex(),
            "tcb": self.tcbs(),
            "revocation_lists": list(self.revocation.issuers),
        }


def verify(report: bytes, endorsements: Sequence[bytes], *, pinned_roots: Collection[str], now: int) -> VerifiedReport:
    """Verify a raw report with its endorsements (VCEK or VLEK, ASK, ARK, and perhaps CRLs; DER or PEM) at ``now``
    (unix seconds).

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    parsed = parse_report(report)
    if parsed.signing_key is None or (parsed.signing_key is SigningKey.VCEK and parsed.chip_key_masked):
        raise RefusedError(
            Reason.SIGNATURE,
            "the report says that it is not signed by a key of the chip",
            expected="a VCEK that is not masked, or a VLEK",
            actual="masked VCEK" if parsed.signing_key else "none",
        )
    crls = [each for each in endorsements if looks_like_crl(each)]
    endorsement = verify_endorsements([each for each in endorsements if not looks_like_crl(each)], pinned_roots)
    if endorsement.signing_key is not parsed.signing_key:
        raise RefusedError(
            Reason.CHAIN,
            "the endorsements are for another kind of key than the report names",
            expected=parsed.signing_key,
            actual=endorsement.signing_key,
        )
    endorsement.check_validity(now)
    try:
        endorsement.public_key.verify(encode_dss_signature(*parsed.signature), parsed.signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        raise RefusedError(
            Reason.SIGNATURE,
            f"the report's signature does not verify with the {endorsement.signing_key}",
            next_step="check that the endorsements are those of this chip at its reported TCB",
        ) from None
    _check_endorsed(parsed, endorsement)
    return VerifiedReport(parsed, endorsement, verify_crls(crls, endorsement.authorities, now))


def _check_endorsed(report: Report, endorsement: Endorsement) -> None:
    """The report and the certificate of the key that signed it must describe the same chip, at the same TCB."""
    product = endorsement.product
    if report.cpuid is not None and Product.from_cpuid(report.cpuid[0], report.cpuid[1]) is not product:
        raise RefusedError(
            Reason.CHAIN,
            "the report comes from a CPU of another product than the certificate",
            expected=product,
            actual=f"family {report.cpuid[0]:#x}, model {report.cpuid[1]:#x}",
        )
    if endorsement.signing_key is SigningKey.VCEK:
        endorsed = endorsement.hardware_id.ljust(CHIP_ID_BYTES, b"\0")
        if report.chip_id_masked or not hmac.compare_digest(endorsed, report.chip_id):
            raise RefusedError(
                Reason.CHIP_ID,
                "the report's chip id is not the hwID of the VCEK",
                expected=endorsement.hardware_id.hex(),
                actual="all zero" if report.chip_id_masked else report.chip_id.hex(),
            )
    if report.reported_tcb != endorsement.tcb:
        raise RefusedError(
            Reason.TCB,
            f"the reported TCB is not the one that the {endorsement.signing_key} was derived for",
            expected=f"{product.components(endorsement.tcb)}",
            actual=f"{product.components(report.reported_tcb)}",
        )
