"""Gradient-mask tuning: at every step only the largest gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from addlang.errors import AddlangError
from addlang.strategies.base import Around, Attached, PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan
    from addlang.strategies.costs import Cost

ELSEWHERE = "train gmt in one process or with DDP (sharding: ddp), or use strategy: ssu"


class GMT(Strategy):
    """Per tensor, the ``int(n * ratio)`` entries of the accumulated gradient with the smallest absolute value are set to
    zero; then the rest is clipped, then the optimizer steps.

    Nothing is frozen for good: the optimizer's momentum and its weight decay still move an entry whose gradient was
    dropped. The accumulation interval of the paper is the batch: micro-batches are summed before the choice.
    """

    name = "gmt"
    paper = "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance (AAAI 2025)"
    summary = "at every step drop the smallest gradients; dynamic, saves no compute, freezes nothing for good"
    dynamic = True

    ratio: float = Field(0.5, ge=0, lt=1, description="share of every tensor's gradient that is dropped (Table 8)")
    include_embeddings: bool = Field(
        False, description="drop in embedding and head too (the SSU paper's comparison trains them in full)"
    )

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import freeze_whole, inside

        return self.finish(model, inputs, freeze_whole(model, inside(model), set()))

    def check_sharding(self, sharding: Literal["none", "ddp", "fsdp"]) -> None:
        if sharding == "fsdp":
            raise AddlangError("gmt chooses within whole tensors, and FSDP cuts them", ELSEWHERE)

    def attach(self, model: nn.Module, plan: FreezePlan, execution: str, *, masters: bool = True) -> Attached:
        from addlang.strategies._layers import inside

        names = set(plan) if self.include_embeddings else set(inside(model))
        return GradientMask(super().attach(model, plan, execution, masters=masters), names, self.ratio)

    def cost(self, model: nn.Module) -> Cost:
        from addlang.strategies.costs import of_plan

        return of_plan(model, self.outline(model), "and one top-k over every gradient")


class GradientMask(Around):
    """Drops small gradients after the inner state has masked and before the loop clips."""

    def __init__(self, inner: Attached, names: set[str], ratio: float) -> None:
        super().__init__(inner)
        self.names = names
        self.ratio = ratio

    def before_clip(self, step: int) -> None:
        self.inner.before_clip(step)
        for name, p in self.named_trainable():
            if name in self.names and p.grad is not None:
                drop_smallest(p.grad, self.ratio, name)


def drop_smallest(gradient: Tensor, ratio: float, name: str = "gradient") -> None:
    """Set the ``int(n * ratio)`` entries of smallest absolute value to zero, in place; exactly as many, also among equals.

    Raises:
        AddlangError: the gradient is sharded, so no rank sees the whole tensor.
    """
    import torch

    if hasattr(gradient, "full_tensor"):
        raise AddlangError(f"gmt chooses within whole tensors, but '{name}' is sharded", ELSEWHERE)
    flat = gradient.view(-1) if gradient.is_contiguous() else gradient.reshape(-1)
    dropped = int(flat.numel() * ratio)
    if dropped == 0:
        return
    kept = torch.topk(flat.abs(), flat.numel() - dropped, sorted=False).indices
    values = flat[kept]
    masked = torch.zeros_like(flat).index_copy_(0, kept, values)
    gradient.copy_(masked.view(gradient.shape))
