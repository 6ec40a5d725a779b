"""The study file: how recipes are laid over each other, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from addlang.errors import AddlangError
from addlang.recipe import Recipe
from addlang.study.spec import Cell, cells, load_study, overlay

STUDY: dict[str, Any] = {
    "output_dir": "out",
    "recipe": {
        "model_name_or_path": "lab", "language": "sw", "datasets": [{"path": "t.jsonl"}], "tokens": 1024, "learning_rate": 1e-3,
        "evaluation": {"replies": None, "tasks": ["lab"]},
    },
    "arms": {"full": {"strategy": "full"}, "SSU": {"strategy": {"name": "ssu", "ratio": 0.4}, "learning_rates": [2e-3, 4e-3]}},
    "seeds": [0, 1],
}  # fmt: skip


def write(path: Path, **changes: Any) -> Path:
    (path / "t.jsonl").write_text('{"text": "maneno"}\n', encoding="utf-8")
    file = path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
    return file


def grid(path: Path, **changes: Any) -> dict[Cell, dict[str, Any]]:
    return cells(load_study(write(path, **changes)), path)


def test_every_arm_is_run_at_its_learning_rates_with_every_seed(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert list(found) == [
        Cell((), "full", None, 0), Cell((), "SSU", 2e-3, 0), Cell((), "SSU", 4e-3, 0),
        Cell((), "full", None, 1), Cell((), "SSU", 2e-3, 1), Cell((), "SSU", 4e-3, 1),
    ]  # fmt: skip
    data = found[Cell((), "SSU", 4e-3, 1)]
    assert (data["learning_rate"], data["seed"], data["tokens"]) == (4e-3, 1, 1024)
    assert data["strategy"] == {"name": "ssu", "ratio": 0.4}
    assert data["output_dir"].endswith("out/runs/SSU-lr0.004-s1")


def test_seeds_and_rates_may_be_written_as_on_a_command_line(tmp_path: Path) -> None:
    study = load_study(write(tmp_path), {"seeds": "3,4, 5", "learning_rates": "1e-3,2e-3"})
    assert (study.seeds, study.learning_rates) == ((3, 4, 5), (1e-3, 2e-3))
    with pytest.raises(AddlangError, match=r"seeds\.1"):
        load_study(write(tmp_path), {"seeds": "3,x"})


def test_axes_are_combined_and_merge_into_mappings(tmp_path: Path) -> None:
    axes = {
        "language": {"sw": {}, "hi": {"language": "hi", "evaluation": {"limit": 3}}},
        "size": {"small": {"tokens": 512}},
    }
    found = grid(tmp_path, axes=axes, seeds=0)
    assert {c.setting for c in found} == {("sw", "small"), ("hi", "small")}
    data = found[Cell(("hi", "small"), "full", None, 0)]
    assert data["evaluation"] == {"replies": None, "tasks": ["lab"], "limit": 3}
    assert (data["language"], data["tokens"]) == ("hi", 512)


def test_the_last_phase_gets_the_learning_rate(tmp_path: Path) -> None:
    phase = {"datasets": [{"path": "t.jsonl"}], "strategy": "full", "tokens": 512}
    recipe = {k: v for k, v in STUDY["recipe"].items() if k in ("model_name_or_path", "language")}
    arms = {"two": {"phases": [{**phase, "name": "one", "learning_rate": 1e-5}, {**phase, "name": "two"}]}}
    (data,) = grid(tmp_path, recipe=recipe, arms=arms, learning_rates=3e-3, seeds=0).values()
    assert [p["learning_rate"] for p in data["phases"]] == [1e-5, 3e-3]


def test_a_mapping_of_another_name_replaces_one() -> None:
    assert overlay({"s": {"name": "ssu", "ratio": 0.4}}, {"s": {"name": "hft"}}) == {"s": {"name": "hft"}}
    assert overlay({"s": {"name": "ssu", "ratio": 0.4}}, {"s": {"ratio": 0.2}}) == {"s": {"name": "ssu", "ratio": 0.2}}
    assert overlay({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


def test_a_study_extends_another(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "_base.yaml").write_text((tmp_path / "study.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "more.yaml").write_text("extends: _base.yaml\nseeds: 7\nrecipe: {tokens: 2048}\n", encoding="utf-8")
    study = load_study(tmp_path / "more.yaml")
    assert (study.seeds, study.recipe["tokens"], study.recipe["language"]) == ((7,), 2048, "sw")
    (tmp_path / "_base.yaml").write_text("extends: more.yaml\n", encoding="utf-8")
    with pytest.raises(AddlangError, match="extends itself"):
        load_study(tmp_path / "more.yaml")


def test_the_command_line_replaces_keys(tmp_path: Path) -> None:
    study = load_study(write(tmp_path), {"seeds": [5], "recipe.evaluation.limit": 2})
    assert (study.seeds, study.recipe["evaluation"]["limit"]) == ((5,), 2)
    with pytest.raises(AddlangError, match=r"only keys of the top level and recipe\.KEY"):
        load_study(write(tmp_path), {"arms.full": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key. Did you mean 'seeds'"),
        ({"reference": "ful"}, "reference 'ful' is no arm.*\n.*Did you mean 'full'"),
        ({"arms": {"full": {"seed": 3}}}, r"'full\.seed' is given by the study"),
        ({"arms": {}}, "arms: .*at least 1 item"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=message):
        load_study(write(tmp_path, **changes))


def test_a_wrong_recipe_names_its_arm_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"(?s)arm 'SSU'.*Did you mean 'ratio'"):
        grid(tmp_path, arms={"full": {"strategy": "full"}, "SSU": {"strategy": {"name": "ssu", "ration": 0.1}}})
    with pytest.raises(AddlangError, match=r"(?s)arm 'x'.*missing\.jsonl"):
        grid(tmp_path, arms={"x": {"strategy": "full", "datasets": [{"path": "missing.jsonl"}]}})


def test_arms_with_different_budgets_are_refused_unless_it_is_said(tmp_path: Path) -> None:
    arms = {"full": {"strategy": "full"}, "more": {"strategy": "full", "tokens": 2048}}
    with pytest.raises(AddlangError, match="different numbers of tokens: full 1,024, more 2,048"):
        grid(tmp_path, arms=arms)
    assert len(grid(tmp_path, arms=arms, same_budget=False)) == 4


def test_labels_that_are_one_file_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="would share 'a-b-s0'"):
        grid(tmp_path, arms={"a b": {"strategy": "full"}, "a/b": {"strategy": "full"}})


def test_a_study_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("output_dir: out\nrecipe: {}\narms: {a: {}}\n")
    with pytest.raises(AddlangError, match="is a study, not a recipe") as error:
        Recipe.load(path)
    assert "addlang sweep" in str(error.value.fix)


def test_a_recipe_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model_name_or_path: lab\n", encoding="utf-8")
    with pytest.raises(AddlangError, match=r"has no 'arms'.*\n.*addlang run"):
        load_study(tmp_path / "r.yaml")
    with pytest.raises(AddlangError, match=r"does not exist.*\n.*Did you mean 'r\.yaml'"):
        load_study(tmp_path / "rr.yaml")
