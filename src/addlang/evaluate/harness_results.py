"""What the lm-evaluation-harness returns, as measurements. Its key names (``acc,none``) stand here and nowhere else.

A value is kept per item wherever the harness's own aggregate is the mean of them (or, for lists of yes and no such as
IFEval's instructions, their share), which is checked against that aggregate; other metrics (BLEU, chrF, F1 over the
corpus) come as aggregate with the harness's bootstrap standard error. A group such as ``mmlu`` is one measurement over
all its items (a micro average), so that it has one interval.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from addlang.errors import AddlangWarning
from addlang.evaluate.measurement import Item, Measurement, Role

# metrics of which 1 is all
SHARES = re.compile(r"(^|_)(acc|accuracy|em)(_|$)|(^|_)(match|verify|rate)$|^exact_match")


def measurements(
    name: str, results: Any, members: Sequence[str], settings: dict[str, Any], *, role: Role, language: str
) -> list[Measurement]:
    """One measurement per metric and filter, over the items of all member tasks."""
    keys: dict[tuple[str, str], None] = {}  # (metric, filter), ordered; only what every member has
    for member in members:
        own = {(m, s["filter"]): None for s in results["samples"][member] for m in s["metrics"]}
        keys = own if not keys else {k: None for k in keys if k in own}
    versions = sorted({str(results["versions"][m]) for m in members})
    for member in members:
        warn_of_empty_replies(results["samples"][member], member)
    measured = []
    for metric, filter in keys:
        label = metric if filter == "none" else f"{metric} ({filter})"
        higher = results["higher_is_better"][members[0]].get(metric)
        common: dict[str, Any] = {
            "task": name,
            "version": ", ".join(versions),
            "role": role,
            "language": language,
            "metric": label,
            "higher_is_better": True if higher is None else bool(higher),
            "settings": settings,
        }
        prefixes = [f"{member}/" if len(members) > 1 else "" for member in members]
        parts = [
            items_of(results, member, metric, filter, prefix) for member, prefix in zip(members, prefixes, strict=True)
        ]
        if all(part is not None for part in parts):
            items = tuple(item for part in parts if part is not None for item in part)
            measured.append(Measurement(items=items, unit=_unit(metric, filter, results, members), **common))
            continue
        for member in members:  # a corpus metric has no value over several corpora
            samples = [s for s in results["samples"][member] if s["filter"] == filter and metric in s]
            value = float(results["results"][member][f"{metric},{filter}"])
            spread = results["results"][member].get(f"{metric}_stderr,{filter}")  # "N/A" where it has none
            known = isinstance(spread, int | float) and math.isfinite(spread)
            measured.append(
                Measurement(
                    **{**common, "task": name if len(members) == 1 else member},
                    items=tuple(Item(_name(s), 0, 0, detail=_detail(s)) for s in samples),
                    unit=metric,
                    aggregate=value,
                    aggregate_stderr=float(spread) if known else None,
                )
            )
    return measured


def items_of(results: Any, member: str, metric: str, filter: str, prefix: str) -> tuple[Item, ...] | None:
    """Items of one task, or None where the metric is not a ratio of sums over them."""
    items = []
    for sample in results["samples"][member]:
        if sample["filter"] != filter or metric not in sample:
            continue
        value = sample[metric]
        if isinstance(value, list | tuple) and value and all(isinstance(v, bool) for v in value):
            numerator, denominator = float(sum(value)), float(len(value))
        elif isinstance(value, bool | int | float):
            numerator, denominator = float(value), 1.0
        elif hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a numpy or torch scalar
            numerator, denominator = float(value.item()), 1.0
        else:
            return None
        items.append(Item(prefix + _name(sample), numerator, denominator, detail=_detail(sample)))
    total = sum(item.denominator for item in items)
    value = sum(item.numerator for item in items) / total if total else math.nan
    given = results["results"][member][f"{metric},{filter}"]
    same = isinstance(given, int | float) and math.isclose(value, given, rel_tol=1e-9, abs_tol=1e-12)
    return tuple(items) if same else None


def _name(sample: Mapping[str, Any]) -> str:
    """Number and hash of the document: items with one number but other text are not the same item."""
    return f"{sample['doc_id']}-{sample['doc_hash'][:8]}"


def warn_of_empty_replies(samples: Sequence[Mapping[str, Any]], name: str) -> None:
    """Many task files end a reply at the first newline, so a chat model that begins with one is scored on nothing."""
    replies = [r for s in samples for r in s["resps"][0] if isinstance(r, str)]
    empty = sum(not r.strip() for r in replies)
    if replies and 5 * empty > len(replies):
        warnings.warn(
            f"{name}: {empty} of {len(replies)} replies are empty. If the task file has a newline under 'until', a "
            "reply that begins with one ends there: the score then says nothing about the model",
            AddlangWarning,
            stacklevel=2,
        )


def _detail(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Reply or scores of the choices, and the right answer."""
    replies = sample["filtered_resps"]
    detail: dict[str, Any] = {"answer": str(sample["target"])}
    if all(isinstance(r, str) for r in replies):
        detail["reply"] = replies[0] if len(replies) == 1 else list(replies)
    elif all(isinstance(r, list | tuple) and r and isinstance(r[0], int | float) for r in replies):
        detail["scores"] = [float(r[0]) for r in replies]
    return detail


def _unit(metric: str, filter: str, results: Any, members: Sequence[str]) -> str:
    """``share`` by the kind of metric, never by its values: a model that scores next to nothing out of 100 looks like a share."""
    values = [s[metric] for m in members for s in results["samples"][m] if s["filter"] == filter and metric in s]
    yes_or_no = all(
        isinstance(v, bool) for value in values for v in (value if isinstance(value, list | tuple) else [value])
    )
    return "share" if yes_or_no or SHARES.search(metric) else metric
