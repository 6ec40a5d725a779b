"""Intervals and tests. Everything that compares two models is paired by item; everything over seeds uses t.

Why not one percentile bootstrap for both: over items it is sound (hundreds of them), over three seeds it covers 74 %
where it claims 95 %, so intervals over seeds are t intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from addlang.errors import AddlangError
from addlang.evaluate.measurement import Measurement, by_items, cluster_key

CHUNK = 4_000_000  # resampled indices held at once (8 bytes each)


@dataclass(frozen=True)
class Difference:
    """``after - before`` on the same items, in the metric's own unit and direction.

    ``relative`` is ``(after - before) / before``; None where ``before`` is 0. Interval ends and ``p_value`` are None
    where the data cannot give them (a single item, a corpus metric without standard error). ``method`` says how.
    """

    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    p_value: float | None
    n: int
    method: str
    level: float


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` values with its interval; ``low`` and ``high`` are None for n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float


@dataclass(frozen=True)
class TTest:
    """Difference of two means over seeds, ``a - b``."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    method: str


@dataclass(frozen=True)
class Retention:
    """Mean relative change over tasks; minus is a loss whatever the metric's direction. ``by_task`` in task order.

    ``n`` counts sets of items: several metrics of the same items are one.
    """

    change: float
    low: float | None
    high: float | None
    n: int
    by_task: dict[str, float]
    method: str
    level: float


