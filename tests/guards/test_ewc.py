"""EWC: F and its gradient worked out by hand, alike in masked and split, resume exact."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import calibration, make_model

from addlang.data.calibration import CalibrationSet
from addlang.errors import AddlangError
from addlang.freeze.proof import bits
from addlang.guards import make_guard
from addlang.guards.ewc import fisher, spread
from addlang.recipe import Phase
from addlang.strategies import PlanInputs, make_strategy
from addlang.train.loop import Schedule, train
from guarding import Data, KilledError


def conversations() -> CalibrationSet:
    draw = np.random.default_rng(7)
    ids = tuple(tuple(int(t) for t in draw.integers(6, 260, n)) for n in (16, 12, 9, 5))
    return CalibrationSet(ids, 2, 0, "drawn", "f")


def context() -> Any:
    return SimpleNamespace(
        calibration=conversations,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        progress=lambda *_: None,
        sequence_length=64,
    )


def attach(strategy: str, execution: str = "auto", kind: str = "llama") -> Any:
    model = make_model(kind)
    s = make_strategy(strategy, {})
    return s.attach(model, s.plan(model, PlanInputs(calibration=lambda: calibration())), execution)


def carry_out(
    directory: Path, strategy: str, execution: str = "auto", kill_at: int | None = None, weight: float = 1e3
) -> dict[str, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    phase = Phase(
        datasets=({"path": "x"},), strategy="ssu", sequence_length=16, learning_rate=1e-2, save_steps=2, warmup_steps=1
    )
    attached = attach(strategy, execution)
    guard = make_guard("ewc", {"weight": weight, "sequences": 2}).start(context())
    device, schedule = torch.device("cpu"), Schedule(6, 2, 2)
    train(attached, Data(kill_at), phase, directory, device=device, schedule=schedule, seed=0, guards=[guard])
    return {n: t.clone() for n, t in attached.export()}


@pytest.mark.parametrize("per", ["token", "conversation"])
def test_fisher_is_the_mean_of_squared_gradients_and_leaves_the_weights_alone(per: str) -> None:
    """Per token: of summed losses over all tokens; per conversation: of mean losses over all conversations."""
    attached = attach("full")
    before = {n: p.detach().clone() for n, p in attached.named_trainable()}
    given = conversations()
    found = fisher(attached, [list(given.ids[i]) for i in (0, 2)], context(), per=per)
    want = {n: torch.zeros_like(p) for n, p in before.items()}
    model = make_model("llama")
    for index in (0, 2):
        model.zero_grad()
        ids = torch.tensor([given.ids[index]])
        loss = model(input_ids=ids, labels=ids).loss
        (loss * (ids.shape[1] - 1) if per == "token" else loss).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                want[n] += p.grad.square() / (15 + 8 if per == "token" else 2)
    for n, p in attached.named_trainable():
        assert torch.allclose(found[n], want[n], rtol=1e-3, atol=1e-9), n
        assert p.grad is None
        assert torch.equal(p, before[n])


def test_per_token_half_the_weighted_square_is_the_kl_to_the_source() -> None:
    """On tokens that the model draws itself, averaged over many draws and to second order."""
    model, full = make_model("llama").double(), make_strategy("full", {})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a pad's embedding is 0 and has no gradient, but it is drawn here like any other token
        model.model.embed_tokens.padding_idx = None
        model.model.embed_tokens.weight[0].normal_(0, 0.2, generator=g)
    attached = full.attach(model, full.plan(model, PlanInputs(calibration=lambda: calibration())), "auto")
    ids = torch.full((400, 1), 7)
    with torch.no_grad():
        for _ in range(6):
            p = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=g)], 1)
        source = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    found = fisher(attached, ids.tolist(), context())
    said, seen = 0.0, 0.0
    before = {n: p.detach().clone() for n, p in attached.named_trainable()}
    with torch.no_grad():
        for _ in range(20):  # F's cross terms are left out: right on average over directions
            for n, p in attached.named_trainable():
                change = 1e-5 * torch.randn(p.shape, generator=g, dtype=p.dtype)
                said += 0.5 * float((found[n] * change.square()).sum())
                p.copy_(before[n] + change)
            now = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            seen += float((source.exp() * (source - now)).sum(-1).mean())
    assert said == pytest.approx(seen, rel=0.3)


def test_the_gradient_is_lambda_times_fisher_times_the_distance_worked_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    attached: Any = SimpleNamespace(named_trainable=lambda: [("w", p)])
    guard: Any = make_guard("ewc", {"weight": 0.5}).start(context())
    guard.source, guard.fisher = {"w": p.detach().clone()}, {"w": torch.tensor([4.0, 0.0])}
    with torch.no_grad():
        p.add_(torch.tensor([2.0, -1.0]))
    assert guard.backward(attached, 1) == pytest.approx(0.5 * 0.5 * 4 * 4)
    assert p.grad is not None
    assert p.grad.tolist() == [4.0, 0.0]


@pytest.mark.parametrize(("stored", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_beside_fp32_masters_it_keeps_the_sources_values_exactly_and_fisher_in_16_bits(
    stored: torch.dtype, kept: torch.dtype
) -> None:
    model, full = make_model("llama").to(stored).float(), make_strategy("full", {})
    attached = full.attach(model, full.plan(model, PlanInputs(calibration=lambda: calibration())), "auto")
    guard: Any = make_guard("ewc", {"sequences": 2}).start(context())
    guard.begin(attached)
    ids = [list(conversations().ids[i]) for i in spread(4, 2)]
    for (name, p), (other, f) in zip(attached.named_trainable(), fisher(attached, ids, context()).items(), strict=True):
        assert name == other
        held = guard.source[name]
        assert torch.equal(held.float(), p)
        assert held.dtype == kept or "norm" in name  # norms of ones fit into anything
        assert guard.fisher[name].dtype == torch.bfloat16
        assert torch.allclose(guard.fisher[name].float(), f, rtol=2**-8, atol=0)


def test_masked_and_split_give_the_same_result(tmp_path: Path) -> None:
    masked, split = (carry_out(tmp_path / e, "ssu", e) for e in ("masked", "split"))
    for name, tensor in masked.items():
        assert torch.allclose(tensor, split[name], atol=2e-4), name


@pytest.mark.parametrize("strategy", ["ssu", "gmt", "lisa", "s2ft"])
def test_resumed_equals_uninterrupted(strategy: str, tmp_path: Path) -> None:
    want = carry_out(tmp_path / "whole", strategy)
    with pytest.raises(KilledError):
        carry_out(tmp_path / "killed", strategy, kill_at=4)
    got = carry_out(tmp_path / "killed", strategy)
    assert all(torch.equal(bits(want[n]), bits(got[n])) for n in want)


def test_what_the_source_needs_most_moves_least(tmp_path: Path) -> None:
    before = {n: p.detach() for n, p in make_model("llama").named_parameters()}
    f = fisher(attach("full"), [list(ids) for ids in conversations().ids[:2]], context())

    def moved(weight: float) -> float:
        after = carry_out(tmp_path / str(weight), "full", weight=weight)
        return sum(float((f[n] * (after[n] - before[n]).square()).sum()) for n in after)

    assert moved(1e7) < 0.5 * moved(1e-6)


def test_an_all_zero_fisher_is_an_error() -> None:
    attached: Any = SimpleNamespace(
        named_trainable=lambda: [("w", torch.nn.Parameter(torch.zeros(2)))], model=make_model("llama")
    )
    guard = make_guard("ewc", {"sequences": 1}).start(context())
    with pytest.raises(AddlangError, match="would do nothing"):
        guard.begin(attached)


def test_chosen_conversations_are_spread_over_all_lengths() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 5) == [0, 1, 2]


def test_conversations_of_its_own_need_no_source_data_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import make_tokenizer

    said: list[int] = []

    def sample(_model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        said.append(len(prompts))
        texts = [f"the cat {len(said)} {i}" for i in range(len(prompts))]
        return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]

    monkeypatch.setattr("addlang.evaluate.generation.sample", sample)
    model = make_model("llama")
    full = make_strategy("full", {})
    options = {"data": "self", "sampling": {"conversations": 4, "attempts": 40}}
    guard = make_guard("ewc", options)
    assert guard.requires() == {"chat_template"}
    own = SimpleNamespace(
        **{**vars(context()), "calibration": None}, model=model, model_hash="h", behaviour="b",
        tokenizer=make_tokenizer(), cache_dir=tmp_path, language="en",
    )  # fmt: skip
    active = guard.start(own)
    active.begin(full.attach(model, full.plan(model, PlanInputs()), "auto"))
    about = active.describe()
    assert (about["sequences"], about["source"]) == (4, "sampled from the source model")
    calls = len(said)
    guard.start(own)
    assert len(said) == calls
