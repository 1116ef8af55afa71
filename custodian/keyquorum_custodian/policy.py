"""This custodian's own policy: its documents, its clock, and the facts that its appraisals give (DESIGN §6 step 4).

The rules are core's (:class:`~keyquorum_core.policy.seat.PolicySeat`). Here is where they come from: bundle and lists
are bulletins that this custodian accepted from the signers its configuration names, looked at anew for every decision;
the time is the latest that its clock ever showed, which the keystore remembers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from keyquorum_core.attestation.appraisal import Appraisal
from keyquorum_core.bulletin import Kind
from keyquorum_core.policy.bundle import EXPORT, SANCTIONS, policy_kind
from keyquorum_core.policy.engine import Decision, PolicyEngine
from keyquorum_core.policy.facts import JobFacts, QuorumFacts, Seat, WorkerFacts
from keyquorum_core.policy.lists import ControlledList
from keyquorum_core.policy.seat import PolicySeat, SteadyTime
from keyquorum_custodian.bulletins import Bulletins
from keyquorum_custodian.keystore import Keystore

__all__ = ["POLICY_KINDS", "CustodianPolicy", "KeptTime", "policy_kinds", "worker_facts"]

_GPU: Final = "nvidia-gpu"
_LISTS: Final = {"export": EXPORT, "sanctions": SANCTIONS}
POLICY_KINDS: Final = ("export-list", "policy", "sanctions-list")
"""The kinds of bulletin whose signers are the custodian's own affair."""
_SAVE_SECONDS: Final = 60
_KEPT_WORKERS: Final = 1024
_HOW_TO_INSTALL: Final = (
    "Sign a bundle with `keyquorum policy sign`, and run `keyquorum-custodian policy install FILE --dir DIR`."
)


def policy_kinds(seat: Seat) -> tuple[Kind[object], ...]:
    """How this custodian reads policies and lists."""
    return (policy_kind(seat), EXPORT, SANCTIONS)


def worker_facts(appraisal: Appraisal) -> WorkerFacts:
    """What policies may know of a worker: what its evidence proved, and what the inventory says of that hardware."""
    return WorkerFacts(
        hardware=",".join(sorted(map(str, appraisal.hardware))),
        region=appraisal.region,
        provider=appraisal.provider,
        evidence=appraisal.types,
        machine=appraisal.machine.name,
        model=appraisal.machine.model,
        products=tuple(item.product for item in appraisal.items if item.type != _GPU),
        gpu_models=tuple(chip for item in appraisal.items if item.type == _GPU for chip in item.product.split(", ")),
        tcb={f"{item.type}.{component}": level for item in appraisal.items for component, level in item.tcb.items()},
        development=appraisal.development,
    )


class KeptTime(SteadyTime):
    """A clock that does not go back, not even over a restart: :meth:`save` is called every second or so."""

    def __init__(self, clock: Callable[[], float], keystore: Keystore) -> None:
        SteadyTime.__init__(self, clock, keystore.highest_time())
        self._keystore = keystore
        self._saved = self.highest

    def save(self) -> None:
        """Raises ``STORAGE``, and tries again the next time."""
        now = self.now()
        if now >= self._saved + _SAVE_SECONDS:
            self._keystore.save_highest_time(now)
            self._saved = now


class _Kept:
    """The documents in force among those this custodian accepted."""

    def __init__(self, seat: Seat, bulletins: Bulletins) -> None:
        self._bulletins = bulletins
        self._policy = policy_kind(seat)

    def engine(self) -> PolicyEngine | None:
        found = self._bulletins.find(self._policy)
        return None if found is None else found.value

    def list_named(self, name: str) -> ControlledList | None:
        found = self._bulletins.find(_LISTS[name])
        return None if found is None else found.value


class CustodianPolicy(PolicySeat):
    """One custodian's seat; used from one thread."""

    def __init__(self, seat: Seat, quorum: QuorumFacts, bulletins: Bulletins, time: KeptTime) -> None:
        PolicySeat.__init__(self, seat, quorum, _Kept(seat, bulletins), time, how_to_install=_HOW_TO_INSTALL)
        self._kept_time = time
        self._workers: OrderedDict[tuple[str, str, str], WorkerFacts] = OrderedDict()

    def check_recipient(self, job: JobFacts, appraisal: Appraisal | None, *, logged: bool) -> Decision:
        """May the job's key go to the worker of this appraisal, or (``None``) to its owner? Raises as
        :meth:`PolicySeat.decide`."""
        return self.check_release(job, None if appraisal is None else self._facts(appraisal), logged=logged)

    def _facts(self, appraisal: Appraisal) -> WorkerFacts:
        key = (appraisal.evidence_sha256, appraisal.reference_digest, appraisal.inventory_digest)
        facts = self._workers.get(key)
        if facts is None:
            facts = self._workers[key] = worker_facts(appraisal)
            if len(self._workers) > _KEPT_WORKERS:
                self._workers.popitem(last=False)
        return facts

    def flush(self) -> None:
        """Write what was left for after the answers. Raises ``STORAGE``."""
        self._kept_time.save()