def paired_difference(
    before: Measurement, after: Measurement, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Difference:
    """Compare two models on the same items.

    The interval is a percentile bootstrap: items (or whole clusters) are drawn with replacement, the same draw for both
    models, and the ratio of sums is taken anew. The p value is McNemar's exact one where every item is right or wrong
    and independent, otherwise that of the bootstrap (two-sided, add-one). A corpus metric without per-item values gets
    a normal interval from its standard errors as if unpaired, which is too wide rather than too narrow.

    Raises:
        AddlangError: the two are not the same task on the same items under the same settings.
    """
    _same_task(before, after)
    b, a = before.value, after.value
    relative = (a - b) / b if b else None
    if before.aggregate is not None:
        return _unpaired(before, after, relative, level)
    sums = _paired_sums(before, after)
    n = before.n
    if len(sums) < 2:
        return Difference(b, a, a - b, None, None, relative, None, None, None, n, "none: a single unit", level)
    drawn = _resample(sums, resamples, seed)
    values_before, values_after = _ratios(drawn)
    ok = np.isfinite(values_before) & np.isfinite(values_after)
    values_before, values_after = values_before[ok], values_after[ok]
    changes = values_after - values_before
    low, high = _quantiles(changes, level)
    relative_low = relative_high = None
    positive = values_before != 0
    if relative is not None and positive.any():
        relative_low, relative_high = _quantiles(changes[positive] / values_before[positive], level)
    unit = "items" if len(sums) == n else f"{len(sums)} clusters"
    if _is_binary(before) and _is_binary(after):
        p, test = mcnemar(before, after), "exact McNemar"
    else:
        p, test = _bootstrap_p(changes), "bootstrap"
    method = f"paired bootstrap over {unit}, {resamples} resamples; p: {test}"
    return Difference(b, a, a - b, low, high, relative, relative_low, relative_high, p, n, method, level)


def mcnemar(before: Measurement, after: Measurement) -> float:
    """Exact two-sided p value for paired right/wrong items: a sign test on the items that changed."""
    from scipy.stats import binomtest

    old = {item.id: item.numerator for item in before.items}
    changes = [item.numerator - old[item.id] for item in after.items]
    lost, won = sum(c < 0 for c in changes), sum(c > 0 for c in changes)
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def retention(
    pairs: Sequence[tuple[Measurement, Measurement]], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Retention:
    """Mean over tasks of ``(after - before) / before``, as the papers average, with an interval over items.

    Every set of items is resampled by itself (paired; all metrics of the same items by one draw, for they err together), so
    the interval speaks about these tasks on new items, not about other tasks. Metrics where lower is better count with the
    opposite sign. Corpus metrics are drawn from a normal with their standard error, those of the same items as if they erred
    alike; one without a standard error adds nothing to the width, and ``method`` says so.

    Raises:
        AddlangError: no tasks, a task whose value before is 0, or pairs that do not belong together.
    """
    if not pairs:
        raise AddlangError("retention needs at least one task that was measured before and after")
    by_task: dict[str, float] = {}
    changes = []
    for before, after in pairs:
        _same_task(before, after)
        if before.value == 0:
            raise AddlangError(
                f"{before.task}: the value before is 0, so a relative change is not defined", "leave this task out"
            )
        changes.append(_sign(before) * (after.value - before.value) / before.value)
        name = before.task if before.task not in by_task else f"{before.task} ({before.metric})"
        by_task[name] = changes[-1]
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    unknown: list[str] = []
    groups = by_items(pairs, lambda pair: pair[0].items_id)
    for group in groups:
        if corpus := [pair for pair in group if pair[0].aggregate is not None]:
            z = rng.standard_normal((2, resamples))
            for before, after in corpus:
                spread = [m.stderr or 0.0 for m in (before, after)]
                unknown += [before.task] if not all(spread) else []
                old, new = (m.value + _sign(m) * s * u for m, s, u in zip((before, after), spread, z, strict=True))
                draws += _relative(before, old, new)
        if counted := [pair for pair in group if pair[0].aggregate is None]:
            sums = [_paired_sums(*pair) for pair in counted]
            unknown += [before.task for before, _ in counted] if len(sums[0]) < 2 else []
            drawn = _resample(np.hstack(sums), resamples, int(rng.integers(2**63)))
            for i, (before, _) in enumerate(counted):
                draws += _relative(before, *_ratios(drawn[:, 4 * i : 4 * i + 4]))
    draws = draws[np.isfinite(draws)] / len(pairs)
    low, high = _quantiles(draws, level) if len(unknown) < len(pairs) and len(draws) else (None, None)
    method = f"mean of relative changes; paired bootstrap within {len(groups)} sets of items, {resamples} resamples"
    if unknown:
        method += f"; without the uncertainty of {', '.join(unknown)}"
    return Retention(math.fsum(changes) / len(changes), low, high, len(groups), by_task, method, level)


def _sign(m: Measurement) -> float:
    return 1.0 if m.higher_is_better else -1.0


def _relative(m: Measurement, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Relative changes of resampled values; plus is better."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _sign(m) * (new - old) / old


def mean_relative_change(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean over tasks of ``(after - before) / before`` from printed values."""
    if len(before) != len(after) or not before:
        raise AddlangError(f"{len(before)} values before and {len(after)} after cannot be compared task by task")
    return math.fsum((a - b) / b for b, a in zip(before, after, strict=True)) / len(before)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with a t interval.

    Raises:
        AddlangError: no values.
    """
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise AddlangError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n, level)
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, level)


def paired_t(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> TTest:
    """Paired t test over seeds that two arms share (same order).

    Raises:
        AddlangError: fewer than two seeds, or another number of them.
    """
    if len(a) != len(b) or len(a) < 2:
        raise AddlangError(
            f"a paired t test needs the same seeds, two at least, in both arms; got {len(a)} and {len(b)}"
        )
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    spread = float(differences.std(ddof=1)) / math.sqrt(len(a))
    return _t_test(float(differences.mean()), spread, len(a) - 1, len(a), level, "paired t")


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> TTest:
    """Welch's t test over seeds that two arms do not share (unequal variances).

    Raises:
        AddlangError: an arm with fewer than two seeds.
    """
    if min(len(a), len(b)) < 2:
        raise AddlangError(f"Welch's t test needs two seeds at least in both arms; got {len(a)} and {len(b)}")
    parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
    total = sum(parts)
    freedom = total**2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b), strict=True)) if total else math.inf
    difference = float(np.mean(a) - np.mean(b))
    return _t_test(difference, math.sqrt(total), freedom, len(a) + len(b), level, "Welch's t")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: adjusted p values in input order; None (not tested) is not counted."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats (higher is better on both axes), by rising first coordinate.

    Equal points are all kept.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front: list[int] = []
    best = -math.inf  # highest y among points with a larger or equal x
    for i in order:
        if points[i][1] > best or (front and points[i] == points[front[-1]]):
            front.append(i)
            best = points[i][1]
    return front[::-1]


def interpolate_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """``y`` of a front at ``x``, linear between neighbouring points; None outside their range (no extrapolation).

    Points may come in any order; those that share an ``x`` count with their mean.
    """
    if len(xs) != len(ys):
        raise AddlangError(f"{len(xs)} x values and {len(ys)} y values are no curve")
    if not xs or not min(xs) <= x <= max(xs):
        return None
    knots = np.unique(np.asarray(xs, dtype=np.float64))
    heights = [np.mean([y for given, y in zip(xs, ys, strict=True) if given == knot]) for knot in knots]
    return float(np.interp(x, knots, heights))


