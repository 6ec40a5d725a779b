"""LF_H1 and LF_H2 of the two-phase paper: counts, rankings by hand, heads under grouped queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangError
from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies._layers import share_of_depth


def frozen(plan: Any) -> set[str]:
    return {n for n in plan if plan[n].kind == "all"}


def test_ten_of_32_layers_or_the_same_share_of_another_depth() -> None:
    assert [share_of_depth(n) for n in (1, 2, 3, 16, 32, 48)] == [1, 1, 1, 5, 10, 15]


def test_lf_h1_freezes_whole_random_layers() -> None:
    model = make_model("llama", num_hidden_layers=6)
    plan = make_strategy("lf_h1", {}).plan(model, PlanInputs(seed=1))
    layers = {int(n.split(".")[2]) for n in frozen(plan)}
    assert len(layers) == 2  # 10 / 32 of 6
    assert frozen(plan) == {n for n, _ in model.named_parameters() if any(f".layers.{i}." in n for i in layers)}
    assert plan.provenance["layers"] == sorted(layers)
    chosen = {tuple(make_strategy("lf_h1", {}).plan(model, PlanInputs(seed=s)).provenance["layers"]) for s in range(9)}
    assert len(chosen) > 3


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(AddlangError, match="count 3 is more than the model's 2 layers"):
        make_strategy("lf_h1", {"count": 3}).plan(make_model("llama"), PlanInputs())


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """A reference, and a model of four layers of which q, k and v have changed by known norms.

    q by 1, 4, 2, 3; k by 4, 3, 2, 1; v by 1, 1, 5, 1; the change of q in layer 1 is all in head 3, that of k in head 1.
    """
    model = make_model("mistral", num_hidden_layers=4)  # 4 query heads, 2 key/value heads, of width 8
    model.save_pretrained(tmp_path / "reference")
    norms = {"q_proj": [1, 4, 2, 3], "k_proj": [4, 3, 2, 1], "v_proj": [1, 1, 5, 1]}
    heads = {"q_proj": [0, 3, 1, 1], "k_proj": [0, 1, 0, 0], "v_proj": [0, 0, 0, 0]}
    with torch.no_grad():
        for group, changes in norms.items():
            for layer, norm in enumerate(changes):
                weight = getattr(model.model.layers[layer].self_attn, group).weight
                head = heads[group][layer]
                weight[8 * head : 8 * head + 8] += norm / (8 * 32) ** 0.5  # Frobenius norm of the change: norm
    return model, str(tmp_path / "reference")


def test_lf_h2_ranks_queries_keys_and_values_separately(changed: Any) -> None:
    model, reference = changed
    plan = make_strategy("lf_h2", {"reference_model": reference, "count": 2}).plan(model, PlanInputs())
    want = {"q_proj": (1, 3), "k_proj": (0, 1), "v_proj": (2, 0)}  # among equals the lower layer
    assert frozen(plan) == {f"model.layers.{i}.self_attn.{g}.weight" for g, ls in want.items() for i in ls}
    assert plan.provenance["layers"] == {g: sorted(ls) for g, ls in want.items()}


def test_lf_h2_whole_layers_are_ranked_by_all_three_together(changed: Any) -> None:
    """Squares: layer 0 1+16+1 = 18, layer 1 16+9+1 = 26, layer 2 4+4+25 = 33, layer 3 9+1+1 = 11."""
    model, reference = changed
    plan = make_strategy("lf_h2", {"reference_model": reference, "count": 2, "unit": "layer"}).plan(model, PlanInputs())
    assert {int(n.split(".")[2]) for n in frozen(plan)} == {1, 2}
    assert len(frozen(plan)) == 18


def test_lf_h2_by_head_has_fewer_key_and_value_heads(changed: Any) -> None:
    """Each head ranks the layers for itself: query head 3 has changed in layer 1 only, key head 1 in layer 1 only."""
    model, reference = changed
    with torch.no_grad():  # every head has changed somewhere
        for layer in model.model.layers:
            for group in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, group).weight[:] += 1e-4
    plan = make_strategy("lf_h2", {"reference_model": reference, "count": 1, "unit": "head"}).plan(model, PlanInputs())

    def rows(group: str, layer: int) -> set[int]:
        entry = plan[f"model.layers.{layer}.self_attn.{group}.weight"]
        return (
            set(range(entry.shape[0]))
            if entry.kind == "all"
            else set()
            if entry.index is None
            else set(entry.index.tolist())
        )

    assert {24, 31} <= rows("q_proj", 1)
    assert rows("k_proj", 0) == set(range(8))
    assert rows("k_proj", 1) == set(range(8, 16))
    for group, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        assert sum(len(rows(group, i)) for i in range(4)) == heads * 8  # every head freezes one layer


def test_a_reference_that_equals_the_model_is_an_error(changed: Any, tmp_path: Path) -> None:
    model, _ = changed
    model.save_pretrained(tmp_path / "same")
    with pytest.raises(AddlangError, match="no layer changed"):
        make_strategy("lf_h2", {"reference_model": str(tmp_path / "same")}).plan(model, PlanInputs())


def test_a_reference_of_another_shape_is_named(changed: Any, tmp_path: Path) -> None:
    model, _ = changed
    make_model("mistral", num_hidden_layers=4, num_key_value_heads=4).save_pretrained(tmp_path / "other")
    with pytest.raises(AddlangError, match=r"k_proj\.weight' has shape \(32, 32\).*\(16, 32\)"):
        make_strategy("lf_h2", {"reference_model": str(tmp_path / "other")}).plan(model, PlanInputs())


def test_without_a_reference_the_option_is_named() -> None:
    with pytest.raises(AddlangError, match="option 'reference_model': Field required"):
        make_strategy("lf_h2", {})


def test_the_control_of_lf_h2_freezes_as_many_random_matrices(changed: Any) -> None:
    model, reference = changed
    by_change = make_strategy("lf_h2", {"reference_model": reference, "count": 2}).plan(model, PlanInputs())
    drawn = set()
    for seed in range(6):
        plan = make_strategy("lf_h1", {"unit": "matrix", "count": 2}).plan(model, PlanInputs(seed=seed))
        assert plan.trainable_count == by_change.trainable_count
        assert {n.split(".")[4] for n in frozen(plan)} == {"q_proj", "k_proj", "v_proj"}
        layers = plan.provenance["layers"]
        assert all(len(chosen) == 2 for chosen in layers.values())
        drawn.add(tuple(map(tuple, layers.values())))
    assert any(len(set(d)) > 1 for d in drawn)  # queries, keys and values of different layers
