"""Every recipe that ships is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from addlang.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_recipe_is_valid(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name  # files of a recipe are looked for beside it
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for name in re.findall(r"path: ([\w.-]+\.jsonl)", path.read_text(encoding="utf-8")):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    recipe = Recipe.load(copy)
    assert recipe.fingerprint


def test_the_papers_recipe_has_the_papers_steps() -> None:
    phase = Recipe.load(ROOT / "recipes" / "ssu" / "olmo2-7b-ig.yaml").phases[0]
    assert phase.tokens is not None
    assert phase.batch_size is not None
    assert -(-phase.tokens // (phase.batch_size * phase.sequence_length)) == 12_208
