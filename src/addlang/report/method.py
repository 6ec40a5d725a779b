"""Which method a phase used, with its paper and options, from the plan's provenance and the recipe."""

from __future__ import annotations

from typing import Any

from addlang.errors import AddlangError
from addlang.report import numbers
from addlang.report.files import RunData

_SHOWN = {"strategy", "name", "paper", "summary", "trainable_fraction", "calibration", "seed"}
_TRAINING = {
    "tokens": "",
    "epochs": " (passes over the data)",
    "sequence_length": " tokens",
    "batch_size": " sequences",
    "learning_rate": "",
    "lr_scheduler_type": "",
    "weight_decay": "",
    "precision": "",
}


def method_of(run: RunData, phase: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """``strategy``, ``paper``, ``summary`` and ``options`` (pairs of text) of a phase."""
    plan = (run.state.get("plan") or {}).get(phase) or {}
    given = recipe.get("strategy")
    options = dict(given) if isinstance(given, dict) else {}
    name = str(plan.get("strategy") or options.get("name") or given or "not stated")
    known = _registered(name)
    merged = {**options, **plan}
    pairs = [(_words(k), _text(v)) for k, v in merged.items() if k not in _SHOWN and v is not None]
    if merged.get("calibration"):
        pairs.append(("calibration", _text(merged["calibration"])))
    fraction = plan.get("trainable_fraction")
    if isinstance(fraction, int | float):
        pairs.append(("trained", f"{numbers.percent(fraction)} of all elements"))
    pairs += [(_words(k), _text(recipe[k]) + unit) for k, unit in _TRAINING.items() if recipe.get(k) is not None]
    return {
        "strategy": name,
        "paper": str(plan.get("paper") or known.get("paper") or "none stated"),
        "summary": str(plan.get("summary") or known.get("summary") or ""),
        "options": pairs,
    }


def _registered(name: str) -> dict[str, str]:
    """Metadata of a strategy; nothing for one that this version does not have (the run may come from another)."""
    from addlang.strategies import load_strategy

    try:
        cls = load_strategy(name)
    except AddlangError:
        return {}
    return {"paper": cls.paper, "summary": cls.summary}


def _words(key: str) -> str:
    return key.removesuffix("_type").replace("lr_", "learning rate ").replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or abs(value) >= 0.01 else numbers.scientific(value)
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(k))}: {_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
