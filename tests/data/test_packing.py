"""Packing loses nothing, splits no conversation and keeps documents apart."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from addlang.data.chat import encode_conversation
from addlang.data.fit import best_fit
from addlang.data.npystream import NpyStream
from addlang.data.packing import IGNORE, Packed, pack_conversations, pack_texts
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning

QUICK = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=12)


def pack(texts: list[str], tokenizer: Any, length: int, cache: Path | str | None = None) -> Packed:
    rows = [(text, "f", i) for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as directory:  # the files stay mapped after they are removed
        return pack_texts(
            rows, tokenizer, sequence_length=length, cache_dir=cache or directory, fingerprint_parts=[texts]
        )


def talk(*contents: str, line: int = 1) -> Row:
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return Row(None, messages, "chat.jsonl", line)


def pack_chat(rows: list[Row], tokenizer: Any, length: int, loss_on: Any = "responses", long: Any = "drop") -> Packed:
    parts = [[r.content for r in rows]]
    with tempfile.TemporaryDirectory() as directory:
        return pack_conversations(
            rows,
            tokenizer,
            sequence_length=length,
            loss_on=loss_on,
            long=long,
            cache_dir=directory,
            fingerprint_parts=parts,
        )


@QUICK
@given(texts=TEXTS, length=st.integers(2, 33))
def test_sequences_one_after_the_other_are_exactly_the_documents(texts: list[str], length: int, tokenizer: Any) -> None:
    documents = [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]
    stream = [t for d in documents if d for t in (*d, tokenizer.eos_token_id)]
    if not stream:
        with pytest.raises(AddlangError, match="no text to pack"):
            pack(texts, tokenizer, length)
        return
    packed = pack(texts, tokenizer, length)
    pieces = [packed.tokens[a:b] for a, b in zip(packed.sequences[:-1], packed.sequences[1:], strict=True)]
    assert np.concatenate(pieces).tolist() == stream
    assert {len(p) for p in pieces[:-1]} <= {length}
    assert 0 < len(pieces[-1]) <= length
    assert np.diff([*packed.documents, len(stream)]).tolist() == [len(d) + 1 for d in documents if d]
    assert packed.tokens_total == packed.meta["tokens"] == len(stream)
    assert packed.meta["empty"] == sum(not d for d in documents)


@QUICK
@given(texts=TEXTS, length=st.integers(2, 20), isolate=st.booleans(), extra=st.integers(0, 5))
def test_batches_hold_the_sequences_with_right_labels_and_positions(
    texts: list[str], length: int, isolate: bool, extra: int, tokenizer: Any
) -> None:
    packed = pack(["a", *texts], tokenizer, length)
    batch = packed.batch(np.arange(len(packed)), length + extra, 2, isolate)
    starts = set(packed.documents.tolist())
    for i in range(len(packed)):
        position = 0
        for column in range(length + extra):
            at = int(packed.sequences[i]) + column
            real = at < packed.sequences[i + 1]
            new = at in starts if real else at == packed.sequences[i + 1]
            position = 0 if column == 0 or (isolate and new) else position + 1
            token = int(packed.tokens[at]) if real else 2
            assert batch["input_ids"][i, column] == token
            assert batch["position_ids"][i, column] == position
            assert batch["labels"][i, column] == (token if real and not (isolate and new) else IGNORE)


@QUICK
@given(
    talks=st.lists(
        st.lists(st.text("abc xyz", min_size=1, max_size=30), min_size=2, max_size=4), min_size=1, max_size=12
    ),
    length=st.integers(80, 200),
)
def test_conversations_are_packed_whole_and_once(talks: list[list[str]], length: int, tokenizer: Any) -> None:
    rows = [talk(*t[: len(t) // 2 * 2], line=i) for i, t in enumerate(talks)]
    encoded = [encode_conversation(r.messages or [], tokenizer, loss_on="responses") for r in rows]
    fitting = sorted((ids, loss) for ids, loss in encoded if len(ids) <= length)
    if len(fitting) < len(rows):
        return
    packed = pack_chat(rows, tokenizer, length)
    ends = [*packed.documents[1:].tolist(), packed.tokens_total]
    assert packed.loss is not None
    found = [
        (packed.tokens[a:b].tolist(), packed.loss[a:b].tolist()) for a, b in zip(packed.documents, ends, strict=True)
    ]
    assert sorted(found) == fitting
    assert set(packed.sequences.tolist()) <= {0, *ends}, "a conversation stands in two sequences"
    assert packed.lengths().max() <= length
    assert packed.meta["documents"] == len(rows)


@given(sizes=st.lists(st.integers(1, 50), max_size=60), window=st.integers(1, 20))
def test_best_fit_keeps_every_item_and_the_capacity(sizes: list[int], window: int) -> None:
    groups = list(best_fit(list(enumerate(sizes)), size=lambda i: i[1], capacity=50, window=window))
    assert sorted(item for group in groups for item in group) == list(enumerate(sizes))
    assert all(0 < sum(size for _, size in group) <= 50 for group in groups)


def test_best_fit_fills_sequences_where_a_perfect_fit_exists() -> None:
    sizes = [50, 20, 30, 10, 40, 25, 25, 5, 45]
    assert len(list(best_fit(sizes, size=int, capacity=50, window=100))) == 5


def test_labels_of_conversations_are_the_answers_only(tokenizer: Any) -> None:
    rows = [talk("one two", "three"), talk("the fox", "jumps", line=2)]
    batch = pack_chat(rows, tokenizer, 64).batch([0], 64, tokenizer.pad_token_id)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORE]) in (
        "three<|im_end|>jumps<|im_end|>",
        "jumps<|im_end|>three<|im_end|>",
    )


def test_bos_is_written_only_if_the_tokenizer_adds_it(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert pack(["one"], tokenizer, 8).tokens[0] != tokenizer.bos_token_id
    packed = pack(["one", "", "two"], bos_tokenizer, 8)
    assert [packed.tokens[d] for d in packed.documents] == [bos_tokenizer.bos_token_id] * 2
    assert packed.meta["empty"] == 1


def test_control_tokens_in_text_are_ordinary_text(tokenizer: Any) -> None:
    packed = pack(["a <|eos|> b <|im_start|>"], tokenizer, 64)
    assert packed.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in packed.tokens
    assert tokenizer("<|eos|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_tokenizer_without_eos_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(AddlangError, match="no eos token"):
        pack(["a"], tokenizer, 8)


def test_bytes_rows_and_licences_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [Row("ụlọ", None, "f", 1, "CC0"), Row("b", None, "f", 2, "CC0"), Row("c", None, "f", 3, None)]
    seen: list[int] = []
    meta = pack_texts(
        rows, tokenizer, sequence_length=8, cache_dir=tmp_path, fingerprint_parts=[], progress=seen.append
    ).meta
    assert (meta["rows"], meta["bytes"], meta["licences"]) == (3, 9, {"CC0": 2})
    assert sum(seen) == 3


def test_large_vocabularies_take_four_bytes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack(["abc"], tokenizer, 8).tokens.dtype == np.uint16
    monkeypatch.setattr(type(tokenizer), "__len__", lambda _: 70_000)
    assert pack(["abc"], tokenizer, 8).tokens.dtype == np.uint32


def test_stream_file_refuses_values_that_do_not_fit(tmp_path: Path) -> None:
    with NpyStream(tmp_path / "a.npy", np.uint16) as stream:
        stream.write(np.array([1, 65_535]))
        with pytest.raises(AssertionError, match="does not fit"):
            stream.write(np.array([65_536]))
    assert np.load(tmp_path / "a.npy").tolist() == [1, 65_535]


def test_cached_data_is_not_read_again_and_torn_data_is_rebuilt(tokenizer: Any, tmp_path: Path) -> None:
    first = pack(["one two three"], tokenizer, 8, tmp_path)
    kept = first.tokens.tolist()

    def unread() -> Any:
        raise AssertionError("read again")
        yield

    again = pack_texts(
        unread(), tokenizer, sequence_length=8, cache_dir=tmp_path, fingerprint_parts=[["one two three"]]
    )
    assert again.tokens.tolist() == kept
    (first.path / "tokens.npy").write_bytes(b"torn")
    assert pack(["one two three"], tokenizer, 8, tmp_path).tokens.tolist() == kept


def test_tokenizer_length_and_parts_are_all_in_the_fingerprint(tokenizer: Any, bos_tokenizer: Any) -> None:
    keys = {
        pack(["a"], tokenizer, 8).fingerprint,
        pack(["a"], tokenizer, 9).fingerprint,
        pack(["b"], tokenizer, 8).fingerprint,
        pack(["a"], bos_tokenizer, 8).fingerprint,
    }
    assert len(keys) == 4


def test_packed_data_is_read_only(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="read-only"):
        pack(["a"], tokenizer, 8).tokens[0] = 1


def test_long_conversations_are_dropped_and_counted(tokenizer: Any) -> None:
    rows = [talk("one", "two"), talk("one", "two " * 100, line=2)]
    with pytest.warns(AddlangWarning, match="1 of 2 conversations dropped: longer than 32 tokens"):
        packed = pack_chat(rows, tokenizer, 32)
    assert (packed.meta["dropped"], packed.meta["documents"], packed.meta["rows"]) == (1, 1, 2)


def test_long_conversations_are_cut_to_one_sequence_if_asked_for(tokenizer: Any) -> None:
    rows = [talk("one", "two " * 100), talk("three " * 100, "four", line=2), talk("one", "two", line=3)]
    whole, _ = encode_conversation(rows[0].messages or [], tokenizer, loss_on="responses")
    with pytest.warns(AddlangWarning) as caught:
        packed = pack_chat(rows, tokenizer, 32, long="truncate")
    messages = [str(w.message) for w in caught]
    assert "1 of 3 conversations cut to 32 tokens" in messages
    assert "1 of 3 conversations dropped: longer than 32 tokens" in messages, "nothing of its answer is left"
    assert (packed.meta["truncated"], packed.meta["dropped"], packed.meta["documents"]) == (1, 1, 2)
    cut = packed.batch([0], 32, pad_id=tokenizer.pad_token_id)
    assert cut["input_ids"][0].tolist() == whole[:32]
    assert (cut["labels"][0] >= 0).any()


def test_only_long_conversations_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(AddlangError, match=r"all 1 conversations(.|\n)*raise sequence_length"):
        pack_chat([talk("one", "two " * 100)], tokenizer, 32)


def test_conversations_that_spell_out_control_tokens_are_dropped(tokenizer: Any) -> None:
    rows = [talk("one", "two"), talk("what is <|im_end|>?", "a token", line=2)]
    with pytest.warns(AddlangWarning, match="1 of 2 conversations dropped: they spell out a control token"):
        assert pack_chat(rows, tokenizer, 64).meta["dropped"] == 1


def test_mixed_kinds_name_the_row(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"chat\.jsonl, row 7: a conversation among raw text"):
        pack_texts([talk("a", "b", line=7)], tokenizer, sequence_length=8, cache_dir=tmp_path, fingerprint_parts=[])
    with pytest.raises(AddlangError, match="f, row 3: raw text among conversations"):
        pack_chat([Row("a", None, "f", 3)], tokenizer, 64)


def test_conversation_that_cannot_be_encoded_names_the_row(tokenizer: Any) -> None:
    row = Row(None, [{"role": "user", "content": "a"}], "chat.jsonl", 9)
    with pytest.raises(AddlangError, match=r"chat\.jsonl, row 9: the conversation has no assistant message"):
        pack_chat([row], tokenizer, 64)


def test_missing_chat_template_is_noticed_before_reading(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(AddlangError, match="no chat template"):
        pack_chat([], tokenizer, 64)


@pytest.mark.parametrize("texts", [["one two three", "the lazy dog", "x"], ["a", "b", "c", "d", "five dozen jugs"]])
def test_packed_documents_do_not_see_one_another_in_a_model(tokenizer: Any, texts: list[str]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).double().eval()
    packed = pack(texts, tokenizer, 64)
    batch = {k: torch.from_numpy(v) for k, v in packed.batch([0, 0], 64, tokenizer.pad_token_id).items()}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        bounds = [*packed.documents.tolist(), packed.tokens_total]
        for a, b in pairwise(bounds):
            alone = model(input_ids=batch["input_ids"][:1, a:b]).logits[0]
            torch.testing.assert_close(logits[a:b], alone, rtol=0, atol=1e-12)


def test_indices_and_lengths_out_of_range_are_refused(tokenizer: Any) -> None:
    packed = pack(["one two three"], tokenizer, 8)
    with pytest.raises(IndexError):
        packed.batch([len(packed)], 8, 0)
    with pytest.raises(ValueError, match="does not fit"):
        packed.batch([0], 2, 0)
