"""The methods of merging: what each needs, its parameters, and which arithmetic it uses. Loads no torch.

``merge_method``, ``models``, ``base_model`` and ``parameters`` are named as in mergekit, so that its files can be used for
the methods that both have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from addlang.errors import AddlangError, did_you_mean
from addlang.merge.settings import Setting, values_of
from addlang.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.merge.sources import Models, Part

TIES_DENSITY = 0.2  # the paper's top 20 %


@dataclass(frozen=True)
class Started:
    """A method that has looked at the models: merges one parameter after the other. ``about``: what it decided."""

    merge: Callable[[Part], Iterator[Tensor]]
    about: dict[str, Any] = field(default_factory=dict)


class Merge(Strict, ABC):
    """What every merge has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    title: ClassVar[str]
    paper: ClassVar[str]
    merge_method: str
    config_from: str | None = Field(
        None, description="model whose configuration, tokenizer and chat template are copied; default: see the method"
    )
    tokenizer_source: str | None = Field(
        None,
        description="vocabularies that differ: 'union' (of the model whose tokens include all others'), 'base' or a model: "
        "match rows by token and take that tokenizer; 'ids': match by number. None: they must be the same",
    )
    restore_special_tokens: str | None = Field(
        None, description="model whose rows of special tokens (embedding and head) are put into the result"
    )
    seed: int = Field(0, ge=0, description="of every random choice")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="type of the result; None: as stored in the model of config_from. The arithmetic is fp32"
    )

    @model_validator(mode="after")
    def _names_are_models(self) -> Merge:
        for key in ("config_from", "tokenizer_source"):
            name = getattr(self, key)
            special = ("union", "base", "ids") if key == "tokenizer_source" else ()
            if name is not None and name not in (*self.names(), *special):
                raise ValueError(
                    f"{key} '{name}' is none of the models. {did_you_mean(name, {*self.names(), *special})}"
                )
        if self.config_from and self.tokenizer_source not in (None, "ids", self.config_from):
            raise ValueError("tokenizer_source names the model whose files are copied: leave config_from out")
        return self

    @abstractmethod
    def names(self) -> list[str]:
        """Models that are merged."""

    def base(self) -> str | None:
        """The model that differences are taken from, if there is one."""
        return None

    def stated(self) -> str:
        """Model whose configuration and tokenizer the result gets, unless ``config_from`` names another."""
        return self.base() or self.names()[0]

    def notes(self) -> list[str]:
        """What the user should know about the settings."""
        return []

    @abstractmethod
    def start(self, models: Models) -> Started:
        """Look at the models as a whole and return what merges one parameter."""

    def resolved(self) -> dict[str, Any]:
        """Plain data that :func:`addlang.merge.spec.parse` reads."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _density(value: Setting | None) -> Setting | None:
    if value is not None and not all(0 < v <= 1 for v in values_of(value)):
        raise ValueError("a density lies above 0 and is at most 1")
    return value


class ModelParameters(Strict):
    weight: Setting | None = None
    density: Setting | None = None

    _check = field_validator("density")(_density)


class Weighted(Strict):
    """One of several models."""

    model: str
    parameters: ModelParameters = ModelParameters()


def _model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


WeightedModels = Annotated[tuple[Annotated[Weighted, BeforeValidator(_model)], ...], Field(min_length=1)]


class LinearParameters(Strict):
    weight: Setting = Field(1.0, description="of every model that has none of its own")
    normalize: bool = Field(True, description="divide by the sum of the weights")


class Linear(Merge):
    title: ClassVar[str] = "Weighted mean"
    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022)"
    merge_method: Literal["linear"] = "linear"
    models: WeightedModels
    parameters: LinearParameters = LinearParameters()

    def names(self) -> list[str]:
        return [m.model for m in self.models]

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import linear

        def merge(part: Part) -> Iterator[Tensor]:
            weights = [part.value(m.parameters.weight, self.parameters.weight) for m in self.models]
            if self.parameters.normalize and abs(sum(weights)) < 1e-8:
                raise AddlangError(f"the weights of '{part.name}' add up to 0", "change them, or set normalize: false")
            return linear(lambda: part.blocks(*self.names()), weights, self.parameters.normalize)

        return Started(merge)


class SlerpParameters(Strict):
    t: Setting = Field(0.5, description="0: the base model, 1: the other")


class Slerp(Merge):
    title: ClassVar[str] = "Spherical interpolation"
    paper: ClassVar[str] = "Shoemake (1985), applied to weights tensor by tensor"
    merge_method: Literal["slerp"] = "slerp"
    base_model: str
    models: WeightedModels
    parameters: SlerpParameters = SlerpParameters()

    @model_validator(mode="after")
    def _two(self) -> Slerp:
        if len(self.others()) != 1:
            raise ValueError(f"slerp needs base_model and one other model, not {len(self.others())}")
        return self

    def others(self) -> list[str]:
        return [m.model for m in self.models if m.model != self.base_model]

    def names(self) -> list[str]:
        return [self.base_model, *self.others()]

    def base(self) -> str | None:
        return self.base_model

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import slerp

        def merge(part: Part) -> Iterator[Tensor]:
            def on_linear() -> None:
                part.counts["tensors interpolated linearly (nearly colinear)"] += 1

            return slerp(lambda: part.blocks(*self.names()), part.value(self.parameters.t), on_linear)

        return Started(merge)


class TaskParameters(Strict):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    weight: Setting = Field(1.0, description="of every model that has none of its own")
    scale: float = Field(1.0, alias="lambda", description="factor of the summed update")
    normalize: bool = Field(False, description="divide by the sum of the weights")


class TaskArithmetic(Merge):
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "Editing models with task arithmetic (Ilharco et al., 2023)"
    merge_method: Literal["task_arithmetic"] = "task_arithmetic"
    base_model: str
    models: WeightedModels
    parameters: TaskParameters = TaskParameters()

    def others(self) -> list[Weighted]:
        return [m for m in self.models if m.model != self.base_model]

    def names(self) -> list[str]:
        return [self.base_model, *(m.model for m in self.others())]

    def base(self) -> str | None:
        return self.base_model

    @model_validator(mode="after")
    def _something_to_add(self) -> TaskArithmetic:
        if not self.others():
            raise ValueError("models: name at least one model besides base_model")
        return self

    def weights(self, part: Part) -> list[float]:
        return [part.value(m.parameters.weight, self.parameters.weight) for m in self.others()]

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import task_arithmetic

        p = self.parameters

        def merge(part: Part) -> Iterator[Tensor]:
            return task_arithmetic(lambda: part.blocks(*self.names()), self.weights(part), p.scale, p.normalize)

        return Started(merge)


class TiesParameters(TaskParameters):
    density: Setting = Field(
        TIES_DENSITY, description="share of each model's update that is kept; mergekit's default of 1.0 trims nothing"
    )
    normalize: bool = Field(True, description="average the updates that agree in sign; false: add them")

    _check = field_validator("density")(_density)


class Ties(TaskArithmetic):
    title: ClassVar[str] = "TIES"
    paper: ClassVar[str] = "TIES-Merging (Yadav et al., 2023)"
    merge_method: Literal["ties"] = "ties"  # type: ignore[assignment]
    parameters: TiesParameters = TiesParameters()

    def notes(self) -> list[str]:
        given = "density" in self.parameters.model_fields_set or all(m.parameters.density for m in self.others())
        return (
            []
            if given
            else [
                f"ties: density {TIES_DENSITY} (the paper's; mergekit's default of 1.0 trims nothing); set it with --density"
            ]
        )

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import ties

        p = self.parameters

        def merge(part: Part) -> Iterator[Tensor]:
            densities = [part.value(m.parameters.density, p.density) for m in self.others()]
            return ties(
                lambda: part.blocks(*self.names()), self.weights(part), densities, part.rng(), p.scale, p.normalize
            )

        return Started(merge)


def _rescale(value: Any) -> Any:
    return {True: "l1", False: "none"}.get(value, value) if isinstance(value, bool) else value


class DareParameters(TaskParameters):
    density: Setting | None = Field(None, description="probability that an element of an update is kept")
    rescale: Annotated[Literal["density", "l1", "none"], BeforeValidator(_rescale)] = Field(
        "density",
        description="density: divide by it (the paper); l1: keep sum |delta| (mergekit; also: true); none (false)",
    )

    _check = field_validator("density")(_density)


class DareLinear(TaskArithmetic):
    title: ClassVar[str] = "DARE, linear"
    paper: ClassVar[str] = "Language models are Super Mario (Yu et al., 2024)"
    elect: ClassVar[bool] = False
    merge_method: Literal["dare_linear"] = "dare_linear"  # type: ignore[assignment]
    parameters: DareParameters = DareParameters()

    @model_validator(mode="after")
    def _density_is_given(self) -> DareLinear:
        if self.parameters.density is None and any(m.parameters.density is None for m in self.others()):
            raise ValueError(
                "parameters.density: missing; the paper keeps 0.1 of the small updates of instruction tuning, continued "
                "pre-training moves weights further and bears less dropping (try 0.5)"
            )
        return self

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import dare

        p = self.parameters

        def merge(part: Part) -> Iterator[Tensor]:
            densities = [part.value(m.parameters.density, p.density) for m in self.others()]
            blocks = lambda: part.blocks(*self.names())  # noqa: E731
            return dare(
                blocks, self.weights(part), densities, part.rng, p.scale, p.normalize, p.rescale, elect=self.elect
            )

        return Started(merge)


class DareTies(DareLinear):
    title: ClassVar[str] = "DARE with sign election"
    elect: ClassVar[bool] = True
    merge_method: Literal["dare_ties"] = "dare_ties"  # type: ignore[assignment]


class ChatVectorParameters(Strict):
    ratio: Setting = Field(1.0, description="r in w + r (w_chat - w_base)")


class ChatVector(Merge):
    """The chat model's configuration and chat template are copied."""

    title: ClassVar[str] = "Chat vector"
    paper: ClassVar[str] = "Chat Vector (Huang et al., 2024)"
    merge_method: Literal["chat_vector"] = "chat_vector"
    model: str = Field(description="the model that is to chat, such as one pre-trained further in a language")
    chat_model: str
    base_model: str = Field(description="what the chat model was tuned from")
    parameters: ChatVectorParameters = ChatVectorParameters()

    def names(self) -> list[str]:
        return [self.model, self.chat_model, self.base_model]

    def stated(self) -> str:
        return self.chat_model

    def start(self, models: Models) -> Started:
        def merge(part: Part) -> Iterator[Tensor]:
            ratio = part.value(self.parameters.ratio)
            for w, chat, base in part.blocks(*self.names()):
                yield w + ratio * (chat - base)

        return Started(merge)


