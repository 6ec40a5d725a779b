"""Exactly k of the largest elements of a tensor that is read in blocks and never held as a whole.

The magnitudes of fp32 numbers sort like their bit patterns, so two histograms of 16 bits each find the k-th largest one.
Updates of bf16 weights have many equal magnitudes: those at the threshold are drawn by the seed, neither all kept (then
more than k remain) nor taken in order of their index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BINS = 1 << 16


class Largest:
    """The ``k`` largest by absolute value: :meth:`mask` must be called on the same blocks in the same order.

    Args:
        blocks: reads the tensor anew, block by block.
        k: how many to keep; at least as many elements must be there.
        rng: draws among equal magnitudes.
    """

    def __init__(self, blocks: Callable[[], Iterable[Tensor]], k: int, rng: np.random.Generator) -> None:
        high = torch.zeros(BINS, dtype=torch.int64)
        for block in blocks():
            high += torch.bincount(_bits(block) >> 16, minlength=BINS)
        above, top = _locate(high, k)
        low = torch.zeros(BINS, dtype=torch.int64)
        for block in blocks():
            pattern = _bits(block)
            low += torch.bincount(pattern[pattern >> 16 == top] & (BINS - 1), minlength=BINS)
        above_too, bottom = _locate(low, k - above)
        self.threshold = top << 16 | bottom
        self.wanted = k - above - above_too  # of those at the threshold
        self.tied = int(low[bottom])
        self._rng = rng

    def mask(self, block: Tensor) -> Tensor:
        """True where an element of this block is kept."""
        pattern = _bits(block)
        kept = pattern > self.threshold
        if self.threshold == 0:  # zeros change nothing, kept or not
            return kept.view(block.shape)
        equal = (pattern == self.threshold).nonzero().squeeze(1)
        if len(equal):
            here = int(self._rng.hypergeometric(self.wanted, self.tied - self.wanted, len(equal)))
            chosen = self._rng.permutation(len(equal))[:here]
            kept[equal[torch.from_numpy(chosen)]] = True
            self.wanted -= here
            self.tied -= len(equal)
        return kept.view(block.shape)


def _bits(block: Tensor) -> Tensor:
    """Magnitudes of fp32 numbers as integers in the same order, flat."""
    return block.abs().to(torch.float32).contiguous().view(torch.int32).flatten()


def _locate(histogram: Tensor, k: int) -> tuple[int, int]:
    """(number of elements in higher bins, bin of the k-th largest)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int((from_top < k).sum())
    above = int(from_top[place - 1]) if place else 0
    return above, len(histogram) - 1 - place
