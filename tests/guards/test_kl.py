"""KL to the source on given conversations; and guards inside whole runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer

from addlang.errors import AddlangError
from addlang.freeze.proof import bits
from addlang.guards import GuardContext, make_guard
from addlang.models import Checkpoint
from addlang.run import execute
from addlang.strategies import PlanInputs, make_strategy
from tinyrun import World


class Given:
    ids = ([7, 8, 9, 10, 11], [12, 13, 14], list(range(20, 100)))
    fingerprint = "f"
    source = "three sequences"


def start(model: Any, cache: Path, **options: Any) -> Any:
    guard = make_guard("kl", options)
    return guard.start(
        GuardContext(
            model=model,
            model_hash="h",
            tokenizer=make_tokenizer(),
            seed=0,
            device=torch.device("cpu"),
            cache_dir=cache,
            language="en",
            sequence_length=64,
            batch=4,
            steps=10,
            autocast=contextlib.nullcontext,
            calibration=lambda: Given(),
            progress=lambda *_: None,
        )  # type: ignore[arg-type]
    )


def test_the_given_conversations_are_packed_and_the_long_one_is_cut_and_counted(tmp_path: Path) -> None:
    active = start(make_model("llama"), tmp_path)
    about = active.describe()
    assert about["sampled_conversations"] == 3
    assert about["sampled_cut"] == 1
    assert about["sampled_tokens"] == 5 + 3 + 64


def test_the_source_has_no_divergence_from_itself_and_a_changed_model_has(tmp_path: Path) -> None:
    model = make_model("llama")
    active = start(model, tmp_path, weight=1.0, share=0.5)
    full = make_strategy("full", {})
    attached = full.attach(model, full.plan(model, PlanInputs()), "masked")
    assert active.backward(attached, 1) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert active.backward(attached, 1) > 0.01


@pytest.mark.usefixtures("offline")
def test_a_guard_on_top_of_a_freeze_plan_keeps_the_proof_and_shares_the_budget(world: World, tmp_path: Path) -> None:
    plain = execute(world.recipe(tmp_path / "plain"))
    guarded = execute(world.recipe(tmp_path / "guarded", guards=[{"name": "kl", "share": 0.25}]))
    proof = json.loads((guarded / "proof.json").read_text())
    assert proof["ok"]
    assert proof["phases"][0]["frozen_elements"] > 0
    steps = [json.loads((d / "state.json").read_text())["train"]["adapt"]["steps"] for d in (plain, guarded)]
    assert steps == [12, 9]  # a quarter of the tokens is anchored
    rows = [json.loads(line) for line in (guarded / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["guards"] > 0
    a, b = Checkpoint(plain), Checkpoint(guarded)
    assert any(bool((bits(a.get(n)) != bits(b.get(n))).any()) for n in a.names())


def test_unknown_guards_and_options_name_the_nearest() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'self_anchor'"):
        make_guard("self_ancor", {})
    with pytest.raises(AddlangError, match="Did you mean 'weight'"):
        make_guard("kl", {"wieght": 1})
