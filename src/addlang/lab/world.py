"""The lab world: a small generated world whose tasks can be verified and whose languages can be learnt in minutes.

Everything is a pure function of its arguments. What is evaluated never occurs in training: prompts and documents are
split by a hash of their own text, and every fact keeps one sentence for cloze items that no document contains.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from addlang.errors import AddlangError, did_you_mean
from addlang.lab import dissimilar, tasks
from addlang.lab import documents as writing
from addlang.lab.facts import RELATIONS, Cloze, cloze, people, say_parallel, stable_hash
from addlang.lab.lexicon import LANGUAGES, Language
from addlang.lab.tasks import TASKS

__all__ = [
    "CONVERSATION_KINDS", "LANGUAGES", "TASKS", "Cloze", "Item", "cloze_items", "conversations", "documents",
    "exact_match_items", "is_held_out", "normalise", "parallel_sentences", "score_exact_match", "write_dataset",
]  # fmt: skip

Split = Literal["train", "eval"]
CONVERSATION_KINDS = ("english", "similar-sw", "similar-hi", "dissimilar")
PARALLEL_KINDS = tuple(f"parallel-{language}" for language in LANGUAGES)
_HELD_OUT_SHARE = 5  # one prompt or document in five is for evaluation
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """A prompt with its one right answer."""

    id: str
    task: str
    prompt: str
    answer: str


def is_held_out(text: str) -> bool:
    """Whether a prompt or a document belongs to evaluation; its own text decides, so every set agrees."""
    return stable_hash(text) % _HELD_OUT_SHARE == 0


def documents(language: str, n: int, seed: int, split: Split = "train") -> list[str]:
    """Raw text.

    Args:
        language: one of ``LANGUAGES``.
        n: number of documents, all different within one call.
        seed: another seed, other documents.
        split: no document of ``eval`` occurs in ``train``, whatever the seeds.
    """
    code = _language(language)
    if split not in get_args(Split):
        raise AddlangError(f"unknown split '{split}'", did_you_mean(split, get_args(Split)))
    rng = random.Random(f"documents/{code}/{split}/{seed}")
    return _distinct(_draw_documents(code, split, rng), n, str, f"{code} documents")


def _draw_documents(language: Language, split: Split, rng: random.Random) -> Iterator[str]:
    while True:
        text = writing.document(language, rng)
        if is_held_out(text) == (split == "eval"):
            yield text


def conversations(kind: str, n: int, seed: int) -> list[list[dict[str, str]]]:
    """Training conversations of one user and one assistant message, tasks drawn evenly. Prompts may come up again.

    Args:
        kind: ``english``; ``similar-sw`` and ``similar-hi``, the same tasks in another language; ``dissimilar``, other
            tasks and formats in both of them.
        n: number of conversations.
        seed: another seed, other conversations.
    """
    if kind not in CONVERSATION_KINDS:
        raise AddlangError(f"unknown kind of conversations '{kind}'", did_you_mean(kind, CONVERSATION_KINDS))
    rng = random.Random(f"conversations/{kind}/{seed}")
    made: list[list[dict[str, str]]] = []
    language: Language = {"similar-sw": "sw", "similar-hi": "hi"}.get(kind, "en")  # type: ignore[assignment]
    names = tasks.tasks_in(language)
    while len(made) < n:
        if kind == "dissimilar":
            prompt, answer = dissimilar.make(rng)
        else:
            task = rng.choice(names)
            prompt, answer = tasks.make(task, language, rng)
            while is_held_out(prompt):  # the same task again, so that tasks stay balanced
                prompt, answer = tasks.make(task, language, rng)
        made.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    return made


def parallel_sentences(language: str, n: int, seed: int) -> list[str]:
    """Facts, sentence by sentence the same ones in every language for one ``n`` and ``seed``."""
    code = _language(language)
    rng = random.Random(f"parallel/{seed}")
    codes = tuple(LANGUAGES)
    drawn = (say_parallel(rng.choice(people()), rng.choice(RELATIONS), codes, rng) for _ in itertools.count())
    sentences = (dict(zip(codes, same, strict=True)) for same in drawn)
    return [s[code] for s in _distinct(sentences, n, str, "parallel sentences")]


def exact_match_items(n: int, seed: int, language: str = "en") -> list[Item]:
    """Evaluation prompts, all different, as evenly over the tasks as ``n`` allows; none occurs in training."""
    code = _language(language)
    names = tasks.tasks_in(code)
    items: list[Item] = []
    for i, task in enumerate(names):
        rng = random.Random(f"items/{code}/{task}/{seed}")
        share = n // len(names) + (i < n % len(names))
        items += _distinct(_draw_items(task, code, rng), share, _prompt, f"{code} items of task '{task}'")
    return items


def _draw_items(task: str, language: Language, rng: random.Random) -> Iterator[Item]:
    while True:
        prompt, answer = tasks.make(task, language, rng)
        if is_held_out(prompt):
            yield Item(f"{language}-{task}-{stable_hash(prompt):016x}", task, prompt, answer)


def cloze_items(language: str, n: int, seed: int) -> list[Cloze]:
    """Facts of the world as a choice of continuations; their exact sentences occur in no document.

    Args:
        language: one of ``LANGUAGES``.
        n: at most 200, one per fact.
        seed: decides which facts, and the wrong choices.
    """
    code = _language(language)
    rng = random.Random(f"cloze/{code}/{seed}")
    facts = [(person, relation) for person in people() for relation in RELATIONS]
    if n > len(facts):
        raise AddlangError(f"the lab world has {len(facts)} cloze items per language, not {n}", "ask for fewer")
    return [cloze(person, relation, code, rng) for person, relation in rng.sample(facts, n)]


def write_dataset(kind: str, path: str | os.PathLike[str], n: int, seed: int) -> None:
    """Write training rows as JSON lines.

    Args:
        kind: a language or ``parallel-LANGUAGE``, for ``{"text": ...}`` rows, or a kind of conversations, for
            ``{"messages": [...]}`` rows.
        path: the file; its directory must exist.
        n: number of rows.
        seed: as for :func:`documents` and :func:`conversations`.
    """
    rows: list[dict[str, Any]]
    if kind in LANGUAGES:
        rows = [{"text": text} for text in documents(kind, n, seed)]
    elif kind in CONVERSATION_KINDS:
        rows = [{"messages": messages} for messages in conversations(kind, n, seed)]
    elif kind in PARALLEL_KINDS:
        rows = [{"text": text} for text in parallel_sentences(kind.removeprefix("parallel-"), n, seed)]
    else:
        known = (*LANGUAGES, *CONVERSATION_KINDS, *PARALLEL_KINDS)
        raise AddlangError(f"unknown kind of lab data '{kind}'", did_you_mean(kind, known))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(lines, encoding="utf-8")


def normalise(text: str) -> str:
    """Unicode and white space made equal, a full stop at the end dropped. Case counts: one task is about it."""
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(".।").rstrip()


def score_exact_match(reply: str, item: Item) -> bool:
    """Whether the reply is the answer, after :func:`normalise` of both."""
    return normalise(reply) == normalise(item.answer)


def _distinct(drawn: Iterator[_T], n: int, key: Callable[[_T], str], what: str) -> list[_T]:
    """The first ``n`` different ones; an error when the world has no more."""
    seen: dict[str, _T] = {}
    repeats = 0
    while len(seen) < n:
        one = next(drawn)
        if key(one) in seen:
            repeats += 1
            if repeats > 200 + 50 * n:
                raise AddlangError(f"the lab world has only about {len(seen)} {what}, not {n}", "ask for fewer")
        seen.setdefault(key(one), one)
    return list(seen.values())


def _prompt(item: Item) -> str:
    return item.prompt


def _language(language: str) -> Language:
    for code in LANGUAGES:
        if code == language:
            return code
    raise AddlangError(f"the lab world has no language '{language}'", did_you_mean(language, LANGUAGES))
