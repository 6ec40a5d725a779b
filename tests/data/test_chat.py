"""The loss mask covers exactly the assistant's turns, with and without ``{% generation %}`` in the template."""

from __future__ import annotations

import copy
import json
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from addlang.data.builtin_sets import CHAT_TEMPLATES, builtin_template
from addlang.data.cache import tokenizer_fingerprint
from addlang.data.calibration import calibration_batches
from addlang.data.chat import encode_conversation, to_messages
from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate.exact_match import chat_prompt
from addlang.guards.sampling import turn_frame
from addlang.models import load_tokenizer
from addlang.schema import Calibration

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one two three"},
    {"role": "assistant", "content": "four five"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "Ụlọ akwụkwọ"},
]
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen 3: an empty thinking block in the last answer only
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No end of turn at all
BARE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# The end of the turn stands behind the generation block
OUTSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def learnt(ids: list[int], loss: list[int], tokenizer: Any) -> list[str]:
    """The texts of the runs of tokens that carry loss."""
    runs: list[list[int]] = [[]]
    for token, carries in zip(ids, loss, strict=True):
        if carries:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (None, "Ụlọ akwụkwọ<|im_end|>"),
        (PLAIN, "Ụlọ akwụkwọ<|im_end|>"),
        (THINKING, "<think>\n\n</think>\n\nỤlọ akwụkwọ<|im_end|>"),
        (OUTSIDE, "Ụlọ akwụkwọ<|im_end|>"),
    ],
    ids=["generation", "plain", "thinking", "end outside"],
)
def test_exactly_the_answers_and_their_ends_carry_loss(tokenizer: Any, template: str | None, last: str) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    ids, loss = encode_conversation(TALK, tokenizer, loss_on="responses")
    assert learnt(ids, loss, tokenizer) == ["four five<|im_end|>", last]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_mask_equals_that_of_transformers(tokenizer: Any) -> None:
    ids, loss = encode_conversation(TALK, tokenizer, loss_on="responses")
    theirs = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert loss == theirs["assistant_masks"]


def test_eos_is_added_where_the_template_ends_no_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = BARE
    ids, loss = encode_conversation(TALK[1:3], tokenizer, loss_on="responses")
    assert learnt(ids, loss, tokenizer) == ["four five\n<|eos|>"]
    assert ids[-1] == tokenizer.eos_token_id


def test_all_tokens_carry_loss_if_asked_for(tokenizer: Any) -> None:
    ids, loss = encode_conversation(TALK, tokenizer, loss_on="all")
    assert set(loss) == {1}
    assert ids == encode_conversation(TALK, tokenizer, loss_on="responses")[0]


def test_conversation_that_ends_with_the_user_gets_no_eos(tokenizer: Any) -> None:
    ids, loss = encode_conversation(TALK[:4], tokenizer, loss_on="responses")
    assert learnt(ids, loss, tokenizer) == ["four five<|im_end|>"]
    assert ids[-1] != tokenizer.eos_token_id


