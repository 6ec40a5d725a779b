"""What to do, and why: from the forecasts of a few planned runs to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addlang.preflight.forecast import Forecast


@dataclass(frozen=True)
class Candidate:
    """One planned run that was probed.

    Attributes:
        label: strategy and options, in words.
        strategy, options: as in a recipe.
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

    def describe(self) -> dict[str, Any]:
        return {**{k: v for k, v in vars(self).items() if k != "forecast"}, "forecast": self.forecast.describe()}


@dataclass(frozen=True)
class Advice:
    """A recommendation, or the reason why there is none."""

    candidate: Candidate | None
    reasons: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        return {
            "candidate": None if self.candidate is None else self.candidate.describe(),
            "reasons": list(self.reasons),
        }


def advise(candidates: Sequence[Candidate], keep: float) -> Advice:
    """The candidate that gains most of the target language among those that are expected to keep enough.

    Args:
        keep: share of the source ability to keep, such as 0.97.

    Where the forecast says nothing about any candidate, the one that gains most target per source shift in the probe is
    named, and that it is a guess.
    """
    said = [c for c in candidates if c.forecast.lost is not None]
    if not said:
        best = max(candidates, key=lambda c: c.gained / max(c.shift, 1e-6), default=None)
        if best is None:
            return Advice(None, ("No probe was run, so nothing is known about forgetting.",))
        return Advice(best, (
            "The forecast says nothing about these settings; see above why.",
            f"In the probes {best.label} at {best.learning_rate:g} gained most target per change of the source "
            f"({best.gained:.3f} nats against {best.shift:.3f}). That is a guess, not a forecast.",
        ))  # fmt: skip
    sure = [c for c in said if (c.forecast.high or 0.0) <= 1 - keep]
    expected = [c for c in said if (c.forecast.lost or 0.0) <= 1 - keep]
    if sure or expected:
        chosen = max(sure or expected, key=lambda c: c.gained)
        how = "even at the upper end of its interval" if sure else "at the middle of its interval, not at its upper end"
        reasons = [
            f"{len(sure or expected)} of {len(said)} settings are expected to keep {keep:.0%} of the source, {how}; of "
            f"these it gains most of the target in the probe ({chosen.gained:.3f} nats per token)."
        ]
    else:
        chosen = min(said, key=lambda c: c.forecast.lost or 0.0)
        reasons = [
            f"None of {len(said)} settings is expected to keep {keep:.0%} of the source; this one loses least.",
            "Consider fewer tokens, a lower learning rate, replay of source text, or a smaller --keep.",
        ]
    reasons.append(
        f"Forecast: {chosen.forecast.lost:.1%} of the source lost [{chosen.forecast.low:.1%}, {chosen.forecast.high:.1%}] "
        f"(90 %); the probe changed the source's tokens by {chosen.shift:.3f} nats and the target's by {chosen.gained:.3f}."
    )
    others = [c for c in said if c is not chosen]
    if others:
        most = max(others, key=lambda c: c.gained)
        if most.gained > chosen.gained:
            reasons.append(
                f"{most.label} at {most.learning_rate:g} would gain more ({most.gained:.3f}) and is expected to lose {most.forecast.lost:.1%}."
            )
    return Advice(chosen, tuple(reasons))
