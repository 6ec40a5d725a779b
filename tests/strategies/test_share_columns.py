"""share_columns: one set of columns for layers that multiply the same input, and what the split engine makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import calibration, make_model

from addlang.errors import AddlangError
from addlang.models import same_input
from addlang.scoring import Scores, make_scorer
from addlang.strategies import PlanInputs, make_strategy

ATTENTION = [f"model.layers.0.self_attn.{leaf}.weight" for leaf in ("q_proj", "k_proj", "v_proj")]
MLP = [f"model.layers.0.mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj")]


def plan(model: Any, share: bool) -> Any:
    strategy = make_strategy("ssu", {"share_columns": share})
    return strategy, strategy.plan(model, PlanInputs(calibration=lambda: calibration()))


def saved_bytes(share: bool) -> tuple[int, Any]:
    """Bytes that a forward pass keeps for backward, each storage once, and the gradients that follow."""
    model = make_model("llama", hidden_size=64, intermediate_size=96)
    strategy, p = plan(model, share)
    attached = strategy.attach(model, p, "split_assemble")
    stores: dict[int, int] = {}
    weights = {q.untyped_storage().data_ptr() for q in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            stores[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.arange(40)[None] % 200
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return sum(stores.values()), {n: q.grad for n, q in attached.named_trainable()}


def test_q_k_v_share_one_set_of_columns_and_gate_and_up_another() -> None:
    model = make_model("llama")
    _, shared = plan(model, True)
    _, alone = plan(model, False)
    for group in (ATTENTION, MLP):
        first = shared[group[0]].index
        assert all(torch.equal(shared[name].index, first) for name in group)
        assert not all(torch.equal(alone[name].index, alone[group[0]].index) for name in group)
    assert not torch.equal(shared[ATTENTION[0]].index, shared[MLP[0]].index)
    assert shared.trainable_fraction == alone.trainable_fraction


def test_the_set_is_that_of_the_highest_sum_of_scores() -> None:
    model = make_model("llama")
    _, shared = plan(model, True)
    scores = Scores.collect(model, make_scorer("wanda"), "column", calibration())
    total = sum(scores[name] for name in MLP)
    assert isinstance(total, torch.Tensor)
    assert torch.equal(shared[MLP[1]].index, total.topk(len(total) // 2).indices.sort().values)


def test_shared_columns_keep_less_for_backward_and_give_the_gradients_of_the_masked_model() -> None:
    (less, grads), (more, _) = saved_bytes(True), saved_bytes(False)
    assert less < more
    model = make_model("llama", hidden_size=64, intermediate_size=96)
    _, p = plan(model, True)
    ids = torch.arange(40)[None] % 200
    model(input_ids=ids, labels=ids).loss.backward()
    for name in (*ATTENTION, *MLP):
        mask = p[name].mask()[0]
        want = model.get_parameter(name).grad
        assert want is not None
        assert torch.allclose(grads[name], want[:, ~mask].t(), rtol=1e-4, atol=1e-6), name


def test_a_model_with_fused_projections_is_refused() -> None:
    with pytest.raises(AddlangError, match="no separate q, k, v"):
        same_input(["layers.0.qkv_proj.weight", "layers.0.gate_up_proj.weight"])


def test_it_is_defined_for_columns_only() -> None:
    with pytest.raises(AddlangError, match="share_columns needs granularity: column"):
        make_strategy("ssu", {"share_columns": True, "granularity": "row"})
