"""What a strategy is, and what it becomes at run time.

A strategy is a frozen config: its fields are its hyperparameters, ``paper`` and ``summary`` are metadata. ``plan`` says
what is frozen, as data; ``attach`` makes it true on a model. Adding a method is one file in this folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from addlang.errors import AddlangError, did_you_mean, options_at

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from addlang.data.calibration import CalibrationSet
    from addlang.freeze.plan import FreezePlan, Frozen
    from addlang.guards import Guard
    from addlang.recipe import TrainSettings
    from addlang.strategies.costs import Cost

HELPERS = ("base", "costs", "measured")


@dataclass(frozen=True)
class PlanInputs:
    """What a strategy may look at when it plans.

    Attributes:
        seed: of every random choice.
        model_hash: of the source weights; stored in the plan.
        special_token_ids: rows of the embedding that ``freeze_special_tokens`` protects.
        calibration: makes the source-language calibration set; called only by strategies that require it.
        target: the phase's training data from its beginning: one item per optimizer step, a sequence of micro-batches
            (``input_ids``, ``labels``, ``position_ids`` [B, L]); called only by strategies that require target text.
        settings: how the phase trains, for strategies that train while they plan; None: the defaults.
        progress: called with (done, total, what).
        cache_dir: where something that takes long may be kept, under the model's hash; None: nowhere.
    """

    seed: int = 0
    model_hash: str = ""
    special_token_ids: tuple[int, ...] = ()
    calibration: Callable[[], CalibrationSet] | None = None
    target: Callable[[], Iterable[Sequence[Mapping[str, Tensor]]]] | None = None
    settings: TrainSettings | None = None
    progress: Callable[[int, int, str], None] | None = None
    cache_dir: Path | None = None


class Strategy(BaseModel):
    """Base of every method. Subclasses add fields and implement :meth:`plan`.

    Attributes:
        dynamic: what moves is chosen anew during training, so the plan names only what can never move.
        needs_start: training reads the weights that the phase starts from, besides the model's own (not planning: that is
            over before training begins).
        own_weights: what is trained are the model's own weights, which have a value in the source.
        example: options of a typical use, for strategies that have no default for something.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    dynamic: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False
    own_weights: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {}

    @property
    def steps_before(self) -> int:
        """Optimizer steps that are made while planning, on the phase's first batches; they count in no budget."""
        return 0

    train_embeddings: bool = Field(True, description="train the input embedding")
    train_lm_head: bool = Field(True, description="train the output head (same tensor as the embedding when tied)")
    freeze_special_tokens: bool = Field(False, description="keep the special tokens' rows of embedding and head")

    def requires(self) -> frozenset[str]:
        """What the strategy needs: a subset of {"source_text", "target_text", "reference_model", "peft"}."""
        return frozenset()

    def guards(self) -> tuple[Guard, ...]:
        """Guards that belong to the method."""
        return ()

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        """Decide what is frozen. Leaves the weights bit-identical."""
        raise TypeError(f"strategy '{self.name}' must define plan()")

    def outline(self, model: nn.Module) -> FreezePlan:
        """A plan with the right *counts* but arbitrary choices, made without data or weights (for ``addlang plan``)."""
        return self.plan(model, PlanInputs())

    def finish(self, model: nn.Module, inputs: PlanInputs, entries: Mapping[str, Frozen], **facts: Any) -> FreezePlan:
        """The plan from the entries of what is inside the comparison; adds embedding and head, and says how it was made.

        Args:
            entries: one for every parameter but the embedding and the head.
            facts: more provenance, plain data.
        """
        from addlang.freeze.plan import FreezePlan

        every = {**entries, **self.outside(model, inputs)}
        provenance = {"strategy": self.name, **self.model_dump(mode="json"), "seed": inputs.seed, **facts}
        return FreezePlan({n: every[n] for n, _ in model.named_parameters()}, inputs.model_hash, provenance)

    def cost(self, model: nn.Module) -> Cost:
        """What a training step costs; shapes are enough, so the model may be on the meta device."""
        from addlang.strategies.costs import of_plan

        return of_plan(model, self.outline(model))

    def footprint(self, model: nn.Module, plan: FreezePlan) -> tuple[FreezePlan, int]:
        """What training keeps in memory: which of the model's own elements it trains, and how many elements besides."""
        return plan, 0

    def asleep(self, plan: FreezePlan) -> int:
        """Elements that are trained, but not now: their masters are in memory, their gradients and optimizer state are not."""
        return 0

    def check_execution(self, model: nn.Module, plan: FreezePlan, execution: str) -> None:
        """Whether the plan can be obeyed as asked; the model may be on the meta device, the plan an outline.

        Raises:
            AddlangError: it cannot; the reason is named.
        """
        from addlang.freeze.execution import check_execution

        check_execution(model, plan, execution)

    def check_sharding(self, sharding: Literal["none", "ddp", "fsdp"]) -> None:
        """Whether the method can be trained on one process (``none``), on replicas, or on shards.

        Raises:
            AddlangError: it cannot; the reason is named.
        """

    def attach(self, model: nn.Module, plan: FreezePlan, execution: str, *, masters: bool = True) -> Attached:
        """Realise the plan on the model, before sharding and before the optimizer is built."""
        from addlang.freeze.execution import attach_plan

        return attach_plan(model, plan, execution, masters=masters)

    def outside(self, model: Any, inputs: PlanInputs) -> dict[str, Frozen]:
        """Entries for embedding and head, alike in every strategy (contract 9).

        Raises:
            AddlangError: tied weights with contradicting options.
        """
        import torch

        from addlang.freeze.plan import Frozen
        from addlang.models import embedding_names

        embedding, head, tied = embedding_names(model)
        if tied and self.train_embeddings != self.train_lm_head:
            raise AddlangError(
                "the model ties its head to its embedding, so train_embeddings and train_lm_head must be equal",
                f"set both to {str(self.train_embeddings).lower()}",
            )
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        entries: dict[str, Frozen] = {}
        for name, train in ((embedding, self.train_embeddings), (head, self.train_lm_head)):
            if name not in shapes:  # a tied head is listed once, as the embedding
                continue
            ids = sorted({i for i in inputs.special_token_ids if i < shapes[name][0]})
            if not train:
                entries[name] = Frozen(shapes[name], "all")
            elif self.freeze_special_tokens and ids:
                entries[name] = Frozen(shapes[name], "rows", torch.tensor(ids))
            else:
                entries[name] = Frozen(shapes[name], "none")
        return entries


