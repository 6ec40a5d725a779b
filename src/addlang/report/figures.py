"""Figures of one run: forest plot, kept against gained, loss curves and what was frozen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from addlang.progress import count
from addlang.report import numbers
from addlang.report.files import Comparison, RunData
from addlang.report.svg import NARROW, WIDE, Canvas, Figure, Scale, shorten, spread, tick_text, width_of
from addlang.report.verdict import about_replies, reply_metric, rows_of

ROLES = {"source": ("circle", "c1"), "target": ("square", "c2"), "safety": ("diamond", "c4")}
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # shown first
POINTS = 300  # points of a curve; more are averaged


def both(draw: Callable[[float], Markup], caption: str = "") -> Figure:
    """The same figure for wide and narrow screens."""
    return Figure(draw(WIDE), draw(NARROW), caption)


def forests(run: RunData) -> list[Figure]:
    """One forest plot per unit and direction: differences with intervals, the better side is on the right."""
    panels: dict[tuple[str, bool], list[Comparison]] = {}
    for role in ("source", "target", "safety"):
        for c in rows_of(run, role):
            panels.setdefault((c.unit, c.higher_is_better), []).append(c)
    return [both(_forest(rows, unit, higher)) for (unit, higher), rows in panels.items()]


def row_label(c: Comparison) -> str:
    """``lab (exact match)``."""
    return reply_metric(c) if about_replies(c) else f"{c.task} ({reply_metric(c)})"


def _forest(rows: Sequence[Comparison], unit: str, higher: bool) -> Callable[[float], Markup]:
    factor = 100.0 if unit == "share" else 1.0
    name = "percentage points" if unit == "share" else unit or "units of the metric"
    ends = [factor * v for c in rows for v in (c.difference, c.low, c.high) if v is not None]
    low, high = spread(ends, include=(0.0,))

    def draw(width: float) -> Markup:
        canvas, narrow = Canvas(width), width == NARROW
        left, right = (8.0, width - 8) if narrow else (272.0, width - 192)
        step, top = (46.0, 30.0) if narrow else (26.0, 26.0)
        scale = Scale(low, high, left, right) if higher else Scale(low, high, right, left)
        bottom = top + step * len(rows) + 4
        ticks = scale.ticks(4 if narrow else 7)
        for tick in ticks:
            canvas.line(scale(tick), top - 6, scale(tick), bottom, "zero" if tick == 0 else "grid")
            canvas.text(scale(tick), bottom + 15, tick_text(tick, ticks, signed=True), "tick", "middle")
        if min(abs(scale(t) - scale(0)) for t in ticks) > 1:
            canvas.line(scale(0), top - 6, scale(0), bottom, "zero")
        canvas.text(left, top - 12, "← worse", "tick")
        canvas.text(right, top - 12, "better →", "tick", "end")
        for i, c in enumerate(rows):
            value, lo, hi = (None if v is None else factor * v for v in (c.difference, c.low, c.high))
            assert value is not None
            y = top + step * i + (30 if narrow else 14)
            shape, colour = ROLES.get(c.role, ("triangle", "c5"))
            shown = numbers.change(c.difference, c.low, c.high, c.unit)
            if narrow:
                room = width - 16 - width_of(shown, 11)
                label = shorten(row_label(c), room, 11.5)
                canvas.rect(left, y - 23, width_of(label, 12), 16, "mask")
                canvas.text(left, y - 12, label, "t small")
                canvas.text(width - 8, y - 12, shown, "t small num", "end")
            else:
                canvas.text(left - 14, y + 4, shorten(row_label(c), left - 22, 12.5), "t", "end")
                canvas.text(width - 2, y + 4, shorten(shown, 190, 11.5), "t small num", "end")
            title = f"{row_label(c)}: {shown}, n = {c.n}"
            if lo is not None and hi is not None:
                canvas.line(scale(lo), y, scale(hi), y, f"bar {colour}")
                for end in (lo, hi):
                    canvas.line(scale(end), y - 4, scale(end), y + 4, f"bar {colour}")
                canvas.marker(scale(value), y, shape, f"mark {colour}", title=title)
            else:
                canvas.marker(scale(value), y, shape, f"mark hollow {colour}", title=f"{title} {numbers.NO_INTERVAL}")
        hint = "" if higher else "; axis reversed" if narrow else "; fewer is better, axis reversed"
        canvas.text((left + right) / 2, bottom + 34, f"change in {name}{hint}", "axis", "middle")
        return canvas.render(bottom + 42, f"Change by task in {name} with 95 % intervals; right is better")

    return draw


@dataclass(frozen=True)
class PathPoint:
    """A model on the way from before to after: relative change of target and of source, with intervals."""

    name: str
    gained: tuple[float, float | None, float | None]
    kept: tuple[float, float | None, float | None]


def before_after(points: Sequence[PathPoint], x_label: str, y_label: str) -> Figure:
    """Source kept against target gained, as an arrow from the source model through the phases."""

    def draw(width: float) -> Markup:
        canvas, narrow = Canvas(width), width == NARROW
        left, right, top, bottom = 52.0, width - 20, 24.0, 300.0
        xs = [100 * v for p in points for v in p.gained if v is not None]
        ys = [100 * v for p in points for v in p.kept if v is not None]
        x = Scale(*spread(xs, 0.12, (0.0,)), left, right)
        y = Scale(*spread(ys, 0.12, (100.0, 95.0)), bottom, top)
        axes(canvas, x, y, (left, top, right, bottom), x_label, y_label, 4 if narrow else 7)
        canvas.line(left, y(100), right, y(100), "zero")
        canvas.text(right, top - 10, "better ↗", "tick", "end")
        places = [(x(100 * p.gained[0]), y(100 * p.kept[0])) for p in points]
        for a, b in itertools.pairwise(places):
            _arrow(canvas, a, b)
        for i, (p, (px, py)) in enumerate(zip(points, places, strict=True)):
            colour = "ink" if i == 0 else "c1"
            error_bars(canvas, x, y, _percent(p.gained), _percent(p.kept), px, py, colour)
            canvas.marker(px, py, "circle", f"mark {'hollow ' if i == 0 else ''}{colour}", 6, p.name)
            last = i == len(points) - 1
            other = places[i - 1 if last else i + 1]
            below = other[1] <= py if last else other[1] < py  # on the side where there is no arrow
            anchor = "end" if px > (left + right) / 2 else "start"
            canvas.text(px + (-9 if anchor == "end" else 9), py + (22 if below else -12), p.name, "t halo", anchor)
        return canvas.render(bottom + 46, f"{y_label} against {x_label}, before and after")

    return both(draw)


def _percent(v: tuple[float, float | None, float | None]) -> tuple[float | None, float | None]:
    return None if v[1] is None else 100 * v[1], None if v[2] is None else 100 * v[2]


def _arrow(canvas: Canvas, a: tuple[float, float], b: tuple[float, float]) -> None:
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    if length < 24:
        return
    ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
    start, tip = (a[0] + 9 * ux, a[1] + 9 * uy), (b[0] - 9 * ux, b[1] - 9 * uy)
    back = (tip[0] - 9 * ux, tip[1] - 9 * uy)
    canvas.line(*start, *back, "path")
    canvas.polygon([tip, (back[0] - 4.5 * uy, back[1] + 4.5 * ux), (back[0] + 4.5 * uy, back[1] - 4.5 * ux)], "head")


def axes(
    canvas: Canvas,
    x: Scale,
    y: Scale,
    frame: tuple[float, float, float, float],
    x_label: str,
    y_label: str,
    x_ticks: int,
    x_text: Callable[[float], str] | None = None,
    y_text: Callable[[float], str] | None = None,
    y_ticks: int = 6,
) -> None:
    """Grid, ticks and axis labels."""
    left, top, right, bottom = frame
    xs, ys = x.ticks(x_ticks), y.ticks(y_ticks)
    for tick in ys:
        canvas.line(left, y(tick), right, y(tick), "grid")
        canvas.text(left - 7, y(tick) + 4, y_text(tick) if y_text else tick_text(tick, ys), "tick", "end")
    for tick in xs:
        canvas.line(x(tick), top, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 16, x_text(tick) if x_text else tick_text(tick, xs), "tick", "middle")
    canvas.line(left, bottom, right, bottom, "frame")
    canvas.text((left + right) / 2, bottom + 36, x_label, "axis", "middle")
    canvas.text(0, top - 10, y_label, "axis")


def error_bars(
    canvas: Canvas,
    x: Scale,
    y: Scale,
    across: tuple[float | None, float | None],
    up: tuple[float | None, float | None],
    px: float,
    py: float,
    colour: str,
) -> None:
    """Intervals of a point in both directions, where they exist."""
    if across[0] is not None and across[1] is not None:
        canvas.line(x(across[0]), py, x(across[1]), py, f"bar thin {colour}")
    if up[0] is not None and up[1] is not None:
        canvas.line(px, y(up[0]), px, y(up[1]), f"bar thin {colour}")


def curve(
    rows: Sequence[Mapping[str, Any]], key: str, y_label: str, height: float = 220, smooth: bool = False, share: int = 1
) -> Figure | None:
    """One column of the training log against tokens; None where it was not logged.

    Args:
        smooth: also draw a running mean (the raw values stay visible, pale).
        share: how many such figures stand side by side on a wide screen.
    """
    points = [(float(r["tokens"]), float(r[key])) for r in rows if _finite(r.get("tokens")) and _finite(r.get(key))]
    if len(points) < 2:
        return None
    points = _thin(points)

    def draw(width: float) -> Markup:
        narrow = width == NARROW
        if not narrow:
            width = width / share - (12 if share > 1 else 0)
        canvas = Canvas(width)
        y_room = spread([p[1] for p in points])
        left, right, top, bottom = 52.0, width - 16, 26.0, height - 44.0
        x = Scale(0, max(p[0] for p in points) * 1.0001, left, right)
        y = Scale(*y_room, bottom, top)
        tiny = max(abs(v) for v in y_room) < 0.01
        y_text = (lambda v: numbers.scientific(v) if v else "0") if tiny else count if max(y_room) >= 1000 else None
        ticks = 3 if share > 1 and not narrow else 4 if narrow else 7
        axes(
            canvas,
            x,
            y,
            (left, top, right, bottom),
            "training tokens",
            y_label,
            ticks,
            count,
            y_text,
            4 if height < 200 else 6,
        )
        raw = [(x(a), y(b)) for a, b in points]
        averaged = smooth and len(points) > 30
        canvas.polyline(raw, "curve pale" if averaged else "curve c1")
        if averaged:
            canvas.polyline([(x(a), y(b)) for a, b in _running_mean(points, max(3, len(points) // 25))], "curve c1")
        return canvas.render(height, f"{y_label} against training tokens")

    return both(draw)


def _finite(v: Any) -> bool:
    return isinstance(v, int | float) and math.isfinite(v)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``POINTS`` points: means of neighbours."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _running_mean(points: Sequence[tuple[float, float]], half: int) -> list[tuple[float, float]]:
    """Mean over ``half`` neighbours to each side.

    At the start fewer, on both sides alike, because the curve is steep there; at the end only the right side is cut.
    """
    smooth = []
    for i, (a, _) in enumerate(points):
        window = points[i - min(half, i) : i + min(half, i) + 1]
        smooth.append((a, sum(p[1] for p in window) / len(window)))
    return smooth


def frozen_map(tensors: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Share that is frozen, by module group (rows) and layer (columns); what is outside the layers stands below."""
    cells: dict[str, dict[int | None, list[int]]] = {}
    for t in tensors:
        group = str(t.get("group") or t.get("name"))
        layer = t.get("layer")
        totals = cells.setdefault(group, {}).setdefault(layer if isinstance(layer, int) else None, [0, 0])
        totals[0] += int(t.get("frozen") or 0)
        totals[1] += int(t.get("elements") or 0)
    if not cells:
        return None
    cells = dict(sorted(cells.items(), key=lambda c: (*_MODULES, c[0]).index(c[0])))
    inside = [g for g, by_layer in cells.items() if any(k is not None for k in by_layer)]
    outside = [g for g, by_layer in cells.items() if None in by_layer]
    layers = sorted({k for by_layer in cells.values() for k in by_layer if k is not None})

    def draw(width: float) -> Markup:
        canvas, narrow = Canvas(width), width == NARROW
        left, size = (118.0, 11.0) if narrow else (190.0, 12.5)
        cell = min(64.0, (width - left - 6) / max(1, len(layers)))
        row, y = 24.0, 22.0 if layers else 4.0
        gap = 1.5 if cell > 8 else 0.5
        every = max(1, math.ceil(22 / cell))
        for i, layer in enumerate(layers):
            if i % every == 0:
                canvas.text(left + cell * (i + 0.5), 14, str(layer), "tick", "middle")
        if layers:
            canvas.text(left - 10, 14, "layer", "axis", "end")

        def put(group: str, layer: int | None, at: float, w: float) -> None:
            if layer not in cells[group] or not cells[group][layer][1]:
                return
            frozen, total = cells[group][layer]
            share = frozen / total
            place = f"{group}, layer {layer}" if layer is not None else group
            title = f"{place}: {frozen:,} of {total:,} elements frozen ({numbers.percent(share)})"
            canvas.rect(at + gap / 2, y + gap / 2, w - gap, row - gap, "cell", title)
            if share:
                canvas.rect(at + gap / 2, y + gap / 2, w - gap, row - gap, "frozen", title, 0.12 + 0.88 * share)
            if w >= 38:
                text = f"{100 * share:.0f} %" if narrow or w < 50 else numbers.percent(share)
                canvas.text(at + w / 2, y + row / 2 + 4, text, "celltext on" if share > 0.55 else "celltext", "middle")

        for group in inside:
            canvas.text(
                left - 10, y + row / 2 + 4, shorten(group, left - 14, size), "t small" if narrow else "t", "end"
            )
            for i, layer in enumerate(layers):
                put(group, layer, left + cell * i, cell)
            y += row
        y += 10 if layers and outside else 0
        for group in outside:
            name = f"{group} (no layer)" if group in inside else group
            canvas.text(left - 10, y + row / 2 + 4, shorten(name, left - 14, size), "t small" if narrow else "t", "end")
            put(group, None, left, 64.0)
            y += row
        y += 16
        canvas.text(left - 10, y + 14, "frozen", "axis", "end")
        for i, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            at = left + 44 * i
            canvas.rect(at, y, 42, 20, "cell")
            if share:
                canvas.rect(at, y, 42, 20, "frozen", "", 0.12 + 0.88 * share)
            canvas.text(
                at + 21, y + 14, f"{100 * share:.0f} %", "celltext on" if share > 0.55 else "celltext", "middle"
            )
        return canvas.render(y + 28, "Share of elements that is frozen, by module and layer")

    return both(draw)
