"""Language and form of replies: what the model answers to the target set's prompts against what the set answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S")
FORMS = ("one word", "one line", "several lines", "list", "JSON or code")


@dataclass(frozen=True)
class Forms:
    """Replies of the model and of the data to the same prompts.

    Attributes:
        model, data: share of every form.
        overlap: 1 minus half the summed difference of the shares; 1: the same forms as often.
        model_languages, data_languages: language -> share of the sentences that are long enough to be judged.
        replies: how many.
        model_judged, data_judged: sentences that were long enough to be judged.
    """

    model: dict[str, float]
    data: dict[str, float]
    overlap: float
    model_languages: dict[str, float]
    data_languages: dict[str, float]
    replies: int
    model_judged: int
    data_judged: int

    def describe(self) -> dict[str, Any]:
        return dict(vars(self))


def form_of(reply: str) -> str:
    """The one of :data:`FORMS` that a reply has."""
    text = reply.strip()
    lines = [line for line in text.splitlines() if line.strip()]
    if "```" in text or _is_json(text):
        return "JSON or code"
    if sum(bool(_ITEM.match(line)) for line in lines) >= 2:
        return "list"
    if len(lines) > 1:
        return "several lines"
    return "one word" if len(text.split()) <= 1 else "one line"


def _is_json(text: str) -> bool:
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def compare_forms(model_replies: Sequence[str], data_replies: Sequence[str]) -> Forms:
    """Forms and languages of two lists of replies."""
    shares = [_shares([form_of(r) for r in replies]) for replies in (model_replies, data_replies)]
    overlap = 1 - 0.5 * sum(abs(shares[0].get(f, 0.0) - shares[1].get(f, 0.0)) for f in FORMS)
    own, theirs = _languages(model_replies), _languages(data_replies)
    return Forms(
        shares[0], shares[1], overlap, _shares(own), _shares(theirs), len(model_replies), len(own), len(theirs)
    )


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: n / len(names) for name, n in Counter(names).most_common()}


def _languages(replies: Sequence[str]) -> list[str]:
    """Of every sentence that is long enough to be judged."""
    from addlang.evaluate.replies import identify, is_judged, sentences

    return [identify(s)[0] for reply in replies for s in sentences(reply) if is_judged(s)]


def ask(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy replies through the chat template."""
    from addlang.evaluate.exact_match import chat_prompt
    from addlang.evaluate.generation import greedy, stop_ids

    ids = greedy(
        model, tokenizer, [chat_prompt(tokenizer, p) for p in prompts], max_new_tokens=max_new_tokens,
        batch_size=batch_size, stop_ids=stop_ids(model, tokenizer),
    )  # fmt: skip
    return [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
