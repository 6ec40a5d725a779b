"""Every recipe that ships is valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addlang import strictyaml
from addlang.evaluate.lm_eval import file_of
from addlang.recipe import Recipe
from addlang.study.spec import cells, load_study

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if not p.name.startswith("_")]
STUDIES = [p for p in FILES if "arms:" in p.read_text(encoding="utf-8")]
RECIPES = [p for p in FILES if p not in STUDIES and "model_name_or_path:" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    """Data that must be fetched or made may be absent; task files and templates are shipped."""
    recipe = Recipe.parse(strictyaml.read(path.read_text(encoding="utf-8")), where=str(path), base_dir=path.parent)
    assert recipe.fingerprint
    assert_shipped(recipe, path.parent)


def assert_shipped(recipe: Recipe, folder: Path) -> None:
    for task in recipe.evaluation.tasks:
        file_of(task, folder)
    template = recipe.template_path(folder)
    assert template is None or template.is_file()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_study_is_valid(path: Path) -> None:
    grid = cells(load_study(path), path.parent, files=False)
    assert grid
    for data in {json.dumps(data.get("evaluation"), sort_keys=True): data for data in grid.values()}.values():
        assert_shipped(Recipe.parse(data, base_dir=path.parent), path.parent)


def test_the_papers_recipe_has_the_papers_steps() -> None:
    phase = Recipe.load(ROOT / "recipes" / "ssu" / "olmo2-7b-ig.yaml").phases[0]
    assert phase.tokens is not None
    assert phase.batch_size is not None
    assert -(-phase.tokens // (phase.batch_size * phase.sequence_length)) == 12_208


@pytest.mark.parametrize(("name", "runs"), [("order", 12), ("table-5", 16), ("table-d9", 16)])
def test_the_two_phase_papers_rows_are_there_with_table_a1s_values(name: str, runs: int) -> None:
    path = ROOT / "recipes" / "two-phase" / f"{name}.yaml"
    grid = cells(load_study(path), path.parent, files=False)
    assert len({(cell.setting, cell.arm) for cell in grid}) == runs
    for data in grid.values():
        for phase in Recipe.parse(data).phases:
            assert (phase.learning_rate, phase.batch_size, phase.warmup_steps, phase.weight_decay) == (1e-6, 16, 10, 0)
            assert (phase.lr_scheduler_type, phase.precision, phase.optimizer) == ("cosine", "bf16", "adamw")
            assert {part.epochs for part in phase.parts or (phase,)} == {4}


def test_orders_of_phases_are_compared_at_one_budget() -> None:
    path = ROOT / "recipes" / "two-phase" / "order.yaml"
    study = load_study(path)
    assert study.same_budget
    budgets: dict[tuple[str, ...], set[int | str | None]] = {}
    for cell, data in cells(study, path.parent, files=False).items():
        budgets.setdefault(cell.setting, set()).add(Recipe.parse(data).budget)
    assert all(len(of_arms) == 1 and None not in of_arms for of_arms in budgets.values())


def test_openorcas_system_prompts_meet_a_template_that_knows_them() -> None:
    path = ROOT / "recipes" / "two-phase" / "table-d9.yaml"
    grid = cells(load_study(path), path.parent, files=False)
    templates = {cell.setting[0]: data.get("chat_template") for cell, data in grid.items()}
    assert templates == {"Mistral-7B": "mistral", "Llama-3-8B": None}
