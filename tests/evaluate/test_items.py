"""The texts of evaluation items, from every kind of task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addlang.errors import AddlangError
from addlang.evaluate.items import evaluation_texts, task_texts
from addlang.recipe import Evaluation, RepliesEvaluation

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {test: items.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers.text}}"
doc_to_target: 0
metric_list:
  - {metric: acc}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"Who is number {i}?", "answers": {"text": ["Ada", "Obi"], "start": [0, 1]}} for i in range(3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK)
    return tmp_path


def test_task_files_give_every_string_of_their_documents(folder: Path) -> None:
    found = list(task_texts(["task.yaml"], target_language="ig", limit=2, base_dir=folder))
    assert {(t.task, t.item) for t in found} == {("tiny", "0"), ("tiny", "1")}
    assert ("question", "Who is number 1?") in {(t.field, t.text) for t in found}
    assert ("answers.text.1", "Obi") in {(t.field, t.text) for t in found}


def test_data_files_are_items_row_by_row(folder: Path) -> None:
    found = list(task_texts(["items.jsonl"], target_language="ig", base_dir=folder))
    assert {(t.task, t.item) for t in found} == {("items.jsonl", str(i)) for i in (1, 2, 3)}


def test_the_lab_gives_its_prompts_and_its_facts() -> None:
    found = list(task_texts(["lab"], target_language="sw", limit=20, base_dir=None))
    assert len([t for t in found if t.field == "prompt"]) == 20
    assert any(t.task == "lab facts" for t in found)


def test_a_recipes_own_prompts_for_replies_are_items(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Tell me a story."}\n')
    own = Evaluation(replies=RepliesEvaluation(prompts="prompts.jsonl"))
    assert [t.text for t in evaluation_texts(own, target_language="ig", base_dir=tmp_path)] == ["Tell me a story."]
    assert not list(evaluation_texts(Evaluation(), target_language="ig", base_dir=tmp_path))


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"gone\.yaml"):
        list(task_texts(["gone.yaml"], target_language="ig", base_dir=tmp_path))
