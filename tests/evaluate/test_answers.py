"""Bits per byte of answers: the bits of the answer's tokens given the question, over the answer's bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer

from addlang.data.chat import encode_conversation
from addlang.evaluate.answers import answer_bits_per_byte
from addlang.evaluate.measurement import NotMeasuredError

CHATS = [
    ("a", [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat ọ"}]),
    ("b", [
        {"role": "user", "content": "who"}, {"role": "assistant", "content": "the rat"},
        {"role": "user", "content": "where to"}, {"role": "assistant", "content": "the other hat"},
    ]),
]  # fmt: skip


def measure(model: Any, chats: Any = CHATS, batch_size: int = 2, sequence_length: int = 96) -> Any:
    return answer_bits_per_byte(
        model, make_tokenizer(), chats, sequence_length=sequence_length, batch_size=batch_size, role="target", language="ig",
        task="t",
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_is_the_bits_of_all_answers_with_their_ends_over_their_bytes(batch_size: int) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    got = measure(model, batch_size=batch_size)
    for (_, messages), item in zip(CHATS, got.items, strict=True):
        ids, loss = encode_conversation(messages, tokenizer, loss_on="responses")
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        bits = -sum(float(logp[t - 1, ids[t]].detach()) for t in range(1, len(ids)) if loss[t]) / math.log(2)
        assert item.numerator == pytest.approx(bits, rel=1e-4)
        size = sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
        assert item.denominator == size
        assert sum(loss) > sum(len(tokenizer(m["content"])["input_ids"]) for m in messages if m["role"] == "assistant")
    assert (got.metric, got.unit, got.higher_is_better) == ("answer_bits_per_byte", "bits/byte", False)


def test_the_question_is_seen_but_not_counted() -> None:
    model = make_model("llama")
    other = [("a", [{"role": "user", "content": "another question"}, CHATS[0][1][1]])]
    one, two = measure(model, CHATS[:1]).items[0], measure(model, other).items[0]
    assert one.denominator == two.denominator
    assert one.numerator != two.numerator


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    length = len(encode_conversation(CHATS[0][1], tokenizer, loss_on="responses")[0])
    got = measure(model, sequence_length=length)
    assert [item.id for item in got.items] == ["a"]
    assert got.settings["left_out"] == 1
    with pytest.raises(NotMeasuredError, match="no conversation fits"):
        measure(model, sequence_length=4)
