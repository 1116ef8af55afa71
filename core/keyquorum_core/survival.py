"""How much more can go wrong: from the custodians that still serve an epoch to the losses that leave no quorum.

The rest of a set of custodians A after a loss L is no quorum exactly when it lies inside some maximal unqualified
set U, that is when L contains all of A outside U. So the smallest fatal loss is the smallest A \\ U over all U: the
fewest holders that any seed has in A. Whole jurisdictions go the same way: L is then a union of jurisdictions, and has
to contain every one that A \\ U touches. Both are exact for every rule, and take one pass over the seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from keyquorum_core.quorum import Quorum

__all__ = ["Survival", "survival"]


@dataclass(frozen=True, slots=True)
class Survival:
    """What the custodians ``serving`` an epoch can still lose. Custodians and jurisdictions are in their ids' order."""

    serving: tuple[str, ...]
    """Those of the epoch's committee that were counted."""
    fatal_custodians: int
    """The fewest whose loss leaves no quorum; 0 when there is none now."""
    fatal_custodians_example: tuple[str, ...]
    fatal_jurisdictions: int
    """The fewest jurisdictions whose custodians' loss leaves no quorum; 0 when there is none now."""
    fatal_jurisdictions_example: tuple[str, ...]
    indispensable: tuple[str, ...]
    """Custodians that must not be lost next: without any one of them, there is no quorum."""
    indispensable_jurisdictions: tuple[str, ...]

    @property
    def quorum(self) -> bool:
        """Whether there is a quorum now."""
        return self.fatal_custodians > 0

    @property
    def losses(self) -> int:
        """How many more custodians may be lost, whichever they are; -1 when there is no quorum now."""
        return self.fatal_custodians - 1

    @property
    def jurisdiction_losses(self) -> int:
        """How many more jurisdictions may be lost, whichever they are; -1 when there is no quorum now."""
        return self.fatal_jurisdictions - 1

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``keyquorum cluster status --json``."""
        return {
            "quorum": self.quorum,
            "serving": list(self.serving),
            "losses": self.losses,
            "fatal_loss": list(self.fatal_custodians_example),
            "indispensable": list(self.indispensable),
            "jurisdiction_losses": self.jurisdiction_losses,
            "fatal_jurisdictions": list(self.fatal_jurisdictions_example),
            "indispensable_jurisdictions": list(self.indispensable_jurisdictions),
        }


def survival(quorum: Quorum, serving: Iterable[str]) -> Survival:
    """What an epoch made for ``quorum`` survives while ``serving`` serve it. Ids of others add nothing."""
    asked = set(serving)
    located: dict[str, list[str]] = {}
    for custodian in quorum.committee:
        if custodian.id in asked:
            located.setdefault(custodian.jurisdiction, []).append(custodian.id)
    there = {name: quorum.mask([name]) for name in sorted(name for names in located.values() for name in names)}
    where = {jurisdiction: quorum.mask(located[jurisdiction]) for jurisdiction in sorted(located)}
    few = _fewest_holders(quorum, there)
    far = _fewest_holders(quorum, where)
    everyone = quorum.mask(there)
    qualified = quorum.is_qualified_mask(everyone)
    return Survival(
        serving=tuple(there),
        fatal_custodians=len(few),
        fatal_custodians_example=few,
        fatal_jurisdictions=len(far),
        fatal_jurisdictions_example=far,
        indispensable=_indispensable(quorum, everyone, there) if qualified else (),
        indispensable_jurisdictions=_indispensable(quorum, everyone, where) if qualified else (),
    )


def _fewest_holders(quorum: Quorum, groups: dict[str, int]) -> tuple[str, ...]:
    """The fewest groups (name → mask) that hold all there is of some seed; the first such seed's where several tie."""
    held = [quorum.holder_counts(mask) for mask in groups.values()]
    if not held:
        return ()
    touching = [sum(count > 0 for count in counts) for counts in zip(*held, strict=True)]
    seed = touching.index(min(touching))
    return tuple(name for name, counts in zip(groups, held, strict=True) if counts[seed])


def _indispensable(quorum: Quorum, everyone: int, groups: dict[str, int]) -> tuple[str, ...]:
    return tuple(name for name, mask in groups.items() if not quorum.is_qualified_mask(everyone & ~mask))
