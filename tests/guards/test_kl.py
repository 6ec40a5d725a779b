"""KL to the source on given conversations; and guards inside whole runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer

import addlang.train.checkpoint
from addlang.errors import AddlangError, AddlangWarning
from addlang.freeze.proof import bits
from addlang.guards import GuardContext, make_guard
from addlang.models import Checkpoint
from addlang.run import execute
from addlang.strategies import PlanInputs, make_strategy
from guarding import FEW, said
from tinyrun import Killed, World, dying_at, metrics, same
from training import phase


class Given:
    ids = ([7, 8, 9, 10, 11], [12, 13, 14], list(range(20, 100)))
    fingerprint = "f"
    source = "three sequences"


def start(model: Any, cache: Path, *, micro: int = 4, **options: Any) -> Any:
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
            micro=micro,
            steps=10,
            autocast=contextlib.nullcontext,
            calibration=lambda: Given(),
            progress=lambda *_: None,
            read_by_guards=guard.token_share,
        )  # type: ignore[arg-type]
    )


def test_the_given_conversations_are_packed_and_the_long_one_is_cut_and_counted(tmp_path: Path) -> None:
    active = start(make_model("llama"), tmp_path)
    about = active.describe()
    assert about["sampled_conversations"] == 3
    assert about["sampled_cut"] == 1
    assert about["sampled_tokens"] == 5 + 3 + 64


def test_given_conversations_that_are_read_too_often_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(
        AddlangWarning, match=r"^kl: its 3 conversations are read 36 times.*raise calibration\.sequences"
    ):
        start(make_model("llama"), tmp_path, share=0.5)


def test_the_source_has_no_divergence_from_itself_and_a_changed_model_has(tmp_path: Path) -> None:
    model = make_model("llama")
    active = start(model, tmp_path, weight=1.0, share=0.5)
    full = make_strategy("full", {})
    attached = full.attach(model, full.plan(model, PlanInputs()), "masked")
    assert active.backward(attached, 1) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert active.backward(attached, 1) > 0.01


def test_the_guard_passes_no_more_rows_at_once_than_the_target_and_its_term_does_not_depend_on_it(
    tmp_path: Path,
) -> None:
    model = make_model("llama")
    full = make_strategy("full", {})
    attached = full.attach(model, full.plan(model, PlanInputs()), "masked")
    seen, terms = [], []
    model.register_forward_pre_hook(lambda _, __, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    for micro in (4, 1):
        active = start(model, tmp_path, micro=micro, mode="replay", share=0.5)
        seen.clear()
        terms.append(active.backward(attached, 1))
        assert max(seen) == micro
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


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


@pytest.mark.parametrize("strategy", ["lora", "dora", "adalora"])
def test_a_pull_to_the_sources_weights_is_refused_for_adapters_and_one_to_its_outputs_is_not(strategy: str) -> None:
    for guard in ("ewc", "l2sp"):
        with pytest.raises(
            ValueError, match=rf"the guard {guard} pulls.*'{strategy}'.*take the guard kl or self_anchor"
        ):
            phase(strategy=strategy, guards=["kl", guard])
        assert phase(strategy="lisa", guards=[guard]).all_guards[0].name == guard
    names = [g.name for g in phase(strategy=strategy, guards=["kl", "self_anchor"]).all_guards]
    assert names == ["kl", "self_anchor"]


def test_a_recipe_tells_why_adapters_cannot_be_pulled_to_the_source(world: World, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"l2sp pulls every trained weight to its value in the source"):
        world.recipe(tmp_path / "out", strategy="lora", guards=["l2sp"])


def test_unknown_guards_and_options_name_the_nearest() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'self_anchor'"):
        make_guard("self_ancor", {})
    with pytest.raises(AddlangError, match="Did you mean 'weight'"):
        make_guard("kl", {"wieght": 1})


def test_guards_share_the_budget_as_their_shares_say(tmp_path: Path) -> None:
    """Of ten tokens one is anchored by one guard and three by another: six are left for the target, a sixth and a half of
    which the guards read."""
    from dataclasses import replace

    active = start(make_model("llama"), tmp_path, share=0.1)
    alone = active.order.per_step
    guard = make_guard("kl", {"share": 0.1})
    together = guard.start(replace(active.context, read_by_guards=0.4)).order.per_step
    per_row = active.about["tokens"] / len(active.teacher)
    assert alone * per_row == pytest.approx(4 * 64 * 0.1 / 0.9)
    assert together * per_row == pytest.approx(4 * 64 * 0.1 / 0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guards": [{"name": "kl", "share": 0.5}, {"name": "self_anchor", "share": 0.6}]},
            r"guards read 110% of all tokens \(kl 50%, self_anchor 60%\)",
        ),
        ({"strategy": "self_anchor", "guards": ["self_anchor"]}, "'self_anchor' brings the guard self_anchor along"),
        ({"guards": ["kl", "kl"]}, "a guard stands twice"),
        ({"guards": [{"name": "ewc", "sampling": {"conversations": 9}}]}, "sampling has options of data: self"),
    ],
)
def test_guards_that_make_no_sense_together_are_refused_with_the_reason(
    changes: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(AddlangError, match=message):
        world.recipe(tmp_path / "out", **changes)


@pytest.mark.usefixtures("offline")
def test_bad_conversations_of_a_guard_are_named_before_anything_is_measured(world: World, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    given = {"datasets": [{"path": str(tmp_path / "chat.jsonl")}]}
    with pytest.raises(AddlangError, match=r"chat\.jsonl, row 1"):
        execute(world.recipe(tmp_path / "out", strategy="full", guards=["kl"], calibration=given))
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.usefixtures("offline")
def test_the_report_and_the_model_card_name_the_guards_and_what_they_held_to(world: World, tmp_path: Path) -> None:
    out = execute(world.recipe(tmp_path / "out", guards=[{"name": "kl", "share": 0.25}, "l2sp"]))
    for file in ("report.html", "README.md"):
        text = (out / file).read_text(encoding="utf-8")
        assert "Guard kl (weight 0.3, share 0.25, temperature 1, top k 64, kl, constant), on 12 conversations" in text
        assert "Guard l2sp (weight 0.01)." in text


def test_what_was_sampled_is_told_with_counts_and_examples() -> None:
    from addlang.report.phases import guard_text

    text = guard_text(
        {
            "guard": "self_anchor", "weight": 0.3, "share": 0.3, "sampled_conversations": 2000, "sampled_drawn": 2560,
            "sampled_dropped": {"empty turn": 12, "skipped": 3}, "sampled_openings": 180, "sampled_largest_opening": 0.125,
            "sampled_examples": [{"instruction": "Count\nthe fish", "answer": "3"}],
        }
    )  # fmt: skip
    assert "sampled 2,560 conversations, 2,000 were kept, dropped: 12 empty turn, 3 skipped." in text
    assert (
        "180 ways (first three words); the commonest is 12.5 % of them. For example: “Count the fish”, answered “3”."
        in text
    )


@pytest.mark.parametrize(
    ("strategy", "guards"),
    [("hft", ["kl"]), ("ssu", [{"name": "self_anchor", **FEW}]), ("gmt", ["kl", {"name": "self_anchor", **FEW}])],
    ids=["hft-kl", "ssu-self_anchor", "gmt-both"],
)
def test_a_killed_run_with_anchors_ends_with_the_bits_of_an_undisturbed_one(
    strategy: str, guards: list[Any], world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addlang.evaluate.generation.sample", said)
    recipe = lambda name: world.recipe(tmp_path / name, strategy=strategy, guards=guards, save_steps=3)  # noqa: E731
    whole = execute(recipe("whole"))
    assert json.loads((whole / "proof.json").read_text())["ok"]
    save = addlang.train.checkpoint.Writer.save
    with monkeypatch.context() as patch:
        patch.setattr(addlang.train.checkpoint.Writer, "save", dying_at(3, save, Killed()))
        with pytest.raises(Killed):
            execute(recipe("killed"))
    killed = execute(recipe("killed"))
    assert same(killed, whole)
    assert metrics(killed) == metrics(whole)
