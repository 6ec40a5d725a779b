"""Half fine-tuning: freeze a random half of every layer's matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan
    from addlang.models import ParamInfo


class HFT(Strategy):
    """Of every layer, 2 random of q, k, v, o are frozen; 2 of up, gate, down in a random half of the layers and 1 in the
    rest; half of the layer's norms. A bias goes with its matrix. The final norm, embedding and head are trained.

    The rule is that of the SSU paper's baselines (section 4); the paper of HFT gives it for a ratio of one half only.
    """

    name = "hft"
    paper = "HFT: Half Fine-Tuning for Large Language Models (ACL 2025)"
    summary = "freeze a random half of every layer's matrices; needs no data"

    ratio: float = Field(0.5, ge=0, lt=1, description="share of each layer's matrices that is frozen (Figure 2)")
    rounding: Literal["nearest", "spread"] = Field(
        "nearest",
        description="ratios other than 0.5: every layer freezes round(ratio * n) of a group of n; or, as the paper does "
        "at 0.5, some layers one more than others so that the whole model meets the ratio",
    )

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import depth, freeze_whole, inside, sample

        kinds = inside(model)
        layers = depth(kinds)
        groups: dict[str, dict[int, list[str]]] = {"attention": {}, "mlp": {}, "norms": {}}
        for name, info in kinds.items():
            if info.layer is None:
                continue
            modules = groups[_group(name, info)].setdefault(info.layer, [])
            if info.module not in modules:
                modules.append(info.module)
        chosen: set[str] = set()
        for group, by_layer in groups.items():
            size = max((len(m) for m in by_layer.values()), default=0)
            low, more = self._counts(size, layers)
            longer = set(sample(inputs.seed, f"hft:{group}", layers, more))
            for layer, modules in by_layer.items():
                count = low + (layer in longer)
                picks = sample(inputs.seed, f"hft:{group}:{layer}", len(modules), count)
                chosen.update(modules[i] for i in picks)
        frozen = {n for n, info in kinds.items() if info.layer is not None and info.module in chosen}
        return self.finish(model, inputs, freeze_whole(model, kinds, frozen))

    def _counts(self, n: int, layers: int) -> tuple[int, int]:
        """How many of ``n`` a layer freezes, and how many layers freeze one more."""
        exact = self.ratio * n
        if self.rounding == "nearest" and self.ratio != 0.5:
            return int(exact + 0.5), 0
        low = int(exact + 1e-9)
        return low, int((exact - low) * layers + 1e-9)


def _group(name: str, info: ParamInfo) -> str:
    from addlang.errors import AddlangError
    from addlang.strategies._layers import ATTENTION, MLP

    if info.group in ATTENTION:
        return "attention"
    if info.group in MLP:
        return "mlp"
    if "norm" in info.group.lower():
        return "norms"
    raise AddlangError(
        f"hft is defined for layers of q, k, v, o, up, gate and down projections and norms; '{name}' is none of them",
        "use strategy: layers to name what is frozen",
    )
