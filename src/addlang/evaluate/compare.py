"""Before against after, as flat rows for reports."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from addlang.errors import AddlangWarning
from addlang.evaluate.measurement import Measurement
from addlang.evaluate.statistics import paired_difference


def compare(
    before: Sequence[Measurement], after: Sequence[Measurement], *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """One row per (task, metric) that both models have, in the order of ``before``.

    Values, differences and interval ends are in the metric's unit and direction (minus is lower, not worse: see
    ``higher_is_better``); ``relative`` is the difference over the value before. Interval ends, ``p`` and ``relative``
    are None where the data cannot give them; p values are not corrected for their number, see ``statistics.holm``. Rows with
    one ``items_id`` are about the same items.

    Raises:
        AddlangError: the two were not measured on the same items under the same settings.
    """
    later = {m.key: m for m in after}
    alone = sorted({m.key for m in before} ^ set(later))
    if alone:
        names = ", ".join(f"{task} ({metric})" for task, metric in alone)
        warnings.warn(f"measured on one of the two models only, so not compared: {names}", AddlangWarning, stacklevel=2)
    rows = []
    for old in before:
        if old.key not in later:
            continue
        d = paired_difference(old, later[old.key], resamples=resamples, seed=seed)
        rows.append(
            {
                "task": old.task,
                "role": old.role,
                "language": old.language,
                "metric": old.metric,
                "unit": next((u for u in (old.unit, later[old.key].unit) if u != "share"), "share"),  # see _same_task
                "higher_is_better": old.higher_is_better,
                "before": d.before,
                "after": d.after,
                "difference": d.difference,
                "low": d.low,
                "high": d.high,
                "p": d.p_value,
                "relative": d.relative,
                "relative_low": d.relative_low,
                "relative_high": d.relative_high,
                "n": d.n,
                "items_id": old.items_id,
                "method": d.method,
            }
        )
    return rows
