"""Phases in another order, or in one: what moves, what stays, and that the budget is the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from addlang.errors import AddlangError, AddlangWarning
from addlang.recipe import Recipe
from addlang.run import execute
from addlang.rundir import read_state
from tinyrun import World, chat_rows, write_rows

PHASES: dict[str, Any] = {
    "model_name_or_path": "lab", "output_dir": "out", "language": "sw",
    "phases": [
        {"name": "english", "datasets": [{"path": "a", "role": "source"}], "strategy": "full", "tokens": "3k", "learning_rate": 1e-3},
        {"name": "target", "datasets": [{"path": "b"}, {"path": "c"}], "strategy": "ssu", "tokens": 2000, "learning_rate": 2e-3},
    ],
}  # fmt: skip


def arranged(kind: str, **changes: Any) -> Recipe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AddlangWarning)
        return Recipe.parse({**PHASES, **changes, "arrangement": kind})


def test_reverse_moves_data_and_budgets_and_leaves_the_training_where_it_is() -> None:
    first, second = arranged("reverse").phases
    assert [first.name, second.name] == ["target", "english"]
    assert [s.path for s in first.datasets] == ["b", "c"]
    assert [first.tokens, second.tokens] == [2000, 3000]
    assert [first.strategy.name, second.strategy.name] == ["full", "ssu"]
    assert [first.learning_rate, second.learning_rate] == [1e-3, 2e-3]


def test_a_mixture_has_all_data_one_budget_and_the_last_phases_settings() -> None:
    (mixture,) = arranged("mixture").phases
    assert [s.path for s in mixture.datasets] == ["a", "b", "c"]
    assert mixture.tokens == 5000
    assert [(p.name, p.datasets, p.tokens) for p in mixture.parts] == [("english", 1, 3000), ("target", 2, 2000)]
    assert mixture.strategy.name == "ssu"
    assert mixture.learning_rate == 2e-3


def test_a_mixture_says_which_settings_differ() -> None:
    with pytest.warns(
        AddlangWarning, match="differ in learning_rate, strategy; their mixture is trained as phase 'target'"
    ):
        Recipe.parse({**PHASES, "arrangement": "mixture"})


@pytest.mark.parametrize("kind", ["mixture", "reverse"])
def test_the_arranged_recipe_written_and_read_again_is_the_same(kind: str) -> None:
    recipe = arranged(kind)
    assert Recipe.parse(recipe.resolved()).fingerprint == recipe.fingerprint
    assert recipe.arrangement == "phases"


def test_the_arrangements_have_the_same_budget() -> None:
    assert {arranged(kind).budget for kind in ("phases", "mixture", "reverse")} == {5000}
    epochs = [{**{k: v for k, v in p.items() if k != "tokens"}, "epochs": 2} for p in PHASES["phases"]]
    budgets = {arranged(kind, phases=epochs).budget for kind in ("phases", "mixture", "reverse")}
    assert budgets == {"2 epochs of a + 2 epochs of b, c"}


def test_appended_replay_and_other_epochs_are_another_budget() -> None:
    replay = {"kind": "english", "datasets": [{"path": "e"}], "share": 0.1}
    first, second = PHASES["phases"]
    assert Recipe.parse({**PHASES, "phases": [first, {**second, "replay": replay}]}).budget == 5200
    replaced = {**second, "replay": {**replay, "mode": "replace"}}
    assert Recipe.parse({**PHASES, "phases": [first, replaced]}).budget == 5000


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PHASES["phases"][0]], "arrangement: mixture needs two phases or more"),
        ([{**PHASES["phases"][0], "replay": {"kind": "english"}}, PHASES["phases"][1]], "remove replay of 'english'"),
    ],
)
def test_what_cannot_be_arranged_is_said(phases: list[Any], message: str) -> None:
    with pytest.raises(AddlangError, match=message):
        Recipe.parse({**PHASES, "phases": phases, "arrangement": "mixture"})


def test_tokens_and_epochs_are_not_both_given() -> None:
    with pytest.raises(AddlangError, match="tokens and epochs both state the budget; leave one out"):
        Recipe.parse({**PHASES, "phases": [{**PHASES["phases"][0], "epochs": 1}]})


@pytest.mark.usefixtures("offline")
def test_a_mixture_trains_as_many_steps_as_its_phases_together(world: World, tmp_path: Path) -> None:
    english = write_rows(tmp_path / "english.jsonl", chat_rows(30, 21))
    target = write_rows(tmp_path / "target.jsonl", chat_rows(45, 22))
    shared = {"strategy": "full", "epochs": 2, "sequence_length": 128, "batch_size": 4, "learning_rate": 1e-3}
    data = world.data(tmp_path / "phases", **dict.fromkeys(["datasets", "tokens", "strategy"]))
    for key in ("sequence_length", "batch_size", "learning_rate", "save_steps", "logging_steps", "calibration"):
        data.pop(key)
    data["phases"] = [
        {"name": "english", "datasets": [{"path": english, "role": "source"}], **shared},
        {"name": "target", "datasets": [{"path": target}], **shared},
    ]
    state = {
        kind: read_state(execute(Recipe.parse({**data, "arrangement": kind, "output_dir": str(tmp_path / kind)})))
        for kind in ("phases", "mixture", "reverse")
    }
    steps = {kind: [t["steps"] for t in s["train"].values()] for kind, s in state.items()}
    assert len(steps["phases"]) == len(steps["reverse"]) == 2
    assert steps["mixture"] == [sum(steps["phases"])]
    assert sorted(steps["reverse"]) == sorted(steps["phases"])
    card = state["mixture"]["data"]["mixture"]
    assert f"english {steps['phases'][0]} + target {steps['phases'][1]}" in card["notes"][0]
    both = {s["path"]: s["trained_tokens"] for c in state["phases"]["data"].values() for s in c["sources"]}
    for source in card["sources"]:
        assert source["trained_tokens"] == pytest.approx(both[source["path"]], rel=0.08)


def test_keys_of_a_phase_at_the_top_level_hold_for_every_phase() -> None:
    shared = {"strategy": "full", "epochs": 2, "sequence_length": 64, "learning_rate": 1e-3}
    phases = [
        {"name": "a", "datasets": [{"path": "a"}]},
        {"name": "b", "datasets": [{"path": "b"}], "tokens": 500, "learning_rate": 2e-3, "strategy": "ssu"},
    ]
    recipe = Recipe.parse(
        {**{k: PHASES[k] for k in ("model_name_or_path", "output_dir", "language")}, **shared, "phases": phases}
    )
    a, b = recipe.phases
    assert (a.epochs, a.tokens, a.learning_rate, a.strategy.name) == (2, None, 1e-3, "full")
    assert (b.epochs, b.tokens, b.learning_rate, b.strategy.name) == (None, 500, 2e-3, "ssu")
    assert a.sequence_length == b.sequence_length == 64
