"""Local models as back-ends: batches, lengths, languages; their replies are judged like those of an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer, save_model

from addlang.builders.backend import Reply, Request
from addlang.builders.budget import Budget
from addlang.builders.local import LocalModel
from addlang.builders.protect import Protector
from addlang.builders.translate import Translation, translate
from addlang.errors import AddlangError

ASKED: dict[str, Any] = {"prompt": "To {target}: {mark}", "source": "English", "target": "German", "mark": "[1]"}


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    directory = tmp_path_factory.mktemp("t5")
    tokenizer = make_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, n_positions=64,
        decoder_start_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat"), dtype="float32")


def run(backend: LocalModel, *requests: Request) -> dict[tuple[str, int], Reply]:
    left, kept = list(requests), list[Reply]()
    answered = list(backend.run(lambda: left.pop(0) if left else None, kept.append))
    assert kept == [reply for _, reply in answered]
    assert all((request.key, request.attempt) == (reply.key, reply.attempt) for request, reply in answered)
    return {(reply.key, reply.attempt): reply for reply in kept}


def requests(attempt: int = 0) -> list[Request]:
    return [
        Request(str(i), "the cat sat on " * (i % 3 + 1), attempt, "lost [1]" if attempt else None) for i in range(7)
    ]


@pytest.mark.parametrize("kind", ["seq2seq", "chat"])
def test_replies_do_not_depend_on_the_batch(kind: str, seq2seq: Path, chat: Path) -> None:
    directory = {"seq2seq": seq2seq, "chat": chat}[kind]
    one, many = (run(LocalModel(directory, **ASKED, batch_size=size, max_new_tokens=6), *requests()) for size in (1, 4))
    assert {k: r.text for k, r in one.items()} == {k: r.text for k, r in many.items()}
    assert len(one) == 7
    assert all(r.problem == "cut off after 6 tokens" for r in one.values() if r.tokens_out == 6)


@pytest.mark.parametrize("kind", ["seq2seq", "chat"])
def test_a_refused_text_is_asked_for_differently(kind: str, seq2seq: Path, chat: Path) -> None:
    directory = {"seq2seq": seq2seq, "chat": chat}[kind]
    backend = LocalModel(directory, **ASKED, batch_size=4, max_new_tokens=6)
    found = run(backend, *requests(), *requests(1), *requests(2))
    texts = [{found[str(i), attempt].text for attempt in range(3)} for i in range(7)]
    assert any(len(own) > 1 for own in texts)


def test_texts_that_do_not_fit_are_a_problem_of_their_own(seq2seq: Path) -> None:
    found = run(LocalModel(seq2seq, **ASKED, max_new_tokens=4), Request("a", "cat " * 100), Request("b", "cat"))
    assert "too long for the model: 101 tokens" in (found["a", 0].problem or "")
    assert found["b", 0].text is not None


def test_an_unknown_language_of_the_model_is_named(seq2seq: Path) -> None:
    with pytest.raises(AddlangError, match=r"no language 'hau_Latn'(.|\n)*<\|user\|>"):
        run(LocalModel(seq2seq, **ASKED, target_code="hau_Latn"), Request("a", "cat"))
    found = run(LocalModel(seq2seq, **ASKED, target_code="<|user|>", max_new_tokens=4), Request("a", "cat"))
    assert found["a", 0].text is not None


def test_the_identity_holds_what_a_reply_depends_on(seq2seq: Path, chat: Path) -> None:
    keys = {
        json.dumps(LocalModel(d, **{**ASKED, **changes}).identity)
        for d in (seq2seq, chat)
        for changes in ({}, {"beams": 3}, {"prompt": "Other"}, {"max_new_tokens": 9})
    }
    assert len(keys) == 6, "beams do not matter for a chat model, nor the prompt for the other"


def test_a_job_with_a_local_model_rejects_what_it_cannot_keep_and_does_not_translate_twice(
    seq2seq: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Heat it to 150 °C for the others in the house. Then wait."}) + "\n")
    job = Translation((str(file),), tmp_path / "out.jsonl", "en", "de", Protector(mark="[{}]"), unit="sentence")
    about = translate(job, LocalModel(seq2seq, **ASKED, max_new_tokens=8), Budget())
    assert (about["rejected"], about["complete"]) == (1, True)
    assert about["replies"] == 6, "three attempts at each of two sentences"
    again = translate(job, LocalModel(seq2seq, **ASKED, max_new_tokens=8), Budget())
    assert again["replies"] == 6
