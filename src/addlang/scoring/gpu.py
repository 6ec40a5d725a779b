"""Sums of squared features on a GPU: one pass over an activation and one launch for each sum.

A host that launches a dozen small operations for every input of every layer falls behind the GPU, which has a billion weights
done in 25 ms for 4,096 tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from addlang.triton_check import works

SMALLEST = 1 << 18  # elements, not tuned; below, launching should cost more than there is to save
PROGRAMS = 32  # that share the rows of an activation, each with sums of its own: what they come to does not depend on their order


def usable(x: Tensor) -> bool:
    """Whether :func:`add_column_squares` is the way to sum the squares of ``x`` [N, K]."""
    fits = x.is_cuda and x.numel() >= SMALLEST and x.is_contiguous() and x.dtype != torch.float64
    return fits and _works(x.device)


def new_table(x: Tensor) -> Tensor:
    """Sums of the columns of ``x`` [N, K] in parts, float64 [P, K]: the sum is that of the parts."""
    return torch.zeros(PROGRAMS, x.shape[1], dtype=torch.float64, device=x.device)


def add_column_squares(table: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """Add ``sum_t w_t x_tj^2`` to the sums in ``table``; x: [N, K], weights: fp32 [N] (None: all 1)."""
    from addlang.scoring import _triton

    with torch.cuda.device_of(x):
        _triton.add_column_squares(table, x, weights)


def row_scales(x: Tensor, weights: Tensor | None, epsilon: float) -> Tensor:
    """What the squares of each row are multiplied by to be those of the row after RMSNorm: fp32 [N]."""
    from addlang.scoring import _triton

    with torch.cuda.device_of(x):
        return _triton.row_scales(x, weights, epsilon)


@functools.cache
def _works(device: torch.device) -> bool:
    def check() -> bool:
        x = torch.arange(15.0, device=device).view(3, 5)
        weights = torch.tensor([1.0, 0.0, 0.5], device=device)
        table = new_table(x)
        add_column_squares(table, x, None)
        add_column_squares(table, x, weights)
        squares = x.double().square()
        summed = torch.equal(table.sum(0), squares.sum(0) + weights.double() @ squares)
        scales = weights / (x.square().mean(1) + 0.5)
        return summed and torch.allclose(row_scales(x, weights, 0.5), scales)

    return works(check, "scoring runs without Triton and takes longer")
