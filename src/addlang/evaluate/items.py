"""The texts of evaluation items, so that training data can be searched for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from addlang.data.contamination import ItemText
from addlang.data.readers import kind_of, read_records
from addlang.evaluate import lm_eval
from addlang.evaluate.suite import LAB, LAB_CLOZE, LAB_ITEMS, LAB_SEED, LAB_TARGET, reply_prompts
from addlang.recipe import Evaluation


def evaluation_texts(evaluation: Evaluation, *, target_language: str, base_dir: Path | None) -> Iterator[ItemText]:
    """Every text of every item that a recipe evaluates on: of its tasks, and its own prompts for free replies.

    Held-out text for bits per byte is not among them: training text is cleaned of it in any case.

    Raises:
        AddlangError: a task that does not exist or cannot be loaded.
    """
    yield from task_texts(evaluation.tasks, target_language=target_language, limit=evaluation.limit, base_dir=base_dir)
    if evaluation.replies is not None and evaluation.replies.prompts is not None:
        for name, prompt in reply_prompts(evaluation.replies, base_dir):
            yield ItemText("replies", name, "prompt", prompt)


def task_texts(
    tasks: Sequence[str], *, target_language: str, limit: int | None = None, base_dir: Path | None = None
) -> Iterator[ItemText]:
    """Every text of every item of tasks.

    Args:
        tasks: ``lab``, ``lab-target``, names of harness tasks, task files, or data files (jsonl, json, csv, parquet, also
            compressed) whose rows are items.
        limit: first items of each task, as in the evaluation.
    """
    for name in tasks:
        path = (base_dir or Path()) / Path(name).expanduser()
        if name in (LAB, LAB_TARGET):
            yield from _lab(name, target_language, limit)
        elif path.is_file() and kind_of(path):
            task = "/".join(Path(name).parts[-2:])  # many are called test.jsonl
            for row, record in read_records(path):
                yield from _strings(task, str(row), "", record)
        else:
            for task, number, document in lm_eval.documents(name, limit=limit, base_dir=base_dir):
                yield from _strings(task, str(number), "", document)


def _lab(name: str, target_language: str, limit: int | None) -> Iterator[ItemText]:
    from addlang.lab import world

    language = "en" if name == LAB else target_language
    for item in world.exact_match_items(min(LAB_ITEMS, limit or LAB_ITEMS), LAB_SEED, language):
        yield ItemText(name, item.id, "prompt", item.prompt)
        yield ItemText(name, item.id, "answer", item.answer)
    if name == LAB and target_language in world.LANGUAGES and target_language != "en":
        for fact in world.cloze_items(target_language, min(LAB_CLOZE, limit or LAB_CLOZE), LAB_SEED):
            yield ItemText(f"{name} facts", fact.id, "context and answer", fact.context + fact.choices[fact.answer])


def _strings(task: str, item: str, field: str, value: Any) -> Iterator[ItemText]:
    """All strings of a document, however deep, each with its place as ``answers.text.0``."""
    if isinstance(value, str):
        yield ItemText(task, item, field or "text", value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(task, item, f"{field}.{key}".lstrip("."), inner)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for place, inner in enumerate(value):
            yield from _strings(task, item, f"{field}.{place}".lstrip("."), inner)
