"""How much of the source language is kept, with the interval that a budget needs: paired by item, on all items or on a half
of them, and never narrower than their number allows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from addlang.errors import AddlangError
from addlang.evaluate.measurement import Measurement, by_items, cluster_key
from addlang.evaluate.statistics import retention
from addlang.report.verdict import abilities, of_text

Items = Literal["all", "choose", "confirm"]  # the latter two are the halves


@dataclass(frozen=True)
class Kept:
    """Mean over tasks of after / before (1 + the mean relative change; 1: nothing was lost), on ``n`` items (each once,
    however many metrics are about it).

    ``low`` is the lower end of the 95 % interval.
    """

    value: float
    low: float
    high: float
    n: int


def watched(measurements: Sequence[Measurement], names: Sequence[str] = ()) -> list[Measurement]:
    """What a budget is about: abilities in the source language, or bits per byte of its text where there are none.

    Args:
        names: tasks to watch instead, by the words their names begin with.

    Raises:
        AddlangError: nothing of the source language was measured, a name fits no task, a value is 0, or a task has no
            per-item values.
    """
    source = [m for m in measurements if m.role == "source"]
    chosen = abilities(source) or of_text(source)
    if names:
        chosen = [m for m in source if any(m.task.startswith(name) for name in names)]
        if lost := [n for n in names if not any(m.task.startswith(n) for m in source)]:
            known = ", ".join(sorted({m.task for m in source}))
            raise AddlangError(f"no task of the source language is named '{lost[0]}'", f"measured are: {known}")
    if not chosen:
        raise AddlangError(
            "nothing of the source language is measured, so no budget can be kept",
            "name tasks (--tasks) or source text (--source_text)",
        )
    for m in chosen:
        if m.value == 0:
            raise AddlangError(
                f"{m.task}: the source model's {m.metric} is 0, so no share of it can be kept",
                "watch another task (--watch)",
            )
        if m.aggregate is not None:
            raise AddlangError(
                f"{m.task}: {m.metric} has no values per item, so its items cannot be halved",
                "watch another task (--watch)",
            )
    return chosen


def part_of(measurement: Measurement, which: Items) -> Measurement:
    """All items, or one half of them (whole clusters): the same for every model, in an order that has nothing to do with theirs."""
    if which == "all":
        return measurement
    keys = sorted({cluster_key(i) for i in measurement.items}, key=lambda k: hashlib.sha256(repr(k).encode()).digest())
    middle = len(keys) // 2
    wanted = set(keys[:middle] if which == "choose" else keys[middle:])
    return replace(measurement, items=tuple(i for i in measurement.items if cluster_key(i) in wanted))


def share_kept(
    before: Sequence[Measurement],
    after: Sequence[Measurement],
    which: Items,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Kept:
    """What is kept on these items.

    The bootstrap says "certain" where no item changed; but then 1 in n could still have (:func:`smallest_loss`), so that is
    the least distance of ``low`` from 1.
    """
    found = {m.key: m for m in after}
    pairs = [(part_of(b, which), part_of(found[b.key], which)) for b in before]
    result = retention(pairs, resamples=resamples, level=level)
    if result.low is None or result.high is None:
        raise AddlangError("one item is no basis for an interval", "evaluate on more items (--limit)")
    floor = smallest_loss([b for b, _ in pairs], level)
    low = 1 + min(result.low, -floor)
    return Kept(1 + result.change, low, 1 + result.high, items_in([b for b, _ in pairs]))


def items_in(measurements: Sequence[Measurement]) -> int:
    """Number of items; several metrics of the same ones count once."""
    return sum(group[0].n for group in by_items(measurements, lambda m: m.items_id))


def smallest_loss(before: Sequence[Measurement], level: float = 0.95) -> float:
    """The smallest mean relative loss that these items can exclude: where none of n right-or-wrong items changed, up to
    ``1 - alpha^(1/n)`` of all such items may (the exact binomial bound). 0 for graded metrics. Metrics of the same items
    would lose together, so theirs add up; those of different items add in quadrature.
    """
    alpha = (1 - level) / 2
    groups = by_items((m for m in before if _is_binary(m)), lambda m: m.items_id)
    losses = [math.fsum((1 - alpha ** (1 / m.n)) / m.value for m in group) for group in groups]
    return math.hypot(*losses) / len(before)


def items_to_exclude(before: Sequence[Measurement], loss: float, level: float = 0.95) -> int:
    """Items of each right-or-wrong task that could exclude a mean relative loss of that size if none changed."""
    alpha = (1 - level) / 2
    groups = by_items((m for m in before if _is_binary(m)), lambda m: m.items_id)
    # of a sum over k metrics each of g sets of right-or-wrong items may contribute loss * k / sqrt(g), shared by its metrics
    part = loss * len(before) / math.sqrt(len(groups))
    return max(
        math.ceil(math.log(alpha) / math.log1p(-min(0.999, part * m.value / len(group))))
        for group in groups
        for m in group
    )


def items_for(kept: Kept, keep: float) -> int | None:
    """Items with which the lower end would reach ``keep`` if the value stayed; None if the value is below it."""
    if kept.value <= keep:
        return None
    return math.ceil(kept.n * ((kept.value - kept.low) / (kept.value - keep)) ** 2)


def _is_binary(m: Measurement) -> bool:
    return all(i.denominator == 1 and i.numerator in (0, 1) for i in m.items)