class SpecialTokens(Merge):
    """A model with another's rows of special tokens."""

    title: ClassVar[str] = "Restored special tokens"
    paper: ClassVar[str] = "SSU, section 4 (the released code freezes these rows)"
    merge_method: Literal["special_tokens"] = "special_tokens"
    model: str

    @model_validator(mode="after")
    def _source_is_given(self) -> SpecialTokens:
        if self.restore_special_tokens is None:
            raise ValueError("restore_special_tokens: missing; name the model whose rows are put back")
        return self

    def names(self) -> list[str]:
        return [self.model]

    def start(self, models: Models) -> Started:
        return Started(lambda part: (w for (w,) in part.blocks(self.model)))


class LayerSwapParameters(Strict):
    bottom: int | None = Field(None, ge=0, description="layers from the language model at the bottom (of 32: 5)")
    top: int | None = Field(None, ge=0, description="and at the top (of 32: 2)")
    transition: int | None = Field(None, ge=0, description="averaged layers between the two, at either end (of 32: 1)")
    auto: bool = Field(
        False, description="bottom and top: as far as the language model changed relatively more than the task model"
    )


class LayerSwap(Merge):
    """Embeddings go with the bottom; the final norm and the head with the top. The task model's files are copied."""

    title: ClassVar[str] = "Layer swapping"
    paper: ClassVar[str] = "Layer swapping (Bandarkar et al., 2025)"
    merge_method: Literal["layer_swap"] = "layer_swap"
    task_model: str = Field(description="gives the middle layers")
    language_model: str = Field(description="gives the bottom and the top")
    base_model: str | None = Field(None, description="what both were tuned from; needed for auto")
    parameters: LayerSwapParameters = LayerSwapParameters()

    @model_validator(mode="after")
    def _auto_or_numbers(self) -> LayerSwap:
        p = self.parameters
        if p.auto and (p.bottom is not None or p.top is not None):
            raise ValueError("parameters.auto finds bottom and top: leave them out")
        if p.auto and self.base_model is None:
            raise ValueError("parameters.auto compares both models with what they were tuned from: give base_model")
        if self.base_model is not None and not p.auto:
            raise ValueError("base_model is only used with parameters.auto")
        return self

    def names(self) -> list[str]:
        return [self.task_model, self.language_model, *([self.base_model] if self.base_model else [])]

    def stated(self) -> str:
        return self.task_model

    def start(self, models: Models) -> Started:
        from addlang.merge.layers import assign, swap_ranges

        ranges, about = swap_ranges(self, models)
        layout = models.layout

        def merge(part: Part) -> Iterator[Tensor]:
            whose = assign(part.name, part.info, layout, ranges)
            part.counts[f"tensors: {whose}"] += 1
            chosen = {"task": [self.task_model], "language": [self.language_model]}
            for tensors in part.blocks(*chosen.get(whose, [self.task_model, self.language_model])):
                yield tensors[0] if len(tensors) == 1 else (tensors[0] + tensors[1]) / 2

        return Started(merge, about)


