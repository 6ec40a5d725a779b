"""LISA: who is awake, what the sleeping ones keep, and that every layer is in the optimizer."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangError
from addlang.guards import make_guard
from addlang.strategies import PlanInputs, make_strategy
from addlang.strategies.lisa import draw
from addlang.train.memory import estimate
from training import phase


def attach(model: Any, **options: Any) -> Any:
    strategy = make_strategy("lisa", options)
    return strategy.attach(model, strategy.plan(model, PlanInputs(seed=5)), "masked")


def steps(attached: Any, first: int, last: int, optimizer: Any = None) -> Any:
    if optimizer is None:
        optimizer = torch.optim.AdamW(attached.param_groups(0.1), lr=1e-2)
        attached.bind(optimizer, 100)
    for step in range(first, last + 1):
        ids = torch.randint(6, 260, (2, 20), generator=torch.Generator().manual_seed(step))
        attached.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        attached.before_clip(step)
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()
    return optimizer


def layers_moved(before: dict[str, torch.Tensor], model: Any) -> set[int | None]:
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    return {int(n.split(".")[2]) if ".layers." in n else None for n in moved}


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_sleeping_layers_do_not_move_not_even_by_weight_decay() -> None:
    model = make_model("llama", num_hidden_layers=5)
    attached = attach(model, active_layers=2, interval=3)
    before = snapshot(model)
    optimizer = steps(attached, 1, 3)
    first = draw(5, 0, 5, 2)
    assert layers_moved(before, model) == first | {None}
    before = snapshot(model)
    steps(attached, 4, 6, optimizer)
    assert layers_moved(before, model) == draw(5, 1, 5, 2) | {None}


def test_the_draw_is_uniform_and_depends_on_seed_and_period_only() -> None:
    assert draw(0, 3, 8, 2) == draw(0, 3, 8, 2)
    counts = [sum(layer in draw(0, p, 8, 2) for p in range(4000)) for layer in range(8)]
    assert all(abs(c - 1000) < 100 for c in counts)


def test_a_layer_that_falls_asleep_loses_its_optimizer_state() -> None:
    model = make_model("llama", num_hidden_layers=5)
    attached = attach(model, active_layers=1, interval=2)
    optimizer = steps(attached, 1, 2)
    named = dict(attached.named_trainable())
    awake = {n for n in named if ".layers." not in n}
    assert {n for n, p in named.items() if optimizer.state.get(p)} == awake  # the next layer has not stepped yet
    steps(attached, 3, 3, optimizer)
    layer = draw(5, 1, 5, 1).pop()
    with_state = {n for n, p in named.items() if optimizer.state.get(p)}
    assert with_state == awake | {n for n in named if f".layers.{layer}." in n}
    assert all(float(optimizer.state[named[n]]["step"]) == 1 for n in with_state - awake)  # fresh moments


def test_every_layer_belongs_to_the_optimizer_from_the_start() -> None:
    """An optimizer that is built while layers sleep never owns them (ms-swift pull request 10140; LMFlow issue 726 reports
    the symptom: the loss is the same however many layers are active)."""
    model = make_model("llama", num_hidden_layers=5)
    attached = attach(model, active_layers=1, interval=1)
    owned = {id(p) for g in attached.param_groups(0.1) for p in g["params"]}
    assert owned == {id(p) for p in model.parameters()}
    before = snapshot(model)
    steps(attached, 1, 40)
    assert layers_moved(before, model) == {0, 1, 2, 3, 4, None}


def test_a_checkpoint_remembers_who_is_awake() -> None:
    a = attach(make_model("llama", num_hidden_layers=5), active_layers=2, interval=1)
    steps(a, 1, 7)
    b = attach(make_model("llama", num_hidden_layers=5), active_layers=2, interval=1)
    assert a.awake != b.awake
    b.load_state_dict({n: t.clone() for n, t in a.state_dict().items()})
    assert a.awake == b.awake == draw(5, 7, 5, 2)
    assert [p.requires_grad for _, p in a.named_trainable()] == [p.requires_grad for _, p in b.named_trainable()]


def test_the_memory_estimate_is_of_the_layers_that_are_awake_and_of_all_masters() -> None:
    model = make_model("llama", num_hidden_layers=5).to(torch.bfloat16)
    plan = make_strategy("lisa", {"active_layers": 2}).outline(model)
    settings: dict[str, Any] = {"micro": 1, "stored_bytes": 2, "compute_bytes": 2, "form": "masked"}
    found = estimate(model.config, plan, phase(strategy={"name": "lisa", "active_layers": 2}), **settings)
    attached = attach(model, active_layers=2, interval=1)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors if t is not None and t.dim())  # noqa: E731
    ids = torch.arange(6, 26).view(1, -1)
    optimizer = steps(attached, 1, 1)
    for step in (2, 3, 4):
        steps(attached, step, step, optimizer)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        state = [t for s in optimizer.state.values() for t in s.values()]
        assert size(p.grad for p in model.parameters()) == found["gradients"]
        assert size(state) == found["optimizer"]
        assert size(model.parameters()) == found["trained_weights"]
        optimizer.zero_grad()
    full = estimate(model.config, plan, phase(strategy="full"), **settings)
    assert found["gradients"] < full["gradients"]
    assert found["optimizer"] < full["optimizer"]
    assert found["trained_weights"] == full["trained_weights"]


def test_more_active_layers_than_layers_is_an_error() -> None:
    with pytest.raises(AddlangError, match=r"active_layers 3 is more than the model's 2 layers"):
        make_strategy("lisa", {"active_layers": 3}).plan(make_model("llama"), PlanInputs())


@pytest.mark.parametrize("name", ["l2sp", "ewc"])
def test_a_penalty_leaves_sleeping_layers_alone_and_knows_those_that_will_wake(name: str) -> None:
    """Its gradient is no reason to move what sleeps; and F of a layer that sleeps at the start must not be zero."""
    guard: Any = make_guard(name, {"weight": 1e3}).start(conversations_only())
    model = make_model("llama", num_hidden_layers=3)
    attached = attach(model, active_layers=1, interval=1)
    guard.begin(attached)
    assert [p.requires_grad for _, p in attached.named_trainable()].count(False) > 0
    if name == "ewc":
        assert all(bool(f.any()) for n, f in guard.fisher.items() if n.endswith("proj.weight"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    guard.backward(attached, 1)
    awake = attached.awake
    for parameter, p in attached.named_trainable():
        asleep = parameter in attached.layer_of and attached.layer_of[parameter] not in awake
        assert (p.grad is None) == asleep, parameter


def conversations_only() -> Any:
    given = SimpleNamespace(ids=[list(range(6, 26)), list(range(40, 52))], source="drawn", fingerprint="f")
    return SimpleNamespace(
        calibration=lambda: given,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        progress=lambda *_: None,
    )
