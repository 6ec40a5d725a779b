"""DoRA: LoRA on the direction of every matrix, and a trained magnitude per output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from addlang.strategies._adapters import ADAPTER, AdapterAttached, AdapterStrategy
from addlang.strategies.base import Attached
from addlang.strategies.lora import attach_lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan


class DoRA(AdapterStrategy):
    """``m (W + s B A) / ||W + s B A||``, one norm and one magnitude ``m`` per output; starts as ``W``."""

    name = "dora"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation (ICML 2024)"
    summary = "LoRA with a separate magnitude per output (peft), merged at the end"

    rank: int = Field(32, gt=0, description="rank of every update (the paper's larger setting for Llama)")
    alpha: float = Field(64, gt=0, description="the update is scaled by alpha / rank")

    @property
    def width(self) -> int:
        return self.rank

    def _extra(self, out: int) -> int:
        return out

    def _note(self) -> str:
        return "and the norms of every merged matrix once per forward pass"

    def _attached(self, model: nn.Module, plan: FreezePlan, peft: Any, masters: bool) -> Attached:
        return attach_lora(self, model, plan, peft, masters, DoRAAttached, use_dora=True)


class DoRAAttached(AdapterAttached):
    """DoRA's merged weights have the trained magnitudes."""

    def __init__(self, model: nn.Module, plan: FreezePlan, *args: Any, masters: bool, **kw: Any) -> None:
        super().__init__(model, plan, *args, masters=masters, **kw)
        for (
            name
        ) in self.targets:  # peft takes them in the type of the weights: rounded to 16 bits they are not the norms
            layer = self.layer(name)
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight
            magnitude.data = row_norms(super().merged(name)).to(magnitude.dtype)

    def merged(self, name: str) -> Tensor:
        dense = super().merged(name)
        magnitude = self.layer(name).lora_magnitude_vector[ADAPTER].weight.detach().to(dense.dtype)
        return dense * (magnitude / row_norms(dense)).unsqueeze(1)


def row_norms(weight: Tensor) -> Tensor:
    """[out, in] -> [out]"""
    import torch

    norms: Tensor = torch.linalg.norm(weight, dim=1)
    return norms
