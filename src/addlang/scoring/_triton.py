"""The Triton kernels of :mod:`addlang.scoring.gpu`; imported only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, STEP = 256, 8  # of a program's pass over the activation; not tuned


def add_column_squares(table: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """``table.sum(0) += sum_t w_t x_tj^2``; x: contiguous [N, K], weights: fp32 [N] or None (all 1), table: float64 [P, K]."""
    rows, width = x.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    programs = table.shape[0]
    _add_column_squares[(programs, triton.cdiv(width, columns))](
        x, x if weights is None else weights, table, rows, width, WEIGHTED=weights is not None, P=programs, R=STEP, C=columns
    )  # fmt: skip


def row_scales(x: Tensor, weights: Tensor | None, epsilon: float) -> Tensor:
    """``w_t / (mean_j x_tj^2 + epsilon)``, fp32 [N]; x: contiguous [N, K], weights: fp32 [N] or None (all 1)."""
    rows, width = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    columns = min(2 * COLUMNS, triton.next_power_of_2(width))
    _row_scales[(triton.cdiv(rows, STEP),)](
        x, x if weights is None else weights, out, rows, width, epsilon, WEIGHTED=weights is not None, R=STEP, C=columns
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _add_column_squares(  # type: ignore[no-untyped-def]
    x, weights, table, rows, width, WEIGHTED: tl.constexpr, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    p = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    for first in range(p * R, rows, P * R):
        r = first + tl.arange(0, R).to(tl.int64)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        values = tl.load(x + r[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            total += values * values * tl.load(weights + r, mask=r < rows, other=0.0)[:, None]
        else:
            total += values * values
    own = table + p.to(tl.int64) * width + c  # no other program adds there, so the order is always the same
    known = tl.load(own, mask=c < width, other=0.0)
    tl.store(own, known + tl.sum(total, 0).to(tl.float64), mask=c < width)


@triton.jit  # type: ignore[untyped-decorator]
def _row_scales(  # type: ignore[no-untyped-def]
    x, weights, out, rows, width, epsilon, WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    r = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64)
    total = tl.zeros((R, C), dtype=tl.float32)
    for first in range(0, width, C):
        c = first + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        values = tl.load(x + r[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += values * values
    scale = 1.0 / (tl.sum(total, 1) / width + epsilon)
    if WEIGHTED:
        scale *= tl.load(weights + r, mask=r < rows, other=0.0)
    tl.store(out + r, scale, mask=r < rows)
