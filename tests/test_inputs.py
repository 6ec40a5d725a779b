"""What a run read, by content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from addlang.inputs import changed, digests
from addlang.recipe import Recipe


def recipe(**changes: Any) -> Recipe:
    return Recipe.parse(
        {
            "model_name_or_path": "lab", "output_dir": "out", "language": "sw", "strategy": "full", "tokens": 1000,
            "datasets": [{"path": "text"}, {"path": "lab://sw"}, {"path": "owner/on-the-hub"}, {"path": "text/a.jsonl"}],
            "calibration": {"datasets": [{"path": "chat.jsonl", "role": "source"}]},
            "evaluation": {"tasks": ["mine.yaml", "arc_easy"], "replies": {"prompts": "prompts.jsonl"}},
            "chat_template": "own.jinja", **changes,
        }
    )  # fmt: skip


def write(folder: Path) -> None:
    (folder / "text" / "deeper").mkdir(parents=True)
    for name in ("text/a.jsonl", "text/deeper/b.jsonl", "chat.jsonl", "prompts.jsonl", "mine.yaml", "own.jinja"):
        (folder / name).write_text(f"content of {name}", encoding="utf-8")


NAMED = {"text", "text/a.jsonl", "chat.jsonl", "prompts.jsonl", "mine.yaml", "own.jinja"}


def test_every_local_file_of_a_recipe_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "here")
    here = digests(recipe(), tmp_path / "here")
    assert set(here) == NAMED
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(tmp_path / "there" / "chat.jsonl", ns=(1, 1))
    assert digests(recipe(), tmp_path / "there") == here


def test_a_changed_file_is_named_and_so_is_a_directory_with_one_file_more(tmp_path: Path) -> None:
    write(tmp_path)
    before = digests(recipe(), tmp_path)
    for name in sorted(NAMED - {"text", "text/a.jsonl"}):
        old = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text("something else", encoding="utf-8")
        assert changed(before, digests(recipe(), tmp_path)) == [name]
        (tmp_path / name).write_text(old, encoding="utf-8")
    (tmp_path / "text" / "c.jsonl").write_text("more", encoding="utf-8")
    assert changed(before, digests(recipe(), tmp_path)) == ["text"]


def test_a_file_that_is_gone_and_one_that_was_not_noted_tell_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    before = digests(recipe(), tmp_path)
    (tmp_path / "chat.jsonl").unlink()
    shutil.rmtree(tmp_path / "text")
    assert changed(before, digests(recipe(), tmp_path)) == []
    assert changed({}, before) == []


def test_a_model_directory_is_known_by_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md")
    for name in files:
        (model / name).write_text(name, encoding="utf-8")
    mine = recipe(model_name_or_path=str(model), chat_template=None)
    before = digests(mine, tmp_path)
    assert set(before) == {str(model)}
    seen = []
    for name in files:
        (model / name).write_text("something else", encoding="utf-8")
        seen.append(changed(before, digests(mine, tmp_path)) == [str(model)])
        (model / name).write_text(name, encoding="utf-8")
    assert seen == [True, True, True, True, False]