def _text_keys(value: Any) -> Any:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class RevertParameters(Strict):
    scale: Setting = Field(1.0, description="share of the update that is kept; modules and layers multiply it")
    modules: Mapping[str, float] = Field({}, description="module type (q_proj, embed_tokens, ...) -> factor")
    layers: Annotated[Mapping[str, float], BeforeValidator(_text_keys)] = Field(
        {}, description="layer or range (3, 0-4) -> factor"
    )
    density: float = Field(
        1.0, gt=0, le=1, description="share of every tensor's elements whose update is kept: those that changed most"
    )
    criterion: Literal["magnitude", "relative"] = Field(
        "magnitude", description="of density: |w - w0|, or that divided by |w0|"
    )
    plan: str | None = Field(
        None, description="freeze plan (or a run's directory): what it freezes goes back to the source's values"
    )


class Revert(Merge):
    """``w0 + m (w - w0)`` after training; the trained model's files are copied."""

    title: ClassVar[str] = "Revert after training"
    paper: ClassVar[str] = "WiSE-FT (Wortsman et al., 2022); modular reverting (Bandarkar et al., 2025)"
    merge_method: Literal["revert"] = "revert"
    model: str = Field(description="the trained model, w")
    source_model: str = Field(description="what it was trained from, w0")
    parameters: RevertParameters = RevertParameters()

    def names(self) -> list[str]:
        return [self.model, self.source_model]

    def base(self) -> str | None:
        return self.source_model

    def stated(self) -> str:
        return self.model

    def start(self, models: Models) -> Started:
        from addlang.merge.arithmetic import revert
        from addlang.merge.layers import Factors

        p = self.parameters
        factors = Factors(p.modules, p.layers, models.layout)
        plan = load_plan(p.plan, models) if p.plan else None

        def merge(part: Part) -> Iterator[Tensor]:
            share = part.value(p.scale) * factors(part.info)
            shielded = None
            if plan is not None and (entry := plan[part.name]).kind != "none":
                frozen = entry.mask().flatten()
                shielded = lambda start, stop: frozen[start:stop]  # noqa: E731
            blocks = lambda: part.blocks(self.source_model, self.model)  # noqa: E731
            return revert(blocks, share, p.density, p.criterion, part.rng(), shielded)

        return Started(merge)


def load_plan(name: str, models: Models) -> Any:
    """The freeze plan in a file or run directory, checked against the result's parameters."""
    from addlang.freeze.plan import FreezePlan

    path = Path(name).expanduser()
    plan = FreezePlan.load(path / "freeze_plan.safetensors" if path.is_dir() else path)
    shapes = models.layout.shapes
    if odd := [n for n in {*shapes, *plan.entries} if n not in plan.entries or plan[n].shape != shapes.get(n)]:
        raise AddlangError(f"{path}: the plan is of another model: '{sorted(odd)[0]}' does not match", "name its plan")
    if all(entry.kind == "none" for entry in plan.entries.values()):
        raise AddlangError(f"{path}: the plan freezes nothing, so nothing would go back", "name another plan")
    return plan


METHODS: dict[str, type[Merge]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "chat_vector": ChatVector,
    "layer_swap": LayerSwap,
    "revert": Revert,
    "special_tokens": SpecialTokens,
}
