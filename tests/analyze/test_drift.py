"""Drift is that of the explicit covariances, pads and BOS change nothing, and fp64 is kept where it matters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer, save_model

from addlang.analyze.base import Context, make_analysis
from addlang.analyze.drift import covariance_change
from addlang.analyze.plots import write_figure
from addlang.analyze.states import mean_states
from addlang.errors import AddlangError


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(5, 12), (9, 4), (2, 3), (7, 7)])
def test_the_low_rank_drift_is_that_of_the_explicit_matrices(n: int, d: int) -> None:
    before, after = rows(n, d, 0), rows(n, d, 1) * 3 + 2
    explicit = torch.cov(after.T) - torch.cov(before.T)
    change = covariance_change(before, after)
    assert change.spectral == pytest.approx(float(torch.linalg.matrix_norm(explicit, 2)), rel=1e-12)
    assert change.frobenius == pytest.approx(float(explicit.norm()), rel=1e-12)
    own = torch.cov(before.T)
    assert change.spectral_relative == pytest.approx(change.spectral / float(torch.linalg.matrix_norm(own, 2)))
    assert change.frobenius_relative == pytest.approx(change.frobenius / float(own.norm()))


def test_a_relative_change_of_a_ten_thousandth_comes_out_right() -> None:
    before = rows(40, 256, 0) * 100
    change = covariance_change(before, before * math.sqrt(1 + 1e-4))
    assert change.spectral_relative == pytest.approx(1e-4, rel=1e-6)


def test_the_same_model_does_not_drift() -> None:
    before = rows(6, 10, 0)
    assert covariance_change(before, before.clone()).spectral < 1e-12
    assert covariance_change(torch.ones(3, 4), torch.ones(3, 4)).spectral_relative is None


def test_pads_and_bos_are_left_out_of_the_means() -> None:
    model = make_model("llama")
    bos = make_tokenizer().bos_token_id
    short, long = [7, 8, 9], [10, 11, 12, 13, 14, 15, 16]
    together = mean_states(model, [short, long])
    assert torch.allclose(together[:, :1], mean_states(model, [short]), atol=1e-6)
    with torch.inference_mode():
        hidden = model(torch.tensor([[bos, *short]]), output_hidden_states=True).hidden_states
    found = mean_states(model, [[bos, *short]], bos=bos)
    for layer in (0, 1):  # the last of transformers' states is after the final norm
        assert torch.allclose(found[layer, 0], hidden[layer][0, 1:].double().mean(0), atol=1e-6)
    assert found.shape == (3, 1, 32)
    assert not torch.allclose(found, mean_states(model, [[bos, *short]]), atol=1e-3)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3", "olmo2"])
def test_every_layer_of_other_architectures_is_seen(architecture: str) -> None:
    model = make_model(architecture)
    with torch.inference_mode():
        hidden = model(torch.tensor([[7, 8, 9]]), output_hidden_states=True).hidden_states
    found = mean_states(model, [[7, 8, 9]])
    assert torch.allclose(found[1, 0], hidden[1][0].double().mean(0), atol=1e-5)


def context(tmp_path: Path, **models: int) -> Context:
    return Context({n: save_model(tmp_path / n, dtype="float32", seed=s) for n, s in models.items()})


def test_the_analysis_gives_a_row_per_layer_and_an_unchanged_model_zero(tmp_path: Path) -> None:
    result = make_analysis("drift", {"limit": 6}).run(context(tmp_path, a=0, same=0, other=1))
    assert [r[0] for r in result.rows] == ["embedding", "layer 1", "layer 2"]
    drift = result.data["drift"]
    assert all(c["spectral"] < 1e-9 for c in drift["same"])
    assert all(c["spectral"] > 1e-6 for c in drift["other"])
    assert result.data["reference"] == "a"


def test_the_papers_centring_over_layers_gives_one_covariance(tmp_path: Path) -> None:
    result = make_analysis("drift", {"limit": 6, "center": "across_layers"}).run(context(tmp_path, a=0, b=1))
    assert len(result.data["drift"]["b"]) == 1
    assert result.draw is not None
    write_figure(tmp_path / "drift.svg", result.draw, result.size)  # a bar per model
    assert (tmp_path / "drift.svg").read_text().startswith("<?xml")


def test_models_of_other_widths_are_refused(tmp_path: Path) -> None:
    there = {
        "a": save_model(tmp_path / "a"),
        "b": save_model(tmp_path / "b", hidden_size=16, num_attention_heads=2, num_key_value_heads=2),
    }
    with pytest.raises(AddlangError, match="'b' 2 of 16"):
        make_analysis("drift", {"limit": 4}).run(Context(there))


def test_one_model_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="at least 2 models"):
        make_analysis("drift", {}).run(context(tmp_path, a=0))
