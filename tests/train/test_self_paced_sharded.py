"""Several processes choose and train what one does: each measures its part of the data."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from addlang.data.mixture import Mixture
from addlang.data.packing import Packed
from addlang.schema import SelfPaced
from addlang.train.loop import Schedule
from addlang.train.self_paced import SelfPacedAttached, SelfPacedData
from addlang.train.shard import ALONE, World, join_world
from training import CPU, L, attach, make_exact, run, weights

STEPS, BATCH = 6, 4


def conversations(count: int, seed: int) -> Packed:
    """Two to a sequence, the second half of each with loss."""
    random = np.random.default_rng(seed)
    tokens = random.integers(6, 260, count * L // 2).astype(np.uint16)
    loss = np.tile(np.repeat([0, 1], L // 4), count).astype(np.uint8)
    starts = np.arange(0, len(tokens), L // 2, dtype=np.int64)
    return Packed(Path(), tokens, loss, np.append(starts[::2], len(tokens)), starts, {"fingerprint": str(seed)})


def train(directory: Path, world: World, sharding: str) -> dict[str, Any]:
    mixture = Mixture([conversations(40, 1), conversations(22, 2)], [None, None], seed=0, sequences=STEPS * BATCH)
    data = SimpleNamespace(
        mixture=mixture, sequence_length=L, isolate=True, paths=("a", "b"), tokenizer=SimpleNamespace(pad_token_id=0)
    )
    attached = attach("ssu", torch.float64)
    schedule = Schedule(STEPS, BATCH, 1)
    paced = SelfPacedData(
        data, attached, SelfPaced(update_every=2, weights="linear"), schedule, seed=0, device=CPU,
        autocast=contextlib.nullcontext, world=world,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        make_exact(patch)
        whole = SelfPacedAttached(attached, paced)
        run(directory, whole, data=paced, steps=STEPS, batch=BATCH, micro=1, world=world, sharding=sharding)
    return {
        "weights": weights(attached),
        "losses": torch.from_numpy(paced.losses),
        "uses": torch.from_numpy(paced.uses),
    }


def worker(rank: int, size: int, store: str, folder: str, sharding: str) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with join_world("cpu") as world:
        found = train(Path(folder, "run"), world, sharding)
        if rank == 0:
            torch.save(found, Path(folder, "found.pt"))
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sharding"), [(3, "fsdp"), (2, "ddp")])
def test_several_processes_equal_one(size: int, sharding: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(worker, (size, str(Path(place, "store")), str(tmp_path), sharding), nprocs=size)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = train(tmp_path / "alone", ALONE, "none")
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["uses"], alone["uses"])
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-9)
