"""LoTA: the global top-k by hand, the zero-threshold trap, and a source that comes back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangError, AddlangWarning
from addlang.freeze.proof import bits
from addlang.recipe import TrainSettings
from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies.lota import largest


def batches(steps: int = 200, micro: int = 2) -> Any:
    def stream() -> Iterator[list[dict[str, torch.Tensor]]]:
        for step in range(steps):
            yield [
                {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16).expand(1, -1)}
                for i in range(micro)
                for ids in [torch.from_numpy(np.random.default_rng(step * micro + i).integers(6, 260, (1, 16)))]
            ]

    return stream


def inputs(seed: int = 0, steps: int = 200, **settings: Any) -> PlanInputs:
    return PlanInputs(seed=seed, target=batches(steps), settings=TrainSettings(learning_rate=1e-3, **settings))


def test_the_top_k_is_global_and_exact() -> None:
    """Of eight changes the three largest, wherever they are: 0.9, -0.8 and 0.5."""
    masks = largest({"a": torch.tensor([[0.1, -0.8], [0.2, 0.3]]), "b": torch.tensor([0.9, 0.5, -0.4, 0.0])}, 3, seed=0)
    assert masks["a"].tolist() == [[False, True], [False, False]]
    assert masks["b"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("k", [1, 17, 400, 999, 1000])
def test_the_histogram_finds_what_sorting_finds(k: int) -> None:
    g = torch.Generator().manual_seed(1)
    deltas = {"a": torch.randn(20, 30, generator=g) * 1e-5, "b": torch.randn(400, generator=g)}
    flat = torch.cat([d.abs().flatten() for d in deltas.values()])
    want = torch.zeros(1000, dtype=torch.bool)
    want[flat.argsort(descending=True)[:k]] = True
    masks = largest(deltas, k, seed=0)
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), want)


def test_equal_changes_are_drawn_by_the_seed_and_counted_exactly() -> None:
    deltas = {"a": torch.full((10, 10), 0.5), "b": torch.full((50,), -0.5)}
    one, same, other = (largest(deltas, 30, seed=s) for s in (1, 1, 2))
    assert int(one["a"].sum()) == 20
    assert int(one["b"].sum()) == 10
    assert torch.equal(one["a"], same["a"])
    assert not torch.equal(one["a"], other["a"])


def test_a_zero_threshold_does_not_make_everything_trainable() -> None:
    """The trap: in pure bf16 at 5e-5 most updates round away, so the k-th largest change is 0 and ``>= 0`` is everything.
    The SSU paper's LoTA at 12.5, 25 and 37.5 % are one and the same row (Table 14)."""
    model = make_model("llama").to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    strategy = make_strategy("lota", {"sparsity": 0.1, "warmup_steps": 2, "warmup_learning_rate": 5e-5})
    with pytest.warns(AddlangWarning, match="weights to train moved during the warm-up"):
        plan = strategy.plan(model, inputs(master_weights="model"))
    linear = [n for n in plan if n.endswith("proj.weight")]
    total = sum(plan[n].numel for n in linear)
    assert sum(plan[n].frozen_count for n in linear) == int(total * 0.1)
    assert all(torch.equal(bits(before[n]), bits(p)) for n, p in model.named_parameters())
    changes = torch.zeros(1000)
    changes[:5] = 1.0
    threshold = changes.topk(100).values[-1]
    assert int((changes >= threshold).sum()) == 1000  # what a threshold would have kept


