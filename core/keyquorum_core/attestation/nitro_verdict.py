"""One Nitro document judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from keyquorum_core.attestation.nitro import verify
from keyquorum_core.attestation.nitro_appraisal import (
    NITRO,
    NitroReferenceValues,
    check_can_bind,
    check_not_debug,
    check_reference,
    check_report_data,
)
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.attestation.verdict import Verdict
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_nitro"]


def judge_nitro(
    evidence: bytes,
    *,
    now: int,
    reference: NitroReferenceValues | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a COSE_Sign1 structure at ``now``; never raises.

    Without ``reference`` the root is AWS's, and debug mode and the ability to bind a key are judged; with it, all that
    it says. ``expected_report_data`` (64 bytes), where given, must be met.
    """
    claims: dict[str, object] = {}
    try:
        verified = verify(
            evidence, pinned_roots=AWS_NITRO_ROOTS if reference is None else reference.pinned_roots, now=now
        )
        claims = verified.claims()
        check_not_debug(verified)
        check_can_bind(verified)
        if reference is not None:
            claims["image"] = check_reference(verified, reference, now=now).image
        if expected_report_data is not None:
            check_report_data(verified, expected_report_data)
    except KeyquorumError as error:
        return Verdict(NITRO, False, bool(claims), str(error.reason), str(error), claims)
    return Verdict(NITRO, True, True, "", "", claims)
