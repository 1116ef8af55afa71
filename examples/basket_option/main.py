"""A European call on a basket of correlated assets by Monte Carlo, with an analytic control.

The assets follow correlated geometric Brownian motions. The call on their *geometric* average has a closed form; it
checks the simulation (a z-score) and, as a control variate, takes most of the noise out of the price of the call on
their *arithmetic* average, which has none (Kemna and Vorst, Journal of Banking & Finance 14, 1990; Glasserman, Monte
Carlo Methods in Financial Engineering, §4.1). Reads ``params.json`` beside it, writes ``result.json`` into the folder
named by ``KEYQUORUM_OUTPUT`` (or here). The same file runs on NumPy, and on CuPy where there is a GPU. Paths come in
chunks, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import array_api_compat
import numpy

HERE = Path(__file__).resolve().parent
Array = Any
"""An array of whichever namespace is in use: the array API standard has no type of its own to name here."""


def namespace() -> tuple[Any, Any, str]:
    """The array namespace, the library whose random numbers go with it, and the device's name.

    CuPy if it finds a GPU, else NumPy. Random numbers are not in the array API standard, so this is the one place where
    the libraries differ: both have ``random.default_rng(seed)`` with ``standard_normal(size=…)``, but of different
    generators, so that the same seed gives prices that differ within their standard errors.
    """
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
            return array_api_compat.array_namespace(cupy.empty(0)), cupy, f"gpu: {name}"
    except Exception:  # noqa: S110 - no CuPy, no driver or no device: each has its own exception, all mean the CPU
        pass
    return array_api_compat.array_namespace(numpy.empty(0)), numpy, "cpu"


@dataclass(frozen=True, slots=True)
class Basket:
    """Rates and volatilities per year, maturity in years; ``correlation`` is one number for every pair."""

    spots: tuple[float, ...]
    weights: tuple[float, ...]
    volatilities: tuple[float, ...]
    dividends: tuple[float, ...]
    correlation: float
    rate: float
    maturity: float
    strike: float

    def __post_init__(self) -> None:
        count = len(self.spots)
        if not count or {len(self.weights), len(self.volatilities), len(self.dividends)} != {count}:
            raise SystemExit("params.json: spots, weights, volatilities and dividends must be equally many")
        if abs(sum(self.weights) - 1) > 1e-12:
            raise SystemExit("params.json: the weights must add up to 1")

    def covariance(self) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
        """Of the log-returns to maturity: (assets, assets)."""
        count = len(self.spots)
        correlations = numpy.full((count, count), self.correlation) + (1 - self.correlation) * numpy.eye(count)
        sigma = numpy.asarray(self.volatilities)
        return numpy.asarray(correlations * numpy.outer(sigma, sigma) * self.maturity, dtype=numpy.float64)

    def log_means(self) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
        """Of the log-prices at maturity under the risk-neutral measure: (assets,)."""
        drifts = self.rate - numpy.asarray(self.dividends) - numpy.asarray(self.volatilities) ** 2 / 2
        return numpy.asarray(numpy.log(self.spots) + drifts * self.maturity, dtype=numpy.float64)

    def geometric_price(self) -> float:
        """The call on the geometric average in closed form: that average is lognormal."""
        weights = numpy.asarray(self.weights)
        mean = float(weights @ self.log_means())
        variance = float(weights @ self.covariance() @ weights)
        deviation = math.sqrt(variance)
        d1 = (mean - math.log(self.strike) + variance) / deviation
        normal = NormalDist()
        forward = math.exp(mean + variance / 2) * normal.cdf(d1) - self.strike * normal.cdf(d1 - deviation)
        return math.exp(-self.rate * self.maturity) * forward


class Moments:
    """Running sums of two discounted payoffs, taken about a point near their means so that squares lose no digits."""

    def __init__(self, xp: Any, about: float) -> None:
        self._xp = xp
        self._about = about
        self.count = 0
        self._a = self._g = self._aa = self._gg = self._ag = 0.0

    def add(self, arithmetic: Array, geometric: Array) -> None:
        xp, a, g = self._xp, arithmetic - self._about, geometric - self._about
        self.count += int(a.shape[0])
        self._a += float(xp.sum(a))
        self._g += float(xp.sum(g))
        self._aa += float(xp.sum(a * a))
        self._gg += float(xp.sum(g * g))
        self._ag += float(xp.sum(a * g))

    def means(self) -> tuple[float, float]:
        return self._about + self._a / self.count, self._about + self._g / self.count

    def covariances(self) -> tuple[float, float, float]:
        """Unbiased variance of the arithmetic payoff, of the geometric one, and their covariance."""
        n = self.count
        a, g = self._a / n, self._g / n
        return (
            (self._aa - n * a * a) / (n - 1),
            (self._gg - n * g * g) / (n - 1),
            (self._ag - n * a * g) / (n - 1),
        )


def simulate(xp: Any, rng: Any, basket: Basket, paths: int, chunk: int, seconds: float) -> Moments:
    """At least ``paths`` paths in chunks, and further chunks until ``seconds`` have passed."""
    began = time.monotonic()
    factor = xp.asarray(numpy.linalg.cholesky(basket.covariance()).T)
    log_means = xp.asarray(basket.log_means())
    weights = xp.asarray(basket.weights)
    discount = math.exp(-basket.rate * basket.maturity)
    moments = Moments(xp, about=basket.geometric_price())
    while moments.count < paths or time.monotonic() - began < seconds:
        size = min(chunk, paths - moments.count) if moments.count < paths else chunk
        normals = rng.standard_normal(size=(size, len(basket.spots)))
        logs = xp.matmul(normals, factor) + log_means
        arithmetic = xp.matmul(xp.exp(logs), weights) - basket.strike
        geometric = xp.exp(xp.matmul(logs, weights)) - basket.strike
        moments.add(
            discount * xp.where(arithmetic > 0, arithmetic, xp.zeros_like(arithmetic)),
            discount * xp.where(geometric > 0, geometric, xp.zeros_like(geometric)),
        )
    return moments


def run(params: dict[str, Any]) -> dict[str, Any]:
    """Price the basket that ``params`` describes; prices in the spots' currency."""
    xp, library, device = namespace()
    basket = Basket(
        spots=tuple(map(float, params["spots"])),
        weights=tuple(map(float, params["weights"])),
        volatilities=tuple(map(float, params["volatilities"])),
        dividends=tuple(map(float, params["dividends"])),
        correlation=float(params["correlation"]),
        rate=float(params["rate"]),
        maturity=float(params["maturity_years"]),
        strike=float(params["strike"]),
    )
    rng = library.random.default_rng(int(params["seed"]))
    moments = simulate(
        xp, rng, basket, max(2, int(params["paths"])), int(params["chunk_paths"]), float(params["seconds"])
    )
    exact = basket.geometric_price()
    plain, geometric = moments.means()
    var_a, var_g, cov = moments.covariances()
    beta = cov / var_g
    residual = max(0.0, var_a - beta * cov)
    geometric_error = math.sqrt(var_g / moments.count)
    return {
        "price": plain - beta * (geometric - exact),
        "standard_error": math.sqrt(residual / moments.count),
        "plain_price": plain,
        "plain_standard_error": math.sqrt(var_a / moments.count),
        "variance_reduction": var_a / residual if residual else None,
        "control_weight": beta,
        "geometric_analytic": exact,
        "geometric_price": geometric,
        "geometric_standard_error": geometric_error,
        "geometric_z_score": (geometric - exact) / geometric_error,
        "paths": moments.count,
        "device": device,
    }


def main() -> None:
    result = run(json.loads((HERE / "params.json").read_text("utf-8")))
    output = Path(os.environ.get("KEYQUORUM_OUTPUT", "."))
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"arithmetic basket call: {result['price']:.6f} ± {result['standard_error']:.6f} on {result['device']}")
    print(f"without the control:    {result['plain_price']:.6f} ± {result['plain_standard_error']:.6f}")
    print(
        f"geometric basket call:  {result['geometric_price']:.6f}, analytic {result['geometric_analytic']:.6f}, "
        f"z = {result['geometric_z_score']:+.2f}, {result['paths']} paths"
    )


if __name__ == "__main__":
    main()
