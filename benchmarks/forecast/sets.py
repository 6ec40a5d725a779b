"""Phase-2 sets of graded similarity, made from the lab's world; each is a pure function of its name, size and seed."""

from __future__ import annotations

import random
from typing import Any

from addlang.lab import tasks, world

CYRILLIC = str.maketrans("abcdefghijklmnoprstuvwyz", "абцдефгхижклмнопрстувўыз")
NARROW = ("copy", "first", "last", "contains")
# content, as it differs from the English instructions that the model was tuned on, from nothing to everything
KINDS = (
    "english", "similar-sw", "similar-hi", "dissimilar", "raw-sw", "raw-hi", "raw-en", "narrow-sw", "relabelled-en",
    "narrow-hi", "relabelled-sw", "cyrillic-sw", "raw-cyrillic",
)  # fmt: skip


def rows(content: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Training rows.

    Args:
        content: a kind, or ``A+B@s``: the share ``s`` of B in A, drawn row by row.
        n: number of rows.
    """
    first, _, rest = content.partition("+")
    if not rest:
        return _rows(first, n, seed)
    second, _, share = rest.partition("@")
    rng = random.Random(f"mix/{content}/{seed}")
    pools = [iter(_rows(kind, n, seed)) for kind in (first, second)]
    return [next(pools[rng.random() < float(share)]) for _ in range(n)]


def _rows(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{kind}/{seed}")
    if kind in world.CONVERSATION_KINDS:
        return [{"messages": m} for m in world.conversations(kind, n, seed)]
    if kind == "raw-cyrillic":
        return [{"text": cyrillic(text)} for text in world.documents("sw", n, seed)]
    name, _, language = kind.partition("-")
    if name == "raw":
        return [{"text": text} for text in world.documents(language, n, seed)]
    if name == "narrow":  # few of the tasks
        return [_turn(*_make(NARROW, language, rng)) for _ in range(n)]
    if name == "relabelled":  # known prompts, but every answer is another one than the model has learnt
        made = [_make(tasks.tasks_in(language), language, rng) for _ in range(n)]  # type: ignore[arg-type]
        return [_turn(prompt, f"({' '.join(reversed(answer.split()))})") for prompt, answer in made]
    if kind == "cyrillic-sw":
        made = [_make(tasks.tasks_in("sw"), "sw", rng) for _ in range(n)]
        return [_turn(cyrillic(prompt), cyrillic(answer)) for prompt, answer in made]
    raise ValueError(f"unknown kind of content '{kind}'")


def cyrillic(text: str) -> str:
    """The same text in letters that the model has never seen."""
    return text.lower().translate(CYRILLIC)


def _make(names: tuple[str, ...], language: str, rng: random.Random) -> tuple[str, str]:
    task = rng.choice(names)
    while True:
        prompt, answer = tasks.make(task, language, rng)  # type: ignore[arg-type]
        if not world.is_held_out(prompt):
            return prompt, answer


def _turn(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def language_of(content: str) -> str:
    """ISO code for the recipe: of the first part."""
    return "hi" if "-hi" in content.partition("+")[0] else "en" if "en" in content.partition("+")[0] else "sw"


__all__ = ["KINDS", "cyrillic", "language_of", "rows"]
