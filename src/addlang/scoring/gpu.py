"""Sums of squared features on a GPU in one pass over the activation, instead of one for each of cast, square and sum."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from addlang.triton_check import works

SMALLEST = 1 << 18  # elements, not tuned; below, launching should cost more than there is to save


def usable(x: Tensor) -> bool:
    """Whether :func:`column_squares` is the way to sum the squares of ``x``."""
    fits = x.is_cuda and x.numel() >= SMALLEST and x.is_contiguous() and x.dtype != torch.float64
    return fits and _works(x.device)


def column_squares(x: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_t w_t x_tj^2`` in float64 [K]; x: [N, K], weights: fp32 [N] (None: all 1)."""
    from addlang.scoring import _triton

    with torch.cuda.device_of(x):
        return _triton.column_squares(x, weights)


@functools.cache
def _works(device: torch.device) -> bool:
    def check() -> bool:
        x = torch.arange(15.0, device=device).view(3, 5)
        weights = torch.tensor([1.0, 0.0, 0.5], device=device)
        plain, weighted = column_squares(x, None), column_squares(x, weights)
        squares = x.double().square()
        return torch.equal(plain, squares.sum(0)) and torch.equal(weighted, weights.double() @ squares)

    return works(check, "scoring runs without Triton and takes longer")
