"""Whose run a directory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from addlang.errors import AddlangError
from addlang.recipe import Recipe
from addlang.rundir import RunDir, holds_finished


def recipe(out: Path, **changes: Any) -> Recipe:
    return Recipe.parse(
        {
            "model_name_or_path": "lab", "output_dir": str(out), "language": "sw", "strategy": "ssu", "tokens": 1000,
            "datasets": [{"path": "lab://sw"}], "guards": ["ewc"], **changes,
        }
    )  # fmt: skip


def begin(out: Path, *, done: bool = True) -> None:
    run = RunDir.open(recipe(out))
    if done:
        run.finish("evaluate:before")
    run.close()


def rewrite(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The recipe as another version wrote it."""
    data = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    change(data["phases"][0])
    (out / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")


def as_before_ewc_per_token(phase: dict[str, Any]) -> None:
    del phase["guards"][0]["per"]
    phase["guards"][0]["weight"] = 1000.0


def test_a_run_for_which_another_default_held_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(out)
    rewrite(out, as_before_ewc_per_token)
    with pytest.raises(AddlangError) as caught:
        RunDir.open(recipe(out))
    assert "other defaults held: phases.0.guards.0.weight (1000.0 there, 100.0 here)\n" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    RunDir.open(recipe(out), overwrite=True).close()
    RunDir.open(recipe(out)).close()


def test_a_run_for_which_another_default_held_is_not_taken_as_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(out)
    assert not holds_finished(out, recipe(out), None)
    RunDir(out, recipe(out)).update(status="finished")
    assert holds_finished(out, recipe(out), None)
    rewrite(out, lambda phase: phase["strategy"].update(ratio=0.25))
    with pytest.raises(
        AddlangError, match=r"phases.0.strategy.ratio \(0.25 there, 0.5 here\)\n.*remove this directory"
    ):
        holds_finished(out, recipe(out), None)


def test_keys_that_versions_add_or_drop_and_those_without_effect_are_no_other_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(out)
    rewrite(out, lambda phase: phase["guards"][0].pop("per"))
    rewrite(out, lambda phase: phase["strategy"].update(dropped_long_ago=3))
    rewrite(out, lambda phase: phase.update(save_steps=7, logging_steps=9))
    RunDir.open(recipe(out)).close()
    (out / "recipe.yaml").unlink()
    RunDir.open(recipe(out, save_steps=3)).close()


def test_a_run_is_known_by_its_settings_where_a_default_has_changed_its_fingerprint(tmp_path: Path) -> None:
    """What a recipe names was hashed by a version for which it was the default, or the other way round."""
    out = tmp_path / "out"
    begin(out)
    RunDir(out, recipe(out)).update(fingerprint="0123456789abcdef")
    RunDir.open(recipe(out)).close()
    with pytest.raises(AddlangError, match=r"another recipe; different: phases.0.guards.0.weight"):
        RunDir.open(recipe(out, guards=[{"name": "ewc", "weight": 30}]))
    RunDir(out, recipe(out)).update(status="finished")
    assert holds_finished(out, recipe(out), None)
    assert not holds_finished(out, recipe(out, seed=3), None)


def test_a_run_without_results_begins_again_under_the_new_defaults(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(out, done=False)
    rewrite(out, as_before_ewc_per_token)
    RunDir.open(recipe(out)).close()
    stored = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert stored == recipe(out).resolved()


def test_a_recipe_is_the_same_after_it_was_written(tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-5, "strategy": {"name": "lota"}, "guards": ["kl", "l2sp"], "language": "no"}
    for number, changes in enumerate(({}, rates)):
        out = tmp_path / str(number)
        run = RunDir.open(recipe(out, **changes))
        run.finish("evaluate:before")
        run.close()
        RunDir.open(recipe(out, **changes)).close()
