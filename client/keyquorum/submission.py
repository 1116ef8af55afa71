"""What came of submitting a job."""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum.jobs import Job

__all__ = ["SubmittedJob"]


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A committed job, and how its key was opened."""

    job: Job
    custodians: tuple[str, ...]
    """Whose answers counted, sorted."""
    blamed: tuple[str, ...]
    """Custodians that gave wrong contributions, by their own signatures."""
    suspected: tuple[str, ...]
    """Custodians of whom some did, without telling which."""
    refused: dict[str, str]
    """Custodians that refused, by the coordinator's word, or whose answer didn't verify; with why."""
    confirmed: bool
    """Whether each seed was reported alike by two custodians, so that no single one can have spoilt the key."""

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def state(self) -> str:
        return self.job.state

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            **self.job.as_dict(),
            "custodians_answered": list(self.custodians),
            "blamed": list(self.blamed),
            "suspected": list(self.suspected),
            "refused": dict(self.refused),
            "confirmed": self.confirmed,
        }
