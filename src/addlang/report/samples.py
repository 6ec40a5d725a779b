"""A handful of replies: evenly spaced items, so that nobody has chosen them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addlang.report.files import RunData

ITEMS, TASKS, LENGTH = 4, 8, 600
_PROMPT = ("prompt", "question", "instruction", "input")
_EXPECTED = ("expected", "answer", "reference", "target", "gold")
_REPLY = ("reply", "response", "output", "completion", "prediction")


def chosen_samples(run: RunData) -> list[dict[str, Any]]:
    """Per task a few items with the reply of every model; tasks without replies in words are left out."""
    order = ["before", *[str(p.get("name")) for p in run.phases], "after"]
    models = sorted(run.samples, key=lambda m: (order.index(m) if m in order else len(order), m))
    tasks = list(dict.fromkeys(t for m in models for t in run.samples[m]))
    chosen = []
    for task in tasks:
        by_model = {m: _by_id(run.samples[m].get(task, [])) for m in models}
        ids = [i for i, item in next((v for v in by_model.values() if v), {}).items() if _find(item, _REPLY)]
        if not ids:
            continue
        step = max(1, len(ids) // ITEMS)
        items = [_item(i, by_model) for i in ids[step // 2 :: step][:ITEMS]]
        chosen.append({"task": task, "items": items})
    return chosen[:TASKS]


def _by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Items by id, the detail's keys beside the item's own."""
    flat = {}
    for number, row in enumerate(rows, start=1):
        detail = row.get("detail")
        flat[str(row.get("id", number))] = {**(detail if isinstance(detail, Mapping) else {}), **row}
    return flat


def _item(name: str, by_model: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    replies, prompt, expected = [], "", ""
    for model, items in by_model.items():
        item = items.get(name)
        if item is None:
            continue
        prompt = prompt or _find(item, _PROMPT)
        expected = expected or _find(item, _EXPECTED)
        replies.append({"model": model, "text": _find(item, _REPLY) or "(empty)", "score": _score(item)})
    return {"id": name, "prompt": prompt, "expected": expected, "replies": replies}


def _score(item: Mapping[str, Any]) -> str:
    top, bottom = item.get("numerator"), item.get("denominator", 1)
    if not isinstance(top, int | float) or not isinstance(bottom, int | float):
        return ""
    if bottom == 1 and top in (0, 1):
        return "✓ counted as right" if top else "✗ not counted as right"
    return f"{top:g} of {bottom:g}"


def _find(item: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        value = item.get(key)
        if value not in (None, ""):
            text = value if isinstance(value, str) else str(value)
            return text if len(text) <= LENGTH else text[:LENGTH] + " … (cut here)"
    return ""
