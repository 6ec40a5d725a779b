"""Cloze accuracy: which of several continuations the model finds most likely. Needs no instruction following."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from addlang.errors import AddlangError
from addlang.evaluate.likelihood import log_likelihoods, start_token
from addlang.evaluate.measurement import Item, Measurement, Role

VERSION = "1"


@dataclass(frozen=True)
class Choices:
    """A context, its possible continuations and the index of the right one. ``cluster``: see ``Item``."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int
    cluster: str | None = None


def choice_accuracy(
    model: Any,
    tokenizer: Any,
    items: Sequence[Choices],
    *,
    batch_size: int,
    task: str,
    role: Role,
    language: str,
    normalize: Literal["none", "bytes"] = "none",
    version: str = VERSION,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Share of items whose right choice has the highest log-likelihood after its context.

    Context and choice are tokenised together, because a tokenizer may merge across their border; what is scored begins
    where the tokens with a choice first differ from those of the context alone, at the same place for all choices.
    A tie counts as wrong.

    Args:
        items: see :class:`Choices`; context and choice are joined as they are, so a space belongs to one of them.
        normalize: ``bytes`` divides by the choice's length in UTF-8 (long choices are not at a disadvantage).
        batch_size: (context, choice) pairs per forward pass.
        progress: called with the number of pairs done and of all pairs.

    Raises:
        AddlangError: an item without a right choice, with an empty one, or too long for the model.
        NotMeasuredError: no items.
    """
    start = start_token(tokenizer)
    sequences: list[list[int]] = []
    starts: list[int] = []
    for item in items:
        if not 0 <= item.answer < len(item.choices) or len(item.choices) < 2 or not all(item.choices):
            raise AddlangError(
                f"{task}: item '{item.id}' has answer {item.answer} of {len(item.choices)} choices",
                "give two or more choices, none empty, and the index of the right one, counted from 0",
            )
        context = _tokens(tokenizer, item.context)
        joined = [_tokens(tokenizer, item.context + choice) for choice in item.choices]
        shared = min(_common(context, tokens) for tokens in joined)
        sequences += [[start, *tokens] for tokens in joined]
        starts += [1 + shared] * len(joined)
    scores = log_likelihoods(model, sequences, starts, batch_size=batch_size, progress=progress)
    measured = []
    at = 0
    for item in items:
        own = scores[at : at + len(item.choices)]
        at += len(item.choices)
        if normalize == "bytes":
            own = [s / len(c.encode("utf-8")) for s, c in zip(own, item.choices, strict=True)]
        right = all(own[item.answer] > s for k, s in enumerate(own) if k != item.answer)
        measured.append(
            Item(item.id, float(right), cluster=item.cluster, detail={"scores": own, "answer": item.answer})
        )
    return Measurement(
        task=task,
        version=version,
        role=role,
        language=language,
        metric="accuracy" if normalize == "none" else "accuracy_per_byte",
        higher_is_better=True,
        items=tuple(measured),
        settings={"normalize": normalize, "start": "beginning-of-sequence token, else end-of-sequence"},
        unit="share",
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
