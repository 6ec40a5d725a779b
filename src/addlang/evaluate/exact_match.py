"""Questions with one right answer, asked through the chat template and answered greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from addlang.data.chat import render
from addlang.evaluate.generation import greedy, stop_ids
from addlang.evaluate.measurement import Item, Measurement, NotMeasuredError, Role

VERSION = "1"


@dataclass(frozen=True)
class Question:
    """What is asked, the right answer and the kind of task it belongs to (for tables by kind)."""

    id: str
    prompt: str
    answer: str
    group: str | None = None


def equal_text(reply: str, question: Question) -> bool:
    """The reply is the answer, apart from white space at its ends."""
    return reply.strip() == question.answer.strip()


def chat_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user turn with the start of the assistant's turn.

    Raises:
        NotMeasuredError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise NotMeasuredError(
            "the model has no chat template, so it cannot be asked",
            "give one with chat_template, or evaluate an instruction-tuned model",
        )
    text = render([{"role": "user", "content": prompt}], tokenizer, prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def exact_match(
    model: Any,
    tokenizer: Any,
    items: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    task: str,
    role: Role,
    language: str,
    score: Callable[[str, Question], bool] = equal_text,
    version: str = VERSION,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Share of questions answered exactly.

    Args:
        items: see :class:`Question`; its group stands in the measured item's detail.
        max_new_tokens: tokens per reply; a longer reply is cut and says so in its detail.
        batch_size: questions per batch; does not change the result.
        score: whether a reply (special tokens removed) answers the question.
        progress: called with the number of questions done and of all questions.

    Raises:
        NotMeasuredError: no chat template, or no questions.
    """
    prompts = [chat_prompt(tokenizer, item.prompt) for item in items]
    replies = greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_ids=stop_ids(model, tokenizer),
        progress=progress,
    )
    measured = []
    for item, ids in zip(items, replies, strict=True):
        reply = tokenizer.decode(ids, skip_special_tokens=True)
        detail: dict[str, Any] = {"prompt": item.prompt, "answer": item.answer, "reply": reply, "task": item.group}
        if len(ids) == max_new_tokens:
            detail["cut"] = True
        measured.append(Item(item.id, float(score(reply, item)), detail=detail))
    return Measurement(
        task=task,
        version=version,
        role=role,
        language=language,
        metric="exact_match",
        higher_is_better=True,
        items=tuple(measured),
        settings={
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "chat_template": True,
            "score": f"{score.__module__}.{score.__qualname__}",
        },
        unit="share",
    )
