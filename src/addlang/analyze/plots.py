"""Figures by matplotlib, as SVG. The only module that imports it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError

COLOURS = ("#0b69a6", "#c2500c", "#0a8463", "#974a85", "#866a00", "#3a8ac0", "#4c545c", "#ab2f3d")
OTHERS = "#c9ced3"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Draw and write one figure, atomically; the same data give the same bytes.

    Raises:
        AddlangError: matplotlib is not installed.
    """
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AddlangError(
            f"figures of analyses need matplotlib ({error})", "install it: pip install 'addlang[analyze]'"
        ) from error
    settings: Any = {
        "svg.fonttype": "path",
        "svg.hashsalt": "addlang",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#eaecee",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=COLOURS),
    }
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure)
        temporary = path.with_name(path.name + ".tmp")
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    os.replace(temporary, path)


def draw_shares(figure: Any, found: Mapping[str, Mapping[str, float]]) -> None:
    """A stacked bar per set: shares of languages by code, the seven most frequent by name; none where nothing was judged."""
    axes = figure.add_subplot()
    total: Counter[str] = Counter()
    for shares in found.values():
        total.update(shares)
    shown = [c for c, _ in total.most_common(7)]
    for y, shares in enumerate(found.values()):
        if not shares:
            axes.text(0.01, y, "not judged", va="center", color=COLOURS[6])
            continue
        left = 0.0
        for i, code in enumerate(shown):
            axes.barh(y, shares.get(code, 0.0), left=left, color=COLOURS[i], height=0.6)
            left += shares.get(code, 0.0)
        axes.barh(y, max(0.0, 1 - left), left=left, color=OTHERS, height=0.6)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share")
    colours = {**dict(zip(shown, COLOURS, strict=False)), "others": OTHERS}
    figure.legend(
        [axes.bar(0, 0, color=c) for c in colours.values()], list(colours), loc="outside lower center", ncols=8
    )