def test_the_mask_is_where_a_full_fine_tuning_has_moved_most() -> None:
    """By hand: the same steps with plain AdamW; the mask is the top tenth of the change."""
    model = make_model("llama")
    strategy = make_strategy("lota", {"warmup_steps": 3})
    plan = strategy.plan(model, inputs(weight_decay=0.1, max_grad_norm=0.5))
    other = make_model("llama")
    norms = [p for p in other.parameters() if p.dim() < 2]
    rest = [p for p in other.parameters() if p.dim() >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=1e-3, fused=True
    )
    for step, micro in zip(range(3), batches()(), strict=False):
        for b in micro:
            (other(**b, use_cache=False).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert step < 3
    source = dict(model.named_parameters())
    linear = [n for n in plan if n.endswith("proj.weight")]
    change = torch.cat([(other.get_parameter(n) - source[n]).abs().flatten() for n in linear])
    trained = torch.cat([~plan[n].mask().flatten() for n in linear])
    k = change.numel() - int(change.numel() * 0.9)
    assert int(trained.sum()) == k
    overlap = float(trained[change.topk(k).indices].float().mean())
    assert overlap > 0.99  # the same but for rounding at the edge


def test_norms_and_biases_are_frozen_unless_they_compete() -> None:
    for include in (False, True):
        plan = make_strategy("lota", {"warmup_steps": 1, "include_norms": include}).plan(make_model("llama"), inputs())
        kinds = {plan[n].kind for n in plan if ".layers." in n and len(plan[n].shape) == 1}
        assert kinds == ({"elements"} if include else {"all"})
        assert plan["model.norm.weight"].kind == "all"
        assert plan["model.embed_tokens.weight"].kind == plan["lm_head.weight"].kind == "none"


def test_too_little_data_and_no_data_are_errors() -> None:
    with pytest.raises(AddlangError, match=r"warms up for 100 steps, but the phase has data for 4 only"):
        make_strategy("lota", {}).plan(make_model("llama"), inputs(steps=4))
    with pytest.raises(AddlangError, match="needs target text"):
        make_strategy("lota", {}).plan(make_model("llama"), PlanInputs())


def test_a_failed_warm_up_leaves_the_source_untouched() -> None:
    model = make_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(AddlangError):
        make_strategy("lota", {}).plan(model, inputs(steps=2))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not model.training


def masks(strategy: Any, **settings: Any) -> Any:
    plan = strategy.plan(make_model("llama"), inputs(**settings))
    return {n: plan[n].mask() for n in plan if n.endswith("proj.weight")}


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes minutes here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_uncompiled")
def test_the_warm_up_rounds_stochastically_where_the_phase_does() -> None:
    """Rounding to nearest loses nearly all updates of 5e-5 in bf16, and the mask would be drawn at random."""
    pytest.importorskip("torchao")
    strategy = make_strategy("lota", {"sparsity": 0.9, "warmup_steps": 5, "warmup_learning_rate": 5e-5})
    model = make_model("llama").to(torch.bfloat16)
    before = torch.get_rng_state()
    plans = []
    for seed in (0, 0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error", AddlangWarning)  # "weights to train moved"
            plans.append(strategy.plan(model, inputs(seed, optimizer="adamw_bf16_sr", master_weights="model")))
    assert torch.equal(before, torch.get_rng_state())
    equal = [all(torch.equal(plans[0][n].mask(), other[n].mask()) for n in plans[0]) for other in plans[1:]]
    assert equal == [True, False]


@pytest.mark.usefixtures("_uncompiled")
def test_the_warm_up_has_the_phases_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from addlang.train import optimizers

    used: list[Any] = []
    build = optimizers.build_optimizer
    monkeypatch.setattr(optimizers, "build_optimizer", lambda *a: used.append(build(*a)) or used[-1])
    masks(make_strategy("lota", {"warmup_steps": 1}), optimizer="adamw_8bit", adam_beta2=0.95)
    assert used[0].quantised
    assert used[0].param_groups[0]["betas"] == (0.9, 0.95)
    assert any(s for s in used[0].state.values())


def test_embedding_and_head_have_their_own_rate_in_the_warm_up_in_the_phases_proportion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from addlang.train import optimizers

    rates: list[list[float]] = []
    build = optimizers.build_optimizer

    def spy(*a: Any) -> Any:
        optimizer = build(*a)
        rates.append([g["lr"] for g in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(optimizers, "build_optimizer", spy)
    plain = masks(make_strategy("lota", {"warmup_steps": 3}))
    own = masks(make_strategy("lota", {"warmup_steps": 3}), embedding_learning_rate=1e-1)
    assert any(not torch.equal(plain[n], own[n]) for n in plain)
    masks(make_strategy("lota", {"warmup_steps": 1, "warmup_learning_rate": 1e-4}), embedding_learning_rate=1e-1)
    assert rates == [[1e-3, 1e-3], [1e-3, 1e-3, 1e-1], [1e-4, 1e-4, pytest.approx(1e-2)]]


def test_the_warm_up_recomputes_activations_where_the_phase_does_and_stops_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from addlang.train import loss

    on: list[bool] = []
    original = loss.token_loss

    def spy(model: Any, batch: Any) -> Any:
        on.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        return original(model, batch)

    monkeypatch.setattr(loss, "token_loss", spy)
    strategy = make_strategy("lota", {"warmup_steps": 2})
    without = masks(strategy)
    assert not any(on)
    on.clear()
    model = make_model("llama")
    plan = strategy.plan(model, inputs(activation_checkpointing=True))
    assert len(on) == 4
    assert all(on)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert all(torch.equal(plan[n].mask(), without[n]) for n in without)


def test_the_tokens_of_the_warm_up_are_told() -> None:
    plan = make_strategy("lota", {"warmup_steps": 3}).plan(make_model("llama"), inputs())
    assert (
        plan.provenance["warmup_tokens"] == 3 * 2 * 15
    )  # two micro-batches of one sequence of 16, of which 15 are labels
