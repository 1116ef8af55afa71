"""Revocations: what a cluster's operators withdrew, as one growing document (docs/spec/revocations.md).

Each version of the bulletin lists everything that is revoked. A later version may add entries; an entry leaves the list
only by being named among the lifted, with a reason, so that nothing comes back by being left out
(:func:`check_follows`). What the entries are asked about is on the release path: each target is a dictionary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from keyquorum_core.attestation.appraisal import Appraisal
from keyquorum_core.attestation.inventory import HARDWARE
from keyquorum_core.bulletin import Bulletin, Kind
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import JOB_ID, SHA256_HEX, check
from keyquorum_core.strictjson import Fields

__all__ = ["NOTHING", "REVOCATIONS", "TARGETS", "Revocation", "Revocations", "changes", "check_follows"]

_WHAT = "revocations"
_MAX_ENTRIES = 65536
_MAX_REASON = 400
_HARDWARE = re.compile(
    "|".join(rf"{kind}:(?:{pattern.pattern})" for kind, pattern in sorted(HARDWARE.items())), re.ASCII
)
_MEASUREMENT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}:(?:[0-9a-f]{2}){16,64}", re.ASCII)

TARGETS: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "job": JOB_ID,
        "owner": SHA256_HEX,
        "worker": SHA256_HEX,
        "hardware": _HARDWARE,
        "measurement": _MEASUREMENT,
        "policy": SHA256_HEX,
        "roster": SHA256_HEX,
    }
)
"""What can be revoked, and how its subject is written. ``job``: its id; ``owner``: the fingerprint of the owner's
identity, whatever it calls itself; ``worker``: SHA-256 of its encoded recipient key, as in leaves; ``hardware``:
``kind:id`` as the inventory writes it; ``measurement``: ``evidence type:hex``; ``policy``: digest of a policy bundle;
``roster``: digest of a roster version."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """One entry. ``at``: unix seconds since when, for people; what is listed is revoked now. Holds no personal data
    but what operators write into ``reason``."""

    target: str
    subject: str
    reason: str
    at: int

    @property
    def name(self) -> tuple[str, str]:
        return self.target, self.subject

    def as_json(self) -> dict[str, object]:
        return {"at": self.at, "reason": self.reason, "subject": self.subject, "target": self.target}


@dataclass(frozen=True, slots=True)
class Revocations:
    """Loaded by :meth:`read`, which is what checks it. Every ``require_…`` raises :class:`RefusedError`
    (``REVOKED``)."""

    version: int
    digest: str
    """SHA-256 of the bulletin's payload, hex; empty for :data:`NOTHING`."""
    revoked: Mapping[tuple[str, str], Revocation]
    lifted: Mapping[tuple[str, str], Revocation]

    @classmethod
    def read(cls, bulletin: Bulletin) -> Revocations:
        """The body: ``{"revoked": [entry, …], "lifted": [entry, …]}``, an entry being ``{"target", "subject",
        "reason", "at"}``. Raises :class:`MalformedError`, also for a subject there twice."""
        fields = Fields(bulletin.body, _WHAT)
        revoked = [_entry(each) for each in fields.list("revoked", max_items=_MAX_ENTRIES)]
        lifted = [_entry(each) for each in fields.list("lifted", max_items=_MAX_ENTRIES)]
        fields.done()
        names = [entry.name for entry in (*revoked, *lifted)]
        if len(set(names)) != len(names):
            repeated = next(name for name, count in Counter(names).items() if count > 1)
            raise MalformedError(
                Reason.MALFORMED,
                f"{_WHAT}: an entry stands there twice",
                expected="each subject once, revoked or lifted",
                actual=" ".join(repeated)[:200],
            )
        return cls(
            bulletin.version,
            bulletin.digest,
            MappingProxyType({entry.name: entry for entry in revoked}),
            MappingProxyType({entry.name: entry for entry in lifted}),
        )

    def find(self, target: str, subject: str) -> Revocation | None:
        return self.revoked.get((target, subject))

    def require_standing(self, target: str, subject: str) -> None:
        """``subject`` is not revoked."""
        entry = self.revoked.get((target, subject))
        if entry is not None:
            raise self._refusal(entry)

    def require_asker(self, *, job_id: str, owner: str, roster: str) -> None:
        """Neither the job, nor its owner (fingerprint), nor the roster in force (digest)."""
        self.require_standing("roster", roster)
        self.require_standing("owner", owner)
        self.require_standing("job", job_id)

    def require_worker(self, appraisal: Appraisal, recipient_sha256: str) -> None:
        """Neither the worker's key, nor any of its hardware, nor anything that was measured on it."""
        self.require_standing("worker", recipient_sha256)
        for hardware in appraisal.hardware:
            self.require_standing("hardware", str(hardware))
        for item in appraisal.items:
            if item.measurement:
                self.require_standing("measurement", f"{item.type}:{item.measurement}")

    def of(self, target: str) -> tuple[Revocation, ...]:
        return tuple(entry for entry in self.revoked.values() if entry.target == target)

    def _refusal(self, entry: Revocation) -> RefusedError:
        return RefusedError(
            Reason.REVOKED,
            f"the operators revoked this {entry.target}: {entry.reason}",
            expected=f"a {entry.target} that stands",
            actual=f"{entry.subject}, revoked at {entry.at}",
            next_step="If that was a mistake, the operators lift it in the next version of the revocations.",
            details={"target": entry.target, "revocations_version": str(self.version)},
        )


