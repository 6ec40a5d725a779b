"""What the tests of the loop share: data that are a function of their number, a phase, an attached tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import calibration, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from addlang.recipe import Phase
from addlang.strategies import PlanInputs, make_strategy
from addlang.train.loop import Schedule, train

CPU = torch.device("cpu")
L = 24


class Data:
    """Random sequences, a pure function of their number, with labels of different counts."""

    def __init__(self, hook: Any = None) -> None:
        self.hook = hook

    def batch(self, first: int, count: int) -> dict[str, np.ndarray[Any, Any]]:
        if self.hook is not None:
            self.hook(first)
        ids, labels = [], []
        for k in range(first, first + count):
            r = np.random.default_rng(k)
            row = r.integers(6, 260, L)
            ids.append(row)
            labels.append(np.where(np.arange(L) < L - r.integers(0, 10), row, -100))
        positions = np.broadcast_to(np.arange(L), (count, L)).copy()
        return {"input_ids": np.stack(ids), "labels": np.stack(labels), "position_ids": positions}

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        return [{"sequence": k} for k in range(first, first + count)]


def phase(**kw: Any) -> Phase:
    settings: dict[str, Any] = {
        "datasets": [{"path": "x"}], "strategy": {"name": "ssu"}, "sequence_length": L, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_steps": 3, "logging_steps": 1, "warmup_steps": 2,
    }  # fmt: skip
    return Phase(**{**settings, **kw})


def attach(
    strategy: str = "ssu",
    dtype: torch.dtype = torch.float32,
    architecture: str = "llama",
    execution: str = "masked",
    masters: bool = True,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    model = make_model(architecture, **(changes or {})).to(dtype)
    s = make_strategy(strategy, options)
    plan = s.plan(model, PlanInputs(special_token_ids=(0, 1, 2), calibration=lambda: calibration()))
    return s.attach(model, plan, execution, masters=masters)


def run(
    directory: Path, attached: Any = None, steps: int = 8, data: Any = None, micro: int = 2, batch: int = 4, **kw: Any
) -> Any:
    """Train; keywords of ``train`` (world, guards) are told from those of the phase."""
    attached = attached or attach()
    directory.mkdir(exist_ok=True, parents=True)
    own = {k: kw.pop(k) for k in ("world", "guards") if k in kw}
    schedule = Schedule(steps, batch, micro)
    train(attached, data or Data(), phase(**kw), directory, device=CPU, schedule=schedule, seed=0, **own)
    return attached


def weights(attached: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in attached.export()}


def make_exact(patch: pytest.MonkeyPatch) -> None:
    """Norms, rotary angles and the softmax of transformers are hard-wired to fp32; let them follow the model's type."""
    to, floats, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def keep_double(self: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        wanted = kw.get("dtype", args[0] if args else None)
        return self if self.dtype == torch.float64 and wanted == torch.float32 else to(self, *args, **kw)

    def keep_softmax(x: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        if x.dtype == torch.float64:
            kw["dtype"] = torch.float64
        return softmax(x, *args, **kw)

    patch.setattr(torch.Tensor, "to", keep_double)

    def keep_float(self: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.float64:
            return self
        return floats(self) if self.is_floating_point() else self.double()  # positions meet doubles in rotary angles

    patch.setattr(torch.Tensor, "float", keep_float)
    patch.setattr(torch.nn.functional, "softmax", keep_softmax)


def _floats(*tensors: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)


# operations of which torch has no deterministic kernel on a GPU, of those that a language model or an optimizer could need
# (its documentation of use_deterministic_algorithms, and kthvalue, which that forgets): when they are refused
REFUSED_ON_A_GPU: dict[str, Callable[..., bool]] = {
    "kthvalue": lambda *a, **k: True,
    "median": lambda *a, **k: len(a) > 1 or bool(k),  # with a dimension it gives indices too
    "nanmedian": lambda *a, **k: len(a) > 1 or bool(k),
    "histc": lambda *a, **k: True,
    "bincount": lambda x, weights=None, *a, **k: weights is not None,
    "put": lambda *a, **k: True,
    "cumsum": lambda x, *a, **k: _floats(x),
    "scatter_reduce": lambda x, dim, index, src, reduce, **k: reduce == "prod",
    "nll_loss2d_forward": lambda *a, **k: True,
    "grid_sampler_2d_backward": lambda *a, **k: True,
}


class AsOnAGpu(TorchDispatchMode):
    """Refuses what torch would refuse on a GPU where deterministic kernels are asked for."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        refused = REFUSED_ON_A_GPU.get(func.overloadpacket.__name__.rstrip("_"))
        if refused and torch.are_deterministic_algorithms_enabled() and refused(*args, **(kwargs or {})):
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


class Killed(BaseException):
    pass
