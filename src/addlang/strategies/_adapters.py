"""What LoRA, DoRA and AdaLoRA have in common: peft's layers inside the model, and a dense checkpoint at the end.

The embedding and the head are trained in place. peft's ``modules_to_save`` would train copies of them, which unties a
tied head from its embedding without a word, and holds both twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from addlang.errors import AddlangError, did_you_mean
from addlang.strategies._layers import ATTENTION, MLP
from addlang.strategies.base import Attached, PlanInputs, Strategy, import_peft

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan
    from addlang.strategies.costs import Cost

ADAPTER = "default"
NOT_SHARDED = (
    "adapters are not sharded: they and their optimizer state are small",
    "use DDP (sharding: ddp), or strategy: ssu with FSDP",
)


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class AdapterStrategy(Strategy):
    """Base of the methods that train a low-rank update of frozen matrices and merge it in the end.

    The freeze plan says what may differ in the merged checkpoint: the targeted matrices, embedding and head.
    """

    own_weights = False

    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the adapters' inputs")
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (*ATTENTION, *MLP), min_length=1, description="module types that get an adapter"
    )

    @property
    def width(self) -> int:
        """Rank while training."""
        raise TypeError(f"strategy '{self.name}' must define width")

    def requires(self) -> frozenset[str]:
        return frozenset({"peft"})

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import freeze_whole, inside

        kinds = inside(model)
        targets = set(self.targets(model))
        entries = freeze_whole(model, kinds, set(kinds) - targets)
        return self.finish(model, inputs, entries, adapter_parameters=self._size(model))

    def targets(self, model: nn.Module) -> list[str]:
        """Weights that get an adapter.

        Raises:
            AddlangError: a name that matches no linear layer, with the nearest one.
        """
        from addlang.strategies._layers import inside

        linear = {n: i.group for n, i in inside(model).items() if i.kind == "linear"}
        for module in self.target_modules:
            if module not in linear.values():
                raise AddlangError(
                    f"target_modules: the model has no linear layer '{module}'",
                    did_you_mean(module, set(linear.values())),
                )
        return [n for n, group in linear.items() if group in self.target_modules]

    def _size(self, model: nn.Module) -> int:
        """Elements of all adapters."""
        shapes = [model.get_parameter(n).shape for n in self.targets(model)]
        return sum(self.width * (s[0] + s[1]) + self._extra(s[0]) for s in shapes)

    def _extra(self, out: int) -> int:
        """Elements of one adapter besides the two factors."""
        return 0

    def check_execution(self, model: nn.Module, plan: FreezePlan, execution: str) -> None:
        if execution != "auto":
            raise AddlangError(
                f"strategy '{self.name}' trains adapters beside frozen matrices: there is no execution to choose",
                "leave execution out",
            )

    def check_sharding(self, sharding: Literal["none", "ddp", "fsdp"]) -> None:
        if sharding == "fsdp":
            raise AddlangError(*NOT_SHARDED)

    def attach(self, model: nn.Module, plan: FreezePlan, execution: str, *, masters: bool = True) -> Attached:
        self.check_execution(model, plan, execution)
        peft = import_peft(self.name)
        plan.validate(model)
        return self._attached(model, plan, peft, masters)

    def _attached(self, model: nn.Module, plan: FreezePlan, peft: Any, masters: bool) -> Attached:
        raise TypeError(f"strategy '{self.name}' must define _attached()")

    def footprint(self, model: nn.Module, plan: FreezePlan) -> tuple[FreezePlan, int]:
        from addlang.freeze.plan import FreezePlan, Frozen
        from addlang.strategies._layers import inside

        kinds = inside(model)  # it moves when the adapters are merged, but is not what the optimizer owns
        entries = {n: Frozen(e.shape, "all") if n in kinds else e for n, e in plan.entries.items()}
        return FreezePlan(entries, plan.model_hash, plan.provenance), self._size(model)

    def cost(self, model: nn.Module) -> Cost:
        from addlang.models import embedding_names
        from addlang.strategies._layers import inside
        from addlang.strategies.costs import OPTIMIZER_BYTES, Cost

        plan = self.outline(model)
        kinds = inside(model)
        outside = {n: e.numel - e.frozen_count for n, e in plan.entries.items() if n not in kinds}
        head = embedding_names(model)[1]
        frozen = sum(plan[n].numel for n, i in kinds.items() if i.kind == "linear") + plan[head].numel
        shapes = [model.get_parameter(n).shape for n in self.targets(model)]
        products = sum(6 * self.width * (s[0] + s[1]) for s in shapes)
        trained = sum(outside.values()) + self._size(model)
        flops = 4 * frozen + 2 * outside[head] + products  # no matrix but the head has a gradient of its own
        return Cost(plan.numel, trained, flops, OPTIMIZER_BYTES * trained, self._note())

    def _note(self) -> str:
        return ""


class AdapterAttached(Attached):
    """A model whose targeted linear layers are peft layers.

    Args:
        tuner: makes the peft tuner, which puts its layers into the model.
        targets: names of the weights that get an adapter.
        seed: of the adapters' initial values.
    """

    execution = "adapters (peft)"

    def __init__(
        self, model: nn.Module, plan: FreezePlan, tuner: Any, targets: list[str], *, seed: int, masters: bool
    ) -> None:
        import torch

        from addlang.freeze.masked import LOW_PRECISION, Masked
        from addlang.freeze.plan import FreezePlan, Frozen
        from addlang.strategies._layers import inside

        super().__init__(model, plan)
        self.targets = targets
        within = inside(model)
        for p in model.parameters():
            p.requires_grad_(False)
        devices = [p.device for p in list(model.parameters())[:1] if p.device.type == "cuda"]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self.tuner = tuner(model)
        names = dict(model.named_parameters())
        rest = {
            n: plan[n] if n in plan.entries and n not in within else Frozen(tuple(p.shape), "all")
            for n, p in names.items()
        }
        adapters = {n for n, p in names.items() if p.requires_grad}
        self._outside = Masked(model, FreezePlan(rest), masters=masters)  # embedding and head; everything else frozen
        for n in adapters:
            p = names[n]
            p.requires_grad_(True)
            if masters and p.dtype in LOW_PRECISION:
                p.data = p.data.float()

    def layer(self, name: str) -> Any:
        """The peft layer of a targeted weight."""
        return self.model.get_submodule(name.removesuffix(".weight"))

    def bind(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        import torch

        if any(isinstance(p, torch.distributed.tensor.DTensor) for _, p in self.named_trainable()):
            raise AddlangError(*NOT_SHARDED)

    def before_clip(self, step: int) -> None:
        self._outside.before_clip(step)

    def after_step(self, step: int) -> None:
        self._outside.after_step(step)

    def merged(self, name: str) -> Tensor:
        """The dense weight with its update, in fp32 (float64 for a float64 model)."""
        import torch

        layer = self.layer(name)
        base = layer.get_base_layer().weight.detach()
        wide = torch.promote_types(base.dtype, torch.float32)
        dense: Tensor = base.to(wide) + layer.get_delta_weight(ADAPTER).detach().to(wide)
        return dense

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Embedding and head as trained, and every targeted weight merged, under the original names."""
        for name, p in self.model.named_parameters():
            if p.requires_grad and name in self.plan.entries:
                yield name, p.detach()
        for name in self.targets:
            yield name, self.merged(name).detach()
