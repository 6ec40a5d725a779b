"""Spectrum: the ratio by hand, both thresholds, the ranking per module type, and an empty noise set."""

from __future__ import annotations

import math
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
