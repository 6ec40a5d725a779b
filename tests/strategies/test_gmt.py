"""GMT: exact counts, ties, the order of a step, and that it is no hard freeze."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import make_model

from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies.gmt import drop_smallest


def test_the_smallest_by_absolute_value_are_dropped() -> None:
    g = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 1.0]])
    drop_smallest(g, 0.5)
    assert g.tolist() == [[0.0, -3.0, 0.0], [2.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("n", "ratio", "kept"), [(7, 0.5, 4), (5, 0.875, 1), (48, 0.125, 42), (3, 0.0, 3), (1, 0.9, 1)]
)
def test_int_n_ratio_entries_are_dropped(n: int, ratio: float, kept: int) -> None:
    g = torch.randn(n, generator=torch.Generator().manual_seed(0))
    drop_smallest(g, ratio)
    assert int((g != 0).sum()) == kept


def test_the_count_is_exact_among_equals() -> None:
    """A threshold with >=, as in public code, keeps all of them: where every value is equal, or most are zero, nothing is
    dropped. Both are common: zero gradients of rare tokens, and 16-bit values."""
    equal = torch.full((4, 4), -0.25)
    drop_smallest(equal, 0.5)
    assert int((equal != 0).sum()) == 8
    threshold = torch.full((16,), 0.25).topk(8).values[-1]
    assert int((torch.full((16,), 0.25) >= threshold).sum()) == 16
    sparse = torch.zeros(16, dtype=torch.bfloat16)
    sparse[3] = 1.0
    drop_smallest(sparse, 0.5)
    assert sparse.nonzero().tolist() == [[3]]


def test_a_transposed_gradient_is_changed_in_place() -> None:
    g = torch.arange(1.0, 7.0).view(2, 3).t()
    drop_smallest(g, 0.5)
    assert g.tolist() == [[0, 4], [0, 5], [0, 6]]


def attach(model: Any, execution: str = "masked", **options: Any) -> Any:
    strategy = make_strategy("gmt", options)
    return strategy.attach(model, strategy.plan(model, PlanInputs()), execution)


def backward(model: Any, seed: int = 0) -> None:
    ids = torch.randint(6, 260, (2, 20), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def test_the_choice_is_made_on_the_accumulated_gradient() -> None:
    """Two micro-batches are summed first: masking each of them would keep up to twice as many entries."""
    model = make_model("llama")
    backward(model, 0)
    backward(model, 1)
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    for g in want.values():
        drop_smallest(g, 0.5)
    model.zero_grad()
    attached = attach(model)
    backward(model, 0)
    backward(model, 1)
    attached.before_clip(1)
    for n, p in model.named_parameters():
        if "embed" not in n and "head" not in n:
            assert torch.equal(p.grad, want[n]), n
            assert int((p.grad != 0).sum()) == p.numel() - p.numel() // 2


@pytest.mark.parametrize("include", [False, True])
def test_embedding_and_head_are_whole_unless_asked_for(include: bool) -> None:
    model = make_model("llama")
    attached = attach(model, include_embeddings=include)
    backward(model)
    before = int((model.lm_head.weight.grad != 0).sum())
    attached.before_clip(1)
    after = int((model.lm_head.weight.grad != 0).sum())
    assert after == (before / 2 if include else before)


def test_clipping_sees_only_what_is_kept() -> None:
    model = make_model("llama")
    attached = attach(model, train_embeddings=False, train_lm_head=False, ratio=0.875)
    backward(model)
    whole = math.sqrt(sum(float(p.grad.norm()) ** 2 for _, p in attached.named_trainable()))
    attached.before_clip(1)
    norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 0.1))
    kept = math.sqrt(sum(float(p.grad.norm()) ** 2 for _, p in attached.named_trainable()))
    assert norm < whole
    assert kept == pytest.approx(0.1, rel=1e-4)


def test_momentum_moves_an_entry_whose_gradient_is_dropped() -> None:
    """Not a hard freeze: kept at step 1, dropped at step 2, and yet it moves at step 2, without any weight decay."""
    model = make_model("llama")
    attached = attach(model)
    optimizer = torch.optim.AdamW(attached.param_groups(0.0), lr=1e-3)
    weight = model.model.layers[0].mlp.up_proj.weight
    for step in (1, 2):
        optimizer.zero_grad()
        backward(model, step)
        attached.before_clip(step)
        kept = weight.grad != 0
        before = weight.detach().clone()
        optimizer.step()
        if step == 1:
            assert torch.equal(weight != before, kept)
            first = kept
    dropped = first & ~kept
    assert bool(dropped.any())
    assert bool((weight != before)[dropped].all())
