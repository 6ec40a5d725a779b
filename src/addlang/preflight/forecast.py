"""The forecast of English lost: small linear models fitted on runs of the lab, with conformal intervals.

There are two: for runs that nothing holds to the source but their plan (``free``), and for runs with a guard (``held``), which
settle where a penalty or KL balances the target's pull, so that the rest of a run costs them less than its beginning.

The outcome is the share of exact match that the adapted model loses, ``1 - after / before``; it is fitted on a logit scale
and clipped at 1 %, below which a run's own sampling error hides it. ``benchmarks/forecast/run.py`` makes the coefficients
and judges them on pairs that were never seen; docs/results.md has what came out.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
FLOOR = 0.01  # of the share lost, both ends
BEYOND = 1.0  # widths of the fitted range outside of which nothing is said


@dataclass(frozen=True)
class Coefficients:
    """A fitted forecast.

    Attributes:
        features: names of signals; see :func:`addlang.preflight.signals.signals`.
        mean, scale: of each over the fitted pairs.
        weights, intercept: of the standardised features, on the logit scale.
        quantile: of the absolute leave-one-out residuals, for a 90 % interval.
        low, high: range of each feature over the fitted pairs.
        fitted_on: what the pairs were, in words.
        parameters: of the model that was fitted on.
        probe_steps: of the probes that were fitted on; a probe of another length says something else.
    """

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    quantile: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    pairs: int
    fitted_on: str
    parameters: int
    probe_steps: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Coefficients:
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in cls.__dataclass_fields__
        }
        return cls(**known)


@dataclass(frozen=True)
class Forecast:
    """Share of the source ability that will be lost, with a 90 % interval.

    Attributes:
        lost, low, high: None where nothing can be said.
        outside: features outside of the fitted range, for which the interval was widened.
        why: what a reader must know, sentence by sentence.
    """

    lost: float | None
    low: float | None
    high: float | None
    outside: tuple[str, ...] = ()
    why: tuple[str, ...] = field(default=())

    def describe(self) -> dict[str, Any]:
        return {
            "lost": self.lost,
            "low": self.low,
            "high": self.high,
            "outside": list(self.outside),
            "why": list(self.why),
        }


@functools.cache
def shipped(*, held: bool = False) -> Coefficients:
    """The coefficients that come with addlang; ``held``: for a run with guards."""
    text = (files("addlang.preflight") / "forecast.json").read_text(encoding="utf-8")
    return Coefficients.from_json(json.loads(text)["held" if held else "free"])


def logit(share: float) -> float:
    """Of a share lost, clipped."""
    p = min(max(share, FLOOR), 1 - FLOOR)
    return math.log(p / (1 - p))


def expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def forecast(signals: Mapping[str, float], fitted: Coefficients, *, parameters: int | None = None) -> Forecast:
    """The forecast for one planned run.

    Args:
        signals: from :func:`addlang.preflight.signals.signals`.
        fitted: of a kind of run; see :func:`shipped`.
        parameters: of the model; the farther from the fitted one, the less is known about the interval.

    Outside of the fitted range the interval grows in proportion to the distance; at a whole range's width outside of it
    nothing is said.
    """
    missing = [name for name in fitted.features if name not in signals]
    if missing:
        return Forecast(None, None, None, why=(f"The forecast needs {', '.join(missing)}, which was not measured.",))
    if signals.get("probe_steps", fitted.probe_steps) != fitted.probe_steps:
        steps = f"{signals['probe_steps']:g} steps; the forecast was fitted on probes of {fitted.probe_steps}"
        return Forecast(None, None, None, ("probe_steps",), (f"The probe had {steps}.",))
    outside, distance, why = [], 0.0, []
    for name, low, high in zip(fitted.features, fitted.low, fitted.high, strict=True):
        value, width = signals[name], max(high - low, 1e-9)
        away = max(low - value, value - high, 0.0) / width
        if away > 0:
            outside.append(name)
            distance = max(distance, away)
            why.append(f"{name} is {value:.3g}; the fitted pairs have {low:.3g} to {high:.3g}.")
    if distance > BEYOND:
        why.append("That is too far outside for a forecast.")
        return Forecast(None, None, None, tuple(outside), tuple(why))
    z = [(signals[n] - m) / s for n, m, s in zip(fitted.features, fitted.mean, fitted.scale, strict=True)]
    x = fitted.intercept + sum(w * v for w, v in zip(fitted.weights, z, strict=True))
    half = fitted.quantile * (1 + 2 * distance)
    if outside:
        why.append(f"The interval was widened by {200 * distance:.0f} %.")
    if parameters is not None and not 0.1 <= parameters / fitted.parameters <= 10:
        why.append(
            f"Fitted on a model of {fitted.parameters / 1e6:.1f} million parameters; this one has {parameters / 1e6:,.0f} million. "
            "How often the interval holds here is not known."
        )
    return Forecast(_inside(x), _bound(x - half, low=True), _bound(x + half, low=False), tuple(outside), tuple(why))


def _inside(x: float) -> float:
    return 0.0 if x <= logit(FLOOR) else 1.0 if x >= logit(1 - FLOOR) else expit(x)


def _bound(x: float, *, low: bool) -> float:
    """An interval's end as a share; what reaches the clipped part stands for all of it."""
    if low:
        return 0.0 if x <= logit(FLOOR) else min(expit(x), 1 - FLOOR)
    return 1.0 if x >= logit(1 - FLOOR) else max(expit(x), FLOOR)


def fit(
    rows: Sequence[Mapping[str, float]],
    lost: Sequence[float],
    features: Sequence[str],
    *,
    penalty: float,
    level: float,
    fitted_on: str,
    parameters: int,
    probe_steps: int,
) -> Coefficients:
    """Ridge regression of the logit of the share lost, with the quantile of its leave-one-out residuals.

    Args:
        penalty: of the standardised weights.
        level: of the interval, for example 0.9; the finite-sample quantile of conformal prediction.
    """  # fmt: skip
    import numpy as np

    x = np.array([[row[f] for f in features] for row in rows], dtype=np.float64)
    t = np.array([logit(v) for v in lost])
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-9)
    z = np.c_[np.ones(len(x)), (x - mean) / scale]
    inverse, weights = solve(z, t, penalty)
    residuals = np.sort(np.abs((t - z @ weights) / (1 - np.einsum("ij,jk,ik->i", z, inverse, z))))
    rank = min(len(residuals) - 1, math.ceil(level * (len(residuals) + 1)) - 1)
    return Coefficients(
        tuple(features), tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights[1:].tolist()), float(weights[0]),
        float(residuals[rank]), tuple(x.min(0).tolist()), tuple(x.max(0).tolist()), len(x), fitted_on, parameters, probe_steps,
    )  # fmt: skip


def solve(
    z: np.ndarray[Any, Any], t: np.ndarray[Any, Any], penalty: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inverse of the penalised normal matrix and the weights; the first column (the intercept) is not penalised."""
    import numpy as np

    ridge = penalty * np.eye(z.shape[1])
    ridge[0, 0] = 0.0
    inverse = np.linalg.inv(z.T @ z + ridge)
    return inverse, inverse @ z.T @ t
