"""The Triton kernel of :mod:`addlang.scoring.gpu`; imported only where there is a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS, STEP, ROWS = 256, 8, 64  # of a block, of a pass over it, and of a program; not tuned


def column_squares(x: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_t w_t x_tj^2``; x: contiguous [N, K], weights: fp32 [N] or None (all 1) -> float64 [K]."""
    import torch

    rows, width = x.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    partial = torch.empty(triton.cdiv(rows, ROWS), width, dtype=torch.float32, device=x.device)
    grid = (partial.shape[0], triton.cdiv(width, columns))
    _column_squares[grid](
        x, x if weights is None else weights, partial, rows, width, WEIGHTED=weights is not None, N=ROWS, R=STEP, C=columns
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


@triton.jit  # type: ignore[untyped-decorator]
def _column_squares(  # type: ignore[no-untyped-def]
    x, weights, partial, rows, width, WEIGHTED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * N
    c = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    for offset in range(0, N, R):
        r = first + offset + tl.arange(0, R)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        values = tl.load(x + r[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            total += values * values * tl.load(weights + r, mask=r < rows, other=0.0)[:, None]
        else:
            total += values * values
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + c, tl.sum(total, 0), mask=c < width)
