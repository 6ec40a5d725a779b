"""Contract 7: two processes with FSDP2, or with DDP, train what one process trains."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_split import assert_frozen_intact, batches, make, make_exact, make_plan, worst

from addlang.errors import AddlangError
from addlang.freeze.split import SplitAttached

pytestmark = pytest.mark.slow
STEPS = 4


def loop(attached: SplitAttached, model: Any, rank: int, world: int) -> None:
    """Each rank takes its rows of every batch; gradients are averaged over ranks."""
    optimizer = torch.optim.AdamW(attached.param_groups(0.1), lr=1e-2)
    for step, (a, b) in enumerate(zip(batches(2 * STEPS)[::2], batches(2 * STEPS)[1::2], strict=True)):
        for ids in (a, b):  # accumulated
            rows = ids.chunk(world)[rank]
            logits = model(input_ids=rows, use_cache=False).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        attached.before_clip(step)
        torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step(step)


def prepare(case: str, kind: str, checkpointing: bool, form: Any = "auto") -> tuple[Any, Any, SplitAttached]:
    model = make(case, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = make_plan(model, kind)
    return model, plan, SplitAttached(model, plan, form=form)


def distributed_like(model: Any, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ordinary parameters of a sharded model take only DTensors; split ones take both."""
    sharded = model.state_dict()
    return {
        n: distribute_tensor(t, s.device_mesh, s.placements) if isinstance(s := sharded[n], DTensor) else t
        for n, t in whole.items()
    }


def worker(
    rank: int, world: int, port_file: str, case: str, kind: str, mode: str, checkpointing: bool, out: str
) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    make_exact(pytest.MonkeyPatch())
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
    model, _, attached = prepare(case, kind, checkpointing)
    assert attached.form == "assemble"
    wrapped = model
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), name
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    loop(attached, wrapped, rank, world)
    for _, p in attached.named_trainable():
        assert isinstance(p, DTensor) == (mode == "fsdp")
    result = dict(attached.export())
    state = model.state_dict()
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    attached.load_state_dict(attached.state_dict())
    model.load_state_dict(distributed_like(model, whole))  # an ordinary dense checkpoint fits the sharded model
    again = dict(attached.export())
    assert all(torch.equal(result[n], again[n]) for n in result)
    if rank == 0:
        torch.save({"export": result, "state": whole}, out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("case", "kind", "mode", "checkpointing", "world"),
    [
        ("qwen3-tied", "columns", "fsdp", False, 2),
        ("llama-bias", "columns", "fsdp", True, 2),
        ("olmo2", "rows", "fsdp", False, 2),
        ("llama-bias", "columns", "ddp", False, 2),
    ],
)
def test_two_processes_equal_one(
    case: str, kind: str, mode: str, checkpointing: bool, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "result.pt"))
        args = (world, str(Path(folder, "store")), case, kind, mode, checkpointing, out)
        torch.multiprocessing.spawn(worker, args, nprocs=world)
        found: dict[str, dict[str, Tensor]] = torch.load(out, weights_only=True)
    make_exact(monkeypatch)
    model, plan, attached = prepare(case, kind, False, "assemble")
    source = {n: p.detach().clone() for n, p in make(case, torch.float64).named_parameters()}
    loop(attached, model, 0, 1)
    expected = dict(attached.export())
    assert worst(found["export"], expected) <= 1e-10
    assert set(found["state"]) == set(make(case).state_dict())
    assert_frozen_intact(plan, source, {n: found["state"][n] for n in plan})
    assert worst({n: found["state"][n] for n in expected}, expected) <= 1e-10


def refused(rank: int, store: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=1)
    model, _, attached = prepare("llama-bias", "columns", False, "resident")
    fully_shard(model)
    with pytest.raises(AddlangError, match="resident split layers cannot be sharded"):
        loop(attached, model, 0, 1)
    dist.destroy_process_group()


def test_resident_form_refuses_sharding() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(refused, (str(Path(folder, "store")),), nprocs=1)
