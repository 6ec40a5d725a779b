from __future__ import annotations

from typing import Any

import pytest

from addlang.evaluate.exact_match import Question, chat_prompt, exact_match
from addlang.evaluate.generation import greedy
from addlang.evaluate.measurement import Measurement, NotMeasuredError


def ask(model: Any, tokenizer: Any, items: list[Question], **changes: Any) -> Measurement:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "batch_size": 2,
        "task": "lab",
        "role": "source",
        "language": "en",
    }
    return exact_match(model, tokenizer, items, **{**settings, **changes})


def test_the_prompt_is_a_user_turn_and_the_start_of_an_answer(tokenizer: Any) -> None:
    assert tokenizer.decode(chat_prompt(tokenizer, "the cat")) == "<|user|>the cat<|end|><|assistant|>"


def test_a_reply_counts_when_it_is_the_answer(model: Any, tokenizer: Any) -> None:
    prompts = [chat_prompt(tokenizer, text) for text in ("the cat", "the mat")]
    replies = greedy(model, tokenizer, prompts, max_new_tokens=6, batch_size=1, stop_ids={tokenizer.eos_token_id})
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    items = [Question("1", "the cat", f" {said[0]}\n", "copy"), Question("2", "the mat", said[1] + "!", "sort")]
    m = ask(model, tokenizer, items)
    assert [i.numerator for i in m.items] == [1, 0]
    assert [i.detail["task"] for i in m.items] == ["copy", "sort"]
    assert [i.detail["reply"] for i in m.items] == said


def test_the_score_can_be_given_and_stands_in_the_settings(model: Any, tokenizer: Any) -> None:
    m = ask(model, tokenizer, [Question("1", "the cat", "?")], score=always)
    assert m.value == 1
    assert m.settings["score"].endswith("always")


def always(reply: str, question: Question) -> bool:
    return True


def test_without_a_chat_template_nothing_is_measured(model: Any, new_tokenizer: Any) -> None:
    with pytest.raises(NotMeasuredError, match="no chat template"):
        ask(model, new_tokenizer(None), [Question("1", "the cat", "?")])
