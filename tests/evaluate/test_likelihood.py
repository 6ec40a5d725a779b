from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from addlang.errors import AddlangError
from addlang.evaluate.cloze import Choices, choice_accuracy
from addlang.evaluate.likelihood import log_likelihoods
from addlang.evaluate.measurement import Measurement, NotMeasuredError
from addlang.evaluate.perplexity import bits_per_byte, windows

TEXTS = [
    ("a", "the cat sat on the mat"),
    ("b", "ሰላም ዓለም"),
    ("c", "x"),
    ("d", "the rat ran to the other hat and the cat sat on the mat. " * 3),
]


def bpb(model: Any, tokenizer: Any, documents: list[tuple[str, str]], **changes: Any) -> Measurement:
    settings: dict[str, Any] = {
        "sequence_length": 200,
        "batch_size": 4,
        "role": "source",
        "language": "en",
        "task": "t",
    }
    return bits_per_byte(model, tokenizer, documents, **{**settings, **changes})


def test_bits_per_byte_of_a_uniform_model_by_hand(uniform_model: Any, tokenizer: Any) -> None:
    m = bpb(uniform_model, tokenizer, TEXTS)
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text in TEXTS]
    size = [len(text.encode()) for _, text in TEXTS]
    assert m.value == pytest.approx(math.log2(len(tokenizer)) * sum(tokens) / sum(size), rel=1e-6)
    assert m.items[1].denominator == 3 * 6 + 1, "Ethiopic letters have three bytes"
    assert [i.detail["tokens"] for i in m.items] == tokens


def test_bits_per_byte_equals_the_models_own_loss(model: Any, tokenizer: Any) -> None:
    text = TEXTS[0][1]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)  # nats per token, the start token is not predicted
    want = loss * (ids.shape[1] - 1) / math.log(2) / len(text)
    assert bpb(model, tokenizer, [("a", text)]).value == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_does_not_depend_on_batch_size_or_order(model: Any, tokenizer: Any) -> None:
    one = bpb(model, tokenizer, TEXTS, batch_size=1)
    for batch_size in (2, 3, 50):
        many = bpb(model, tokenizer, TEXTS[::-1], batch_size=batch_size)
        assert {i.id: i.numerator for i in many.items} == pytest.approx(
            {i.id: i.numerator for i in one.items}, rel=1e-5
        )


def test_bits_per_byte_does_not_depend_on_the_window_of_a_document_that_fits(model: Any, tokenizer: Any) -> None:
    short = TEXTS[:3]
    assert bpb(model, tokenizer, short, sequence_length=60).value == pytest.approx(
        bpb(model, tokenizer, short, sequence_length=200).value, rel=1e-6
    )


def test_long_documents_lose_no_token(uniform_model: Any, tokenizer: Any) -> None:
    assert windows([1, 2, 3, 4, 5], 0, 3) == [[0, 1, 2], [0, 3, 4], [0, 5]]
    whole = bpb(uniform_model, tokenizer, TEXTS)
    cut = bpb(uniform_model, tokenizer, TEXTS, sequence_length=7)
    assert cut.value == pytest.approx(whole.value, rel=1e-6)
    assert cut.items[3].detail == whole.items[3].detail


def test_loss_is_taken_in_fp32_from_a_bf16_model(tokenizer: Any, new_model: Any) -> None:
    half = new_model(tokenizer).to(torch.bfloat16)
    with torch.no_grad():
        half.lm_head.weight.zero_()
    m = bpb(half, tokenizer, TEXTS[:1])
    assert m.items[0].numerator / m.items[0].detail["tokens"] == pytest.approx(math.log2(len(tokenizer)), rel=1e-6)


def test_a_window_that_the_model_cannot_read_is_an_error(model: Any, tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match="exceeds the model's 256"):
        bpb(model, tokenizer, [("a", "z" * 400)], sequence_length=400)
    with pytest.raises(AddlangError, match="nothing to predict"):
        bpb(model, tokenizer, TEXTS, sequence_length=1)
    with pytest.raises(NotMeasuredError):
        bpb(model, tokenizer, [])


def test_log_likelihood_counts_from_its_start(model: Any) -> None:
    whole, head, tail = log_likelihoods(model, [[1, 9, 20, 30], [1, 9, 20], [1, 9, 20, 30]], [1, 1, 3], batch_size=2)
    assert whole == pytest.approx(head + tail, rel=1e-5)
    assert log_likelihoods(model, [[1], [1, 9, 20]], [1, 1], batch_size=1) == [0, pytest.approx(head)]


CLOZE = [
    Choices("1", "the cat sat on the", (" mat", " hat", " other rat"), 0),
    Choices("2", "the rat ran to", (" the cat", " x", " zzz", " and"), 2),
    Choices("3", "", ("the", "and"), 1),
]


def accuracy(model: Any, tokenizer: Any, items: list[Choices], **changes: Any) -> Measurement:
    settings: dict[str, Any] = {"batch_size": 4, "task": "cloze", "role": "target", "language": "en"}
    return choice_accuracy(model, tokenizer, items, **{**settings, **changes})


def test_cloze_scores_are_the_models_log_likelihoods(model: Any, tokenizer: Any) -> None:
    m = accuracy(model, tokenizer, CLOZE)
    for item, measured in zip(CLOZE, m.items, strict=True):
        context = [tokenizer.bos_token_id, *tokenizer(item.context, add_special_tokens=False)["input_ids"]]
        for choice, score in zip(item.choices, measured.detail["scores"], strict=True):
            tail = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([context + tail])).logits[0].log_softmax(-1)
            want = sum(float(logs[len(context) - 1 + k, token]) for k, token in enumerate(tail))
            assert score == pytest.approx(want, abs=1e-3)
        best = max(range(len(item.choices)), key=lambda k: measured.detail["scores"][k])
        assert measured.numerator == float(best == item.answer)


def test_cloze_per_byte_divides_by_the_length_of_the_choice(model: Any, tokenizer: Any) -> None:
    plain, normal = accuracy(model, tokenizer, CLOZE), accuracy(model, tokenizer, CLOZE, normalize="bytes")
    assert normal.metric == "accuracy_per_byte"
    assert normal.items[0].detail["scores"] == pytest.approx(
        [s / n for s, n in zip(plain.items[0].detail["scores"], (4, 4, 10), strict=True)], rel=1e-4
    )


def test_a_tie_is_no_right_answer(uniform_model: Any, tokenizer: Any) -> None:
    assert accuracy(uniform_model, tokenizer, [Choices("1", "the", (" cat", " mat"), 0)]).value == 0


def test_a_border_inside_a_token_treats_all_choices_alike(uniform_model: Any, tokenizer: Any) -> None:
    # "on th" + "e": the tokenizer merges "the", so the scored part begins before the border, for "x" as well
    m = accuracy(uniform_model, tokenizer, [Choices("1", "on th", ("e", "x"), 0)])
    merged = tokenizer("on the", add_special_tokens=False)["input_ids"]
    context = tokenizer("on th", add_special_tokens=False)["input_ids"]
    assert merged[: len(context)] != context, "the test needs a merge across the border"
    assert m.value == 1, "one token against two"


def test_a_broken_item_is_named(model: Any, tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match="item 'q' has answer 2 of 2 choices"):
        accuracy(model, tokenizer, [Choices("q", "a", ("b", "c"), 2)])
