"""The self anchor alone: everything is trained, held to the source's distribution on its own conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from addlang.guards.self_anchor import SelfAnchor
from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan
    from addlang.guards import Guard
    from addlang.strategies.costs import Cost


class SelfAnchored(Strategy):
    """Nothing is frozen; the guard of the same name does the work. On top of another method use ``guards``."""

    name = "self_anchor"
    paper = SelfAnchor.paper
    summary = "train everything, held to the source's own distribution on conversations that the source itself samples"

    anchor: SelfAnchor = Field(SelfAnchor(), description="options of the guard")

    def guards(self) -> tuple[Guard, ...]:
        return (self.anchor,)

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.freeze.plan import FreezePlan

        plan = FreezePlan.empty(model)
        return FreezePlan({**plan.entries, **self.outside(model, inputs)}, inputs.model_hash, {"strategy": self.name})

    def cost(self, model: nn.Module) -> Cost:
        from addlang.strategies.costs import of_plan

        return of_plan(model, self.outline(model), "and sampling and reading its conversations once beforehand")
