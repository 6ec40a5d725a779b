"""A short real training run at the planned settings, thrown away: how fast does the source language go?

It is carried out by the same code as a run: plan, guards, attach, loop. Only the schedule differs: a few warm-up steps and
then the full learning rate, because the planned schedule would still be warming up.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.guards.base import ActiveGuard
from addlang.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from addlang.data.prepare import PhaseData
    from addlang.preflight.watch import Reading, Watched
    from addlang.schema import Phase
    from addlang.strategies.base import Attached

STEPS = 32
WARMUP = 4


@dataclass(frozen=True)
class Probe:
    """What a probe saw.

    Attributes:
        steps: optimizer steps.
        losses: (step, source loss in nats per token), from step 0.
        before, after: watched tokens.
        target_loss: of the first and of the last step, nats per label token.
        target_gained: fall of the loss on held-out target text, nats per token; 0 where none was given.
        moved: mean over tensors of the Frobenius norm of the update (as MPD reads it).
        moved_relative: norm of the whole update over that of the weights that could move.
        seconds: of training, without what guards prepare.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    before: Reading
    after: Reading
    target_loss: tuple[float, float]
    target_gained: float
    moved: float
    moved_relative: float
    seconds: float

    @property
    def loss_change(self) -> float:
        """Of the source text, nats per token; plus is a loss of ability."""
        return self.after.loss - self.before.loss

    @property
    def shift(self) -> float:
        """Mean absolute change of a source token's log-probability, nats: also seen where losses cancel out."""
        import numpy as np

        return float(np.abs(self.after.logp - self.before.logp).mean())

    @property
    def accuracy_lost(self) -> float:
        """Share of the watched tokens that were the most likely ones and are no longer."""
        return float((self.before.right & ~self.after.right).mean())


class Rehearsal(RunDir):
    """A run that keeps its state in memory and its files in a directory that is thrown away."""

    def __init__(self, path: Path, recipe: Any) -> None:
        super().__init__(path, recipe)
        self._state: dict[str, Any] = {"stages": {}}

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    def update(self, **changes: Any) -> None:
        self._state = {**self._state, **changes}

    def add_warnings(self, messages: list[str]) -> None:
        """They are shown, not kept."""


class Watcher(ActiveGuard):
    """Reads the watched text now and then while the probe trains; adds nothing to the loss."""

    def __init__(self, text: Watched, at: frozenset[int], autocast: Any) -> None:
        self.text, self.at, self.autocast = text, at, autocast
        self.losses: list[tuple[int, float]] = []

    def backward(self, attached: Attached, step: int) -> float:
        from addlang.preflight.watch import read

        if step - 1 in self.at:
            self.losses.append((step - 1, read(attached.model, self.text, self.autocast).loss))
        return 0.0


def run_probe(
    recipe: Any,
    phase: Phase,
    source: Path,
    tokenizer: Any,
    data: PhaseData,
    text: Watched,
    *,
    device: torch.device,
    steps: int = STEPS,
    base_dir: Path | None = None,
    target: Watched | None = None,
) -> Probe:
    """Train a few steps and read the watched text before and after.

    Args:
        data: the phase's data, of which the beginning is read.
        target: held-out target text, to see what the probe gains.

    Raises:
        AddlangError: memory ran out while training.
    """
    import torch

    from addlang.liger import apply_liger
    from addlang.models import Checkpoint, load_model
    from addlang.preflight.watch import read
    from addlang.run import make_plan, start_guards
    from addlang.train.loop import Schedule, compute_context, compute_dtype, train
    from addlang.train.memory import explain_out_of_memory, settle
    from addlang.train.schedule import micro_batch

    stored = Checkpoint(source)
    dtype = stored.dtype if compute_dtype(phase, device) in (None, torch.bfloat16) else torch.float32
    model = load_model(source, dtype=dtype, device=device, attn_implementation=phase.attn_implementation)
    micro = micro_batch(phase, data.batch_size, device.type)
    planned = Schedule(data.sequences // data.batch_size, data.batch_size, micro)
    steps = min(steps, planned.steps)
    settings = phase.model_copy(
        update={
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": min(WARMUP, steps - 1), "logging_steps": 1,
            "report_to": (), "save_steps": steps + 1, "sharding": "auto",
        }
    )  # fmt: skip
    autocast = compute_context(phase, device)
    with tempfile.TemporaryDirectory() as folder:
        run = Rehearsal(Path(folder), recipe)
        plan = make_plan(run, phase, model, stored.hash, tokenizer, base_dir, data, planned)
        guards = start_guards(run, phase, model, stored.hash, tokenizer, device, planned, base_dir)
        if phase.use_liger_kernel:
            apply_liger(model)
        about: dict[str, Any] = {"micro": micro, "device": device, "stored": stored.dtype, "batch": data.batch_size}
        settled = settle(model, plan, phase, **about)
        with explain_out_of_memory(model, plan, settled, **about):
            attached = phase.strategy.attach(model, plan, settled.execution, masters=phase.master_weights == "fp32")
            # the source's values in the form that trains: read before that, they would differ by rounding too
            before = read(attached.model, text, autocast)
            target_before = 0.0 if target is None else read(attached.model, target, autocast).loss
            watcher = Watcher(text, frozenset({steps // 4, steps // 2}), autocast)
            result = train(
                attached, data, settings, Path(folder), device=device, schedule=Schedule(steps, data.batch_size, micro),
                seed=recipe.seed, guards=[*guards, watcher],
            )  # fmt: skip
        after = read(attached.model, text, autocast)
        gained = 0.0 if target is None else target_before - read(attached.model, target, autocast).loss
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    moved, relative = movement(stored, attached)
    return Probe(
        steps=steps,
        losses=((0, before.loss), *watcher.losses, (steps, after.loss)),
        before=before,
        after=after,
        target_loss=(float(rows[0]["loss"]), float(rows[-1]["loss"])),
        target_gained=gained,
        moved=moved,
        moved_relative=relative,
        seconds=result.seconds,
    )


def movement(stored: Any, attached: Attached) -> tuple[float, float]:
    """Mean Frobenius norm of the tensors' updates, and the whole update's norm over that of the same weights."""
    import math

    norms, total, weight = [], 0.0, 0.0
    for name, tensor in attached.export():
        if name not in stored.location:  # tied: stored under its twin's name
            continue
        old = stored.get(name).double()
        change = float((tensor.detach().double().cpu() - old).norm())
        norms.append(change)
        total += change**2
        weight += float(old.norm()) ** 2
    if not norms:
        return 0.0, 0.0
    return math.fsum(norms) / len(norms), math.sqrt(total / weight)
