"""Everything that a recipe asks to measure, as a list of tasks that can be run on any model and cached.

A suite is built once and run on every model of a comparison, so all of them answer the same items. A task's fingerprint
covers its items, its settings and the tokenizer; together with the hash of a model's weights it names a cached result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate import answers, cloze, exact_match, perplexity, replies
from addlang.evaluate.measurement import Measurement, NotMeasuredError, NotRun, Outcome, Role
from addlang.recipe import DatasetSpec, Evaluation, RepliesEvaluation

LAB, LAB_TARGET = "lab", "lab-target"
LAB_ITEMS, LAB_SEED, LAB_CLOZE = 480, 1, 200
LAB_REPLY = 48  # tokens; the longest answer of the lab's tasks has fewer

Progress = Callable[[int, int], None]
Run = Callable[[Any, Any, Progress | None], Outcome]


@dataclass(frozen=True)
class Task:
    """One thing to measure: ``run(model, tokenizer, progress)``. ``fingerprint``: of all that determines the result."""

    name: str
    fingerprint: str
    run: Run


@dataclass(frozen=True)
class Suite:
    """Tasks for one tokenizer. ``not_run``: what cannot be measured on any model of this run."""

    tokenizer: Any
    tasks: tuple[Task, ...]
    not_run: tuple[NotRun, ...] = ()


def build_suite(
    evaluation: Evaluation,
    *,
    tokenizer: Any,
    heldout_target: Sequence[tuple[str, str]],
    source_language: str,
    target_language: str,
    sequence_length: int,
    heldout_chats: Sequence[tuple[str, list[dict[str, str]]]],
    base_dir: Path | None = None,
) -> Suite:
    """Collect what a recipe asks for.

    Bits per byte of held-out target text and of source text (the recipe's, or the built-in English set), the recipe's
    tasks, and free replies to source-language prompts. Without source text or prompts in a source language other than
    English, those are "not run", because built-in English would measure another language.

    Args:
        evaluation: the recipe's part; its ``target_datasets`` are not read here, see ``heldout_target``.
        tokenizer: that of the models; with its chat template.
        heldout_target: (id, text) that no model of the run was trained on.
        source_language, target_language: ISO 639 codes.
        sequence_length: window for bits per byte, in tokens.
        heldout_chats: (id, messages) of what in ``heldout_target`` are conversations; their answers are measured too.
        base_dir: directory against which the recipe's relative paths are resolved.

    Raises:
        AddlangError: text, prompts or task files that cannot be read.
    """
    from addlang.data.cache import fingerprint, tokenizer_fingerprint
    from addlang.data.prepare import labelled_chats, labelled_texts

    identity = tokenizer_fingerprint(tokenizer, chat=True)
    english = source_language.split("-")[0] in ("en", "eng")
    not_run: list[NotRun] = []
    tasks: list[Task] = []

    def add(name: str, run: Run, *determined_by: Any) -> None:
        tasks.append(Task(name, fingerprint(name, identity, evaluation.batch_size, *determined_by), run))

    texts: list[tuple[str, Role, str, Sequence[tuple[str, str]]]] = []
    if evaluation.source_datasets:
        texts.append(("text", "source", source_language, labelled_texts(evaluation.source_datasets, base_dir)))
    elif english:
        texts.append(("built-in text", "source", source_language, builtin_texts()))
    else:
        reason = f"there is no built-in text in '{source_language}'; give some under evaluation.source_datasets"
        not_run.append(NotRun(f"text ({source_language})", reason))
    if heldout_target:
        texts.append(("held-out text", "target", target_language, heldout_target))
    else:
        not_run.append(NotRun(f"held-out text ({target_language})", "no held-out target text was given"))
    for name, role, language, documents in texts:
        full = f"{name} ({language})"
        run = _measured(
            perplexity.bits_per_byte,
            documents,
            sequence_length=sequence_length,
            batch_size=evaluation.batch_size,
            role=role,
            language=language,
            task=full,
        )
        add(full, run, perplexity.VERSION, role, language, sequence_length, documents)
    chats: list[tuple[str, Role, str, Sequence[tuple[str, list[dict[str, str]]]]]] = [
        ("answers", "source", source_language, labelled_chats(evaluation.source_datasets, base_dir)),
        ("held-out answers", "target", target_language, heldout_chats),
    ]
    for name, role, language, conversations in chats:
        if conversations and getattr(tokenizer, "chat_template", None):
            full = f"{name} ({language})"
            run = _measured(
                answers.answer_bits_per_byte,
                conversations,
                sequence_length=sequence_length,
                batch_size=evaluation.batch_size,
                role=role,
                language=language,
                task=full,
            )
            add(full, run, answers.VERSION, role, language, sequence_length, conversations)
    for name in evaluation.tasks:
        if name == LAB:
            _add_lab(add, evaluation, target_language)
        elif name == LAB_TARGET:
            _add_lab_tasks(add, evaluation, target_language, evaluation.task_roles.get(LAB_TARGET, "target"))
        else:
            _add_harness(add, name, evaluation, tokenizer, source_language, target_language, base_dir)
    if evaluation.replies is not None:
        if evaluation.replies.prompts is None and not english:
            reason = f"there are no built-in prompts in '{source_language}'; give some with evaluation.replies.prompts"
            not_run.append(NotRun("replies", reason))
        else:
            _add_replies(add, evaluation, evaluation.replies, source_language, base_dir)
    return Suite(tokenizer, tuple(tasks), tuple(not_run))


def evaluate_model(model: Any, suite: Suite, *, progress: Callable[[float], None] | None = None) -> Outcome:
    """Run every task on a model.

    Args:
        model: a causal language model of transformers; its modes are left as they were.
        progress: called with the number of tasks done, with fractions.
    """
    return _evaluate(suite, lambda task, inner: _run(task, model, suite.tokenizer, inner), progress)


def cached_evaluate(
    model: Any, model_hash: str, suite: Suite, cache_dir: Path, *, progress: Callable[[float], None] | None = None
) -> Outcome:
    """As :func:`evaluate_model`, keeping every result in ``cache_dir/<model_hash>/<task fingerprint>.json``.

    A file that is torn or of another version is measured again. Warnings of a measurement are kept with it and issued
    again, so that a run that finds it in the cache reports the same as the run that made it.

    Args:
        model_hash: of the weights on disk; the configuration, the dtype and the kind of device that they compute in are
            added here.
    """
    from addlang.data.cache import fingerprint
    from addlang.models import behaviour

    computes = behaviour(model.config, getattr(model, "generation_config", None))

    def run(task: Task, inner: Progress | None) -> Outcome:
        key = fingerprint(task.fingerprint, computes, str(model.dtype), model.device.type)
        path = cache_dir / model_hash / f"{key}.json"
        stored = _read(path)
        if stored is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", AddlangWarning)
                outcome = _run(task, model, suite.tokenizer, inner)
            messages = [str(w.message) for w in caught if issubclass(w.category, AddlangWarning)]
            for w in caught:
                if not issubclass(w.category, AddlangWarning):
                    warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
            _write(path, outcome, messages)
        else:
            outcome, messages = stored
        for message in messages:
            warnings.warn(message, AddlangWarning, stacklevel=2)
        return outcome

    return _evaluate(suite, run, progress)


def _evaluate(
    suite: Suite, run: Callable[[Task, Progress | None], Outcome], progress: Callable[[float], None] | None
) -> Outcome:
    result = Outcome(not_run=list(suite.not_run))
    for number, task in enumerate(suite.tasks):
        inner = None if progress is None else functools.partial(_advance, progress, number)
        result = result + run(task, inner)
        if progress is not None:
            progress(number + 1)
    return result


def _advance(progress: Callable[[float], None], number: int, done: int, total: int) -> None:
    progress(number + done / total)


def _run(task: Task, model: Any, tokenizer: Any, progress: Progress | None) -> Outcome:
    try:
        return task.run(model, tokenizer, progress)
    except NotMeasuredError as error:
        fix = f" ({error.fix})" if error.fix else ""
        return Outcome(not_run=[NotRun(task.name, error.message + fix)])


def _measured(function: Callable[..., Measurement], items: Any, **settings: Any) -> Run:
    """A task that is one call of a measuring function."""

    def run(model: Any, tokenizer: Any, progress: Progress | None) -> Outcome:
        return Outcome([function(model, tokenizer, items, progress=progress, **settings)])

    return run


def builtin_texts() -> list[tuple[str, str]]:
    from addlang.data.builtin_sets import builtin

    lines = builtin("source_en").read_text(encoding="utf-8").splitlines()
    return [(f"source_en:{i}", json.loads(line)["text"]) for i, line in enumerate(lines, 1)]


def _add_lab(add: Callable[..., None], evaluation: Evaluation, target_language: str) -> None:
    """The embedded world: its English tasks, and facts in the target language where the world has it."""
    from addlang.lab import world

    _add_lab_tasks(add, evaluation, "en", evaluation.task_roles.get(LAB, "source"))
    if target_language not in world.LANGUAGES or target_language == "en":
        return
    count = min(LAB_CLOZE, evaluation.limit or LAB_CLOZE)
    facts = [
        cloze.Choices(c.id, c.context, c.choices, c.answer) for c in world.cloze_items(target_language, count, LAB_SEED)
    ]
    name = f"lab facts ({target_language})"
    run = _measured(
        cloze.choice_accuracy,
        facts,
        batch_size=evaluation.batch_size,
        task=name,
        role="target",
        language=target_language,
    )
    add(name, run, cloze.VERSION, target_language, [vars(c) for c in facts])


def _add_lab_tasks(add: Callable[..., None], evaluation: Evaluation, language: str, role: Role) -> None:
    """The world's instruction tasks in one of its languages."""
    from addlang.lab import world

    items = [
        exact_match.Question(item.id, item.prompt, item.answer, item.task)
        for item in world.exact_match_items(min(LAB_ITEMS, evaluation.limit or LAB_ITEMS), LAB_SEED, language)
    ]
    name = "lab tasks" if language == "en" else f"lab tasks ({language})"
    run = _measured(
        exact_match.exact_match,
        items,
        max_new_tokens=LAB_REPLY,
        batch_size=evaluation.batch_size,
        task=name,
        role=role,
        language=language,
        score=_lab_score,
    )
    add(name, run, exact_match.VERSION, role, language, [vars(i) for i in items])


def _lab_score(reply: str, question: exact_match.Question) -> bool:
    from addlang.lab import world

    item = world.Item(question.id, question.group or "", question.prompt, question.answer)
    return world.score_exact_match(reply, item)


def _add_harness(
    add: Callable[..., None],
    name: str,
    evaluation: Evaluation,
    tokenizer: Any,
    source_language: str,
    target_language: str,
    base_dir: Path | None,
) -> None:
    """A task of the lm-evaluation-harness or a task file."""
    from addlang.evaluate import lm_eval

    file = lm_eval.file_of(name, base_dir)
    lm_eval.require()
    role = evaluation.task_roles.get(name, "source")
    language = target_language if role == "target" else source_language
    settings: dict[str, Any] = {
        "num_fewshot": evaluation.shots(name),
        "limit": evaluation.limit,
        "batch_size": evaluation.batch_size,
        "seed": 0,
        "apply_chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }
    if name in evaluation.generation_kwargs:
        settings["generation"] = dict(evaluation.generation_kwargs[name])

    def run(model: Any, tokenizer: Any, progress: Progress | None) -> Outcome:
        places: dict[str, Any] = {"roles": {name: role}, "languages": {name: language}, "base_dir": base_dir}
        return Outcome(lm_eval.run_tasks(model, tokenizer, [name], **settings, **places, progress=progress))

    add(name, run, lm_eval.version(), settings, role, language, lm_eval.content(file) if file is not None else None)


def _add_replies(
    add: Callable[..., None],
    evaluation: Evaluation,
    spec: RepliesEvaluation,
    source_language: str,
    base_dir: Path | None,
) -> None:
    prompts = reply_prompts(spec, base_dir)
    settings: dict[str, Any] = {
        "expected": source_language,
        "max_new_tokens": spec.max_new_tokens,
        "batch_size": evaluation.batch_size,
    }

    def run(model: Any, tokenizer: Any, progress: Progress | None) -> Outcome:
        return replies.reply_language(model, tokenizer, prompts, progress=progress, **settings)

    add("replies", run, replies.VERSION, replies.identifier_name(), settings, prompts)


def reply_prompts(spec: RepliesEvaluation, base_dir: Path | None) -> list[tuple[str, str]]:
    """(id, prompt) from a file with a column ``prompt`` or ``text``, or the built-in ones."""
    from addlang.data.builtin_sets import builtin
    from addlang.data.prepare import labelled_rows

    path = str(builtin("prompts_en")) if spec.prompts is None else spec.prompts
    name = "prompts_en" if spec.prompts is None else Path(spec.prompts).name
    errors: list[AddlangError] = []
    for column in ("prompt", "text"):
        data = DatasetSpec.model_validate({"path": path, "format": "text", "text_column": column, "limit": spec.limit})
        try:
            return [(label, row.content) for label, row in labelled_rows(name, data, base_dir)]
        except AddlangError as error:
            errors.append(error)
    raise errors[0]


def _read(path: Path) -> tuple[Outcome, list[str]] | None:
    """A cached result and its warnings; None if there is none or it is torn."""
    try:
        text = path.read_text(encoding="utf-8")
        messages = json.loads(text)["warnings"]
        return Outcome.from_json(text), [str(m) for m in messages]
    except (OSError, ValueError, KeyError, TypeError):  # AddlangError is a ValueError
        return None


def _write(path: Path, outcome: Outcome, messages: Sequence[str]) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        AddlangError: no permission, or the disk is full.
    """
    data = json.loads(outcome.to_json()) | {"warnings": list(messages)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise AddlangError(
            f"the evaluation cache '{path.parent}' cannot be written ({error.strerror})",
            "free some space, or choose another cache directory",
        ) from error
