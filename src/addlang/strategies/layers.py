"""Freeze, or train, the layers and modules that you name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from addlang.errors import AddlangError, did_you_mean
from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan
    from addlang.models import ParamInfo

NUMBERS = re.compile(r"(-?\d+)(?:-(\d+))?")


def _selectors(value: Any) -> Any:
    """``"0-3,7"``, ``7``, ``["0-3", "mlp"]`` -> tuple of strings; a text with letters is one pattern."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        parts = [p.strip() for p in value.split(",")]
        value = parts if all(NUMBERS.fullmatch(p) for p in parts) else [value]
    if isinstance(value, list | tuple):
        return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
    return value


def _compiles(value: tuple[str, ...]) -> tuple[str, ...]:
    for selector in value:
        try:
            re.compile(selector)
        except re.error as error:
            raise ValueError(f"'{selector}' is no regular expression ({error})") from None
    return value


Selectors = Annotated[tuple[str, ...], BeforeValidator(_selectors)]


class Layers(Strategy):
    """Each selector is a layer (``5``; ``-1``: the last), an inclusive range (``0-7``), or a regular expression that is
    searched in parameter names (``mlp``, ``layers\\.[0-3]\\.self_attn``). Several select what any of them selects.

    Embedding and head are outside: ``train_embeddings`` and ``train_lm_head`` decide about them, as for every strategy.
    """

    name = "layers"
    paper = "baseline of section 5.2 of Exploring Two-Phase Continual Instruction Fine-tuning for Multilingual Adaptation in Large Language Models"
    summary = "freeze, or train, the layers and modules that you name"
    example = {"freeze": "self_attn"}  # noqa: RUF012 - read only

    freeze: Selectors = Field((), description="what is frozen; the rest is trained")
    train: Selectors = Field((), description="what is trained; the rest is frozen")

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Layers:
        if bool(self.freeze) == bool(self.train):
            raise ValueError("give freeze or train, not both" if self.freeze else "give freeze or train")
        _compiles(self.freeze + self.train)
        return self

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import freeze_whole, inside

        kinds = inside(model)
        everything = [n for n, _ in model.named_parameters()]
        chosen: set[str] = set()
        for selector in self.freeze or self.train:
            chosen |= select(selector, kinds, everything)
        if chosen == set(kinds):
            verb = "freeze" if self.freeze else "train"
            raise AddlangError(
                f"{verb}: {', '.join(self.freeze or self.train)} selects every layer",
                "use strategy: full to train everything, or narrow the selection",
            )
        return self.finish(model, inputs, freeze_whole(model, kinds, chosen if self.freeze else set(kinds) - chosen))


def select(selector: str, kinds: dict[str, ParamInfo], everything: list[str]) -> set[str]:
    """Parameters that one selector names.

    Raises:
        AddlangError: it names nothing, a layer that does not exist, or only embedding and head.
    """
    from addlang.strategies._layers import depth

    number = NUMBERS.fullmatch(selector)
    if number:
        count = depth(kinds)
        first = int(number[1]) + (count if int(number[1]) < 0 else 0)
        last = first if number[2] is None else int(number[2])
        if first > last:
            raise AddlangError(f"layers '{selector}' is an empty range", f"write {last}-{first}")
        if first < 0 or last >= count:
            raise AddlangError(f"layers '{selector}': the model has layers 0-{count - 1}")
        return {n for n, i in kinds.items() if i.layer is not None and first <= i.layer <= last}
    found = {n for n in kinds if re.search(selector, n)}
    if not found:
        outside = [n for n in everything if n not in kinds and re.search(selector, n)]
        if outside:
            raise AddlangError(
                f"pattern '{selector}' matches only '{outside[0]}'", "use train_embeddings and train_lm_head for these"
            )
        words = {i.group for i in kinds.values()} | {part for n in kinds for part in n.split(".") if not part.isdigit()}
        raise AddlangError(f"pattern '{selector}' matches no parameter", did_you_mean(selector, words))
    return found
