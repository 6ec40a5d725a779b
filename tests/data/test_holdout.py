"""No held-out text is in the training text, and the choice depends on content and seed alone."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addlang.data.holdout import split_holdout, split_passages
from addlang.data.similar import WINDOW, NearIndex, normalise
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning


def words(n: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(n))


def rows(texts: Iterable[str]) -> list[Row]:
    return [Row(text, None, "f", i) for i, text in enumerate(texts, 1)]


DOCUMENTS = [words(60, seed) for seed in range(500)]


def test_held_out_and_training_documents_are_disjoint_and_complete() -> None:
    split = split_holdout(rows(DOCUMENTS), share=0.1, maximum=500, seed=0)
    held, train = {r.content for r in split.heldout}, [r.content for r in split.train]
    assert len(held) == 50
    assert sorted([*held, *train]) == sorted(DOCUMENTS)
    assert split.stats == {"distinct": 500, "duplicates": 0, "held_out": 50, "passages": False, "near_duplicates": 0}


def test_choice_does_not_depend_on_the_order() -> None:
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    a, b = (split_holdout(rows(d), share=0.05, maximum=500, seed=0) for d in (DOCUMENTS, shuffled))
    assert [r.content for r in a.heldout] == [r.content for r in b.heldout]
    assert a.fingerprint == b.fingerprint


def test_seed_changes_the_choice() -> None:
    a, b = (split_holdout(rows(DOCUMENTS), share=0.05, maximum=500, seed=s) for s in (0, 1))
    assert {r.content for r in a.heldout} != {r.content for r in b.heldout}
    assert a.fingerprint != b.fingerprint


def test_maximum_bounds_the_held_out_documents() -> None:
    assert len(split_holdout(rows(DOCUMENTS), share=0.4, maximum=30, seed=0).heldout) == 30


def test_one_copy_of_every_document_is_trained_on() -> None:
    texts = [d for d in DOCUMENTS for _ in range(2)] + [DOCUMENTS[0].upper() + "!!", DOCUMENTS[1].replace(" ", "  \n")]
    split = split_holdout(rows(texts), share=0.02, maximum=500, seed=0)
    kept = [normalise(r.content) for r in split.train]
    assert len(kept) == len(set(kept)) == 490
    assert split.stats["duplicates"] == 502


def test_near_copies_of_held_out_documents_are_not_trained_on() -> None:
    chosen = [r.content for r in split_holdout(rows(DOCUMENTS), share=0.02, maximum=500, seed=0).heldout]
    edited = chosen[0].replace(chosen[0].split()[30], "zzz", 1)
    longer = words(300, 7001) + " " + chosen[1] + " " + words(300, 7002)
    part = " ".join(chosen[2].split()[:40])
    fine = words(60, 7003) + " " + " ".join(chosen[3].split()[:10])
    split = split_holdout(rows([*DOCUMENTS, edited, longer, part, fine]), share=0.02, maximum=500, seed=0)
    assert {r.content for r in split.heldout} == set(chosen)
    assert {r.content for r in split.train} & {edited, longer, part, fine} == {fine}
    assert split.stats["near_duplicates"] == 3


def test_many_near_copies_are_warned_of() -> None:
    base = [words(60, s) for s in range(40)]
    texts = [f"{b} copy number {i}" for b in base for i in range(20)]
    split = split_holdout(rows(texts), share=0.02, maximum=500, seed=0)
    with pytest.warns(AddlangWarning, match="are nearly equal to held-out text and are not trained on"):
        train = [r.content for r in split.train]
    held = {" ".join(r.content.split()[:60]) for r in split.heldout}
    assert not held & {" ".join(t.split()[:60]) for t in train}


def test_excluded_texts_are_neither_trained_on_nor_held_out() -> None:
    split = split_holdout(rows(DOCUMENTS), share=0.1, maximum=500, seed=0, exclude=DOCUMENTS[:100])
    seen = {r.content for r in split.train} | {r.content for r in split.heldout}
    assert seen == set(DOCUMENTS[100:])


def test_held_out_text_of_other_sources_can_be_excluded_afterwards() -> None:
    split = split_holdout(rows(DOCUMENTS), share=0.0, maximum=500, seed=0)
    other = split.excluding(DOCUMENTS[:3])
    assert {r.content for r in other.train} == set(DOCUMENTS[3:])
    assert {r.content for r in split.train} == set(DOCUMENTS)
    assert other.fingerprint != split.fingerprint


@pytest.mark.parametrize("paragraphs", [True, False])
def test_one_giant_document_gives_passages(paragraphs: bool) -> None:
    giant = ("\n\n" if paragraphs else " ").join(DOCUMENTS)
    with pytest.warns(AddlangWarning, match="passages of them are held out"):
        split = split_holdout(rows([giant]), share=0.02, maximum=500, seed=0)
    held, train = [r.content for r in split.heldout], [r.content for r in split.train]
    assert len(held) >= 5
    assert not any(h.strip() in t for h in held for t in train)
    assert sum(map(len, [*held, *train])) == len(giant)
    assert all(t in giant for t in train)
    assert split.stats["passages"]


def test_too_little_text_is_a_clear_error() -> None:
    with (
        pytest.warns(AddlangWarning, match="passages"),
        pytest.raises(AddlangError, match=r"too little target data(.|\n)*evaluation.target_datasets"),
    ):
        split_holdout(rows(["one short text"]), share=0.02, maximum=500, seed=0)


def test_nothing_left_to_train_on_is_a_clear_error() -> None:
    split = split_holdout(rows(DOCUMENTS[:20]), share=0.0, maximum=500, seed=0, exclude=DOCUMENTS[:20])
    with pytest.raises(AddlangError, match="no training text is left"):
        list(split.train)


def test_conversations_are_held_out_whole() -> None:
    talks = [
        Row(None, [{"role": "user", "content": d}, {"role": "assistant", "content": "ok"}], "f", i)
        for i, d in enumerate(DOCUMENTS[:100])
    ]
    split = split_holdout(talks, share=0.02, maximum=500, seed=0)
    assert len(split.heldout) == 8
    assert len(list(split.train)) == 92


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab .\n。!"), max_size=600), size=st.integers(5, 60))
def test_passages_are_the_text(text: str, size: int) -> None:
    passages = split_passages(text, size)
    assert "".join(passages) == text
    assert all(len(p) <= 2 * size for p in passages)


def test_normalisation_ignores_case_punctuation_and_space_but_no_letters() -> None:
    assert normalise("“Hello,  World!”") == normalise("hello world") == "helloworld"
    assert normalise("ọ́ma") == normalise("o\u0323\u0301ma") != normalise("oma")
    assert normalise("नेपाली") != normalise("नपल"), "vowel signs are letters here"
    assert normalise("...") != normalise("!!!")


@settings(max_examples=50, deadline=None)
@given(a=st.integers(0, 50), b=st.integers(0, 50))
def test_near_index_finds_a_text_and_no_unrelated_one(a: int, b: int) -> None:
    index = NearIndex([normalise(DOCUMENTS[a])], 0.6)
    assert index.near(normalise(DOCUMENTS[b])) == (a == b)


def test_texts_shorter_than_a_window_are_never_near() -> None:
    index = NearIndex(["a" * (WINDOW - 1)], 0.6)
    assert not index.near("a" * (WINDOW - 1))
    assert not NearIndex([], 0.6).near("a" * 100)