class Attached:
    """All run-time state of a strategy on one model. The defaults do nothing.

    The loop calls, per optimizer step: backward -> ``before_clip`` -> clip -> optimizer -> ``after_step``.
    """

    execution: str = "dense"  # how the plan is obeyed, for the report

    def __init__(self, model: nn.Module, plan: FreezePlan) -> None:
        self.model = model
        self.plan = plan

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer owns, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: norms and biases are not decayed, as in the Hugging Face trainer."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for _, p in self.named_trainable():
            (decayed if p.dim() >= 2 else plain).append(p)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return [g for g in groups if g["params"]]

    def bind(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Once, when the optimizer is built and before a checkpoint is loaded.

        Args:
            steps: optimizer steps of the whole phase.
        """

    def before_clip(self, step: int) -> None:
        """After backward and accumulation, before gradients are clipped (also when clipping is off)."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step."""

    def loss_term(self) -> Tensor | None:
        """A penalty added to the loss of each optimizer step, or None."""
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers for ``metrics.jsonl``, where a step is logged."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue exactly, by name; the masters of what is trained, no frozen weights."""
        return {n: p.detach() for n, p in self.named_trainable()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        import torch

        own = dict(self.named_trainable())
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))[0]
            raise AddlangError(
                f"the checkpoint does not fit this run: '{odd}' is in one only", "start again with --overwrite"
            )
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(state[n])

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the source model that may have moved: (original name, dense tensor of original shape)."""
        for n, p in self.named_trainable():
            yield n, p.detach()


class Around(Attached):
    """A strategy's run-time state around another one's: passes everything on. Subclasses add what they do."""

    def __init__(self, inner: Attached) -> None:
        super().__init__(inner.model, inner.plan)
        self.inner = inner
        self.execution = inner.execution

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self.inner.named_trainable()

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return self.inner.param_groups(weight_decay)

    def bind(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.inner.bind(optimizer, steps)

    def before_clip(self, step: int) -> None:
        self.inner.before_clip(step)

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)

    def loss_term(self) -> Tensor | None:
        return self.inner.loss_term()

    def metrics(self) -> dict[str, float]:
        return self.inner.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state_dict(state)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.export()


def import_peft(name: str) -> Any:
    """The peft package.

    Raises:
        AddlangError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise AddlangError(
            f"strategy '{name}' needs the package peft ({error})", "install it: pip install 'addlang[peft]'"
        ) from error
    return peft


def available() -> list[str]:
    """Names of all strategies, from the files of this package; loads none of them."""
    import addlang.strategies as package

    names = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in names if n not in HELPERS and not n.startswith("_"))


def load_strategy(name: str) -> type[Strategy]:
    """The strategy class of that name.

    Raises:
        AddlangError: unknown name, with the nearest known one.
    """
    key = str(name).replace("-", "_").lower()
    if key not in available():
        raise AddlangError(f"unknown strategy '{name}'", did_you_mean(str(name), available()))
    module = importlib.import_module(f"addlang.strategies.{key}")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Strategy)
            and value.__module__ == module.__name__
            and value.name == key
        ):
            return value
    raise TypeError(f"addlang/strategies/{key}.py defines no Strategy with name '{key}'")


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Build a strategy from its name and options.

    Raises:
        AddlangError: unknown name or option, or a bad value; all of them at once.
    """
    cls = load_strategy(name)
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                lines.append(f"strategy '{name}': unknown option '{key}'. {did_you_mean(*options_at(cls, e['loc']))}")
            else:
                message = e["msg"].removeprefix("Value error, ")
                given = f", option '{key}': {message} (given: {e.get('input')!r})" if key else f": {message}"
                lines.append(f"strategy '{name}'{given}")
        raise AddlangError("; ".join(lines)) from None
