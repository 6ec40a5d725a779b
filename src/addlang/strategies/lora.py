"""LoRA: a low-rank update beside every frozen matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from addlang.strategies._adapters import AdapterAttached, AdapterStrategy
from addlang.strategies.base import Attached

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan


class LoRA(AdapterStrategy):
    """``W + (alpha / rank) B A``, ``B`` starting at zero; merged into ``W`` at the export.

    Rank 64 is the two-phase paper's baseline (section 5.2); it names no alpha, so this is the customary twice the rank.
    """

    name = "lora"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022)"
    summary = "train a low-rank update of every matrix (peft), merged at the end"

    rank: int = Field(64, gt=0, description="rank of every update")
    alpha: float = Field(128, gt=0, description="the update is scaled by alpha / rank")

    @property
    def width(self) -> int:
        return self.rank

    def _attached(self, model: nn.Module, plan: FreezePlan, peft: Any, masters: bool) -> Attached:
        return attach_lora(self, model, plan, peft, masters, AdapterAttached)


def attach_lora(
    strategy: Any,
    model: nn.Module,
    plan: FreezePlan,
    peft: Any,
    masters: bool,
    attached: type[AdapterAttached],
    **options: Any,
) -> AdapterAttached:
    """LoRA layers by peft; ``options`` go to its configuration."""
    config = peft.LoraConfig(
        r=strategy.rank,
        lora_alpha=strategy.alpha,
        lora_dropout=strategy.dropout,
        target_modules=list(strategy.target_modules),
        bias="none",
        **options,
    )
    seed = int(plan.provenance.get("seed", 0))
    targets = strategy.targets(model)
    return attached(
        model, plan, lambda m: peft.LoraModel(m, {"default": config}, "default"), targets, seed=seed, masters=masters
    )
