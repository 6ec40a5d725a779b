"""Every recipe that ships is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.1}
# Tables 2 and 10-13, Figure 2, Tables 3, 4, 5, 6 and 14: arms of the paper, without its source model
SSU_ARMS = {
    "table2-main": 7, "figure2-ratio": 1 + 3 * 7, "table3-granularity": 3, "table4-scorers": 5, "table5-calibration": 3,
    "tables6-14-baselines": 1 + 8 + 5,
}  # fmt: skip


@pytest.mark.parametrize("name", SSU_ARMS)
def test_the_ssu_papers_rows_are_there_for_two_models_and_five_languages_with_tables_8_and_9s_values(name: str) -> None:
    path = ROOT / "recipes" / "ssu" / f"{name}.yaml"
    study = load_study(path)
    assert study.same_budget
    assert len([arm for arm in study.arms if "public code" not in arm]) == SSU_ARMS[name]
    settings = set()
    for cell, data in cells(study, path.parent, files=False).items():
        recipe = Recipe.parse(data)
        (phase,) = recipe.phases
        settings.add((recipe.model_name_or_path, recipe.language, phase.datasets[0].name))
        assert (phase.tokens, phase.batch_size, phase.sequence_length) == (200_000_000, 32, 512)
        assert (phase.learning_rate, phase.lr_scheduler_type, phase.warmup_steps) == (5e-5, "cosine", 0.05)
        assert (phase.adam_beta1, phase.adam_beta2, phase.adam_epsilon, phase.weight_decay) == (0.9, 0.999, 1e-8, 0.01)
        assert phase.precision == "bf16"
        assert phase.calibration.sequences == (128 if cell.arm == "Default (128)" else 500)
        assert phase.calibration.sequence_length == 2048
        outer = (phase.strategy.train_embeddings, phase.strategy.train_lm_head, phase.strategy.freeze_special_tokens)
        assert outer == (True, True, False)
        if phase.strategy.name == "gmt":
            assert phase.gradient_accumulation_steps == 4
        if phase.strategy.name == "adalora":
            s = phase.strategy
            assert (s.target_rank, s.alpha, s.dropout, s.beta1, s.beta2, s.orthogonal) == (8, 32, 0.05, 0.85, 0.85, 0.5)
            assert s.schedule(12_208) == (1000, 8546, 20)
        if phase.strategy.name == "lota":
            assert phase.strategy.warmup_steps == 100
        shots = {recipe.evaluation.shots(t) for t in recipe.evaluation.tasks if "mmlu" in t}
        assert shots == {5}
        assert {recipe.evaluation.shots(t) for t in recipe.evaluation.tasks if "belebele" in t} == {3}
        decoding = recipe.evaluation.generation_kwargs
        assert decoding == {"ifeval": {**SAMPLING, "max_gen_toks": 1280}, "gsm8k": SAMPLING}
    models = {f"allenai/OLMo-2-1124-{size}-Instruct" for size in ("7B", "13B")}
    assert settings == {(m, code, code) for m in models for code in ("ne", "ky", "am", "ha", "ig")}


def options_of(name: str, strategy: str, *options: str) -> list[tuple[Any, ...]]:
    path = ROOT / "recipes" / "ssu" / f"{name}.yaml"
    grid = cells(load_study(path), path.parent, files=False)
    found = [Recipe.parse(d).phases[0].strategy for c, d in grid.items() if c.setting == ("7B", "ig")]
    return [tuple(getattr(s, o) for o in options) for s in found if s.name == strategy]


def test_the_ssu_papers_rows_have_the_papers_options() -> None:
    eighths = [n / 8 for n in range(1, 8)]
    assert options_of("figure2-ratio", "ssu", "scorer", "ratio") == [("wanda", r) for r in eighths]
    assert (
        options_of("figure2-ratio", "hft", "ratio")
        == options_of("figure2-ratio", "gmt", "ratio")
        == [(r,) for r in eighths]
    )
    assert options_of("tables6-14-baselines", "lota", "sparsity") == [(r,) for r in (0.9, *eighths)]
    assert options_of("tables6-14-baselines", "s2ft", "d_ratio", "o_ratio") == [
        *((d, 0.0) for d in (0.015, 0.03, 0.055, 0.11)),
        (0.015, 0.015),
    ]
    assert options_of("table3-granularity", "ssu", "granularity") == [("column",), ("row",), ("element",)]
    scorers = {s for s, code in options_of("table4-scorers", "ssu", "scorer", "reference_code") if not code}
    assert scorers == {"random", "magnitude", "wanda", "sparsegpt", "fisher"}
    assert options_of("table5-calibration", "ssu", "scorer", "ratio") == [("wanda", 0.5)] * 3


def rates_of(name: str) -> dict[str, set[float]]:
    """Learning rates of every arm of a study under recipes/ssu, one model and language of it."""
    path = ROOT / "recipes" / "ssu" / f"{name}.yaml"
    rates: dict[str, set[float]] = {}
    for cell, data in cells(load_study(path), path.parent, files=False).items():
        rates.setdefault(cell.arm, set()).add(float(Recipe.parse(data).phases[0].learning_rate))
    return rates


@pytest.mark.parametrize("name", ["baselines", "calibration", "granularity", "methods", "ratio", "scorers"])
def test_every_arm_of_a_lab_table_has_three_learning_rates(name: str) -> None:
    """Methods are compared at equal gain, which one rate does not give."""
    assert all(len(rates) >= 3 for rates in rates_of(f"lab/{name}").values())


def test_the_labs_lota_is_that_of_the_papers_tables() -> None:
    def lota(name: str) -> dict[float, bool]:
        path = ROOT / "recipes" / "ssu" / f"{name}.yaml"
        found = [
            Recipe.parse(data).phases[0].strategy for data in cells(load_study(path), path.parent, files=False).values()
        ]
        return {s.sparsity: s.include_norms for s in found if s.name == "lota"}

    assert lota("lab/baselines") == lota("tables6-14-baselines")
    assert set(lota("lab/baselines").values()) == {True}


def test_the_labs_calibration_arms_differ_in_one_thing_from_another() -> None:
    """Real English against as many sequences of the lab's own set, and these against 500 of them."""
    path = ROOT / "recipes" / "ssu" / "lab" / "calibration.yaml"
    seen = {
        (bool(c.datasets), c.sequences)
        for c in (
            Recipe.parse(d).phases[0].calibration for d in cells(load_study(path), path.parent, files=False).values()
        )
    }
    assert seen == {(True, 500), (True, 128), (True, 60), (False, 60)}


def test_our_own_study_has_the_methods_that_the_results_rank_first_at_several_rates() -> None:
    path = ROOT / "recipes" / "ssu" / "ours.yaml"
    grid = cells(load_study(path), path.parent, files=False)
    phases = {cell.arm: Recipe.parse(data).phases[0] for cell, data in grid.items()}
    own_words = {
        p.strategy.name: g.weight for p in phases.values() for g in p.guards if g.name == "ewc" and g.data == "self"
    }
    assert own_words == {"full": 100, "ssu": 100}
    rates = rates_of("ours")
    several = {arm for arm, p in phases.items() if p.guards or p.strategy.name == "self_anchor"} | {"FFT"}
    assert all(len(rates[arm]) >= 3 for arm in several)
    assert all(max(rates[arm]) > max(rates["FFT"]) for arm in rates if "EWC" in arm)  # a penalty wants a higher rate
    assert min(rates["FFT"]) < 5e-5 < max(rates["FFT"])


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
