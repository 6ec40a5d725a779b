"""LISA: train a few layers at a time, drawn anew at every interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from addlang.errors import AddlangError
from addlang.strategies.base import Around, Attached, PlanInputs, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan
    from addlang.strategies.costs import Cost

PERIOD = "lisa/period"
ONE_PROCESS = (
    "lisa puts parameters to sleep, which neither DDP nor FSDP allows while they train",
    "train lisa in one process, or use strategy: ssu",
)


class LISA(Strategy):
    """Embedding, head and final norm are trained all the time; of the layers, ``active_layers`` are awake for ``interval``
    steps, then others are drawn. A layer that falls asleep loses its optimizer state: that is what saves the memory, and
    it starts with fresh moments when it wakes.

    Nothing is frozen for good: every layer is drawn sooner or later.
    """

    name = "lisa"
    paper = "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning (NeurIPS 2024)"
    summary = "train embeddings and a few random layers, others at every interval; optimizer memory of these only"
    dynamic = True

    active_layers: int = Field(2, gt=0, description="layers awake at a time")
    interval: int = Field(20, gt=0, description="optimizer steps until others are drawn")

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import depth, freeze_whole, inside

        kinds = inside(model)
        if self.active_layers > depth(kinds):
            raise AddlangError(
                f"active_layers {self.active_layers} is more than the model's {depth(kinds)} layers",
                f"lower it to {depth(kinds)} or less",
            )
        return self.finish(model, inputs, freeze_whole(model, kinds, set()))

    def check_sharding(self, sharding: Literal["none", "ddp", "fsdp"]) -> None:
        if sharding != "none":
            raise AddlangError(*ONE_PROCESS)

    def attach(self, model: nn.Module, plan: FreezePlan, execution: str, *, masters: bool = True) -> Attached:
        from addlang.strategies._layers import depth, inside

        kinds = inside(model)
        inner = super().attach(model, plan, execution, masters=masters)
        layer_of = {n: i.layer for n, i in kinds.items() if i.layer is not None}
        seed = int(plan.provenance.get("seed", 0))
        return Sleeping(inner, layer_of, depth(kinds), self.active_layers, self.interval, seed)

    def asleep(self, plan: FreezePlan) -> int:
        from addlang.models import layer_number

        layers: dict[int, int] = {}
        for name, entry in plan.entries.items():
            if (layer := layer_number(name)) is not None:
                layers[layer] = layers.get(layer, 0) + entry.numel
        return sum(sorted(layers.values())[: -self.active_layers])

    def cost(self, model: nn.Module) -> Cost:
        from addlang.freeze.plan import FreezePlan, Frozen
        from addlang.strategies._layers import depth, inside
        from addlang.strategies.costs import mean, of_plan

        kinds = inside(model)
        costs = []
        for period in range(16):
            awake = draw(0, period, depth(kinds), self.active_layers)
            entries = dict(self.outline(model).entries)
            asleep = [n for n, i in kinds.items() if i.layer is not None and i.layer not in awake]
            entries.update({n: Frozen(entries[n].shape, "all") for n in asleep})
            costs.append(of_plan(model, FreezePlan(entries), "mean over 16 draws"))
        return mean(costs)


def draw(seed: int, period: int, layers: int, active: int) -> set[int]:
    """The layers that are awake in a period: uniform, without replacement, a pure function of (seed, period)."""
    from addlang.strategies._layers import sample

    return set(sample(seed, f"lisa:{period}", layers, active))


class Sleeping(Around):
    """Wakes and puts to sleep."""

    def __init__(
        self, inner: Attached, layer_of: Mapping[str, int], layers: int, active: int, interval: int, seed: int
    ) -> None:
        super().__init__(inner)
        self._names = [n for n, _ in inner.named_trainable()]
        self.layer_of, self.layers, self.active, self.interval, self.seed = layer_of, layers, active, interval, seed
        self.optimizer: torch.optim.Optimizer | None = None
        self.period = 0
        self._turn(0)

    @property
    def awake(self) -> set[int]:
        """Layers that are trained now."""
        return draw(self.seed, self.period, self.layers, self.active)

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Also what sleeps, so that the optimizer owns every parameter from the beginning."""
        parameters = dict(self.model.named_parameters())
        return [(n, parameters[n]) for n in self._names]

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return Attached.param_groups(self, weight_decay)

    def bind(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise AddlangError(*ONE_PROCESS)
        super().bind(optimizer, steps)
        self.optimizer = optimizer

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)
        if step % self.interval == 0:
            self._turn(step // self.interval)

    def _turn(self, period: int) -> None:
        self.period = period
        awake = self.awake
        for name, p in self.named_trainable():
            up = name not in self.layer_of or self.layer_of[name] in awake
            p.requires_grad_(up)
            if not up:
                p.grad = None
                if self.optimizer is not None:
                    self.optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, Tensor]:
        import torch

        return {**{n: p.detach() for n, p in self.named_trainable()}, PERIOD: torch.tensor([self.period])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if PERIOD not in state:
            raise AddlangError("the checkpoint is not of a lisa run", "start again with --overwrite")
        Attached.load_state_dict(self, {n: t for n, t in state.items() if n != PERIOD})
        self.inner.after_step(0)
        self._turn(int(state[PERIOD]))

    def export(self) -> Iterator[tuple[str, Tensor]]:
        self.inner.after_step(0)  # puts back what is frozen
        for name, p in self.named_trainable():
            yield name, p.detach()
