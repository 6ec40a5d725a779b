"""What to do, and why: from the forecasts of a few planned runs to one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from addlang.preflight.forecast import Forecast


@dataclass(frozen=True)
class Candidate:
    """One planned run that was probed.

    Attributes:
        label: strategy and guards with their options, in words.
        strategy: its name and those of the guards.
        options: of the strategy, as in a recipe.
        ratio: share that is frozen; None where the strategy has no ratio.
        learning_rate: of the probe.
        gained: fall of the loss on held-out target text during the probe, nats per token.
        lost: rise of the loss on source text during the probe, nats per token.
        shift: mean absolute change of the source tokens' log-probabilities, nats.
        seconds_per_step: on this device.
    """

    label: str
    strategy: str
    options: dict[str, Any]
    learning_rate: float
    gained: float
    lost: float
    shift: float
    seconds_per_step: float
    forecast: Forecast
    ratio: float | None = None

    def describe(self) -> dict[str, Any]:
        return {**{k: v for k, v in vars(self).items() if k != "forecast"}, "forecast": self.forecast.describe()}


@dataclass(frozen=True)
class Advice:
    """A recommendation, or the reason why there is none.

    Attributes:
        reasons: for the setting as a whole.
        choices: (what, value, reason) of the strategy, its ratio and the learning rate: what was probed instead.
    """

    candidate: Candidate | None
    reasons: tuple[str, ...]
    choices: tuple[tuple[str, str, str], ...] = ()

    def describe(self) -> dict[str, Any]:
        return {
            "candidate": None if self.candidate is None else self.candidate.describe(),
            "reasons": list(self.reasons),
            "choices": [dict(zip(("what", "value", "reason"), c, strict=True)) for c in self.choices],
        }


def advise(candidates: Sequence[Candidate], keep: float) -> Advice:
    """The candidate that gains most of the target language among those that are expected to keep enough.

    Args:
        keep: share of the source ability to keep, such as 0.97.

    Where the forecast says nothing about any candidate, the one that gains most target per source shift in the probe is
    named, and that it is a guess.
    """
    said = [c for c in candidates if c.forecast.lost is not None]
    if not candidates:
        return Advice(None, ("No probe was run, so nothing is known about forgetting.",))
    chosen = best(candidates, keep)
    if not said:
        return Advice(chosen, (
            "The forecast says nothing about these settings; see above why.",
            f"In the probes {chosen.label} at {chosen.learning_rate:g} gained most target per change of the source "
            f"({chosen.gained:.3f} nats against {chosen.shift:.3f}). That is a guess, not a forecast.",
        ), choices(chosen, candidates, keep))  # fmt: skip
    sure, expected = _sure(said, keep), _expected(said, keep)
    if sure or expected:
        n = len(sure or expected)
        how = "even at the upper end of its interval" if sure else "at the middle of its interval, not at its upper end"
        reasons = [
            f"{n} of {len(said)} settings {'is' if n == 1 else 'are'} expected to keep {keep:.0%} of the source, {how}"
            + (
                "."
                if n == 1
                else f"; of these it gains most of the target in the probe ({chosen.gained:.3f} nats per token)."
            )
        ]
    else:
        reasons = [
            f"None of {len(said)} settings is expected to keep {keep:.0%} of the source; this one loses least.",
            "Consider fewer tokens, a lower learning rate, replay of source text, or a smaller --keep.",
        ]
    reasons.append(
        f"Forecast: {chosen.forecast.lost:.1%} of the source lost [{chosen.forecast.low:.1%}, {chosen.forecast.high:.1%}] "
        f"(90 %); the probe changed the source's tokens by {chosen.shift:.3f} nats and the target's by {chosen.gained:.3f}."
    )
    return Advice(chosen, tuple(reasons), choices(chosen, candidates, keep))


def best(candidates: Sequence[Candidate], keep: float) -> Candidate:
    """The one to take of at least one; see :func:`advise`."""
    said = [c for c in candidates if c.forecast.lost is not None]
    if not said:
        return max(candidates, key=lambda c: c.gained / max(c.shift, 1e-6))
    if enough := _sure(said, keep) or _expected(said, keep):
        return max(enough, key=lambda c: c.gained)
    return min(said, key=lambda c: c.forecast.lost or 0.0)


def _sure(said: Sequence[Candidate], keep: float) -> list[Candidate]:
    return [c for c in said if (c.forecast.high or 0.0) <= 1 - keep]


def _expected(said: Sequence[Candidate], keep: float) -> list[Candidate]:
    return [c for c in said if (c.forecast.lost or 0.0) <= 1 - keep]


def choices(chosen: Candidate, candidates: Sequence[Candidate], keep: float) -> tuple[tuple[str, str, str], ...]:
    """Why this strategy, this ratio and this learning rate: each against what was probed in its place."""
    strategies = dict.fromkeys(c.strategy for c in candidates if c.strategy != chosen.strategy)
    others = [best([c for c in candidates if c.strategy == name], keep) for name in strategies]
    own = [c for c in candidates if c.strategy == chosen.strategy]
    ratios = dict.fromkeys(c.ratio for c in own if c.ratio != chosen.ratio)
    by_ratio = [min((c for c in own if c.ratio == r), key=lambda c: _apart(c, chosen)) for r in ratios]
    rates = sorted((c for c in own if c.label == chosen.label and c is not chosen), key=lambda c: c.learning_rate)
    this = _told(chosen)
    return (
        (
            "strategy",
            chosen.strategy,
            _against(this, others, lambda c: f"{c.label} at {c.learning_rate:g}", "--compare"),
        ),
        (
            "ratio",
            "-" if chosen.ratio is None else f"{chosen.ratio:g}",
            "this strategy has none"
            if chosen.ratio is None
            else _against(this, by_ratio, lambda c: f"{c.ratio:g} at {c.learning_rate:g}", "--compare"),
        ),
        (
            "learning rate",
            f"{chosen.learning_rate:g}",
            _against(this, rates, lambda c: f"{c.learning_rate:g}", "--rates"),
        ),
    )


def _apart(one: Candidate, other: Candidate) -> float:
    return abs(math.log(one.learning_rate / other.learning_rate))


def _told(c: Candidate) -> str:
    lost = f"source changed by {c.shift:.3f}" if c.forecast.lost is None else f"{c.forecast.lost:.1%} lost"
    return f"{c.gained:+.3f} gained, {lost}"


def _against(this: str, others: Sequence[Candidate], name: Callable[[Candidate], str], option: str) -> str:
    if not others:
        return f"no other was probed ({option})"
    return f"{this}; in its place " + "; ".join(f"{name(c)}: {_told(c)}" for c in others)
