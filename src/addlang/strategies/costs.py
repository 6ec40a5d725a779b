"""What a method costs, worked out from shapes: trained share, FLOPs per token, optimizer memory.

FLOPs count the products with weights: 2 per weight forward, 2 for the gradient of its input, 2 for its own gradient.
Attention's own products are left out: they are the same for every method. Measured times are in ``benchmarks/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan

OPTIMIZER_BYTES = 8  # two fp32 moments per trained element
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2-7b": ("Olmo2", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                           "vocab_size": 100352}),
    "olmo2-13b": ("Olmo2", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
                            "vocab_size": 100352}),
    "llama3-8b": ("Llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                            "num_key_value_heads": 8, "vocab_size": 128256}),
    "mistral-7b": ("Mistral", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                               "num_key_value_heads": 8, "vocab_size": 32768}),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Cost of one training step of one method on one model.

    Attributes:
        parameters: elements of the model.
        trained: elements that the optimizer owns at one time (new ones of adapters included).
        flops: per token, products with weights only.
        optimizer_bytes: the optimizer's two fp32 moments.
        note: what the numbers leave out.
    """

    parameters: int
    trained: int
    flops: float
    optimizer_bytes: int
    note: str = ""

    @property
    def share(self) -> float:
        """Trained elements over the model's elements."""
        return self.trained / self.parameters


def of_plan(model: nn.Module, plan: FreezePlan, note: str = "") -> Cost:
    """Cost of training what ``plan`` leaves free, with split execution where that can run the plan.

    A frozen matrix needs no gradient of its own; of a matrix with frozen columns or rows, split execution computes the
    trained part only, masked execution (plans with single elements) all of it. Nothing below the lowest trained
    parameter needs a backward pass; within one layer that is not told apart.
    """
    from addlang.freeze.split import why_not_split
    from addlang.models import embedding_names, parameter_kinds

    masked = why_not_split(model, plan) is not None
    embedding, _, tied = embedding_names(model)
    kinds = parameter_kinds(model)
    top = 1 + max((k.layer for k in kinds.values() if k.layer is not None), default=-1)
    positions: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, info in kinds.items():
        outer = {"embedding": -1, "head": top + 1}.get(info.kind, top)
        positions[name] = outer if info.layer is None else info.layer
        entry = plan[name]
        trained[name] = entry.numel if masked and entry.kind != "all" else entry.numel - entry.frozen_count
    lowest = min((p for n, p in positions.items() if trained[n]), default=top + 2)
    flops = 0.0
    for name, info in kinds.items():
        n = plan[name].numel
        if info.kind in ("linear", "head"):
            needs_input = lowest < positions[name] if info.kind == "head" else lowest <= positions[name]
            flops += 2 * n + (2 * n if needs_input else 0) + 2 * trained[name]
        elif name == embedding and tied:  # the head's products with the same tensor
            flops += 4 * n + 2 * trained[name]
    total = sum(trained.values())
    return Cost(plan.numel, total, flops, OPTIMIZER_BYTES * total, note)


def mean(costs: Sequence[Cost]) -> Cost:
    """The average of several, for methods whose trained part changes."""
    flops = sum(c.flops for c in costs) / len(costs)
    trained = round(sum(c.trained for c in costs) / len(costs))
    return replace(costs[0], flops=flops, trained=trained, optimizer_bytes=OPTIMIZER_BYTES * trained)


def shape_model(preset: str) -> Any:
    """A model without weights (meta device): a name of ``PRESETS``, or whatever ``model_name_or_path`` takes."""
    import torch
    import transformers

    from addlang.models import resolve, skeleton

    if preset in PRESETS:
        family, sizes = PRESETS[preset]
        config = getattr(transformers, f"{family}Config")(**sizes, tie_word_embeddings=False)
        with torch.device("meta"):
            return getattr(transformers, f"{family}ForCausalLM")(config)
    try:
        directory = resolve(preset)
    except AddlangError as error:
        if "/" in preset:
            raise
        raise AddlangError(f"'{preset}' is no preset and no model", did_you_mean(preset, PRESETS)) from error
    return skeleton(directory)


def table(
    model: nn.Module | str = "olmo2-7b", options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One row per strategy, cheapest first.

    Args:
        model: a model (the meta device will do), a preset's name, or a model's directory or hub id.
        options: strategy name -> options; default: the strategy's own defaults, or its ``example``.

    Returns:
        rows of ``strategy``, ``options``, ``trained``, ``trained_share``, ``flops_per_token``, ``flops_ratio`` (to
        ``full``), ``optimizer_bytes``, ``optimizer_ratio`` (to ``full``), ``note``.
    """
    from addlang.strategies.base import available, load_strategy, make_strategy

    shapes = shape_model(model) if isinstance(model, str) else model
    full = make_strategy("full", {}).cost(shapes)
    rows = []
    for name in available():
        given = dict((options or {}).get(name, load_strategy(name).example))
        rows.append(_row(name, given, make_strategy(name, given).cost(shapes), full))
    return sorted(rows, key=lambda r: (r["flops_ratio"], r["strategy"]))


def _row(name: str, options: dict[str, Any], cost: Cost, full: Cost) -> dict[str, Any]:
    return {
        "strategy": name,
        "options": options,
        "trained": cost.trained,
        "trained_share": cost.share,
        "flops_per_token": cost.flops,
        "flops_ratio": cost.flops / full.flops,
        "optimizer_bytes": cost.optimizer_bytes,
        "optimizer_ratio": cost.optimizer_bytes / full.optimizer_bytes,
        "note": cost.note,
    }


def guard_rows(model: nn.Module | str = "olmo2-7b") -> list[dict[str, Any]]:
    """Rows as of :func:`table` for every guard on top of ``full``; those that are a strategy too stand there.

    A guard adds no products with weights but those of the tokens that it reads, which count towards the budget.
    """
    from addlang import guards
    from addlang.strategies.base import available, make_strategy

    full = make_strategy("full", {}).cost(shape_model(model) if isinstance(model, str) else model)
    rows = []
    for name in guards.available():
        if name in available():
            continue
        guard = guards.make_guard(name, {})
        kept, share = guard.kept_bytes(2, 4), guard.token_share
        notes = [f"{kept} bytes per trained weight of a 16-bit checkpoint"] if kept else []
        notes += [f"reads {share:.0%} of the tokens"] if share else []
        rows.append(_row(f"full + {name}", {"guards": [name]}, replace(full, note=", ".join(notes)), full))
    return rows
