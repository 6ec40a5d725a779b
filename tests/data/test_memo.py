"""Looking words up gives exactly the tokens of the tokenizer, or is not done."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from addlang.data import memo
from addlang.data.memo import GPT2, LLAMA3, O200K, QWEN2, Memo, separable

WORDS = [
    "the",
    "The",
    "don't",
    "DON'T",
    "x",
    "ụlọ",
    "o\u0323",
    "नेपाली",
    "日本語",
    "12345",
    "3.14",
    "--",
    "...",
    "(a)",
    "</s>",
    "<s>",
    "<",
]
WORDS += [
    "end.",
    "x,",
    "DON'T'",
    "12345)!",
    "ọ.",
    "<t>,",
    "<sep",
    "tab\t",
    "\u00a0",
    "\u1680",
    "\x85",
    "\x1c",
    "/",
    "😀",
    "'s",
    "a\nb",
    "\u200b",
    "\ufdd0",
    "a\ufdd0",
    "end.\n",
    "e\u0301",
]
SPACES = [" ", "", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", " \t ", "\u3000", "   \n\n  ", "\n", " \n\n", "\n/"]
TEXTS = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), max_size=12).map(
    lambda pairs: "".join(a + b for a, b in pairs)
)


def backend(pattern: str | None, normalizer: Any = None, added: list[AddedToken] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the cat  sat\n\non the mat. don't 12 345 ụlọ नेपाली " * 3, "  \n  \n\n x ...\n--\n/ the The " * 3]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(added or [])
    return tokenizer


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


def memo_of(tokenizer: Tokenizer) -> Memo:
    line_ends = separable(tokenizer.to_str(), "</s>")
    assert line_ends is not None
    return Memo(plain_copy(tokenizer), "</s>", line_ends)


KINDS: dict[str, Tokenizer] = {
    "byte level": backend(None),
    "gpt2": backend(GPT2),
    "llama3": backend(LLAMA3),
    "qwen2": backend(QWEN2, normalizers.NFC()),
    "o200k": backend(O200K),
    "added": backend(
        LLAMA3,
        added=[
            AddedToken("3.14"),
            AddedToken("\n\n"),
            AddedToken("t\n"),
            AddedToken(" x"),
            AddedToken("  "),
            AddedToken("<t>"),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(batches=st.lists(st.lists(TEXTS, min_size=1, max_size=5), min_size=1, max_size=3))
def test_lookup_equals_the_tokenizer(kind: str, batches: list[list[str]]) -> None:
    plain, encode = plain_copy(KINDS[kind]), memo_of(KINDS[kind])
    cut = [encode(texts) for texts in batches]  # all of them before the first is looked up
    for texts, look_up in zip(batches, cut, strict=True):
        expected = [e.ids for e in plain.encode_batch(texts, add_special_tokens=False)]
        ids, lengths = look_up()
        assert lengths.tolist() == [len(e) for e in expected]
        assert ids.tolist() == [t for e in expected for t in e]


def test_lookup_is_right_after_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_PIECES", 3)
    plain, encode = plain_copy(KINDS["llama3"]), memo_of(KINDS["llama3"])
    for text in ("the cat sat", "on the mat today", "the cat sat", ""):
        assert encode([text])()[0].tolist() == plain.encode(text, add_special_tokens=False).ids


def test_separator_that_melts_with_a_piece_is_noticed() -> None:
    tokenizer = backend(LLAMA3)
    tokenizer.add_special_tokens([AddedToken("x</s>", special=True)])
    texts = ["x y x", "the x the"]
    assert memo_of(tokenizer)(texts)()[0].tolist() == [
        t for e in plain_copy(tokenizer).encode_batch(texts, add_special_tokens=False) for t in e.ids
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        backend(r"\s+|\S+\s"),
        backend(LLAMA3, normalizers.NFKC()),
        backend(LLAMA3, added=[AddedToken("two words")]),
        backend(LLAMA3, added=[AddedToken("ends ")]),
        backend(LLAMA3, added=[AddedToken("two\nlines")]),
        backend(LLAMA3, added=[AddedToken("x", lstrip=True)]),
        backend(LLAMA3, added=[AddedToken("x", single_word=True)]),
    ],
    ids=[
        "pattern",
        "normalizer",
        "token with space",
        "token ends in space",
        "token with line end",
        "lstrip",
        "single word",
    ],
)
def test_unsafe_tokenizers_are_not_cut(tokenizer: Tokenizer) -> None:
    assert not separable(tokenizer.to_str(), "</s>")


def test_prefix_space_metaspace_and_dropout_are_not_cut() -> None:
    prefix = backend(None)
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    metaspace = backend(None)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    random = backend(None)
    random.model.dropout = 0.1
    assert not any(separable(t.to_str(), "</s>") for t in (prefix, metaspace, random))
    assert not separable(backend(None).to_str(), "the"), "a separator must be a control token"
