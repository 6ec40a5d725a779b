"""The search for the largest share of an update, apart from models: what is tried in which order, and what may be said
about the result after several looks at the same items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

HALVINGS = 6  # of bisection: shares are found to 1/64
SAFER = (0.25, 0.5, 0.75, 1.0)  # of the share found: confirmed from the safest upward, then beyond it
SHRINK = 0.25  # pulls ratios of parts with hardly any measured effect towards the mean


@dataclass(frozen=True)
class Family:
    """Shares of the parts of an update that rise together from 0 (``u`` = 0) to 1 (``u`` = 1).

    With a loss of the source that grows with the square of a part's share, ``c m^2``, and a gain of the target that is lost
    with the square of what is taken away, ``b (1 - m)^2``, the best shares for any budget are ``m = b / (b + price c)``: one
    number, the price, orders them all. ``ratios`` are ``b / c`` relative to the parts' mean; equal ratios give ``m = u``.
    """

    ratios: Mapping[str, float]

    def shares(self, u: float) -> dict[str, float]:
        """Share of every part."""
        return {part: round(r * u / (r * u + 1 - u), 4) for part, r in self.ratios.items()}


def family_of(target_lost: Mapping[str, float], source_won: Mapping[str, float]) -> Family:
    """Ratios from what leaving out one part at a time costs the target and gives back to the source.

    Negative effects count as none; parts without any effect get the mean ratio.
    """

    def scaled(effects: Mapping[str, float]) -> dict[str, float]:
        clipped = {k: max(0.0, v) for k, v in effects.items()}
        mean = sum(clipped.values()) / len(clipped)
        return {k: v / mean if mean else 1.0 for k, v in clipped.items()}

    b, c = scaled(target_lost), scaled(source_won)
    return Family({k: (b[k] + SHRINK) / (c[k] + SHRINK) for k in b})


def largest(passes: Callable[[float], bool], halvings: int = HALVINGS) -> float:
    """The largest ``u`` in [0, 1] that passes, if whatever lies below a passing one passes; 0 is taken to pass."""
    if passes(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def grid(steps: int) -> list[float]:
    """1/steps, 2/steps, ..., 1."""
    return [round(k / steps, 4) for k in range(1, steps + 1)]


def ladder(u: float, steps: int) -> list[float]:
    """Ascending candidates around a share that other items suggest: it may be too bold or too careful."""
    beyond = int((1 - u) * steps + 1e-9)
    return [round(x, 4) for x in [*(f * u for f in SAFER), *(u + k / steps for k in range(1, beyond + 1))]]


def confirmed(candidates: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """The last of ascending candidates before the first that does not pass; None if that is the first.

    A fixed-sequence test: each candidate is tested at the full level, and only if all safer ones passed. The chance that the
    result loses more than it may is then that of one test, however many are made (Maurer, Hothorn and Lehmacher 1995; for
    risks that rise with a parameter: Learn then Test, Angelopoulos et al. 2021). The items that test must have had no
    part in choosing the candidates or their order.
    """
    best = None
    for u in candidates:
        if not passes(u):
            break
        best = u
    return best
