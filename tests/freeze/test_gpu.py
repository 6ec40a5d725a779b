"""The copies of split layers where there is no GPU, or one without Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

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


def test_the_check_runs_the_kernels_on_the_device_that_it_asks_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may be another one."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    def take_columns(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        assert current == [x.device]
        out.copy_(x[:, index])

    def scatter_rows(piece: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        assert current == [piece.device]
        out[index] = piece.to(out.dtype)

    kernels = SimpleNamespace(take_columns=take_columns, scatter_rows=scatter_rows)
    monkeypatch.setattr("addlang.freeze._triton", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gpu._works.cache_clear()
    assert gpu._works(torch.device("cpu"))
    gpu._works.cache_clear()
