"""The phases of a recipe arranged otherwise: their data in one mixture, or in reverse order (two-phase paper, section 4.2, appendix C).

Works on plain data, before they are validated, so that a run's own recipe.yaml says what was carried out.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from addlang.errors import AddlangWarning

MOVED = ("name", "datasets", "tokens", "epochs")  # what a phase is about; the rest is how it is trained
BUDGET = ("tokens", "epochs")
OF_ORDER = ("continue_if", "no_previous_data", "no_previous_weights", "start")  # mean nothing in one phase


def share(data: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The recipe with keys of a phase that stand at its top level given to every phase that has none of its own.

    Args:
        keys: those that belong to a phase and not to the recipe.
    """
    phases = data.get("phases")
    if not isinstance(phases, list | tuple) or not all(isinstance(p, Mapping) for p in phases):
        return dict(data)
    shared = {k: v for k, v in data.items() if k in keys}
    rest = {k: v for k, v in data.items() if k not in keys}
    given = []
    for phase in phases:
        taken = {k for k in BUDGET if any(b in phase for b in BUDGET)}  # tokens of its own replace epochs for all
        given.append({**{k: v for k, v in shared.items() if k not in taken}, **phase})
    return {**rest, "phases": given}


def arrange(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe with its ``arrangement`` carried out, and what stands in the way of that.

    ``reverse``: names, data sets and budgets of the phases change places; what is frozen and how it is trained stay where
    they are, so that the last phase's learning rate is still the last one's.

    ``mixture``: one phase with the data of all, trained as the last phase says. It has as many steps as the phases would
    have together, and as many tokens from each one's data.
    """
    data = dict(data)
    kind, phases = data.get("arrangement"), data.get("phases")
    if kind not in ("mixture", "reverse"):
        return data, []
    if not isinstance(phases, list | tuple) or len(phases) < 2 or not all(isinstance(p, Mapping) for p in phases):
        return data, [f"arrangement: {kind} needs two phases or more"]
    if replaying := [p for p in phases if p.get("replay") is not None]:
        return data, [
            f"arrangement: {kind} of phases with replay means nothing; remove replay of '{_name(replaying[0])}'"
        ]
    if any(p.get("parts") for p in phases):
        return data, ["arrangement: one of the phases is a mixture already"]
    data["arrangement"] = "phases"
    if kind == "reverse":
        data["phases"] = [
            {**{k: v for k, v in place.items() if k not in MOVED}, **{k: about[k] for k in MOVED if k in about}}
            for place, about in zip(phases, reversed(phases), strict=True)
        ]
        return data, []
    last = {k: v for k, v in phases[-1].items() if k not in (*MOVED, *OF_ORDER)}
    different = sorted(
        {k for p in phases for k in {*p, *last} if k not in (*MOVED, *OF_ORDER) and p.get(k) != last.get(k)}
    )
    if different:
        warnings.warn(
            f"the phases differ in {', '.join(different)}; their mixture is trained as phase '{_name(phases[-1])}' says",
            AddlangWarning,
            stacklevel=3,
        )
    budgets = [p.get("tokens") for p in phases]
    parts = [
        {
            "name": _name(p),
            "datasets": len(p.get("datasets") or ()),
            **{k: p[k] for k in ("tokens", "epochs") if k in p},
        }
        for p in phases
    ]
    mixture = {
        **last,
        "name": "mixture",
        "datasets": [d for p in phases for d in p.get("datasets") or ()],
        "parts": parts,
    }
    if all(b is not None for b in budgets):
        mixture["tokens"] = _sum(budgets)
    data["phases"] = [mixture]
    return data, []


def _name(phase: Mapping[str, Any]) -> str:
    return str(phase.get("name", "adapt"))


def _sum(budgets: list[Any]) -> Any:
    """Their sum; one of them as it is where it is no count, so that validation says so."""
    from addlang.schema import parse_count

    total = 0
    for given in budgets:
        try:
            total += parse_count(given)
        except (TypeError, ValueError):
            return given
    return total
