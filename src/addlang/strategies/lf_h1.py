"""LF_H1: freeze random layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan


QKV = ("q_proj", "k_proj", "v_proj")


class LFH1(Strategy):
    """Section 5.2, heuristic 1: a random set of 10 of 32 layers is frozen."""

    name = "lf_h1"
    paper = "Exploring Two-Phase Continual Instruction Fine-tuning for Multilingual Adaptation in Large Language Models"
    summary = "freeze 10 of 32 layers, drawn at random"

    count: int | None = Field(
        None, gt=0, description="layers to freeze; None: the paper's 10 of 32 as a share of the depth"
    )
    unit: Literal["layer", "matrix"] = Field(
        "layer",
        description="layer: whole layers; matrix: only q, k and v, each in layers of its own: as many as lf_h2 freezes, as its "
        "control",
    )

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import depth, freeze_whole, inside, sample

        kinds = inside(model)
        layers = depth(kinds)
        count = check_count(self.count, layers)
        if self.unit == "matrix":
            drawn = {g: sample(inputs.seed, f"lf_h1 {g}", layers, count) for g in QKV}
            some = {n for n, i in kinds.items() if i.group in QKV and i.layer in drawn[i.group]}
            return self.finish(model, inputs, freeze_whole(model, kinds, some), layers=drawn)
        chosen = set(sample(inputs.seed, "lf_h1", layers, count))
        frozen = {n for n, i in kinds.items() if i.layer in chosen}
        return self.finish(model, inputs, freeze_whole(model, kinds, frozen), layers=sorted(chosen))


def check_count(count: int | None, layers: int) -> int:
    """The number of layers to freeze.

    Raises:
        AddlangError: the model has fewer layers.
    """
    from addlang.errors import AddlangError
    from addlang.strategies._layers import share_of_depth

    if count is not None and count > layers:
        raise AddlangError(
            f"count {count} is more than the model's {layers} layers", f"lower count to {layers} or less"
        )
    return count or share_of_depth(layers)