def _same_task(before: Measurement, after: Measurement) -> None:
    # earlier versions told a metric's unit by its values: "share", or the metric's own name
    either = {before.unit, after.unit} == {"share", before.metric.partition(" (")[0]}
    for name in ("task", "metric", "version") if either else ("task", "metric", "version", "unit"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise AddlangError(f"{before.task}: {name} is '{old}' before and '{new}' after, so they are not comparable")
    keys = sorted(set(before.settings) | set(after.settings))
    changed = [k for k in keys if before.settings.get(k) != after.settings.get(k)]
    if changed:
        k = changed[0]
        raise AddlangError(
            f"{before.task}: setting '{k}' is {before.settings.get(k)!r} before and {after.settings.get(k)!r} after",
            "measure both models with the same settings",
        )
    if (before.aggregate is None) != (after.aggregate is None):
        raise AddlangError(f"{before.task}: one of the two has per-item values and the other has none")
    old_ids, new_ids = {i.id for i in before.items}, {i.id for i in after.items}
    if old_ids != new_ids:
        odd = sorted(old_ids ^ new_ids)
        raise AddlangError(
            f"{before.task}: the two models did not answer the same items ({len(odd)} differ, for example '{odd[0]}')",
            "measure both models on the same items",
        )


def _paired_sums(before: Measurement, after: Measurement) -> np.ndarray:
    """(C, 4): numerator and denominator before and after, summed by cluster, in order of ids."""
    new = {item.id: item for item in after.items}
    groups: dict[tuple[str, str], list[float]] = {}
    for item in sorted(before.items, key=lambda i: i.id):
        other = new[item.id]
        sums = groups.setdefault(cluster_key(item), [0.0] * 4)
        for k, value in enumerate((item.numerator, item.denominator, other.numerator, other.denominator)):
            sums[k] += value
    return np.array(list(groups.values()), dtype=np.float64)


def _resample(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, k): sums of C rows of ``sums`` (C, k) drawn with replacement."""
    rng = np.random.default_rng(seed)
    c = len(sums)
    parts = []
    step = max(1, CHUNK // c)
    for start in range(0, resamples, step):
        k = min(step, resamples - start)
        drawn = rng.integers(0, c, size=(k, c)) + np.arange(k)[:, None] * c
        counts = np.bincount(drawn.ravel(), minlength=k * c).reshape(k, c)
        parts.append(counts @ sums)
    return np.concatenate(parts)


def _ratios(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values before and after; not finite where a resample drew nothing that could be judged."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return drawn[:, 0] / drawn[:, 1], drawn[:, 2] / drawn[:, 3]


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _bootstrap_p(changes: np.ndarray) -> float:
    below, above = int((changes <= 0).sum()), int((changes >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(changes)))


def _is_binary(m: Measurement) -> bool:
    return all(i.denominator == 1 and i.numerator in (0, 1) and i.cluster is None for i in m.items)


def _t_test(difference: float, spread: float, freedom: float, n: int, level: float, method: str) -> TTest:
    from scipy.stats import t

    if spread == 0:
        return TTest(difference, difference, difference, 1.0 if difference == 0 else 0.0, n, f"{method}, no spread")
    half = float(t.ppf((1 + level) / 2, freedom)) * spread
    p = 2 * float(t.sf(abs(difference) / spread, freedom))
    return TTest(difference, difference - half, difference + half, p, n, method)


def _unpaired(before: Measurement, after: Measurement, relative: float | None, level: float) -> Difference:
    from scipy.stats import norm

    b, a = before.value, after.value
    if before.stderr is None or after.stderr is None:
        method = "none: a corpus metric without standard error"
        return Difference(b, a, a - b, None, None, relative, None, None, None, before.n, method, level)
    z = float(norm.ppf((1 + level) / 2))
    spread = math.hypot(before.stderr, after.stderr)
    p = 2 * float(norm.sf(abs(a - b) / spread)) if spread else float(a == b)
    relative_low = relative_high = None
    if relative is not None:
        half = z * math.hypot(after.stderr / b, a * before.stderr / b**2)  # delta method for a / b
        relative_low, relative_high = relative - half, relative + half
    method = "normal, unpaired: corpus metric without per-item values"
    low, high = a - b - z * spread, a - b + z * spread
    return Difference(b, a, a - b, low, high, relative, relative_low, relative_high, p, before.n, method, level)
