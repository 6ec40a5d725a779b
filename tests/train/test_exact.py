"""Where training asks for deterministic kernels; what they are on a GPU is in ``tests/gpu``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_model

from addlang import guards
from addlang.errors import AddlangError
from addlang.run import execute, prepare_device
from addlang.strategies import available
from addlang.train.exact import any_order, exact_kernels
from guarding import FEW, said
from tinyrun import World
from training import AsOnAGpu

CUDA = torch.device("cuda")
TOLD = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def settings() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    deterministic, warns, cudnn = settings()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warns)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def test_a_deterministic_run_trains_on_a_gpu_without_kernels_that_only_warn() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with exact_kernels(CUDA):
        assert settings() == (True, False, False)
    assert settings() == (True, True, True)


@pytest.mark.parametrize(("device", "deterministic"), [("cpu", True), ("cuda", False)])
def test_other_runs_keep_what_they_have(device: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    before = settings()
    with exact_kernels(torch.device(device)):
        assert settings() == before


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_tells_the_libraries_that_are_told_by_environment_variables(
    deterministic: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in TOLD}
    monkeypatch.setattr(os, "environ", environment)
    prepare_device(world.recipe(tmp_path / "out", deterministic=deterministic))
    assert {k: environment.get(k) for k in TOLD} == (TOLD if deterministic else dict.fromkeys(TOLD))


def test_an_operation_without_a_deterministic_kernel_is_an_error_with_the_fix() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with (
        pytest.raises(AddlangError, match=r"deterministic kernel \(kth(.|\n)*fix: deterministic: false"),
        exact_kernels(CUDA),
    ):
        raise RuntimeError("kth does not have a deterministic implementation, but you set 'torch.use_deterministic...'")
    for other in ("out of memory", "the recomputation is not deterministic"):
        with pytest.raises(RuntimeError, match=other), exact_kernels(CUDA):
            raise RuntimeError(other)
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_process_that_asked_cublas_too_late_is_told_how_to_start() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.raises(AddlangError, match=r"new process with CUBLAS_WORKSPACE_CONFIG=:4096:8"), exact_kernels(CUDA):
        raise RuntimeError(
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` ..."
        )


OPTIONS = {"lota": {"warmup_steps": 3}, "layers": {"freeze": "0"}, "self_anchor": {"anchor": FEW}}


@contextlib.contextmanager
def as_on_a_gpu(watched: list[AsOnAGpu]) -> Iterator[None]:
    watched.append(AsOnAGpu())
    torch.use_deterministic_algorithms(True)
    with watched[-1]:
        yield


@pytest.mark.parametrize("name", [*available(), *(f"full + {g}" for g in guards.available())])
def test_no_operation_of_a_run_lacks_a_deterministic_kernel_on_a_gpu(
    name: str, world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[AsOnAGpu] = []
    for module in ("addlang.train.loop", "addlang.train.exact"):
        monkeypatch.setattr(f"{module}.exact_kernels", lambda _: as_on_a_gpu(watched))
    monkeypatch.setattr("addlang.evaluate.generation.sample", said)
    strategy, _, guard = name.partition(" + ")
    given = {"name": strategy, **OPTIONS.get(strategy, {})}
    if strategy == "lf_h2":
        given["reference_model"] = str(save_model(tmp_path / "before", seed=1))
    anchored = {"name": guard, **(FEW if guard == "self_anchor" else {})}
    execute(world.recipe(tmp_path / "out", strategy=given, guards=[anchored] if guard else None, tokens=768))
    assert sum(w.seen for w in watched) > 1000


def test_the_watch_refuses_what_a_gpu_refuses() -> None:
    torch.use_deterministic_algorithms(True)
    with AsOnAGpu():
        torch.arange(4).cumsum(0)
        for refused in (
            lambda: torch.rand(4).cumsum(0),
            lambda: torch.rand(4).kthvalue(2),
            lambda: torch.rand(4).median(0),
        ):
            with pytest.raises(RuntimeError, match="deterministic implementation"):
                refused()
        with any_order():
            assert torch.tensor([3.0, 1.0, 2.0]).kthvalue(2).values == 2
        with pytest.raises(RuntimeError, match="deterministic implementation"):
            torch.rand(4).kthvalue(2)
