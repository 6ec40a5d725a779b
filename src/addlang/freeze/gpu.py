"""Scattered rows and columns copied on a GPU in one coalesced pass each.

torch's ``index_select`` of columns and ``index_copy_`` take 1.7 to 3 times as long as these kernels on an H200, and a cast is
a pass of its own there. Both ways give the same bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from addlang.triton_check import works

SMALLEST = 1 << 18  # elements, not tuned; below, launching from Python should cost more than there is to save


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """``x[:, index]``: [N, K], int64 [n] -> [N, n]."""
    if not _fast(x):
        return torch.index_select(x, 1, index)
    from addlang.freeze import _triton

    out = x.new_empty(x.shape[0], len(index))
    with torch.cuda.device_of(x):
        _triton.take_columns(x, index, out)
    return out


def scatter_rows(piece: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[index] = piece``, rounded to the type of ``out``: [n, C], int64 [n], [R, C]."""
    if _fast(piece) and out.is_contiguous():
        from addlang.freeze import _triton

        with torch.cuda.device_of(piece):
            _triton.scatter_rows(piece, index, out)
    else:
        out.index_copy_(0, index, piece.to(out.dtype))


def _fast(x: Tensor) -> bool:
    large = x.is_cuda and x.numel() >= SMALLEST and x.is_contiguous()
    return large and not torch.compiler.is_compiling() and _works(x.device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton compiles and runs here; it comes with torch for CUDA, and needs a C compiler."""

    def check() -> bool:
        from addlang.freeze import _triton

        x = torch.arange(12.0, device=device).view(3, 4)
        index = torch.tensor([0, 3], device=device)
        taken, scattered = x.new_empty(3, 2), torch.zeros(4, 4, device=device, dtype=torch.bfloat16)
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
            _triton.take_columns(x, index, taken)
            _triton.scatter_rows(x[:2], index, scattered)
        return torch.equal(taken, x[:, index]) and torch.equal(scattered[index], x[:2].bfloat16())

    return works(check, "split layers run without Triton and take longer")
