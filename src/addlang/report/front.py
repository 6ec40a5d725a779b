"""The front: source kept against target gained for the arms of an experiment, never retention alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from addlang.report.figures import axes, both, error_bars
from addlang.report.svg import NARROW, SHAPES, Canvas, Figure, Labels, Scale, spread

Interval = tuple[float, float | None, float | None]  # mean, low, high


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison as a point with intervals; ``seeds`` are its single runs."""

    label: str
    x: Interval
    y: Interval
    seeds: tuple[tuple[float, float], ...] = ()
    on_front: bool = False
    faint: bool = False  # a small mark whose label only shows on pointing at it, where many arms would hide each other


def front_figure(
    arms: Sequence[Arm],
    *,
    x_label: str,
    y_label: str,
    x_higher_is_better: bool,
    y_reference: tuple[float, str, str] | None = None,
) -> Figure:
    """Scatter of arms with error bars, direct labels and the front through the best of them. Right and up is better.

    Args:
        y_reference: height of a horizontal line, such as the source model, with a short and a long label.
    """

    def draw(width: float) -> Markup:
        canvas, narrow = Canvas(width), width == NARROW
        left, right, top = 46.0, width - 14, 28.0
        bottom = top + (290.0 if narrow else 380.0)
        xs = [v for a in arms for v in (*a.x, *(s[0] for s in a.seeds)) if v is not None]
        ys = [v for a in arms for v in (*a.y, *(s[1] for s in a.seeds)) if v is not None]
        x_low, x_high = spread(xs)
        x = Scale(x_low, x_high, left, right) if x_higher_is_better else Scale(x_low, x_high, right, left)
        y = Scale(*spread(ys, include=[y_reference[0]] if y_reference else []), bottom, top)
        direction = "higher is better" if x_higher_is_better else "lower is better, axis reversed"
        label = x_label if narrow else f"{x_label} ({direction})"
        axes(canvas, x, y, (left, top, right, bottom), label, y_label, 4 if narrow else 7)
        canvas.text(right - 2, top - 10, "better ↗", "tick", "end")
        labels = Labels((left, top, right, bottom))
        if y_reference:
            height_of, short, long = y_reference
            level, name = y(height_of), short if narrow else long
            canvas.line(left, level, right, level, "reference")
            canvas.text(left + 6, level - 6, name, "tick")
            labels.obstacles.append((left, level - 16, left + 6.2 * len(name), level + 2))
        front = sorted((a for a in arms if a.on_front), key=lambda a: a.x[0])
        line = [(x(a.x[0]), y(a.y[0])) for a in front]
        canvas.polyline(line, "front")
        for (x1, y1), (x2, y2) in itertools.pairwise(line):
            for k in range(1, 8):
                cx, cy = x1 + (x2 - x1) * k / 8, y1 + (y2 - y1) * k / 8
                labels.obstacles.append((cx - 3, cy - 3, cx + 3, cy + 3))
        for a in (a for a in arms if a.faint):
            canvas.marker(x(a.x[0]), y(a.y[0]), "circle", "mark faint", 3.2, a.label)
        named = [a for a in arms if not a.faint]
        for i, a in enumerate(named):
            px, py = x(a.x[0]), y(a.y[0])
            colour = f"c{i % 8 + 1}"
            for sx, sy in a.seeds if len(a.seeds) > 1 else ():
                canvas.marker(x(sx), y(sy), "circle", f"seed {colour}", 2.2)
            error_bars(canvas, x, y, a.x[1:], a.y[1:], px, py, colour)
            labels.obstacles.append((px - 7, py - 7, px + 7, py + 7))
            if a.y[1] is not None and a.y[2] is not None:
                labels.obstacles.append((px - 2, y(a.y[2]), px + 2, y(a.y[1])))
            if a.x[1] is not None and a.x[2] is not None:
                ends = sorted((x(a.x[1]), x(a.x[2])))
                labels.obstacles.append((ends[0], py - 2, ends[1], py + 2))
        height = bottom + 46
        for i, a in enumerate(named):
            px, py = x(a.x[0]), y(a.y[0])
            shape, colour = SHAPES[i % len(SHAPES)], f"c{i % 8 + 1}"
            canvas.marker(px, py, shape, f"mark {colour}" + ("" if len(a.seeds) > 1 else " hollow"), 6, a.label)
            name = str(i + 1) if narrow else a.label
            lx, ly, anchor, far = labels.place(px, py, name, 12.5)
            if far:
                canvas.line(px, py, lx, ly - 4, "leader")
            canvas.text(lx, ly, name, "t halo", anchor)
            if narrow:
                height += 20
                canvas.marker(12, height - 12, shape, f"mark {colour}" + ("" if len(a.seeds) > 1 else " hollow"), 5)
                canvas.text(26, height - 8, f"{i + 1}  {a.label}", "t small")
        return canvas.render(height + 4, f"{y_label} against {x_label} for {len(arms)} arms; right and up is better")

    return both(draw)
