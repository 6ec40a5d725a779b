"""Merging by hand: small vectors whose results can be checked on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from addlang.merge.arithmetic import dare, linear, revert, slerp, task_arithmetic, ties
from addlang.merge.largest import Largest


def blocks(*tensors: list[float] | Tensor, size: int = 3) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    """Vectors in blocks of ``size`` elements."""
    whole = [torch.as_tensor(t, dtype=torch.float32) for t in tensors]
    return lambda: iter([tuple(t[i : i + size] for t in whole) for i in range(0, len(whole[0]), size)])


def joined(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_linear_is_the_weighted_mean_or_the_weighted_sum() -> None:
    ab = blocks([1, 2, 3, 4], [5, 6, 7, 8])
    assert joined(linear(ab, [1, 3])).tolist() == [4, 5, 6, 7]
    assert joined(linear(ab, [1, 3], normalize=False)).tolist() == [16, 20, 24, 28]


def test_slerp_of_perpendicular_vectors_goes_along_the_circle() -> None:
    half = joined(slerp(blocks([1, 0, 0, 0], [0, 0, 0, 1]), 0.5))
    assert half.tolist() == pytest.approx([math.sqrt(0.5), 0, 0, math.sqrt(0.5)])
    third = joined(slerp(blocks([2, 0, 0, 0], [0, 0, 0, 2]), 1 / 3))
    assert third.tolist() == pytest.approx([2 * math.cos(math.pi / 6), 0, 0, 2 * math.sin(math.pi / 6)])


def test_slerp_of_nearly_colinear_vectors_is_linear_and_says_so() -> None:
    seen: list[int] = []
    out = joined(slerp(blocks([1, 1, 1, 1], [1, 1, 1, 1.02]), 0.5, lambda: seen.append(1)))
    assert out.tolist() == pytest.approx([1, 1, 1, 1.01])
    assert seen == [1]
    assert joined(slerp(blocks([0, 0], [0, 0]), 0.5)).tolist() == [0, 0]


def test_task_arithmetic_adds_updates_and_the_chat_vector_is_one() -> None:
    base, a, b = [1.0, 1, 1, 1], [2.0, 1, 0, 1], [1.0, 3, 1, 1]
    assert joined(task_arithmetic(blocks(base, a, b), [1, 0.5], scale=2)).tolist() == [3, 3, -1, 1]
    assert joined(task_arithmetic(blocks(base, a, b), [1, 3], normalize=True)).tolist() == [1.25, 2.5, 0.75, 1]


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    """Two updates of six elements, the upper half kept of each: [4, 0, -3, 0, 0, 2] and [-1, 0, -5, 0, 2, 0]."""
    base = [0.0] * 6
    a, b = [4.0, 1, -3, 0.5, -1, 2], [-1.0, 0.2, -5, 0.1, 2, 0.3]
    merged = joined(ties(blocks(base, a, b, size=4), [1, 1], [0.5, 0.5], rng()))
    # element 0: signs differ, + has the larger sum, so only a counts; 2: both; 4 and 5: one each
    assert merged.tolist() == pytest.approx([4, 0, -4, 0, 2, 2])
    added = joined(ties(blocks(base, a, b, size=4), [1, 1], [0.5, 0.5], rng(), normalize=False))
    assert added.tolist() == pytest.approx([4, 0, -8, 0, 2, 2])


def test_ties_with_density_1_trims_nothing() -> None:
    merged = joined(ties(blocks([0.0] * 4, [1.0, 2, -3, 4]), [1], [1.0], rng()))
    assert merged.tolist() == [1, 2, -3, 4]


@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_dare_leaves_the_expected_update_as_it_was(rescale: str) -> None:
    n = 20000
    base, a = torch.zeros(n), torch.ones(n)
    out = joined(dare(blocks(base, a, size=999), [1], [0.1], lambda i: rng(i), rescale=rescale))  # type: ignore[arg-type]
    assert float(out.mean()) == pytest.approx(1.0, abs=0.07 if rescale == "density" else 1e-4)
    assert float((out != 0).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_dare_without_rescaling_shrinks_the_update() -> None:
    out = joined(dare(blocks(torch.zeros(5000), torch.ones(5000)), [1], [0.1], lambda i: rng(i), rescale="none"))
    assert set(out.tolist()) == {0.0, 1.0}


def test_dare_drops_the_same_elements_for_a_seed_and_others_for_each_model() -> None:
    base, a = torch.zeros(400), torch.ones(400)

    def drop(seed: int) -> Tensor:
        pair = blocks(base, a, a * 10, size=64)
        return joined(dare(pair, [1, 1], [0.5, 0.5], lambda i: np.random.default_rng([seed, i]), rescale="none"))

    assert torch.equal(drop(0), drop(0))
    assert not torch.equal(drop(0), drop(1))
    assert set(drop(0).tolist()) == {0.0, 1.0, 10.0, 11.0}  # each model has draws of its own


def test_reverting_is_exact_at_both_ends() -> None:
    """``w0 + 1 (w - w0)`` in fp32 would give 0 for the third element."""
    w0, w = [1.0, -2.0, 1.0], [0.5, 3.0, 1e-9]
    assert joined(revert(blocks(w0, w), 1.0)).tolist() == torch.tensor(w).tolist()
    assert joined(revert(blocks(w0, w), 0.0)).tolist() == w0
    assert joined(revert(blocks(w0, w), 0.5)).tolist() == pytest.approx([0.75, 0.5, 0.5])


def test_reverting_the_small_changes_keeps_the_large_ones_whole() -> None:
    w0, w = [1.0, 1.0, 100.0, 1.0], [1.5, 1.1, 102.0, 0.7]
    by_size = joined(revert(blocks(w0, w), 1.0, density=0.5, rng=rng()))
    assert by_size.tolist() == pytest.approx([1.5, 1.0, 102.0, 1.0])
    relative = joined(revert(blocks(w0, w), 1.0, density=0.5, criterion="relative", rng=rng()))
    assert relative.tolist() == pytest.approx([1.5, 1.0, 100.0, 0.7])


def test_shielded_elements_go_back_to_the_source() -> None:
    frozen = torch.tensor([True, False, False, True])
    out = joined(revert(blocks([0.0] * 4, [1.0] * 4), 1.0, shielded=lambda start, stop: frozen[start:stop]))
    assert out.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("k", [1, 7, 500, 999, 1000])
def test_exactly_k_of_the_largest_are_kept_whatever_the_blocks(k: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(k)).bfloat16().float()  # bf16: many equal ones
    parts = [values[i : i + 77] for i in range(0, 1000, 77)]
    largest = Largest(lambda: iter(parts), k, rng())
    mask = torch.cat([largest.mask(p) for p in parts])
    assert int(mask.sum()) == k
    assert float(values[mask].abs().min()) >= float(torch.cat([torch.zeros(1), values[~mask].abs()]).max())


def test_equal_magnitudes_are_drawn_and_not_taken_in_order() -> None:
    values = torch.ones(1000)
    parts = [values[:300], values[300:]]

    def kept(seed: int) -> Tensor:
        largest = Largest(lambda: iter(parts), 500, rng(seed))
        return torch.cat([largest.mask(p) for p in parts])

    assert int(kept(0).sum()) == 500
    assert 100 < int(kept(0)[:300].sum()) < 200  # about half, not the first 300
    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))


def test_an_update_that_is_mostly_zero_keeps_what_is_not() -> None:
    values = torch.zeros(100)
    values[[3, 50]] = torch.tensor([-2.0, 1e-12])
    largest = Largest(lambda: iter([values]), 40, rng())
    assert largest.mask(values).nonzero().flatten().tolist() == [3, 50]
