"""How a job ended: what the signed statement says, and what the worker's own log and ``--json`` say."""

from __future__ import annotations

from dataclasses import dataclass, field

from keyquorum_core.errors import KeyquorumError, Reason, printable
from keyquorum_core.manifest import ArtifactDigest, ResultStatement, sign_result
from keyquorum_gpu_worker.keys import JobKeys, wipe
from keyquorum_gpu_worker.runner import JobRun

__all__ = ["LAPSED", "NOT_RUN", "Ending", "JobEnd"]

NOT_RUN = 126
"""Exit code of a job that was not run: the shell's for "cannot execute"."""

LAPSED = "lapsed"
"""Outcome of a job whose lease was over before it had ended; there is no statement of it."""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended here, for the log and for ``--json``."""

    job_id: str
    outcome: str
    """One of the manifest module's OUTCOMES; ``refused`` also when the worker gave up before it held the key; or
    :data:`LAPSED`."""
    reason: str = ""
    exit_code: int = 0
    custodians: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()
    layers: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return {
            "job_id": self.job_id,
            "outcome": self.outcome,
            "reason": self.reason,
            "exit_code": self.exit_code,
            "custodians": list(self.custodians),
            "blamed": list(self.blamed),
            "layers": self.layers,
            "seconds": round(self.seconds, 3),
        }


class Ending:
    """What the statement will say."""

    def __init__(self, job: str, keys: JobKeys, started_at: int) -> None:
        self._job = job
        self._keys = keys
        self._started_at = started_at
        self.outcome = "refused"
        self.exit_code = NOT_RUN
        self.reason = ""
        self.layers: dict[str, object] = {}
        self.log = bytearray()
        self.artifacts: dict[str, ArtifactDigest] = {}
        self.statement = b""

    @property
    def maker(self) -> bytes:
        """The worker's encoded public identity, which its artifacts are bound to."""
        return self._keys.identity.public.to_bytes()

    def take(self, run: JobRun) -> None:
        self.outcome, self.exit_code, self.reason = run.outcome, run.exit_code, run.reason
        self.layers, self.log = run.layers, run.log

    def refuse(self, error: KeyquorumError) -> None:
        """The job could not be run, or what it left could not be taken."""
        if error.reason is Reason.TOO_LARGE:
            self.outcome = "output-too-large"
        elif self.outcome == "completed":
            self.outcome = "failed"
        if not self.reason:
            self.reason = str(error)

    def sign(self, finished_at: int) -> None:
        text = printable(self.reason).replace("\n", " ")[:1024]
        statement = ResultStatement(
            job_id=self._job,
            worker=self._keys.identity.public.fingerprint,
            exit_code=self.exit_code,
            outcome=self.outcome,
            reason=text,
            artifacts=self.artifacts,
            started_at=self._started_at,
            finished_at=max(finished_at, self._started_at),
        )
        self.statement = sign_result(statement, self._keys.identity)

    def forget(self) -> None:
        wipe(self.log)
