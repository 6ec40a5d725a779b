"""S2FT: the choice by hand, whole heads, and logits that do not change before the first step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, make_model

from addlang.errors import AddlangError
from addlang.freeze.split import why_not_split
from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies.s2ft import choose


def free_columns(plan: Any, group: str, layers: int) -> list[list[int]]:
    found = []
    for i in range(layers):
        block = "mlp" if group == "down_proj" else "self_attn"
        entry = plan[f"model.layers.{i}.{block}.{group}.weight"]
        mask = entry.mask()
        assert bool((mask == mask[:1]).all())  # whole columns
        found.append((~mask[0]).nonzero().flatten().tolist())
    return found


def test_the_choice_is_one_draw_over_all_layers_together() -> None:
    """Three layers of 48 channels: int(144 * 0.1) = 14 of them, uneven over the layers."""
    drawn = sorted(random.Random(7).sample(range(144), 14))
    by_hand = [[u - 48 * i for u in drawn if 48 * i <= u < 48 * (i + 1)] for i in range(3)]
    assert choose(3, 48, 0.1, seed=7) == by_hand
    assert len({len(c) for c in by_hand}) > 1
    plan = make_strategy("s2ft", {"d_ratio": 0.1}).plan(make_model("llama", num_hidden_layers=3), PlanInputs(seed=7))
    assert free_columns(plan, "down_proj", 3) == by_hand


def test_at_least_one_channel_is_trained() -> None:
    assert sum(map(len, choose(2, 48, 0.001, seed=0))) == 1


def test_output_channels_are_whole_heads_also_with_grouped_queries() -> None:
    model = make_model("qwen3")  # 4 heads of width 8, 2 key/value heads, norms on queries and keys
    plan = make_strategy("s2ft", {"d_ratio": 0.0, "o_ratio": 0.5}).plan(model, PlanInputs(seed=3))
    heads = choose(2, 4, 0.5, seed=3)
    assert sum(map(len, heads)) == 4
    assert free_columns(plan, "o_proj", 2) == [[h * 8 + j for h in layer for j in range(8)] for layer in heads]
    assert free_columns(plan, "down_proj", 2) == [[], []]


def test_only_the_chosen_columns_embedding_and_head_are_trained() -> None:
    model = make_model("llama")
    plan = make_strategy("s2ft", {"d_ratio": 0.11}).plan(model, PlanInputs())
    free = {n for n in plan if plan[n].kind != "all"}
    assert {n.rsplit(".", 2)[-2] for n in free} == {"down_proj", "embed_tokens", "lm_head"}
    outside = sum(plan[n].numel for n in free if "down_proj" not in n)
    assert plan.trainable_count - outside == int(2 * 48 * 0.11) * 32


def test_d_ratios_of_the_paper_have_the_size_of_lora_on_all_seven_projections() -> None:
    """OLMo 2 7B (32 layers, 4096 and 11008 wide): 0.015, 0.03, 0.055, 0.11 against rank 8, 16, 32, 64 (Table 8)."""
    for ratio, rank in ((0.015, 8), (0.03, 16), (0.055, 32), (0.11, 64)):
        s2ft = int(32 * 11008 * ratio) * 4096
        lora = 32 * rank * (4 * (4096 + 4096) + 3 * (4096 + 11008))
        assert s2ft == pytest.approx(lora, rel=0.1), rank


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("execution", ["masked", "split"])
def test_logits_are_the_sources_before_the_first_step(architecture: str, execution: str) -> None:
    model = make_model(architecture).double()
    ids = torch.arange(5, 45).view(1, -1)
    before = model(ids).logits
    strategy = make_strategy("s2ft", {"d_ratio": 0.11, "o_ratio": 0.25})
    plan = strategy.plan(model, PlanInputs())
    assert why_not_split(model, plan) is None
    attached = strategy.attach(model, plan, execution)
    assert torch.equal(attached.model(ids).logits, before)


def permute_heads(model: Any, order: list[int]) -> None:
    """Heads of q, k, v (rows) and o (columns) in another order, as the public code does it: norms stay as they are."""
    heads = len(order)
    for layer in model.model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
                w = proj.weight.view(heads, -1, proj.weight.shape[1])
                proj.weight.copy_(w[order].reshape(proj.weight.shape))
            w = attention.o_proj.weight.view(attention.o_proj.weight.shape[0], heads, -1)
            attention.o_proj.weight.copy_(w[:, order].reshape(attention.o_proj.weight.shape))


@pytest.mark.parametrize(("architecture", "changed"), [("mistral", False), ("olmo2", True)])
def test_permuting_heads_changes_a_model_with_norms_on_queries_and_keys(architecture: str, changed: bool) -> None:
    """OLMo 2 norms all heads' queries with one weight per channel, so a permutation that leaves it in place is another
    model: the SSU paper's S2FT rows with output projections (Table 14) start from a damaged one."""
    model = make_model(architecture, num_key_value_heads=4).double()
    ids = torch.arange(5, 45).view(1, -1)
    before = model(ids).logits
    permute_heads(model, [2, 0, 3, 1])
    assert torch.allclose(model(ids).logits, before, rtol=1e-9, atol=1e-9) != changed


def test_permuting_by_query_heads_is_impossible_with_grouped_queries() -> None:
    model = make_model("mistral")  # 4 query heads, 2 key/value heads
    by_head = model.model.layers[0].self_attn.k_proj.weight.view(2, 8, 32)
    with pytest.raises(IndexError):
        by_head[[2, 0, 3, 1]]


def test_training_nothing_is_refused() -> None:
    with pytest.raises(AddlangError, match="nothing would be trained"):
        make_strategy("s2ft", {"d_ratio": 0})
