"""The one training loop. The order of a step is what addlang exists for, so it stands here in full.

forward, backward (accumulated; the loss is normalised by the tokens of the whole step)
-> attached.before_clip -> clip -> optimizer step (decay touches only what is trained) -> attached.after_step
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from addlang.errors import AddlangError, PreemptedError
from addlang.progress import progress
from addlang.train import checkpoint
from addlang.train.loss import token_loss

if TYPE_CHECKING:
    from addlang.guards import ActiveGuard
    from addlang.recipe import Phase
    from addlang.strategies.base import Attached


class TrainingData(Protocol):
    """What the loop reads: sequence ``k`` of the run, a pure function of ``k``."""

    def batch(self, first: int, count: int) -> dict[str, np.ndarray[Any, Any]]:
        """``input_ids``, ``labels``, ``position_ids`` [count, L] of the sequences first .. first + count - 1."""
        ...

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Where those sequences come from, for error reports."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Steps of a phase: ``steps`` optimizer steps of ``batch`` sequences, ``micro`` of them per forward pass."""

    steps: int
    batch: int
    micro: int


@dataclass(frozen=True)
class TrainResult:
    """What a phase did: steps, label-bearing tokens, seconds of training (all sittings), last logged loss in nats."""

    steps: int
    tokens: int
    seconds: float
    loss: float


