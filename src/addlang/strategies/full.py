"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan


class Full(Strategy):
    name = "full"
    paper = "baseline (FFT) of Mitigating Catastrophic Forgetting in Target Language Adaptation of LLMs via Source-Shielded Updates"
    summary = "train everything; the most target language and the most forgetting"

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.freeze.plan import FreezePlan

        plan = FreezePlan.empty(model)
        return FreezePlan({**plan.entries, **self.outside(model, inputs)}, inputs.model_hash, {"strategy": self.name})
