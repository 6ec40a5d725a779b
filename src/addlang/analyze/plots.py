"""Figures by matplotlib, as SVG. The only module that imports it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError

COLOURS = ("#0b69a6", "#c2500c", "#0a8463", "#974a85", "#866a00", "#3a8ac0", "#4c545c", "#ab2f3d")
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
