"""Where a TPM's quotes leave it, and what may come next.

A TPM says in every quote how often it was reset (``resetCount``), how often resumed since (``restartCount``), and for
how long it has been powered (``clock``). :func:`check_later` judges a worker's first quote, at which they may have
grown; :func:`proceed` judges those of its lease, at which the counters must not: a machine that restarted is not the
one that was appraised.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from keyquorum_core.errors import Reason, RefusedError

__all__ = ["QuoteState", "check_later", "proceed"]


@dataclass(frozen=True, slots=True)
class QuoteState:
    """Where an AK's last accepted quote left its TPM. A custodian keeps one for each AK."""

    ak: str
    """Fingerprint of the AK."""
    reset_count: int
    restart_count: int
    clock: int
    """Milliseconds."""
    firmware_version: int


def check_later(previous: QuoteState, state: QuoteState, *, clock_is_safe: bool) -> None:
    """The reset counter must not go back, nor, without a reset, the restart counter and the clock. After a reset the
    clock may go back where the TPM says (``clock_is_safe`` false) that it may have: power was cut before it was saved.

    Raises :class:`RefusedError` ``STALE``, and ``PROVENANCE`` where ``previous`` is another AK's.
    """
    _check_same_ak(previous, state)
    if state.reset_count < previous.reset_count:
        raise _stale("the TPM's reset counter went back", f"at least {previous.reset_count}", state.reset_count)
    was_reset = state.reset_count > previous.reset_count
    if not was_reset and state.restart_count < previous.restart_count:
        raise _stale("the TPM's restart counter went back", f"at least {previous.restart_count}", state.restart_count)
    if state.clock <= previous.clock and not (was_reset and not clock_is_safe):
        raise _stale("the TPM's clock did not go on", f"more than {previous.clock} ms", f"{state.clock} ms")


def proceed(previous: QuoteState, state: QuoteState) -> None:
    """A further quote of the same worker: nothing restarted, and time went on.

    Raises :class:`RefusedError` ``STALE``, and ``PROVENANCE`` where ``previous`` is another AK's.
    """
    _check_same_ak(previous, state)
    for what, before, after in (
        ("was reset", previous.reset_count, state.reset_count),
        ("was restarted or resumed", previous.restart_count, state.restart_count),
        ("got other firmware", previous.firmware_version, state.firmware_version),
    ):
        if before != after:
            raise _stale(f"the TPM {what} since the worker was appraised", before, after)
    if state.clock <= previous.clock:
        raise _stale("the TPM's clock did not go on", f"more than {previous.clock} ms", f"{state.clock} ms")


def _check_same_ak(previous: QuoteState, state: QuoteState) -> None:
    if not hmac.compare_digest(previous.ak, state.ak):
        raise RefusedError(
            Reason.PROVENANCE, "the quote is by another TPM's key than before", expected=previous.ak, actual=state.ak
        )


def _stale(message: str, expected: object, actual: object) -> RefusedError:
    return RefusedError(Reason.STALE, message, expected=expected, actual=actual, next_step="appraise the worker anew")
