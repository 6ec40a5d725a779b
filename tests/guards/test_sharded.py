"""What penalties ask of all trained elements has one answer in all processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from addlang.guards import ewc, make_guard
from addlang.guards.base import compact, total

VALUES = torch.tensor([[1.0], [1 / 3]])  # the first process's is kept by 16 bits, the second's is not


def worker(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    shard = lambda t: distribute_tensor(t, init_device_mesh("cpu", (2,)), [Shard(0)])  # noqa: E731
    values = shard(VALUES)
    information = {"w": shard(torch.tensor([[0.0], [2.0]]))}  # nothing depends on the first process's element
    ewc.fisher = lambda *_, **__: dict(information)  # type: ignore[assignment]
    context: Any = SimpleNamespace(calibration=lambda: SimpleNamespace(ids=((6, 7),), source="drawn", fingerprint="f"))
    guard = make_guard("ewc", {}).start(context)
    attached: Any = SimpleNamespace(named_trainable=lambda: [("w", torch.nn.Parameter(values))])
    guard.begin(attached)  # raises where all information is 0
    found = (compact(values).dtype, total([values.square().sum(), values.sum()]))
    torch.save(found, Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_decide_alike_and_report_the_whole(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(worker, (str(Path(place, "store")), str(tmp_path)), nprocs=2)
    for rank in range(2):
        dtype, number = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert dtype == torch.float32
        assert number == pytest.approx(float(VALUES.square().sum() + VALUES.sum()))