def test_content_that_repeats_the_prompt_is_not_confused_with_it(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    talk = [{"role": r, "content": "the fox"} for r in ("user", "assistant", "user", "assistant")]
    ids, loss = encode_conversation(talk, tokenizer, loss_on="responses")
    assert learnt(ids, loss, tokenizer) == ["the fox<|im_end|>", "<think>\n\n</think>\n\nthe fox<|im_end|>"]


def test_missing_chat_template_says_how_to_give_one(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(AddlangError, match=r"no chat template(.|\n)*chat_template: FILE"):
        encode_conversation(TALK, tokenizer, loss_on="responses")


def test_no_answer_means_no_loss_and_is_refused(tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match="no assistant message"):
        encode_conversation(TALK[:2], tokenizer, loss_on="responses")


def test_template_that_refuses_the_conversation_says_why(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(AddlangError, match="roles must alternate"):
        encode_conversation(TALK, tokenizer, loss_on="responses")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(AddlangError, match="roles must alternate"):
        encode_conversation(TALK, tokenizer, loss_on="responses")


def test_template_without_system_messages_is_refused_with_one_that_has_them(tokenizer: Any) -> None:
    """That of Mistral 7B Instruct v0.1, given a row of OpenOrca."""
    row = {"system_prompt": "Be brief.", "question": "How are you?", "response": "Well."}
    talk = to_messages(row, "openorca")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(AddlangError, match=r"roles must alternate(.|\n)*chat_template: mistral"):
        encode_conversation(talk, tokenizer, loss_on="responses")
    template = builtin_template("mistral")
    assert template is not None
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    ids, loss = encode_conversation(talk, tokenizer, loss_on="responses")
    assert "Be brief." in tokenizer.decode([i for i, x in zip(ids, loss, strict=True) if not x])


def test_template_that_hides_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + BARE
    with pytest.raises(AddlangError, match=r"message 3(.|\n)*generation"):
        encode_conversation(TALK, tokenizer, loss_on="responses")


def test_unknown_format_suggests_one() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'alpaca'"):
        to_messages({}, "alpacca")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_built_in_templates_put_the_loss_on_answers_and_their_ends(tokenizer: Any, name: str) -> None:
    path = builtin_template(name)
    assert path is not None
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    ids, loss = encode_conversation(TALK, tokenizer, loss_on="responses")
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "<|eos|>")
    first, second = (text.strip() for text in learnt(ids, loss, tokenizer))
    assert first == f"four five{end}"
    assert second.startswith(f"Ụlọ akwụkwọ{end}")
    prompt = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith(prompt), "generation begins where training did"
    assert "Be brief." in prompt


def test_a_template_that_replaces_the_models_own_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.warns(AddlangWarning, match="'alpaca' takes the place of the model's own"):
        load_tokenizer(tmp_path / "model", builtin_template("alpaca"))
    (tmp_path / "same.jinja").write_text(tokenizer.chat_template)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AddlangWarning)
        load_tokenizer(tmp_path / "model", tmp_path / "same.jinja")


def test_a_template_of_another_models_control_tokens_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(AddlangWarning, match=r"<\|eot_id\|>.*none of its own"):
        load_tokenizer(tmp_path, builtin_template("llama3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AddlangWarning)
        load_tokenizer(tmp_path, builtin_template("chatml"))


@pytest.fixture
def on_a_day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function on a day of November 2026, as far as transformers can tell."""
    from transformers.utils import chat_template_utils

    def call(day: int, function: Any, *args: Any, **kw: Any) -> Any:
        class Day(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2026, 11, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        return function(*args, **kw)

    return call


@pytest.mark.parametrize("template", [None, PLAIN], ids=["generation", "plain"])
def test_what_is_trained_on_and_asked_does_not_depend_on_the_day(
    tokenizer: Any, on_a_day: Any, template: str | None, tmp_path: Path
) -> None:
    """Llama 3.2 writes today's date; a run that is resumed tomorrow must see the same texts."""
    head = "{%- if strftime_now is defined %}{{ '<|im_start|>' + strftime_now( \"%d %b %Y\" ) }}{% endif %}"
    tokenizer.chat_template = head + (template or tokenizer.chat_template)
    theirs = [on_a_day(d, tokenizer.apply_chat_template, TALK, tokenize=False) for d in (1, 2)]
    assert theirs[0] != theirs[1], "or the test sees nothing"
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": TALK[1:3]}))
    calibration = Calibration.model_validate({"datasets": [{"path": str(tmp_path / "c.jsonl")}], "sequences": 1})
    once, again = (
        on_a_day(
            day,
            lambda: (
                encode_conversation(TALK, tokenizer, loss_on="responses"),
                chat_prompt(tokenizer, "the fox"),
                turn_frame(tokenizer),
                calibration_batches(calibration, tokenizer, language="en").fingerprint,
            ),
        )
        for day in (1, 2)
    )
    assert once == again
    assert tokenizer.decode(once[0][0]) == theirs[0].replace("01 Nov 2026", "26 Jul 2024")
    assert tokenizer.decode(once[1]).startswith("<|im_start|>26 Jul 2024<|im_start|>user")


def test_the_date_is_part_of_what_a_cache_is_named_by(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from addlang.data import chat

    plain = tokenizer_fingerprint(tokenizer, chat=True)
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%Y') }}" + PLAIN
    before = tokenizer_fingerprint(dated, chat=True)
    monkeypatch.setattr(chat, "DATE", datetime(2030, 1, 1))
    assert tokenizer_fingerprint(dated, chat=True) != before
    assert tokenizer_fingerprint(tokenizer, chat=True) == plain


def test_a_date_that_cannot_be_held_fixed_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}" + PLAIN
    with pytest.raises(AddlangError, match="today's date") as caught:
        encode_conversation(TALK, tokenizer, loss_on="all")
    assert "strftime_now('%d %b %Y')" in (caught.value.fix or "")
