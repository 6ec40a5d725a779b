"""Calibration sets say what they are, count what they hold and are never silently small."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addlang.data.builtin_sets import NAMES, builtin
from addlang.data.calibration import CalibrationSet, calibration_batches
from addlang.data.sources import read_rows
from addlang.errors import AddlangError, AddlangWarning
from addlang.recipe import Calibration, DatasetSpec

Write = Callable[..., Path]


def talk(i: int, words: int = 3) -> dict[str, Any]:
    contents = [f"question {i}", f"answer {i} " + "word " * words]
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=True)]}


def calibrate(tokenizer: Any, *paths: Path, language: str = "en", **options: Any) -> CalibrationSet:
    specs = tuple(DatasetSpec(path=str(p)) for p in paths)
    return calibration_batches(Calibration(datasets=specs, **options), tokenizer, language=language)


def test_sequences_are_templated_conversations_without_generation_prompt(tokenizer: Any, write_jsonl: Write) -> None:
    made = calibrate(tokenizer, write_jsonl(*(talk(i, words=i) for i in range(10))), sequences=10, batch_size=4)
    assert (made.sequences, len(made), len(list(made))) == (10, 3, 3)
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for b in made
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    expected = [tokenizer.apply_chat_template(talk(i, words=i)["messages"], tokenize=False) for i in range(10)]
    assert sorted(texts) == sorted(expected)
    assert made.tokens == sum(int(b["attention_mask"].sum()) for b in made)
    assert len(list(made)) == 3, "a second pass"


def test_long_conversations_are_cut(tokenizer: Any, write_jsonl: Write) -> None:
    made = calibrate(tokenizer, write_jsonl(talk(1, words=200)), sequences=1, sequence_length=16)
    assert next(iter(made))["input_ids"].shape == (1, 16)


def test_too_few_sequences_are_an_error_unless_allowed(tokenizer: Any, write_jsonl: Write) -> None:
    path = write_jsonl(*(talk(i) for i in range(3)))
    with pytest.raises(AddlangError, match=r"data.jsonl: only 3 calibration sequences instead of 5(.|\n)*allow_fewer"):
        calibrate(tokenizer, path, sequences=5)
    with pytest.warns(AddlangWarning, match="scored on 3 calibration sequences instead of 5"):
        assert calibrate(tokenizer, path, sequences=5, allow_fewer=True).sequences == 3


def test_built_in_set_says_how_small_it_is(tokenizer: Any) -> None:
    with pytest.warns(AddlangWarning, match=r"\d+ calibration sequences instead of 500: the built-in English set"):
        made = calibrate(tokenizer)
    assert made.sequences >= 150
    assert made.describe()["source"] == f"built-in English set ({made.sequences} conversations)"
    assert calibrate(tokenizer, sequences=50).sequences == 50


def test_built_in_set_is_refused_for_another_source_language(tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match=r"is English, but the source language is 'fr'(.|\n)*calibration.datasets"):
        calibrate(tokenizer, language="fr")


def test_missing_chat_template_is_an_error(tokenizer: Any, write_jsonl: Write) -> None:
    tokenizer.chat_template = None
    with pytest.raises(AddlangError, match="no chat template"):
        calibrate(tokenizer, write_jsonl(talk(1)), sequences=1)


def test_plain_text_is_allowed_with_a_warning(tokenizer: Any, write_jsonl: Write) -> None:
    with pytest.warns(AddlangWarning, match="1 of 1 calibration rows are plain text"):
        assert calibrate(tokenizer, write_jsonl({"text": "the fox"}), sequences=1).sequences == 1


def test_choice_does_not_depend_on_the_order_of_the_file(tokenizer: Any, write_jsonl: Write) -> None:
    talks = [talk(i) for i in range(40)]
    a = calibrate(tokenizer, write_jsonl(*talks, name="a.jsonl"), sequences=10)
    b = calibrate(tokenizer, write_jsonl(*talks[::-1], name="b.jsonl"), sequences=10)
    assert sorted(a.ids) == sorted(b.ids)
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != calibrate(tokenizer, write_jsonl(*talks), sequences=11).fingerprint


def test_data_sets_share_the_sequences_by_weight_and_fill_in_for_one_another(
    tokenizer: Any, write_jsonl: Write
) -> None:
    large = write_jsonl(*(talk(i) for i in range(30)), name="large.jsonl")
    small = write_jsonl(*(talk(1000 + i) for i in range(4)), name="small.jsonl")
    specs = (DatasetSpec(path=str(large), weight=1), DatasetSpec(path=str(small), weight=3))
    for wanted, from_small in ((4, 3), (20, 4)):
        made = calibration_batches(Calibration(datasets=specs, sequences=wanted), tokenizer, language="en")
        texts = [tokenizer.decode(ids) for ids in made.ids]
        assert sum("question 100" in t for t in texts) == from_small


def test_bad_row_is_named(tokenizer: Any, write_jsonl: Write) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(AddlangError, match=r"data.jsonl, row 1: the chat template refuses"):
        calibrate(tokenizer, write_jsonl(talk(1)), sequences=1)


def test_built_in_conversations_are_varied_and_well_formed() -> None:
    rows = list(read_rows(DatasetSpec(path=str(builtin("calibration_en")))))
    assert len(rows) >= 160
    assert len({r.messages[0]["content"] for r in rows if r.messages}) == len(rows)
    assert sum(len(r.messages or ()) > 2 for r in rows) >= 10
    for row in rows:
        roles = [m["role"] for m in row.messages or ()]
        assert roles == ["user", "assistant"] * (len(roles) // 2), "every template accepts these roles"
        assert all(m["content"] == m["content"].strip() != "" for m in row.messages or ())


def test_built_in_text_and_prompts_have_their_fields() -> None:
    texts = [r.text or "" for r in read_rows(DatasetSpec(path=str(builtin("source_en"))))]
    assert len(texts) == 60
    assert all(80 <= len(t.split()) <= 150 for t in texts)
    prompts = [json.loads(line) for line in builtin("prompts_en").read_text(encoding="utf-8").splitlines()]
    assert len({p["prompt"] for p in prompts}) == 60
    assert all(set(p) == {"prompt", "category"} for p in prompts)


def test_unknown_built_in_name_lists_the_known_ones() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'source_en'"):
        builtin("source")
    assert all(builtin(n).is_file() for n in NAMES)


def test_enough_rows_cause_no_warning(tokenizer: Any, write_jsonl: Write) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(tokenizer, write_jsonl(*(talk(i) for i in range(3))), sequences=3).sequences == 3
