"""L2-SP: its gradient worked out by hand, frozen parts left alone, resume exact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import calibration, make_model

from addlang.freeze.proof import bits
from addlang.guards import make_guard
from addlang.recipe import Phase
from addlang.strategies import PlanInputs, make_strategy
from addlang.train import loop
from addlang.train.loop import Schedule, train
from guarding import Data, KilledError


def attach(execution: str) -> Any:
    model = make_model("llama")
    strategy = make_strategy("ssu", {})
    return strategy.attach(model, strategy.plan(model, PlanInputs(calibration=lambda: calibration())), execution)


def carry_out(
    directory: Path, execution: str, kill_at: int | None = None, weight: float = 0.5
) -> dict[str, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    phase = Phase(
        datasets=({"path": "x"},), strategy="ssu", sequence_length=16, learning_rate=1e-2, save_steps=2, warmup_steps=1
    )
    attached = attach(execution)
    guard = make_guard("l2sp", {"weight": weight}).start(SimpleNamespace())  # type: ignore[arg-type]
    schedule = Schedule(6, 2, 2)
    train(
        attached, Data(kill_at), phase, directory, device=torch.device("cpu"), schedule=schedule, seed=0, guards=[guard]
    )
    return {n: t.clone() for n, t in attached.export()}


def test_every_gradient_is_there_when_the_target_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    loss = loop.token_loss

    def watch(model: Any, batch: Any) -> Any:
        there.append(all(p.grad is not None for p in model.parameters() if p.requires_grad))
        return loss(model, batch)

    monkeypatch.setattr(loop, "token_loss", watch)
    carry_out(tmp_path / "run", "split")
    assert there == [True] * 6  # one pass per step; the memory estimate relies on it


def test_the_gradient_is_lambda_times_the_distance_worked_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    attached: Any = SimpleNamespace(named_trainable=lambda: [("w", p)])
    guard = make_guard("l2sp", {"weight": 0.5}).start(SimpleNamespace())  # type: ignore[arg-type]
    guard.begin(attached)
    with torch.no_grad():
        p.add_(torch.tensor([2.0, -1.0]))
    assert guard.backward(attached, 1) == pytest.approx(0.25 * (4 + 1))
    assert p.grad is not None
    assert p.grad.tolist() == [1.0, -0.5]
    p.grad.fill_(1.0)
    guard.backward(attached, 2)
    assert p.grad.tolist() == [2.0, 0.5]


@pytest.mark.parametrize("execution", ["masked", "split"])
def test_resumed_equals_uninterrupted_and_frozen_stays(execution: str, tmp_path: Path) -> None:
    want = carry_out(tmp_path / "whole", execution)
    with pytest.raises(KilledError):
        carry_out(tmp_path / "killed", execution, kill_at=4)
    got = carry_out(tmp_path / "killed", execution)
    assert all(torch.equal(bits(want[n]), bits(got[n])) for n in want)
    fresh = attach(execution)
    before = dict(make_model("llama").named_parameters())
    for name, new in got.items():
        mask = fresh.plan[name].mask()
        assert torch.equal(new[mask], before[name][mask])


def test_a_stronger_pull_stays_nearer_to_the_source(tmp_path: Path) -> None:
    before = dict(make_model("llama").named_parameters())

    def distance(weight: float) -> float:
        after = carry_out(tmp_path / str(weight), "masked", weight=weight)
        return sum(float((after[n] - before[n].detach()).square().sum()) for n in after)

    assert distance(50.0) < distance(1e-6)
