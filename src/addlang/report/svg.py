"""Hand-made SVG: a canvas, scales and label placement. Colours are CSS classes, so that dark mode and print work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from addlang.report.numbers import typeset

CHAR = 0.56  # mean width of a character of a system font, in ems
WIDE, NARROW = 760, 350  # user units; the narrow drawing is for phones, so that text keeps its size

SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "star")


@dataclass(frozen=True)
class Figure:
    """One figure, drawn for wide and narrow screens."""

    wide: Markup
    narrow: Markup
    caption: str = ""


class Canvas:
    """Collects SVG elements. Text is escaped and typeset."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.parts: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        self._add('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>', x1, y1, x2, y2, cls)

    def rect(
        self, x: float, y: float, w: float, h: float, cls: str, title: str = "", opacity: float | None = None
    ) -> None:
        style = Markup("") if opacity is None else Markup(' fill-opacity="{}"').format(num(opacity))
        body = Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"{}')
        self.parts.append(body.format(*map(num, (x, y, w, h)), cls, style) + _close("rect", title))

    def polyline(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        if points:
            self._add('<polyline points="{}" class="{}"/>', " ".join(f"{num(x)},{num(y)}" for x, y in points), cls)

    def polygon(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        self._add('<polygon points="{}" class="{}"/>', " ".join(f"{num(x)},{num(y)}" for x, y in points), cls)

    def text(self, x: float, y: float, content: str, cls: str = "t", anchor: str = "start", turn: bool = False) -> None:
        rotate = Markup(' transform="rotate(-90 {} {})"').format(num(x), num(y)) if turn else Markup("")
        template = '<text x="{}" y="{}" class="{}" text-anchor="{}"{}>{}</text>'
        self._add(template, x, y, cls, anchor, rotate, typeset(content))

    def marker(self, x: float, y: float, shape: str, cls: str, size: float = 5.5, title: str = "") -> None:
        """A mark whose shape says what its colour says too."""
        if shape == "circle":
            body = Markup('<circle cx="{}" cy="{}" r="{}" class="{}"').format(num(x), num(y), num(size), cls)
            self.parts.append(body + _close("circle", title))
            return
        corners = " L".join(f"{num(x + size * dx)} {num(y + size * dy)}" for dx, dy in _OUTLINES[shape])
        self.parts.append(Markup('<path d="M{} Z" class="{}"').format(corners, cls) + _close("path", title))

    def render(self, height: float, label: str) -> Markup:
        """The finished element; ``label`` is read by screen readers."""
        head = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">').format(
            num(self.width), num(height), num(self.width), num(height), label
        )
        return head + Markup("").join(self.parts) + Markup("</svg>")

    def _add(self, template: str, *values: object) -> None:
        self.parts.append(Markup(template).format(*[num(v) if isinstance(v, int | float) else v for v in values]))


def _close(element: str, title: str) -> Markup:
    """End of an element, with a tooltip if there is one."""
    if not title:
        return Markup("/>")
    return Markup("><title>{}</title></{}>").format(typeset(title), element)


def num(x: float) -> str:
    """A coordinate, short."""
    return f"{x:.1f}".removesuffix(".0") if abs(x) >= 1 or x == 0 else f"{x:.3g}"


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius = 1.25 if i % 2 == 0 else 0.55
        angle = -math.pi / 2 + i * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_P = 0.38
_ARM = [(-_P, -_P), (-_P, -1.15), (_P, -1.15)]  # one arm of the outline; the others are turns of it
_PLUS = [
    *_ARM,
    *[(-y, x) for x, y in _ARM],
    *[(-x, -y) for x, y in _ARM],
    *[(y, -x) for x, y in _ARM],
]
_OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
    "down": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    "plus": _PLUS,
    "cross": [((x - y) * 0.75, (x + y) * 0.75) for x, y in _PLUS],
    "star": _star(),
}


@dataclass(frozen=True)
class Scale:
    """Linear map from data to user units; ``end`` may lie before ``start``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values inside the range."""
        step = _nice((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def spread(values: Sequence[float], pad: float = 0.08, include: Sequence[float] = ()) -> tuple[float, float]:
    """Range of finite values with room around it."""
    finite = [v for v in (*values, *include) if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _nice(step: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(step))
    for factor in (1, 2, 2.5, 5, 10):
        if step <= factor * power * (1 + 1e-9):
            return factor * power
    return 10 * power


def tick_text(value: float, ticks: Sequence[float], signed: bool = False) -> str:
    """Ticks of one axis with the same number of digits."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    digits = next((d for d in range(7) if abs(round(step, d) - step) < 1e-9 * max(1.0, step)), 6)
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if signed and value > 0 else text


def width_of(text: str, size: float) -> float:
    """Estimated width of a text in user units."""
    return CHAR * size * len(text)


def shorten(text: str, room: float, size: float) -> str:
    """Cut a text to a width."""
    most = max(3, int(room / (CHAR * size)))
    return text if len(text) <= most else text[: most - 1] + "…"


Box = tuple[float, float, float, float]  # x1, y1, x2, y2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@dataclass
class Labels:
    """Places labels next to points so that they cover neither each other nor what is drawn."""

    frame: Box
    obstacles: list[Box] = field(default_factory=list)

    def place(self, x: float, y: float, text: str, size: float) -> tuple[float, float, str, bool]:
        """Best free place: (x, baseline, anchor, whether it is so far away that it needs a leader line)."""
        w, h = width_of(text, size), size
        best: tuple[float, float, float, str, bool, Box] | None = None
        for distance in (10.0, 20.0, 32.0, 46.0, 62.0):
            for dx, dy in ((1, 0), (-1, 0), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8), (0, -1), (0, 1)):
                cx, cy = x + distance * dx, y + distance * dy
                anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
                left = cx if dx > 0 else cx - w if dx < 0 else cx - w / 2
                box = (left - 1, cy - h / 2 - 1, left + w + 1, cy + h / 2 + 1)
                outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, self.frame)
                cost = 20 * outside + sum(_overlap(box, o) for o in self.obstacles) + 0.6 * distance
                if best is None or cost < best[0] - 1e-9:
                    best = (cost, cx, cy + 0.36 * h, anchor, distance > 25, box)
        assert best is not None
        self.obstacles.append(best[5])
        return best[1:5]
