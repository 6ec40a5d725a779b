"""Structured sparse fine-tuning: train a few input channels of the down projections, and heads of the output projections."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from addlang.errors import AddlangError
from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan


class S2FT(Strategy):
    """The chosen channels are columns, trained in place; everything else in the layers is frozen.

    The paper moves the chosen channels to the front by permuting the projections around them. That changes nothing only
    if every tensor between them is permuted too, which public code does not do for grouped queries or for norms on
    queries and keys (OLMo 2, Qwen 3): there its model differs from the source before the first step. An index needs no
    permutation, and the split engine trains it at the same cost.
    """

    name = "s2ft"
    paper = "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity (NeurIPS 2024)"
    summary = (
        "train a few input channels of the down projections (and heads of the output projections), freeze the rest"
    )

    d_ratio: float = Field(
        0.015,
        ge=0,
        lt=1,
        description="share of all down-projection input channels; 0.015, 0.03, 0.055, 0.11 have as many parameters as "
        "LoRA of rank 8, 16, 32, 64 on all seven projections (Tables 8 and 14)",
    )
    o_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of all attention heads whose output-projection columns train (paper: 0.015)"
    )

    @model_validator(mode="after")
    def _something(self) -> S2FT:
        if not self.d_ratio and not self.o_ratio:
            raise ValueError("d_ratio and o_ratio are both 0: nothing would be trained")
        return self

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import depth, freeze_whole, inside

        kinds = inside(model)
        layers = depth(kinds)
        entries = freeze_whole(model, kinds, set(kinds))
        for group, ratio in (("down_proj", self.d_ratio), ("o_proj", self.o_ratio)):
            if ratio:
                names = [n for n, i in kinds.items() if i.kind == "linear" and i.group == group]
                if len(names) != layers:
                    raise AddlangError(f"s2ft needs one {group} in each of the {layers} layers; there are {len(names)}")
                entries.update(_columns(model, names, group, ratio, inputs.seed))
        return self.finish(model, inputs, entries)


def _columns(model: Any, names: list[str], group: str, ratio: float, seed: int) -> dict[str, Any]:
    """Entries that leave the chosen channels free; whole heads for the output projection."""
    import torch

    from addlang.freeze.plan import Frozen
    from addlang.strategies._layers import heads_of

    shapes = {n: tuple(model.get_parameter(n).shape) for n in names}
    width = shapes[names[0]][1]
    per_layer = heads_of(model, group) if group == "o_proj" else width
    size = width // per_layer  # columns per unit
    if any(s[1] != per_layer * size for s in shapes.values()):
        raise AddlangError(f"the {group} layers differ in width: {sorted({s[1] for s in shapes.values()})}")
    entries = {}
    units = choose(len(names), per_layer, ratio, seed)
    for name, chosen in zip(names, units, strict=True):
        free = torch.zeros(per_layer, dtype=torch.bool)
        free[chosen] = True
        free = free.repeat_interleave(size)
        if bool(free.all()):
            entries[name] = Frozen(shapes[name], "none")
        elif bool(free.any()):
            entries[name] = Frozen(shapes[name], "columns", (~free).nonzero().flatten())
        else:
            entries[name] = Frozen(shapes[name], "all")
    return entries


def choose(layers: int, per_layer: int, ratio: float, seed: int) -> list[list[int]]:
    """Units of each layer, drawn over all layers together: ``int(total * ratio)``, at least one.

    Python's generator and one draw over the whole range: the public code's choice for the same seed.
    """
    count = max(1, int(layers * per_layer * ratio))
    drawn = sorted(random.Random(seed).sample(range(layers * per_layer), count))
    return [[u % per_layer for u in drawn if u // per_layer == layer] for layer in range(layers)]
