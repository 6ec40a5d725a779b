"""Sums of squares where there is no GPU, or one without Triton; with one: ``tests/gpu``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from addlang.errors import AddlangWarning
from addlang.scoring import gpu
from addlang.scoring.activations import normalised, row_scales


def test_without_a_gpu_the_kernel_is_not_used() -> None:
    assert not gpu.usable(torch.ones(4096, 128))


def test_where_triton_does_not_run_a_warning_says_so() -> None:
    gpu._works.cache_clear()
    with pytest.warns(AddlangWarning, match="scoring runs without Triton and takes longer"):
        assert not gpu._works(torch.device("cpu"))
    gpu._works.cache_clear()


def test_the_check_runs_the_kernel_on_the_device_that_it_asks_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may be another one."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    def column_squares(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        assert current == [x.device]
        squares = x.double().square()
        return squares.sum(0) if weights is None else weights.double() @ squares

    monkeypatch.setattr("addlang.scoring._triton", SimpleNamespace(column_squares=column_squares), raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gpu._works.cache_clear()
    assert gpu._works(torch.device("cpu"))
    gpu._works.cache_clear()


def test_scaled_rows_have_the_squares_of_normalised_rows() -> None:
    norm = make_model("llama").model.norm
    x, weights = torch.randn(7, 24), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    want = weights[:, None] * normalised(x, norm).square()
    assert torch.allclose(row_scales(x, weights, norm)[:, None] * x.square(), want)
    assert torch.allclose(row_scales(x, None, norm)[:, None] * x.square(), normalised(x, norm).square())
