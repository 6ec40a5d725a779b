"""Budgets: epochs are whole passes, parts have what they would have alone, replay comes on top or in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from addlang.data.mixing import add_replay, mix
from addlang.data.packing import Packed
from addlang.schema import Phase

LENGTH = 16


def packed(sequences: int, seed: int, last: int = LENGTH) -> Packed:
    """Full sequences, the last one of ``last`` tokens."""
    total = (sequences - 1) * LENGTH + last
    tokens = np.random.default_rng(seed).integers(0, 99, total).astype(np.uint16)
    offsets = np.append(np.arange(0, total, LENGTH), total).astype(np.int64)
    return Packed(Path(), tokens, None, offsets, np.array([0]), {"fingerprint": str(seed)})


def phase(paths: list[Any], **keys: Any) -> Phase:
    specs = [p if isinstance(p, dict) else {"path": p} for p in paths]
    return Phase(datasets=specs, strategy="full", sequence_length=LENGTH, **{"batch_size": 4, **keys})


def test_epochs_show_every_sequence_that_often() -> None:
    data = [packed(20, 1), packed(12, 2, last=5)]
    mixed = mix(phase(["a", "b"], epochs=3), data, [None, None], seed=0)
    source, index, _ = mixed.mixture.locate_many(0, len(mixed.mixture))
    for s, d in enumerate(data):
        np.testing.assert_array_equal(np.bincount(index[source == s]), np.full(len(d), 3))
    assert len(mixed.mixture) == 3 * 32
    assert mixed.mixture.tokens.tolist() == [3 * 320, 3 * 181]


def test_epochs_end_with_a_whole_batch() -> None:
    mixed = mix(phase(["a"], epochs=1.5), [packed(7, 1)], [None], seed=0)
    assert len(mixed.mixture) == 12  # 10.5 sequences, batches of 4


def test_epochs_count_target_data_and_what_is_mixed_in_by_weight_comes_on_top() -> None:
    specs = [{"path": "a"}, {"path": "e", "role": "replay", "weight": 0.2}]
    mixed = mix(phase(specs, epochs=2), [packed(32, 1), packed(100, 2)], [None, 0.2], seed=0)
    assert mixed.mixture.epochs[0] == pytest.approx(2, abs=0.1)
    assert mixed.mixture.tokens[1] / mixed.mixture.tokens_total == pytest.approx(0.2, abs=0.02)


def test_parts_have_the_tokens_and_steps_that_they_have_alone() -> None:
    data = [packed(40, 1), packed(30, 2), packed(50, 3)]
    parts = [{"name": "x", "datasets": 2, "tokens": 500}, {"name": "y", "datasets": 1, "epochs": 1}]
    mixture = mix(phase(["a", "b", "c"], parts=parts), data, [None] * 3, seed=0)
    alone = [
        mix(phase(["a", "b"], tokens=500), data[:2], [None] * 2, seed=0),
        mix(phase(["c"], epochs=1), data[2:], [None], seed=0),
    ]
    assert len(mixture.mixture) == sum(len(m.mixture) for m in alone)
    assert mixture.mixture.tokens[:2].sum() == pytest.approx(alone[0].mixture.tokens_total, rel=0.1)
    assert mixture.mixture.tokens[2] == pytest.approx(alone[1].mixture.tokens_total, rel=0.1)
    assert mixture.notes[-1] == "as many steps as the phases it stands for: x 8 + y 13 = 21"


@pytest.mark.parametrize("weight", [0.5, None], ids=["half", "by size"])
def test_without_a_budget_the_target_is_read_once_whatever_is_mixed_in(weight: float | None) -> None:
    replayed = {"path": "e", "role": "replay", "weight": weight}
    data = [packed(40, 1), packed(60, 2)]
    mixed, once = (mix(phase(["a", replayed], **keys), data, [None, weight], seed=0) for keys in ({}, {"epochs": 1}))
    assert mixed.mixture.epochs[0] == pytest.approx(1, abs=0.05)
    assert mixed.tokens == once.tokens == (1280 if weight else 1600)
    assert mix(phase(["a"]), data[:1], [None], seed=0).tokens == 640
    parts = [{"name": "x", "datasets": 2}, {"name": "y", "datasets": 1}]
    as_parts = mix(phase(["a", replayed, "b"], parts=parts), [*data, packed(24, 3)], [None, weight, None], seed=0)
    assert as_parts.mixture.epochs[[0, 2]] == pytest.approx([1, 1], abs=0.1)


def test_one_pass_is_at_most_the_papers_tokens_with_what_is_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("addlang.train.schedule.PAPER_TOKENS", 1000)
    specs = [{"path": "a"}, {"path": "e", "role": "replay", "weight": 0.5}]
    data = [packed(40, 1), packed(60, 2)]
    assert mix(phase(specs), data, [None, 0.5], seed=0).tokens == 1000
    assert mix(phase(specs, epochs=1), data, [None, 0.5], seed=0).tokens == 1280


@pytest.mark.parametrize(("append", "tokens", "share"), [(True, 1100, 0.1 / 1.1), (False, 1000, 0.1)])
def test_replay_is_on_top_of_the_budget_or_in_place(append: bool, tokens: int, share: float) -> None:
    base = mix(phase(["a", "b"], tokens=1000), [packed(80, 1), packed(20, 2)], [None] * 2, seed=0)
    mixed = add_replay(base, packed(6, 3), share=0.1, append=append, name="replay")
    assert mixed.tokens == tokens
    assert tokens <= mixed.mixture.tokens_total < tokens + 4 * LENGTH
    assert mixed.mixture.tokens[2] / mixed.mixture.tokens_total == pytest.approx(share, abs=0.02)
    assert mixed.mixture.tokens[0] / mixed.mixture.tokens[1] == pytest.approx(4, rel=0.2)


def test_what_guards_read_counts() -> None:
    guarded = phase(["a"], tokens=1000, guards=[{"name": "kl", "share": 0.25}])
    assert mix(guarded, [packed(80, 1)], [None], seed=0).tokens == 750
