"""Copies and near copies: what is found agrees with the similarity computed in full."""

from __future__ import annotations

import random

import numpy as np

from addlang.data.duplicates import HASHES, Duplicates, signature
from addlang.data.similar import WINDOW, normalise

WORDS = [a + b for a in "bdfgklmnprst" for b in ("a", "en", "iro", "ut", "osi")]


def text(seed: int, length: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def similarity(a: str, b: str) -> float:
    left, right = ({t[i : i + WINDOW] for i in range(len(t) - WINDOW + 1)} for t in (a, b))
    return len(left & right) / len(left | right)


def test_the_share_of_equal_min_hashes_estimates_the_jaccard_similarity() -> None:
    for changed in (1, 3, 8):
        a = text(1)
        b = [*a]
        for place in random.Random(2).sample(range(len(b)), changed):
            b[place] = "zzz"
        left, right = normalise(" ".join(a)), normalise(" ".join(b))
        one, two = signature(left), signature(right)
        assert one is not None
        assert two is not None
        estimate = float(np.mean(one == two))
        assert abs(estimate - similarity(left, right)) < 4 * (0.25 / HASHES) ** 0.5


def test_a_changed_word_makes_a_near_copy_and_another_text_does_not() -> None:
    found = Duplicates(0.8)
    a = text(1)
    b = [*a[:60], "zzz", *a[60:]]
    assert found.add(normalise(" ".join(a))) is None
    assert found.add(normalise(" ".join(b))) == "near"
    assert found.add(normalise(" ".join(a))) == "copy"
    assert found.add(normalise(" ".join(text(2)))) is None
    assert found.add("short") is None
    assert found.add("short") == "copy"


def test_without_a_threshold_only_equal_texts_are_copies() -> None:
    found = Duplicates(None)
    a = text(1)
    assert found.add(normalise(" ".join(a))) is None
    assert found.add(normalise(" ".join([*a, "zzz"]))) is None
    assert found.add(normalise(" ".join(a).upper())) == "copy"