def train(
    attached: Attached,
    data: TrainingData,
    phase: Phase,
    directory: Path,
    *,
    device: torch.device,
    schedule: Schedule,
    seed: int,
    guards: Sequence[ActiveGuard] = (),
) -> TrainResult:
    """Train one phase in ``directory``, continuing from its newest whole checkpoint.

    Writes ``metrics.jsonl`` and ``checkpoint-N/`` every ``save_steps``. Killed at any moment and called again, it ends
    with bit-identical weights (same device, threads and deterministic kernels).

    Raises:
        PreemptedError: SIGTERM arrived; the state was saved first.
        AddlangError: the loss is NaN or infinite; the batch's rows are in ``bad_batch.json``.
    """
    torch.manual_seed(seed)
    model = attached.model
    optimizer = build_optimizer(attached, phase)
    scheduler = build_scheduler(optimizer, phase, schedule.steps)
    attached.bind(optimizer, schedule.steps)
    done, tokens, seconds = 0, 0, 0.0
    found = checkpoint.newest(directory)
    if found is not None:
        done, extra = checkpoint.load(found, attached, optimizer)
        scheduler.load_state_dict(extra["scheduler"])
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # loading the scheduler does not set it
        tokens, seconds = extra["tokens"], extra["seconds"]
    log = MetricsLog(directory / "metrics.jsonl", after_step=done)
    trackers = Trackers(phase, directory)
    autocast = compute_context(phase, device)
    parameters = [p for _, p in attached.named_trainable()]
    loss_value = log.last_loss
    model.train()
    if phase.activation_checkpointing:
        enable_checkpointing(model)

    def save(step: int) -> None:
        extra = {"scheduler": scheduler.state_dict(), "tokens": tokens, "seconds": seconds + time.monotonic() - started}
        checkpoint.save(directory, step, attached, optimizer, extra, phase.save_total_limit)

    started = time.monotonic()
    window_tokens, window_started = 0, started
    total = schedule.steps * schedule.batch * phase.sequence_length
    with preemption() as preempted, progress(f"training {phase.name}", total=total, unit="tokens") as bar:
        for step in range(done + 1, schedule.steps + 1):
            first = (step - 1) * schedule.batch
            arrays = data.batch(first, schedule.batch)
            labels = int((arrays["labels"][:, 1:] != -100).sum())
            step_loss = torch.zeros((), device=device)
            for batch in micro_batches(arrays, schedule.micro, device):
                with autocast():
                    loss_sum, _ = token_loss(model, batch)
                    loss = loss_sum / max(labels, 1)
                loss.backward()  # type: ignore[no-untyped-call]
                step_loss += loss.detach()
            term = attached.loss_term()
            if term is not None:
                term.backward()  # type: ignore[no-untyped-call]
            penalty = sum(g.backward(attached, step) for g in guards)
            attached.before_clip(step)
            norm = torch.nn.utils.clip_grad_norm_(parameters, phase.max_grad_norm or math.inf)
            loss_value = float(step_loss)
            if not math.isfinite(loss_value) or not math.isfinite(float(norm)):
                rows = data.describe_rows(first, schedule.batch)
                (directory / "bad_batch.json").write_text(
                    json.dumps({"step": step, "rows": rows}, ensure_ascii=False, indent=1), encoding="utf-8"
                )
                what = "gradient" if math.isfinite(loss_value) else "loss"
                raise AddlangError(
                    f"the {what} became NaN or infinite at step {step} of phase '{phase.name}'",
                    f"look at the batch's rows in {directory / 'bad_batch.json'}; "
                    f"lower learning_rate ({phase.learning_rate:g}) or use precision: fp32",
                )
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            attached.after_step(step)
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            read = labels + sum(g.tokens(step) for g in guards)
            tokens += read
            window_tokens += read
            bar.update(step * schedule.batch * phase.sequence_length, loss=loss_value)
            if step % phase.logging_steps == 0 or step in (1, schedule.steps):
                now = time.monotonic()
                row = {
                    "phase": phase.name, "step": step, "steps": schedule.steps, "tokens": tokens, "loss": loss_value,
                    **({"guards": penalty} if guards else {}),
                    "learning_rate": rate, "grad_norm": float(norm),
                    "tokens_per_second": round(window_tokens / max(now - window_started, 1e-9), 1),
                    "seconds": round(seconds + now - started, 3),
                }  # fmt: skip
                log.write(row)
                trackers.log(row)
                window_tokens, window_started = 0, now
            stopping = preempted.is_set and step < schedule.steps
            if step % phase.save_steps == 0 or step == schedule.steps or stopping:
                save(step)
            if stopping:
                raise PreemptedError(
                    f"stopped by SIGTERM after step {step} of {schedule.steps}; the state is saved",
                    "run the same command again to continue",
                )
    trackers.close()
    model.eval()
    return TrainResult(schedule.steps, tokens, seconds + time.monotonic() - started, loss_value)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (transformers renamed the call in 5.x)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_optimizer(attached: Attached, phase: Phase) -> torch.optim.Optimizer:
    """AdamW over what is trained; fused, with fp32 state where the masters are fp32."""
    return torch.optim.AdamW(
        attached.param_groups(phase.weight_decay),
        lr=phase.learning_rate,
        betas=(phase.adam_beta1, phase.adam_beta2),
        eps=phase.adam_epsilon,
        fused=True,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, phase: Phase, steps: int) -> Any:
    """transformers' schedule of that name; ``warmup_steps`` below 1 is a share of all steps."""
    from transformers import get_scheduler

    warmup = math.ceil(phase.warmup_steps * steps) if phase.warmup_steps < 1 else int(phase.warmup_steps)
    if warmup >= steps and steps > 1:
        raise AddlangError(
            f"warmup_steps {warmup} leaves none of the {steps} steps of phase '{phase.name}'",
            "lower warmup_steps or raise tokens",
        )
    return get_scheduler(phase.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def compute_dtype(phase: Phase, device: torch.device) -> torch.dtype | None:
    """Type of the matrix products: bf16 on GPUs (``auto``) or where asked for; None: the weights' own (pure bf16)."""
    if phase.master_weights == "model":
        return None
    if phase.precision == "bf16" or (phase.precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def compute_context(phase: Phase, device: torch.device) -> Any:
    """A factory of autocast contexts, empty where the products run in the weights' own type."""
    if compute_dtype(phase, device) == torch.bfloat16:
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext


def micro_batches(
    arrays: dict[str, np.ndarray[Any, Any]], micro: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Slices of ``micro`` sequences on the device."""
    count = len(arrays["input_ids"])
    for i in range(0, count, micro):
        yield {
            k: torch.from_numpy(np.ascontiguousarray(v[i : i + micro])).to(device, non_blocking=True)
            for k, v in arrays.items()
        }


class Flag:
    """Set by a signal, read between steps."""

    is_set = False


@contextlib.contextmanager
def preemption() -> Iterator[Flag]:
    """Turn SIGTERM into a flag while training, so that the step in flight ends and is saved."""
    flag = Flag()

    def handle(_number: int, _frame: FrameType | None) -> None:
        flag.is_set = True

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


class MetricsLog:
    """``metrics.jsonl``: one row per logging step. On resume, rows after the checkpoint are dropped: they will come again."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.path = path
        rows = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that was being written when the run was killed
                    continue
                if row["step"] <= after_step:
                    rows.append(row)
        self.last_loss = rows[-1]["loss"] if rows else math.nan
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        os.replace(tmp, path)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


class Trackers:
    """Experiment trackers of ``report_to``, through accelerate."""

    def __init__(self, phase: Phase, directory: Path) -> None:
        self._accelerator: Any = None
        if phase.report_to:
            try:
                from accelerate import Accelerator

                self._accelerator = Accelerator(
                    log_with=list(phase.report_to), project_dir=str(directory), cpu=not torch.cuda.is_available()
                )
                self._accelerator.init_trackers("addlang")
            except (ImportError, ValueError) as error:
                raise AddlangError(
                    f"report_to {list(phase.report_to)} cannot be used: {error}",
                    "install the tracker, for example pip install 'addlang[trackers]'",
                ) from error

    def log(self, row: dict[str, Any]) -> None:
        if self._accelerator is not None:
            self._accelerator.log(
                {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "steps")},
                step=row["step"],
            )

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
