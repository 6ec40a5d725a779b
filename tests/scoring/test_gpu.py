"""Sums of squares where there is no GPU, or one without Triton; with one: ``tests/gpu``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tiny import calibration, make_model

from addlang.errors import AddlangError, AddlangWarning
from addlang.scoring import gpu
from addlang.scoring.activations import InputStatistics


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

    class Kernels:
        @staticmethod
        def add_column_squares(table: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None) -> None:
            assert current == [x.device]
            squares = x.double().square()
            table[0] += squares.sum(0) if weights is None else weights.double() @ squares

        @staticmethod
        def row_scales(x: torch.Tensor, weights: torch.Tensor, epsilon: float) -> torch.Tensor:
            assert current == [x.device]
            return weights / (x.square().mean(1) + epsilon)

    monkeypatch.setattr("addlang.scoring._triton", Kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gpu._works.cache_clear()
    assert gpu._works(torch.device("cpu"))
    gpu._works.cache_clear()


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "qwen3"])
def test_statistics_are_the_same_with_the_kernels(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two sizes, with and without pads; stand-ins for the kernels, one row of the table after the other."""

    def add_column_squares(table: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        used.append(len(x))
        squares = x.double().square() if weights is None else weights.double()[:, None] * x.double().square()
        for p in range(len(table)):
            table[p] += squares[p :: len(table)].sum(0)

    def row_scales(x: torch.Tensor, weights: torch.Tensor | None, epsilon: float) -> torch.Tensor:
        scale = 1 / (x.float().square().mean(1) + epsilon)
        return scale if weights is None else scale * weights

    used: list[int] = []
    model, data = make_model(architecture), calibration(9)
    plain, fused = InputStatistics(reference=True), InputStatistics(reference=True)
    plain.collect(model, data)
    assert not used
    sometimes = itertools.cycle([True, True, True, False, True])  # small batches go without
    monkeypatch.setattr(gpu, "usable", lambda _: next(sometimes))
    monkeypatch.setattr("addlang.scoring._triton", SimpleNamespace(**locals()), raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    fused.collect(model, data)
    assert used
    assert set(fused.squares) == set(plain.squares)
    for name, squares in plain.squares.items():
        assert torch.allclose(fused.squares[name], squares, rtol=1e-5), name
        assert torch.equal(fused.sequence_means[name], plain.sequence_means[name]), name


def test_layers_with_one_input_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    count = InputStatistics._count
    monkeypatch.setattr(InputStatistics, "_count", lambda self, name, *a: counted.append(name) or count(self, name, *a))
    statistics = InputStatistics()
    statistics.collect(make_model("llama"), calibration(2))
    of_layer = {n.removeprefix("model.layers.0.") for n in counted if n.startswith("model.layers.0.") and "proj" in n}
    assert of_layer == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    found = statistics.squares
    assert torch.equal(found["model.layers.0.self_attn.v_proj"], found["model.layers.0.self_attn.q_proj"])
    assert torch.equal(found["model.layers.0.mlp.up_proj"], found["model.layers.0.mlp.gate_proj"])


def test_an_input_that_is_shared_in_some_batches_only_is_refused() -> None:
    statistics = InputStatistics()
    statistics._leader["model.layers.0.mlp.up_proj"] = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AddlangError, match=r"up_proj' shares its input with another layer in some batches only"):
        statistics.collect(make_model("llama"), calibration(2))
