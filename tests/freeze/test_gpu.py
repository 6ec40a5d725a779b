"""The copies of split layers where there is no GPU, or one without Triton."""

from __future__ import annotations

import pytest
import torch

from addlang.errors import AddlangWarning
from addlang.freeze import gpu


def test_without_a_gpu_torch_copies() -> None:
    x, index = torch.randn(5, 7), torch.tensor([6, 1])
    assert torch.equal(gpu.take_columns(x, index), x[:, index])
    out = torch.zeros(9, 7, dtype=torch.bfloat16)
    gpu.scatter_rows(x[:2], index, out)
    assert torch.equal(out[index], x[:2].bfloat16())
    assert not out[[0, 2, 3, 4, 5, 7, 8]].any()


def test_where_triton_does_not_run_a_warning_says_so() -> None:
    gpu._works.cache_clear()
    with pytest.warns(AddlangWarning, match="split layers run without Triton and take longer"):
        assert not gpu._works(torch.device("cpu"))
    gpu._works.cache_clear()
