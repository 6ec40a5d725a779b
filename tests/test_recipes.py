"""Every recipe that ships is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from addlang.recipe import Recipe
from addlang.study.spec import cells, load_study

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if not p.name.startswith("_")]
STUDIES = [p for p in FILES if "arms:" in p.read_text(encoding="utf-8")]
RECIPES = [p for p in FILES if p not in STUDIES and "model_name_or_path:" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_recipe_is_valid(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name  # files of a recipe are looked for beside it
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for name in re.findall(r"path: ([\w.-]+\.jsonl)", path.read_text(encoding="utf-8")):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    recipe = Recipe.load(copy)
    assert recipe.fingerprint


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_study_is_valid(path: Path) -> None:
    study = load_study(path)
    assert cells(study, path.parent, files=False)


def test_the_papers_recipe_has_the_papers_steps() -> None:
    phase = Recipe.load(ROOT / "recipes" / "ssu" / "olmo2-7b-ig.yaml").phases[0]
    assert phase.tokens is not None
    assert phase.batch_size is not None
    assert -(-phase.tokens // (phase.batch_size * phase.sequence_length)) == 12_208
