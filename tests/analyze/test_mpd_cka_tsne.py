"""MPD against plain sums, CKA's invariances, t-SNE's seed and its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, save_model

from addlang.analyze.base import Context, make_analysis
from addlang.analyze.cka import linear_cka
from addlang.analyze.mpd import parameter_difference
from addlang.analyze.tsne import embed, separation
from addlang.errors import AddlangError


def test_mpd_is_the_mean_over_tensors_or_over_scalars(tmp_path: Path) -> None:
    one, other = (save_model(tmp_path / str(s), dtype="float32", seed=s) for s in (0, 1))
    pairs = list(zip(make_model("llama", 0).parameters(), make_model("llama", 1).parameters(), strict=True))
    differences = [(a - b).detach().double() for a, b in pairs]
    found = parameter_difference(one, other)
    assert found.tensor == pytest.approx(sum(float(d.norm()) for d in differences) / len(differences), rel=1e-6)
    total = sum(d.numel() for d in differences)
    assert found.scalar == pytest.approx(sum(float(d.abs().sum()) for d in differences) / total, rel=1e-6)
    assert set(found.layers) == {0, 1}
    assert parameter_difference(one, one).tensor == 0.0
    tensors = {**load_file(other / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert parameter_difference(one, other) == found == parameter_difference(other, one), "a buffer is no parameter"


def test_mpd_is_normalised_by_the_largest_of_the_set(tmp_path: Path) -> None:
    models = {str(s): save_model(tmp_path / str(s), dtype="float32", seed=s) for s in (0, 1)}
    near = save_model(tmp_path / "near", dtype="float32", seed=0, initializer_range=0.19)
    result = make_analysis("mpd", {"reference": "0"}).run(Context({**models, "near": near}))
    shares = [p["normalised"] for p in result.data["pairs"]]
    assert max(shares) == 1.0
    assert 0 < min(shares) < 1
    for reading in ("tensor", "scalar"):
        top = max(p[reading] for p in result.data["pairs"])
        assert [p[f"{reading}_normalised"] for p in result.data["pairs"]] == [
            p[reading] / top for p in result.data["pairs"]
        ]
    assert result.columns == ["models", "MPD per tensor", "normalised", "MPD per scalar", "normalised"]


def test_mpd_refuses_checkpoints_that_differ_in_shape(tmp_path: Path) -> None:
    one = save_model(tmp_path / "a")
    with pytest.raises(AddlangError, match="has shape"):
        parameter_difference(one, save_model(tmp_path / "b", intermediate_size=64))
    with pytest.raises(AddlangError, match="has a tensor"):
        parameter_difference(one, save_model(tmp_path / "c", num_hidden_layers=1))


def test_cka_does_not_see_rotation_and_scale_but_sees_other_activations() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 8, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    other = torch.randn(30, 200, generator=g, dtype=torch.float64)
    for debiased in (False, True):
        assert linear_cka(x, 3 * x @ rotation + 5, debiased=debiased) == pytest.approx(1.0)
    assert linear_cka(x, other) > 0.3, "the biased form is large for few rows and many features"
    assert abs(linear_cka(x, other, debiased=True)) < 0.15


def test_debiased_hsic_is_the_estimator_of_song_et_al() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))

    def hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
        n, one = len(k), torch.ones(len(k), 1, dtype=torch.float64)
        k, l = (m - torch.diag(torch.diag(m)) for m in (k, l))  # noqa: E741
        a = torch.trace(k @ l)
        b = (one.T @ k @ one) * (one.T @ l @ one) / ((n - 1) * (n - 2))
        return float((a + b - 2 / (n - 2) * (one.T @ k @ l @ one)) / (n * (n - 3)))

    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected)


def test_the_separation_is_centres_over_spread() -> None:
    one = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert separation(one, one + torch.tensor([0.0, 3.0])) == pytest.approx(3.0)
    with pytest.raises(AddlangError, match="same activations"):
        separation(torch.ones(2, 2), torch.ones(2, 2))


def test_tsne_is_seeded_and_tells_two_far_clusters_apart() -> None:
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(12, 6, generator=g), torch.randn(12, 6, generator=g) + 40]).numpy()
    xy = embed(points, perplexity=30, seed=3)
    assert (xy == embed(points, perplexity=30, seed=3)).all()
    near, far = xy[:12], xy[12:]
    assert abs(near.mean(0) - far.mean(0)).max() > max(near.std(0).max(), far.std(0).max())


def test_tsne_of_languages_needs_rows_that_belong_together(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    files = {}
    for code, n in (("en", 6), ("sw", 6), ("hi", 5)):
        files[code] = tmp_path / f"{code}.jsonl"
        files[code].write_text("".join(json.dumps({"text": f"{code} {i} word"}) + "\n" for i in range(n)))
    context = Context({"m": save_model(tmp_path / "m")})
    parallel = {c: str(files[c]) for c in ("en", "sw")}
    result = make_analysis("tsne", {"parallel": parallel, "layers": [1]}).run(context)
    assert list(result.data["separation"]["m"]) == ["en | sw"]
    assert list(result.data["panels"]) == ["m, layer 1"]
    with pytest.raises(AddlangError, match="as many rows"):
        make_analysis("tsne", {"parallel": {c: str(f) for c, f in files.items()}}).run(context)
    with pytest.raises(AddlangError, match="two languages"):
        make_analysis("tsne", {"parallel": {"en": "x"}})


def test_points_of_layers_are_the_papers_reading(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    models = {str(s): save_model(tmp_path / str(s), seed=s) for s in (0, 1)}
    result = make_analysis("tsne", {"points": "per_layer", "limit": 5}).run(Context(models))
    ((_, panel),) = result.data["panels"].items()
    assert {n: len(xy) for n, xy in panel.items()} == {"0": 3, "1": 3}
