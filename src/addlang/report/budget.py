"""What a search for the largest share of an update found, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from addlang.report import numbers
from addlang.report.figures import axes, both, error_bars
from addlang.report.files import write_text
from addlang.report.html import REPORT, environment
from addlang.report.svg import NARROW, Canvas, Figure, Scale, spread


def write_budget(record: Mapping[str, Any], directory: Path) -> Path:
    """Write ``report.html`` of a scaled-back model.

    Args:
        record: the content of its ``merge.json``.

    Raises:
        AddlangError: the file cannot be written.
    """
    write_text(directory / REPORT, budget_html(record))
    return directory / REPORT


def budget_html(record: Mapping[str, Any]) -> str:
    """The page."""
    from addlang.merge.budget_report import sentence, table

    budget = record["budget"]
    columns, rows = table(budget)
    first = 0 if budget["by"] != "overall" else 1  # one share overall is always measured on all items
    tasks = list(budget["chosen"]["target"])  # a column each, where the terminal has one for all
    columns = [*columns[first:-1], *(f"{t.partition(', ')[0]}, {_metric(t)}" for t in tasks)]
    rows = [
        [*row[first:-1], *(f"{p['target'][t]:.3f}" for t in tasks)]
        for row, p in zip(rows, budget["points"], strict=True)
    ]
    return (
        environment()
        .get_template("budget.html.j2")
        .render(
            model=record["merge"]["model"],
            source=record["merge"]["source_model"],
            sentence=sentence(budget),
            looks=budget["looks"],
            kept_figure=kept_by_share(budget),
            columns=columns,
            rows=rows,
            shares=_shares(budget["parameters"]),
        )
    )


def _metric(key: str) -> str:
    return numbers.metric_name(key.rpartition(", ")[2])


def kept_by_share(budget: Mapping[str, Any]) -> Figure:
    """The source kept at every share tested, with intervals, against what the target gains there (or the share itself)."""
    chosen, keep = budget["chosen"], 100 * budget["keep"]
    points = [p for p in budget["points"] if (p["items_used"], p["parts"]) == (chosen["items_used"], chosen["parts"])]
    gains = all(p["target_gained"] is not None for p in points)
    across = [100 * (p["target_gained"] if gains else p["share"]) for p in points]
    label = "target gained, %" if gains else "share of the update, %"

    def draw(width: float) -> Markup:
        canvas, narrow = Canvas(width), width == NARROW
        left, right, top, bottom = 52.0, width - 20, 24.0, 300.0
        x = Scale(*spread(across, 0.12, (0.0,)), left, right)
        y = Scale(*spread([100 * p[k] for p in points for k in ("low", "high")], 0.12, (100.0, keep)), bottom, top)
        axes(canvas, x, y, (left, top, right, bottom), label, "source kept, %", 4 if narrow else 7)
        canvas.line(left, y(keep), right, y(keep), "zero")
        canvas.text(left + 6, y(keep) + 14, f"bound {keep:g} %", "tick")
        for place, p in zip(across, points, strict=True):
            px, py = x(place), y(100 * p["kept"])
            error_bars(canvas, x, y, (None, None), (100 * p["low"], 100 * p["high"]), px, py, "c1")
            mine = p["share"] == chosen["share"]
            shape = "mark c1" if mine else "mark hollow c1"
            canvas.marker(px, py, "circle", shape, 6 if mine else 4.5, f"{p['share']:.3f} of the update")
            if mine or not narrow:
                canvas.text(px + 8, py - 8, f"{p['share']:.2f}", "t halo" if mine else "tick")
        return canvas.render(bottom + 46, f"source kept against {label.partition(',')[0]}, by share of the update")

    return both(draw, "Each point is a share of the update; filled: the one that was written. Bars: 95 % intervals.")


def _shares(parameters: Mapping[str, Any]) -> list[list[str]]:
    """Share by module type or layer; none for one overall share."""
    from addlang.merge.methods import RevertParameters

    found = RevertParameters.model_validate(parameters)
    parts = {**found.modules, **{f"layer {k}": v for k, v in found.layers.items()}}
    return [[name, numbers.percent(value)] for name, value in parts.items()]
