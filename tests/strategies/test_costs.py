"""Costs from shapes: hand-computed on two linear layers, and the table over all strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangError
from addlang.freeze.plan import FreezePlan, Frozen
from addlang.strategies import available
from addlang.strategies.costs import of_plan, shape_model, table


def frozen(model: Any, **kinds: Frozen | str) -> FreezePlan:
    """All frozen but what ``kinds`` says, by the end of the name with dots as double underscores."""
    entries = {}
    for name, p in model.named_parameters():
        entries[name] = Frozen(tuple(p.shape), "all")
        for end, kind in kinds.items():
            if name.endswith(end.replace("__", ".")):
                entries[name] = kind if isinstance(kind, Frozen) else Frozen(tuple(p.shape), kind)  # type: ignore[arg-type]
    return FreezePlan(entries)


def linear(model: Any) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_full_training_is_six_flops_per_linear_weight() -> None:
    model = make_model("mistral")  # untied: the embedding is looked up, the head multiplied
    cost = of_plan(model, FreezePlan.empty(model))
    assert cost.flops == 6 * linear(model)
    assert cost.share == 1
    assert cost.optimizer_bytes == 8 * sum(p.numel() for p in model.parameters())


def test_a_tied_head_is_multiplied_though_it_is_no_parameter_of_its_own() -> None:
    model = make_model("llama_tied")
    assert of_plan(model, FreezePlan.empty(model)).flops == 6 * linear(model)


def test_frozen_columns_save_their_share_of_the_weight_gradient() -> None:
    model = make_model("mistral")
    n = 32 * 48
    half = Frozen((32, 48), "columns", torch.arange(24))
    # the lowest trained layer is 0, so every layer and the head need input gradients
    cost = of_plan(model, frozen(model, layers__0__mlp__down_proj__weight=half))
    assert cost.flops == 4 * linear(model) + 2 * (n // 2)
    assert cost.trained == n // 2


def test_nothing_below_the_lowest_trained_layer_needs_a_backward_pass() -> None:
    model = make_model("mistral")
    layer = sum(m.weight.numel() for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear))
    n = 32 * 48
    cost = of_plan(model, frozen(model, layers__1__mlp__down_proj__weight="none"))
    assert cost.flops == 2 * layer + 4 * (linear(model) - layer) + 2 * n


def test_training_the_head_alone_needs_no_input_gradient() -> None:
    model = make_model("mistral")
    head = model.lm_head.weight.numel()
    cost = of_plan(model, frozen(model, lm_head__weight="none"))
    assert cost.flops == 2 * linear(model) + 2 * head


def test_single_elements_cost_as_much_as_whole_matrices() -> None:
    model = make_model("mistral")
    mask = torch.ones(32, 48, dtype=torch.bool)
    mask[0, 0] = False
    cost = of_plan(model, frozen(model, layers__0__mlp__down_proj__weight=Frozen((32, 48), "elements", mask)))
    assert cost.flops == 4 * linear(model) + 2 * 32 * 48
    assert cost.trained == 32 * 48


def test_the_table_has_every_strategy_and_full_is_the_unit() -> None:
    rows = {r["strategy"]: r for r in table(make_model("llama"))}
    assert set(rows) == set(available())
    assert rows["full"]["flops_ratio"] == rows["full"]["optimizer_ratio"] == 1
    assert rows["ssu"]["flops_ratio"] < 1


def test_presets_have_the_published_sizes_and_no_weights() -> None:
    model = shape_model("olmo2-7b")
    assert next(model.parameters()).device.type == "meta"
    assert sum(p.numel() for p in model.parameters()) == 7_298_617_344  # allenai/OLMo-2-1124-7B
    with pytest.raises(AddlangError, match="Did you mean 'olmo2-7b'"):
        shape_model("olmo-7b")
