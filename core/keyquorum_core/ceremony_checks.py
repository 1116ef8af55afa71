"""What makes an epoch count: who must have taken part, that all committed alike, that a seed is the certified one.

Every check raises :class:`RefusedError` with ``CEREMONY`` that names custodians, index and values; among them is always
the one at fault, and the signed statements that contradict each other are the evidence.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping

from keyquorum_core.ceremony import (
    Commitments,
    EpochCertificate,
    Seed,
    before_seed,
    check_indices,
    commitment,
    commitments_to,
    refused,
)
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.quorum import Quorum

__all__ = ["check_certificate", "check_commitments", "check_present", "check_seeds", "check_signed", "right_seeds"]


def check_present(plan: CeremonyPlan, present: Collection[str]) -> tuple[str, ...]:
    """Those present may make the epoch without the rest; returns the absent, sorted.

    Everyone takes part in *generate*. In *rotate*, at most ``absent_at_most`` of the key's policy are missing, and

    - those present are a quorum. That is the same as: every seed has a holder among them. (A seed belongs to a maximal
      unqualified set and is held by all outside it; a set is a quorum exactly when no such set contains it.)
    - the absent are none. So two sets that could each make the epoch always share a custodian, and a custodian makes an
      epoch once.
    """
    quorum = plan.quorum
    strangers = sorted(set(present) - set(quorum.ids))
    if strangers:
        raise refused("not of the key's committee", strangers, expected=", ".join(quorum.ids))
    absent = tuple(name for name in quorum.ids if name not in present)
    if not absent:
        return ()
    allowed = plan.policy.absent_at_most if plan.kind is Kind.ROTATE else 0
    if len(absent) > allowed:
        raise refused(
            "too many custodians are absent from the ceremony",
            absent,
            expected=f"at most {allowed} absent",
            actual=f"{len(absent)} absent",
        )
    if not quorum.is_qualified(present) or quorum.is_qualified(absent):
        raise refused(
            "those present may not make the epoch without the absent",
            absent,
            expected=f"{quorum.words()}, and the absent no quorum",
            actual=f"present: {', '.join(sorted(present)) or 'nobody'}",
        )
    return absent


def check_commitments(plan: CeremonyPlan, quorum: Quorum, stated: Mapping[str, Commitments]) -> EpochCertificate:
    """Everyone present committed to exactly its seeds, by the same headers, and all holders of a seed alike.

    ``stated`` is by the custodian whose signature was verified. Returns the certificate that all of them then sign.
    """
    if plan.quorum != quorum:
        raise RefusedError(Reason.CEREMONY, "ceremony plan is for another quorum", expected=quorum, actual=plan.quorum)
    absent = check_present(plan, stated)
    for name in sorted(stated):
        _check_statement("commitments", plan, stated[name].plan_digest, stated[name].custodian, name)
        check_indices("commitments", name, stated[name].commitments, set(quorum.indices_of(name)))
    _check_headers(stated)
    agreed: dict[int, bytes] = {}
    for name in sorted(stated):
        agreed.update(stated[name].commitments)
    differing = [
        index
        for name in sorted(stated)
        for index, value in stated[name].commitments.items()
        if not hmac.compare_digest(agreed[index], value)
    ]
    if differing:
        raise _differ(quorum, min(differing), stated)
    return EpochCertificate(plan, tuple(agreed[index] for index in range(quorum.seed_count)), absent)


def _differ(quorum: Quorum, index: int, stated: Mapping[str, Commitments]) -> RefusedError:
    values: dict[bytes, list[str]] = {}
    holders = [name for name in quorum.holders(index) if name in stated]
    for name in holders:
        values.setdefault(stated[name].commitments[index], []).append(name)
    return RefusedError(
        Reason.CEREMONY,
        f"holders of seed {index} committed differently",
        expected="one value from all holders",
        actual="; ".join(f"{', '.join(names)}: {value.hex()}" for value, names in values.items()),
        next_step="The ceremony is void: one of those named lied. Keep its signed statements as evidence.",
        details={
            "index": str(index),
            "custodians": ",".join(holders),
            **{f"commitment.{name}": value.hex() for value, names in values.items() for name in names},
        },
    )


def _check_headers(stated: Mapping[str, Commitments]) -> None:
    """All went by the same headers: of those present, one each."""
    for name in sorted(stated):
        headers = stated[name].headers
        if set(headers) != set(stated):
            raise refused(
                f"{name} was told of other participants than those that committed",
                sorted(set(headers) ^ set(stated)),
                expected=", ".join(sorted(stated)),
                actual=", ".join(sorted(headers)),
            )
    for author in sorted(stated):
        told = {name: stated[name].headers[author] for name in sorted(stated)}
        others = [name for name, digest in told.items() if digest != told[author]]
        if others:
            # Either the author signed two headers or the others made one up: only the headers themselves tell which.
            raise refused(
                f"went by different headers of {author}",
                sorted({author, *others}),
                expected="one header from each custodian",
                actual="; ".join(f"{name}: {digest}" for name, digest in told.items()),
            )


def check_certificate(payload: bytes, plan: CeremonyPlan, quorum: Quorum, signers: Collection[str]) -> EpochCertificate:
    """The certificate is for this plan and quorum and was signed by all who had to: everyone but the absent it names.

    ``signers`` are the custodians whose signatures over ``payload`` were verified. Raises :class:`MalformedError` or
    :class:`RefusedError` with ``CEREMONY``.
    """
    certificate = EpochCertificate.parse(payload)
    check_signed(certificate, plan, quorum, signers)
    return certificate


def check_signed(certificate: EpochCertificate, plan: CeremonyPlan, quorum: Quorum, signers: Collection[str]) -> None:
    """As :func:`check_certificate`, for one whose payload was read: ``signers`` signed exactly those bytes."""
    if certificate.plan != plan or certificate.plan.quorum != quorum:
        raise RefusedError(
            Reason.CEREMONY,
            "epoch certificate is for another plan or quorum",
            expected=f"key {plan.key_id} epoch {plan.epoch}, plan {plan.digest}",
            actual=f"key {certificate.plan.key_id} epoch {certificate.plan.epoch}, plan {certificate.plan.digest}",
        )
    if set(signers) != set(certificate.signers):
        names = sorted(set(certificate.signers) ^ set(signers))
        raise refused(
            "epoch certificate is not signed by all who made the epoch, and nobody else",
            names,
            expected=", ".join(certificate.signers),
        )
    check_present(plan, certificate.signers)


def check_seeds(certificate: EpochCertificate, me: str, seeds: Mapping[int, Seed]) -> None:
    """The seeds are exactly those that the certificate says I hold; on start-up, what is on disk.

    Raises :class:`RefusedError` with ``CEREMONY`` naming the first index that differs, never a seed.
    """
    plan = certificate.plan
    check_indices("seeds", me, seeds, set(plan.quorum.indices_of(me)))
    right = right_seeds(certificate, seeds)
    for index in sorted(seeds.keys() - right):
        raise refused(
            f"seed {index} is not the one in the epoch certificate",
            [me],
            expected=certificate.commitments[index].hex(),
            actual=_shown(plan.ceremony_id, index, seeds[index]),
            index=index,
        )


def _shown(ceremony_id: str, index: int, seed: Seed) -> str:
    return commitment(ceremony_id, index, seed).hex() if isinstance(seed, bytes) else "another seed, in a module"


def right_seeds(certificate: EpochCertificate, seeds: Mapping[int, Seed]) -> set[int]:
    """The indices whose seed is the one that the certificate commits to."""
    certified, ceremony_id = certificate.commitments, certificate.plan.ceremony_id
    made = commitments_to(ceremony_id, {index: seed for index, seed in seeds.items() if isinstance(seed, bytes)})
    kept = ((index, seed) for index, seed in seeds.items() if not isinstance(seed, bytes))
    right = {index for index, seed in kept if seed.is_committed(before_seed(ceremony_id, index), certified[index])}
    return right | {index for index, value in made.items() if hmac.compare_digest(value, certified[index])}


def _check_statement(what: str, plan: CeremonyPlan, plan_digest: str, stated: str, signer: str) -> None:
    if stated != signer:
        raise refused(f"{what} in another custodian's name", [signer], expected=signer, actual=stated)
    if plan_digest != plan.digest:
        raise refused(f"{what} for another plan", [signer], expected=plan.digest, actual=plan_digest)
