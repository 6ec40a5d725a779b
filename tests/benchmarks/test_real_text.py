"""The grid on real text: its recipes and its tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from addlang.recipe import Recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_text.py"


@pytest.fixture(scope="module")
def real_text() -> Any:
    spec = importlib.util.spec_from_file_location("real_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_text"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def numbers(gained: float, lost: float) -> dict[str, Any]:
    return {
        "before": {"target/bits_per_byte": 5.0, "source/bits_per_byte": 2.0},
        "after": {"target/bits_per_byte": 5.0 - gained, "source/bits_per_byte": 2.0 + lost},
        "trainable_fraction": 0.5,
        "seconds": 1.0,
        "proof_ok": True,
    }


def test_the_recipe_is_valid(real_text: Any, tmp_path: Path) -> None:
    given = real_text.arguments().parse_args(["--model", "m", "--text", "ha=ha.jsonl", "--output", str(tmp_path)])
    given.texts, given.source = {"ha": [Path("ha.jsonl")]}, [Path("en.jsonl")]
    arms = {"random": {"strategy": {"name": "ssu", "scorer": "random"}, "weight_decay": 0.1}}
    run = real_text.Run("ha", "random", 1e-3, 2)
    recipe = Recipe.parse(real_text.recipe(run, given, arms))
    assert (recipe.seed, recipe.language) == (2, "ha")
    assert recipe.phases[0].strategy.scorer == "random"
    assert recipe.phases[0].weight_decay == 0.1
    assert recipe.output_dir == str(tmp_path / "runs" / "ha" / "random-lr0.001-s2")


def test_methods_are_compared_at_the_gain_that_all_reach(real_text: Any) -> None:
    results = {}
    for seed in range(3):
        shift = 0.01 * seed
        for rate, gained in ((1, 1.0), (2, 2.0), (3, 3.0)):
            results[real_text.Run("ha", "full", rate, seed)] = numbers(gained, gained**2 + shift)
        for rate, gained in ((1, 1.0), (2, 2.5)):
            results[real_text.Run("ha", "ssu", rate, seed)] = numbers(gained, gained + shift * (1 + rate / 10))
        results[real_text.Run("ha", "much", 1, seed)] = numbers(4.0, 9.0)
    rows = {row["arm"]: row for row in real_text.matched(results, "full")}
    assert {row["target_gained"] for row in rows.values()} == {2.5}
    assert rows["full"]["english_lost"][0] == pytest.approx(6.5 + 0.01)  # halfway between 4 and 9
    assert rows["ssu"]["difference"][0] == pytest.approx(2.5 - 6.5 + 0.002)
    assert rows["ssu"]["p_holm"] == rows["ssu"]["p"] < 0.001
    assert rows["much"]["english_lost"] is None
    assert "note" in rows["much"]
    lines, data = real_text.tables(results, "full", "command")
    assert len(data["cells"]) == 6
    assert any(line.startswith("| ha | ssu | +2.500 |") for line in lines)


def test_a_learning_rate_that_is_beaten_is_no_part_of_the_curve(real_text: Any) -> None:
    assert real_text.front([(1.0, 0.5), (2.0, 1.0), (1.5, 3.0)]) == [(1.0, 0.5), (2.0, 1.0)]
