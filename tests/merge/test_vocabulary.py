"""Models with other tokens: rows are matched by token where that is asked for, and refused where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from addlang.errors import AddlangError
from addlang.merge.spec import parse
from addlang.merge.vocabulary import differing, row_map, superset
from addlang.merge.write import merge_models

N = len(make_tokenizer())


def save(directory: Path, seed: int, more: tuple[str, ...] = (), rows: int | None = None) -> Path:
    """A model whose tokenizer has ``more`` tokens, with a row for each."""
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(more))
    model = make_model("llama", seed=seed)
    model.resize_token_embeddings(rows or len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_rows(directory: Path, rows: int) -> None:
    """Give the model a shorter embedding and leave its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(rows)
    model.save_pretrained(directory)


def embedding(directory: Path) -> torch.Tensor:
    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"]


def test_rows_are_found_by_token_and_padding_rows_by_number() -> None:
    out, other = {"a": 0, "b": 1, "c": 2}, {"b": 0, "a": 1, "d": 2}
    assert row_map(out, 5, other, 4).tolist() == [1, 0, -1, 3, -1]


def test_other_tokens_in_the_same_rows_are_refused(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 0, ("ndizi",)), save(tmp_path / "b", 1, ("papai",))
    spec = {"merge_method": "linear", "models": [str(a), str(b)]}
    with pytest.raises(AddlangError, match=rf"2 differ, such as 'ndizi' \({N} and absent\)"):
        merge_models(parse(spec), tmp_path / "out")
    with pytest.raises(AddlangError, match="two tokenizers cannot be joined"):
        merge_models(parse({**spec, "tokenizer_source": "union"}), tmp_path / "out")
    merge_models(parse({**spec, "tokenizer_source": "ids"}), tmp_path / "ids")
    assert torch.allclose(embedding(tmp_path / "ids"), (embedding(a) + embedding(b)) / 2)
    record = merge_models(parse({**spec, "tokenizer_source": str(a)}), tmp_path / "own")
    assert record["tokens"] == [{"model": str(b), "rows_it_lacks": 1, "tokens_left_out": 1}]
    assert torch.equal(embedding(tmp_path / "own")[N], embedding(a)[N])  # b does not have it


def test_a_vocabulary_that_was_extended_is_merged_by_token(tmp_path: Path) -> None:
    """The update of an adapted model with two more tokens, scaled back: the new rows are its own."""
    source, adapted = save(tmp_path / "source", 0), save(tmp_path / "adapted", 1, ("ndizi", "papai"), rows=N + 4)
    spec = {"merge_method": "revert", "model": str(adapted), "source_model": str(source), "parameters": {"scale": 0.25}}
    with pytest.raises(AddlangError, match="--tokenizer union"):
        merge_models(parse(spec), tmp_path / "out")
    record = merge_models(parse({**spec, "tokenizer_source": "union"}), tmp_path / "out")
    assert record["tokens"] == [{"model": str(source), "rows_it_lacks": 4, "tokens_left_out": 0}]
    out, w0, w = embedding(tmp_path / "out"), embedding(source), embedding(adapted)
    assert out.shape == (N + 4, 32)
    assert torch.allclose(out[:N], w0 + 0.25 * (w[:N] - w0), atol=1e-6)
    assert torch.equal(out[N:], w[N:])
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("papai") == N + 1
    cut = merge_models(parse({**spec, "tokenizer_source": str(source)}), tmp_path / "cut")
    assert embedding(tmp_path / "cut").shape == (N, 32)
    assert cut["tokens"][0]["tokens_left_out"] == 2  # asked for, and told


def test_a_token_that_the_chat_vectors_models_lack_keeps_its_row(tmp_path: Path) -> None:
    w, chat, base = save(tmp_path / "w", 0, ("ndizi",)), save(tmp_path / "chat", 1), save(tmp_path / "base", 2)
    spec = {"merge_method": "chat_vector", "model": str(w), "chat_model": str(chat), "base_model": str(base)}
    merge_models(parse({**spec, "tokenizer_source": "union"}), tmp_path / "out")
    out = embedding(tmp_path / "out")
    assert torch.equal(out[N], embedding(w)[N])
    assert torch.allclose(out[:N], embedding(w)[:N] + embedding(chat) - embedding(base), atol=1e-5)


def test_the_largest_vocabulary_is_found_only_if_it_has_all_tokens() -> None:
    assert superset({"x": {"a": 0}, "y": {"b": 0, "a": 1}}, ["x"]) == "y"
    assert superset({"x": {"a": 0}, "y": {"a": 5}}, ["y"]) == "y"
    with pytest.raises(AddlangError, match="'x' lacks 1 tokens of 'y', such as 'c'"):
        superset({"x": {"a": 0, "b": 1, "d": 2}, "y": {"c": 0, "a": 1}}, [])
    assert differing({"a": 0, "b": 1}, {"a": 0, "b": 2, "c": 1}) == ["b", "c"]


def test_tokens_beyond_the_embedding_have_no_row_and_are_never_cut_silently(tmp_path: Path) -> None:
    """A tokenizer may number more tokens than its model has rows: the other model's rows for them are not the same."""
    whole, short = save(tmp_path / "whole", 0, ("ndizi", "papai")), save(tmp_path / "short", 1, ("ndizi", "papai"))
    save_rows(short, N)
    spec = {"merge_method": "linear", "models": [str(short), str(whole)]}
    with pytest.raises(AddlangError, match="embeddings of other sizes"):
        merge_models(parse({**spec, "tokenizer_source": "ids"}), tmp_path / "out")
    record = merge_models(parse({**spec, "tokenizer_source": "union"}), tmp_path / "union")
    assert record["tokens"] == [{"model": str(short), "rows_it_lacks": 2, "tokens_left_out": 0}]
    assert torch.equal(embedding(tmp_path / "union")[N:], embedding(whole)[N:])
    record = merge_models(parse({**spec, "tokenizer_source": str(short)}), tmp_path / "cut")
    assert record["tokens"] == [{"model": str(whole), "rows_it_lacks": 0, "tokens_left_out": 2}]
    assert "2 of its tokens were left out" in (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
