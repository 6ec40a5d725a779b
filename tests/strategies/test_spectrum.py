"""Spectrum: the ratio by hand, both thresholds, the ranking per module type, and an empty noise set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangWarning
from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies.spectrum import signal_to_noise


def with_values(*values: float) -> torch.Tensor:
    """A square matrix with these singular values."""
    g = torch.Generator().manual_seed(0)
    q = [torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q for _ in range(2)]
    return q[0] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q[1]


def test_the_ratio_by_hand() -> None:
    """Values 10, 2, 1.5, 1, 0.5: quartiles 1 and 2, sigma = 1 / 1.349, threshold 2 sigma = 1.4826; signal 13.5, noise 1.5."""
    got = signal_to_noise(with_values(10, 2, 1.5, 1, 0.5))
    assert got.value == pytest.approx(13.5 / 1.5 / 10, rel=1e-9)
    assert not got.noise_is_empty


def test_the_papers_threshold_is_smaller_by_the_root_of_the_height() -> None:
    """Eq. 1 for the same matrix: 1.4826 / sqrt(5) = 0.663: only 0.5 is noise."""
    got = signal_to_noise(with_values(10, 2, 1.5, 1, 0.5), "paper")
    assert got.value == pytest.approx(14.5 / 0.5 / 10, rel=1e-9)


def test_the_papers_threshold_takes_noise_for_signal() -> None:
    """It is made for the spectrum of W / sqrt(N), and the code's depends on no orientation (Q is min / max)."""
    w = torch.randn(48, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert signal_to_noise(w).value == pytest.approx(signal_to_noise(w.T).value)
    assert signal_to_noise(w, "paper").noise_is_empty
    assert not signal_to_noise(w).noise_is_empty


def test_an_empty_noise_set_is_infinite_and_flagged_never_one() -> None:
    assert signal_to_noise(with_values(3, 3, 3, 3)) == (math.inf, True)  # no spread: sigma 0
    model = make_model("mistral")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(torch.eye(48, 32))
    with pytest.warns(AddlangWarning, match=r"1 of 14 matrices counts as noise.*layers\.1\.mlp\.up_proj"):
        plan = make_strategy("spectrum", {}).plan(model, PlanInputs())
    assert plan["model.layers.1.mlp.up_proj.weight"].kind == "all"
    assert plan.provenance["signal_to_noise"]["model.layers.1.mlp.up_proj.weight"] == "no noise"


def ranked(model: Any, group: str) -> list[int]:
    values = {}
    for i, layer in enumerate(model.model.layers):
        block = layer.mlp if group in ("up_proj", "gate_proj", "down_proj") else layer.self_attn
        values[i] = signal_to_noise(getattr(block, group).weight).value
    return sorted(values, key=lambda i: -values[i])


@pytest.mark.parametrize("mode", ["freeze_top", "train_top"])
def test_the_top_half_of_each_module_type_is_chosen(mode: str) -> None:
    model = make_model("llama", num_hidden_layers=5)
    plan = make_strategy("spectrum", {"mode": mode}).plan(model, PlanInputs())
    for group in ("q_proj", "o_proj", "down_proj"):
        top = set(ranked(model, group)[:2])  # int(5 * 0.5)
        for layer in range(5):
            block = "mlp" if group == "down_proj" else "self_attn"
            is_frozen = plan[f"model.layers.{layer}.{block}.{group}.weight"].kind == "all"
            assert is_frozen == ((layer in top) == (mode == "freeze_top"))
            assert plan[f"model.layers.{layer}.{block}.{group}.bias"].kind == ("all" if is_frozen else "none")
    norms = {plan[n].kind for n in plan if "norm" in n}
    assert norms == ({"none"} if mode == "freeze_top" else {"all"})


def test_16_bit_weights_are_decomposed_in_fp32() -> None:
    w = make_model("llama").model.layers[0].mlp.up_proj.weight
    assert signal_to_noise(w.bfloat16()).value == pytest.approx(signal_to_noise(w).value, rel=0.05)


@pytest.mark.filterwarnings("ignore:spectrum")
def test_singular_values_are_computed_once_per_model_and_a_killed_plan_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addlang.strategies import spectrum as module

    model = make_model("mistral", num_hidden_layers=3)
    calls: list[tuple[int, ...]] = []
    original = module.singular_values

    def counting(weight: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(weight)

    monkeypatch.setattr(module, "singular_values", counting)
    inputs = PlanInputs(model_hash="abc", cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_strategy("spectrum", {}).plan(model, inputs)
    plan = make_strategy("spectrum", {}).plan(model, inputs)
    assert len(calls) == 21 + 1  # of 21 matrices the eighth was begun twice
    other = make_strategy("spectrum", {"threshold": "paper", "mode": "train_top", "ratio": 0.3}).plan(model, inputs)
    assert len(calls) == 22
    monkeypatch.setattr(module, "singular_values", original)
    fresh = PlanInputs(model_hash="abc")
    assert plan.provenance == make_strategy("spectrum", {}).plan(model, fresh).provenance
    options = {"threshold": "paper", "mode": "train_top", "ratio": 0.3}
    assert other.provenance == make_strategy("spectrum", options).plan(model, fresh).provenance


def test_another_model_has_singular_values_of_its_own(tmp_path: Path) -> None:
    plans = [
        make_strategy("spectrum", {}).plan(
            make_model("mistral", seed=s), PlanInputs(model_hash=f"m{s}", cache_dir=tmp_path)
        )
        for s in (0, 1)
    ]
    assert plans[0].provenance["signal_to_noise"] != plans[1].provenance["signal_to_noise"]


def test_the_random_control_freezes_as_many_matrices_of_each_type() -> None:
    model = make_model("mistral", num_hidden_layers=4)
    ranked_plan = make_strategy("spectrum", {}).plan(model, PlanInputs())
    counts = []
    for seed in range(4):
        plan = make_strategy("spectrum", {"select": "random"}).plan(model, PlanInputs(seed=seed))
        assert plan.trainable_count == ranked_plan.trainable_count
        counts.append(frozenset(n for n in plan if plan[n].kind == "all"))
    assert len(set(counts)) > 2
