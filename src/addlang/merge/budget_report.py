"""What a search for a budget found, as plain data, as a table for the terminal, and as a section of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from addlang.merge.kept import items_in
from addlang.report import numbers
from addlang.report.card import escape

if TYPE_CHECKING:
    from addlang.merge.budget import Point, Result, Search

LOOKS = {
    "all": "Shares were tested upward in steps fixed beforehand, each only if all smaller ones had passed, so the last that passed is "
    "subject to the error of one test, not of all that were made.",
    "confirm": "Half of the items chose the shares; the other half, which had no part in that, tested them from well below upward until "
    "the first that failed, so the last that passed is subject to the error of one test, not of all that were made. All items "
    "together had to agree.",
}
COLUMNS = ["items", "share", "kept [95 %]", "n", "target gained", "target"]


def summary(result: Result, search: Search) -> dict[str, Any]:
    """Plain data for ``merge.json`` and ``--json``."""
    parameters = result.parameters.model_dump(mode="json", exclude_defaults=True)
    return {
        "keep": search.keep,
        "by": search.by,
        "watched": [f"{m.task} ({m.metric})" for m in search.before],
        "items": items_in(search.before),
        "chosen": _point(result.chosen),
        "parameters": parameters,
        "share_of_update": round(result.share, 4),
        "best_overall_share": result.overall,
        "ratios": {k: round(v, 3) for k, v in result.family.ratios.items()},
        "points": [_point(p) for p in result.points],
        "models_measured": search.looked,
        "looks": LOOKS[search.tested_on],
    }


def _point(p: Point) -> dict[str, Any]:
    return {
        "items_used": p.which,
        "parts": p.parts,
        "share": p.u,
        "kept": p.kept.value,
        "low": p.kept.low,
        "high": p.kept.high,
        "n": p.kept.n,
        "target_gained": p.gained,
        "target": p.target,
    }


def table(budget: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: every point that was tried, in order."""
    return COLUMNS, [_row(p, budget["keep"]) for p in budget["points"]]


def sentence(budget: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    c = budget["chosen"]
    gained = "" if c["target_gained"] is None else f"; target gained {numbers.percent(c['target_gained'])}"
    parts = "" if c["parts"] == "overall" else f" with a share for each {c['parts']}"
    return (
        f"{numbers.percent(budget['share_of_update'])} of the update{parts} keeps {_interval(c)} of {', '.join(budget['watched'])} on "
        f"{c['n']} items (bound: {numbers.percent(budget['keep'])}){gained}"
    )


def as_markdown(budget: Mapping[str, Any]) -> str:
    """A section of the model card."""
    columns, rows = table(budget)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return f"## Scaled back to a budget\n\n{escape(sentence(budget))}.\n\n{escape(budget['looks'])}\n\n" + "\n".join(
        lines
    )


def _interval(p: Mapping[str, Any]) -> str:
    return numbers.with_interval(p["kept"], p["low"], p["high"], "share")


def _row(p: Mapping[str, Any], keep: float) -> list[str]:
    share = f"{p['share']:.3f}" + ("" if p["parts"] == "overall" else f" ({p['parts']})")
    mark = "kept" if p["low"] >= keep else "not shown"
    gained = "-" if p["target_gained"] is None else numbers.percent(p["target_gained"])
    target = "; ".join(f"{name.partition(',')[0]} {value:.3f}" for name, value in p["target"].items())
    return [p["items_used"], share, f"{_interval(p)} {mark}", str(p["n"]), gained, target]
