"""Recent latency of one custodian: an exponentially weighted mean for ranking, a 95th percentile for hedging."""

from __future__ import annotations

from collections import deque

__all__ = ["Latency"]

_WEIGHT = 0.2
_WINDOW = 128
_REFRESH = 16  # samples between two sorts of the window


class Latency:
    """Seconds. Both figures are 0 before the first sample."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.p95 = 0.0
        self._samples: deque[float] = deque(maxlen=_WINDOW)
        self._since_sort = 0

    def add(self, seconds: float) -> None:
        samples = self._samples
        self.mean = seconds if not samples else self.mean + _WEIGHT * (seconds - self.mean)
        samples.append(seconds)
        self._since_sort += 1
        if self._since_sort >= _REFRESH or len(samples) <= _REFRESH:
            self._since_sort = 0
            ordered = sorted(samples)
            self.p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
