"""How long a step takes: a few real ones, in a directory that is thrown away."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from addlang.errors import AddlangError

if TYPE_CHECKING:
    import torch

    from addlang.data.prepare import PhaseData
    from addlang.freeze.plan import FreezePlan
    from addlang.recipe import Phase

STEPS = 4  # the first one is not counted: allocations, kernels chosen, caches filled


def seconds_per_step(
    source: Path,
    phase: Phase,
    plan: FreezePlan,
    data: PhaseData,
    *,
    micro: int,
    need: int,
    device: torch.device,
    devices: int = 1,
) -> float:
    """Median seconds of an optimizer step on this device, without what :func:`not_timed` names.

    Args:
        plan: an outline will do: the choice of columns does not change the time.
        devices: that share a step; one device's part of its sequences is timed.
        need: bytes that training needs; see :mod:`addlang.train.memory`.

    Raises:
        AddlangError: that is more than half of this device's memory.
    """
    import torch

    from addlang.liger import apply_liger
    from addlang.models import Checkpoint, load_model
    from addlang.train.loop import Schedule, compute_dtype, train
    from addlang.train.memory import GIB, device_memory, settle
    from addlang.train.shard import World

    if need > device_memory(device) / 2:
        raise AddlangError(
            f"phase '{phase.name}' needs {need / GIB:.1f} GiB, too much for a probe on this device",
            "leave --probe out, or run it where the training will run",
        )
    stored = Checkpoint(source).dtype
    dtype = stored if compute_dtype(phase, device) in (None, torch.bfloat16) else torch.float32
    model = load_model(source, dtype=dtype, device=device, attn_implementation=phase.attn_implementation)
    if phase.use_liger_kernel:
        apply_liger(model)
    share = -(-data.batch_size // devices)
    execution = settle(
        model, plan, phase, micro=micro, device=device, stored=stored, batch=share, world=World(0, devices)
    ).execution
    attached = phase.strategy.attach(model, plan, execution, masters=phase.master_weights == "fp32")
    steps = min(STEPS, data.sequences // data.batch_size)
    probe = phase.model_copy(update={"logging_steps": 1, "warmup_steps": 0, "report_to": (), "sharding": "auto"})
    with tempfile.TemporaryDirectory() as folder:
        schedule = Schedule(steps, share, micro)
        train(attached, data, probe, Path(folder), device=device, schedule=schedule, seed=0)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [0.0, *(row["seconds"] for row in rows)]
    lasting = [b - a for a, b in itertools.pairwise(ends)]
    return statistics.median(lasting[1:] or lasting)


def not_timed(phase: Phase, devices: int = 1) -> list[str]:
    """Parts of a phase that :func:`seconds_per_step` leaves out, in words."""
    guards = ", ".join(g.name for g in phase.all_guards)
    return [
        "evaluation",
        *([f"guards ({guards})"] if guards else []),
        *([f"the sampler ({phase.sampler.name})"] if phase.sampler is not None else []),
        *(["exchange between devices"] if devices > 1 else []),
    ]