NOTHING: Final = Revocations(0, "", MappingProxyType({}), MappingProxyType({}))
"""Where no document was ever accepted."""


def check_follows(previous: Revocations, following: Revocations) -> None:
    """Nothing that ``previous`` lists is missing from ``following``: it is revoked still, or lifted with a reason.

    Raises :class:`RefusedError` (``ROLLBACK``)."""
    missing = [name for name in previous.revoked if name not in following.revoked and name not in following.lifted]
    if missing:
        raise RefusedError(
            Reason.ROLLBACK,
            f"version {following.version} of the revocations leaves out what version {previous.version} lists",
            expected="every earlier entry, revoked still or among the lifted",
            actual=_some(missing),
            next_step="Sign a version that has all entries of the one before; `keyquorum revoke` makes it from that.",
        )


def changes(previous: Revocations, following: Revocations) -> tuple[str, ...]:
    """What the later version does, line by line, for people: ``revoke TARGET SUBJECT: REASON``, and ``lift``."""
    before = previous.revoked
    return (
        *(f"revoke {_line(entry)}" for name, entry in sorted(following.revoked.items()) if name not in before),
        *(f"lift {_line(entry)}" for name, entry in sorted(following.lifted.items()) if name in before),
    )


def _line(entry: Revocation) -> str:
    return f"{entry.target} {entry.subject}: {entry.reason}"


def _some(names: Iterable[tuple[str, str]]) -> str:
    listed = sorted(f"{target} {subject[:64]}" for target, subject in names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _entry(value: object) -> Revocation:
    fields = Fields(value, f"{_WHAT} entry")
    entry = Revocation(
        target=fields.text("target", max_length=16),
        subject=fields.text("subject", max_length=256),
        reason=fields.text("reason", max_length=_MAX_REASON),
        at=fields.integer("at"),
    )
    fields.done()
    pattern = TARGETS.get(entry.target)
    if pattern is None:
        raise MalformedError(
            Reason.MALFORMED,
            f"{_WHAT}: nothing of that kind can be revoked",
            expected=", ".join(TARGETS),
            actual=ascii(entry.target),
        )
    check(pattern, entry.subject, f"subject of a revoked {entry.target}")
    if not entry.reason.isprintable() or not entry.reason.strip():
        raise MalformedError(
            Reason.MALFORMED, f"{_WHAT}: an entry without a reason", expected=f"1…{_MAX_REASON} printable characters"
        )
    return entry


REVOCATIONS: Final = Kind("revocations", Revocations.read, check_follows)
