"""Layers and module types of a merge: which model gives a layer, and factors by module and layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from addlang.merge.layout import Layout
    from addlang.merge.methods import LayerSwap
    from addlang.merge.sources import Models
    from addlang.models import ParamInfo

GUIDE_DEPTH, GUIDE_BOTTOM, GUIDE_TOP, GUIDE_TRANSITION = 32, 5, 2, 1
Whose = Literal["task", "language", "mean of both"]


@dataclass(frozen=True)
class Ranges:
    """Number of layers from the language model at either end, and of averaged ones beside them."""

    bottom: int
    top: int
    transition: int


def swap_ranges(spec: LayerSwap, models: Models) -> tuple[Ranges, dict[str, Any]]:
    """The layers of a swap, and plain data for the report.

    Raises:
        AddlangError: they do not fit into the model, or ``auto`` finds none.
    """
    p, depth = spec.parameters, models.layout.layers
    transition = _scaled(GUIDE_TRANSITION, depth, least=0) if p.transition is None else p.transition
    about: dict[str, Any] = {"depth": depth}
    if p.auto:
        assert spec.base_model is not None
        task = relative_changes(models, spec.base_model, spec.task_model)
        language = relative_changes(models, spec.base_model, spec.language_model)
        about["relative_change"] = {"task": task, "language": language}
        bottom, top = auto_ranges(task, language)
        if bottom + top == 0:
            raise AddlangError(
                "auto: neither the first nor the last layer changed relatively more in the language model than in the task model",
                "give --bottom and --top",
            )
    else:
        bottom = _scaled(GUIDE_BOTTOM, depth) if p.bottom is None else p.bottom
        top = _scaled(GUIDE_TOP, depth) if p.top is None else p.top
        if bottom + top == 0:
            raise AddlangError("bottom 0 and top 0 swap no layer", "raise one of them")
    edges = (bottom > 0) + (top > 0)
    if bottom + top + edges * transition > depth:
        raise AddlangError(
            f"bottom {bottom}, top {top} and {edges} x transition {transition} are more than the model's {depth} layers",
            "lower them",
        )
    return Ranges(bottom, top, transition), {**about, "bottom": bottom, "top": top, "transition": transition}


def _scaled(of_32: int, depth: int, least: int = 1) -> int:
    """The guide's number of 32 layers as the same share of another depth."""
    return max(least, round(of_32 * depth / GUIDE_DEPTH))


def assign(name: str, info: ParamInfo, layout: Layout, ranges: Ranges) -> Whose:
    """Which model gives a parameter. A tied head is the embedding, so it goes with the bottom."""
    if name == layout.embedding:
        return "language" if ranges.bottom else "task"
    if info.layer is None:
        return "language" if ranges.top else "task"
    from_top = layout.layers - 1 - info.layer
    if info.layer < ranges.bottom or from_top < ranges.top:
        return "language"
    near_bottom = ranges.bottom and info.layer < ranges.bottom + ranges.transition
    near_top = ranges.top and from_top < ranges.top + ranges.transition
    return "mean of both" if near_bottom or near_top else "task"


def relative_changes(models: Models, base: str, tuned: str) -> list[float]:
    """``||W - W_base|| / ||W_base||`` of every layer, over all its tensors."""
    import torch

    changed = [0.0] * models.layout.layers
    size = [0.0] * models.layout.layers
    for name, info in models.layout.kinds.items():
        if (layer := info.layer) is None:
            continue
        for w0, w in models.part(name).blocks(base, tuned):
            changed[layer] += float((w - w0).to(torch.float64).square().sum())
            size[layer] += float(w0.to(torch.float64).square().sum())
    return [math.sqrt(c / s) if s else 0.0 for c, s in zip(changed, size, strict=True)]


def auto_ranges(task: list[float], language: list[float]) -> tuple[int, int]:
    """(bottom, top): runs of layers at either end where the language model's change, relative to its own mean over the
    layers, exceeds the task model's.

    Raises:
        AddlangError: one of the two did not change at all.
    """
    means = [sum(x) / len(x) for x in (task, language)]
    if 0 in means:
        which = "task" if means[0] == 0 else "language"
        raise AddlangError(f"auto: the {which} model's layers are those of base_model", "check base_model")
    more = [ch / means[1] > t / means[0] for t, ch in zip(task, language, strict=True)]
    bottom = next((i for i, m in enumerate(more) if not m), len(more))
    top = next((i for i, m in enumerate(reversed(more[bottom:])) if not m), 0)
    return bottom, top


class Factors:
    """Product of the factors of a parameter's module type and layer; 1 where none is given.

    Raises:
        AddlangError: a module type or layer that the model does not have.
    """

    def __init__(self, modules: Mapping[str, float], layers: Mapping[str, float], layout: Layout) -> None:
        known = {i.group for i in layout.kinds.values()}
        for name in modules:
            if name not in known:
                raise AddlangError(f"the model has no module type '{name}'", did_you_mean(name, known))
        self.modules = dict(modules)
        self.layers: dict[int, float] = {}
        for text, factor in layers.items():
            for layer in parse_layers(text, layout.layers):
                if layer in self.layers:
                    raise AddlangError(f"layer {layer} stands in two ranges of layers", "name it once")
                self.layers[layer] = factor

    def __call__(self, info: ParamInfo) -> float:
        by_layer = 1.0 if info.layer is None else self.layers.get(info.layer, 1.0)
        return self.modules.get(info.group, 1.0) * by_layer


def parse_layers(text: str, depth: int) -> range:
    """``3`` or ``0-4`` (both ends belong to it)."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if not match:
        raise AddlangError(f"layers '{text}' is no layer or range", "write 3 or 0-4")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < depth:
        raise AddlangError(f"layers '{text}': the model has layers 0 to {depth - 1}", "lower the range")
    return range(first, last + 1)
