"""The order of training data is a pure function of sources, weights and seed, and keeps the shares asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addlang.data.mixture import Mixture
from addlang.data.packing import Packed
from addlang.errors import AddlangError, AddlangWarning

QUICK = settings(max_examples=60, deadline=None)


def source(lengths: list[int], start: int = 0) -> Packed:
    """Sequences of the given lengths whose tokens count up from ``start``."""
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(start, start + total).astype(np.uint32)
    return Packed(Path(f"s{start}"), tokens, None, offsets, offsets[:-1], {"fingerprint": str(start)})


SOURCES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=4)


def mix(lengths: list[list[int]], weights: Any = None, **options: Any) -> Mixture:
    return Mixture([source(x, 1000 * i) for i, x in enumerate(lengths)], weights or [None] * len(lengths), **options)


pytestmark = pytest.mark.filterwarnings("ignore::addlang.errors.AddlangWarning")


@QUICK
@given(lengths=SOURCES, seed=st.integers(0, 5), sequences=st.integers(1, 80))
def test_every_epoch_holds_every_sequence_exactly_once(lengths: list[list[int]], seed: int, sequences: int) -> None:
    mixture = mix(lengths, seed=seed, sequences=sequences)
    seen: dict[tuple[int, int], list[int]] = {}
    for s, i, e in (mixture.locate(k) for k in range(sequences)):
        seen.setdefault((s, e), []).append(i)
    for (s, e), indices in seen.items():
        size = len(lengths[s])
        assert len(set(indices)) == len(indices)
        if (s, e + 1) in seen:
            assert sorted(indices) == list(range(size))


@QUICK
@given(lengths=SOURCES, seed=st.integers(0, 5), sequences=st.integers(2, 60), data=st.data())
def test_any_position_can_be_reached_without_what_stands_before(
    lengths: list[list[int]], seed: int, sequences: int, data: st.DataObject
) -> None:
    whole = mix(lengths, seed=seed, sequences=sequences)
    at = data.draw(st.integers(0, sequences - 1))
    n = data.draw(st.integers(1, sequences - at))
    fresh = mix(lengths, seed=seed, sequences=sequences)
    expected = [whole.locate(k) for k in range(at, at + n)]
    assert list(zip(*(x.tolist() for x in fresh.locate_many(at, n)), strict=True)) == expected
    batch = fresh.batch(at, n, sequence_length=9, pad_id=0)
    for row, (s, i, _) in enumerate(expected):
        alone = whole.sources[s].batch([i], 9, 0)
        for key, value in alone.items():
            assert (batch[key][row] == value[0]).all()


@QUICK
@given(lengths=SOURCES, seed=st.integers(0, 3), short=st.integers(1, 100), longer=st.integers(0, 200))
def test_a_larger_budget_only_appends(lengths: list[list[int]], seed: int, short: int, longer: int) -> None:
    a, b = mix(lengths, seed=seed, tokens=short), mix(lengths, seed=seed, tokens=short + longer)
    assert [a.locate(k) for k in range(len(a))] == [b.locate(k) for k in range(len(a))]


@QUICK
@given(lengths=SOURCES, tokens=st.integers(1, 300), batch=st.integers(1, 8))
def test_budget_is_reached_with_the_fewest_whole_batches(lengths: list[list[int]], tokens: int, batch: int) -> None:
    mixture = mix(lengths, seed=1, tokens=tokens, multiple_of=batch)
    assert len(mixture) % batch == 0
    drawn = [int(mixture.sources[s].lengths([i])[0]) for s, i, _ in map(mixture.locate, range(len(mixture)))]
    assert sum(drawn) == mixture.tokens_total >= tokens
    assert sum(drawn[:-batch]) < tokens


@QUICK
@given(weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_every_prefix_has_nearly_the_shares(weights: list[float], seed: int) -> None:
    mixture = mix([[8] * (5 + 20 * i) for i in range(len(weights))], weights, seed=seed, sequences=400)
    chosen = mixture.locate_many(0, 400)[0]
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 401)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - wanted).max() <= len(weights)


def test_weights_are_shares_of_tokens_not_of_sequences() -> None:
    mixture = mix([[512] * 400, [100] * 400], [0.75, 0.25], seed=0, tokens=100_000)
    assert mixture.tokens / mixture.tokens.sum() == pytest.approx([0.75, 0.25], abs=0.01)
    assert mixture.tokens_total == pytest.approx(100_000, abs=512)


def test_sources_without_weight_share_what_is_left_by_size() -> None:
    mixture = mix([[10] * 30, [10] * 10, [10] * 99], [None, None, 0.2], seed=0, sequences=100)
    assert mixture.shares.tolist() == pytest.approx([0.6, 0.2, 0.2])
    assert mix([[10] * 30, [10] * 10], seed=0, sequences=9).shares.tolist() == pytest.approx([0.75, 0.25])


def test_given_weights_alone_are_ratios() -> None:
    assert mix([[10], [10]], [3, 1], seed=0, sequences=4).shares.tolist() == [0.75, 0.25]


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(AddlangError, match=r"sum to 1 and leave nothing for the 1 dataset(.|\n)*less than 1"):
        mix([[1], [1]], [1.0, None], seed=0, sequences=1)


def test_no_source_is_refused() -> None:
    with pytest.raises(AddlangError, match="no training data"):
        Mixture([], [], seed=0, sequences=1)


def test_seed_changes_the_order_and_nothing_else() -> None:
    a, b = (mix([[3] * 50, [3] * 50], seed=s, sequences=100) for s in (0, 1))
    assert [a.locate(k) for k in range(100)] != [b.locate(k) for k in range(100)]
    assert a.tokens.tolist() == b.tokens.tolist()


def test_epochs_differ_in_order() -> None:
    mixture = mix([[3] * 50], seed=0, sequences=100)
    indices = mixture.locate_many(0, 100)[1]
    assert indices[:50].tolist() != indices[50:].tolist()
    assert mixture.epochs.tolist() == [2.0]


def test_many_repetitions_are_warned_of_by_name() -> None:
    with pytest.warns(AddlangWarning, match="5.0 times over small.jsonl"):
        mix([[3] * 10], seed=0, sequences=50, names=["small.jsonl"])


def test_position_outside_the_run_is_refused() -> None:
    mixture = mix([[3] * 10], seed=0, sequences=5)
    with pytest.raises(IndexError):
        mixture.locate(5)
    with pytest.raises(IndexError):
        mixture.batch(3, 3, sequence_length=3, pad_id=0)


def test_summary_is_plain_data() -> None:
    (row,) = mix([[4] * 10], seed=0, sequences=5, names=["a"]).summary()
    assert row == {"name": "a", "fingerprint": "0", "share": 1.0, "tokens": 20, "sequences": 5, "epochs": 0.5}
