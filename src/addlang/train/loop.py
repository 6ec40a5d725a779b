"""The one training loop. The order of a step is what addlang exists for, so it stands here in full.

plan -> attach -> shard -> optimizer; then for every step:
forward, backward (accumulated; the loss is normalised by the tokens of the whole step, over all processes)
-> attached.before_clip -> clip -> optimizer step (decay touches only what is trained) -> attached.after_step
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from addlang.errors import AddlangError, PreemptedError
from addlang.progress import progress
from addlang.train import checkpoint
from addlang.train.exact import exact_kernels
from addlang.train.loss import token_loss
from addlang.train.monitor import MetricsLog, SpikeWatch, Trackers, check_step, preemption, write_bad_batch
from addlang.train.optimizers import build_optimizer, build_scheduler, require_compiler, set_rates
from addlang.train.shard import ALONE, World, accumulating, decoder_layers, sharding_of, spread, whole

if TYPE_CHECKING:
    from addlang.guards import ActiveGuard
    from addlang.recipe import Phase
    from addlang.strategies.base import Attached


class TrainingData(Protocol):
    """What the loop reads: sequence ``k`` of the run, a pure function of ``k``."""

    def batch(self, first: int, count: int) -> dict[str, np.ndarray[Any, Any]]:
        """``input_ids``, ``labels``, ``position_ids`` [count, L] of the sequences first .. first + count - 1, and perhaps
        ``weights`` [count, L] of their labels."""
        ...

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Where those sequences come from, for error reports."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Steps of a phase: ``steps`` optimizer steps of ``batch`` sequences over all processes, ``micro`` per forward pass."""

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
    world: World = ALONE,
) -> TrainResult:
    """Train one phase in ``directory``, continuing from its newest whole checkpoint.

    Writes ``metrics.jsonl`` and ``checkpoint-N/`` every ``save_steps``. Killed at any moment and called again, it ends
    with bit-identical weights (same device, processes, threads and deterministic kernels).

    Raises:
        PreemptedError: SIGTERM arrived in any process; the state was saved first.
        AddlangError: the loss is NaN, infinite or leapt; the batch's rows are in ``bad_batch.json``.
    """
    sharded = sharding_of(phase, world) == "fsdp"
    torch.manual_seed(seed + (world.rank if sharded else 0))  # replicas must draw alike, shards must not
    if phase.torch_compile:
        compile_layers(attached.model)
    model = spread(attached, phase, world, device, compute_dtype(phase, device))
    with exact_kernels(device):
        for guard in guards:
            guard.begin(attached)
    optimizer = build_optimizer(attached, phase)
    scheduler = build_scheduler(optimizer, phase, schedule.steps)
    attached.bind(optimizer, schedule.steps)
    done, tokens, seconds = 0, 0, 0.0
    spikes = SpikeWatch(phase.max_loss_spike)
    found = world.agree(checkpoint.newest(directory) if world.leads else None)
    if found is not None:
        done, extra = checkpoint.load(found, attached, optimizer, world, sharded=sharded)
        if extra["batch"] != schedule.batch:
            raise AddlangError(
                f"the checkpoint was made with {extra['batch']} sequences per step, this run has {schedule.batch}",
                "set batch_size, which does not depend on the number of devices",
            )
        scheduler.load_state_dict(extra["scheduler"])
        set_rates(optimizer, scheduler.get_last_lr())  # loading the scheduler does not set them
        tokens, seconds = extra["tokens"], extra["seconds"]
        spikes = SpikeWatch(phase.max_loss_spike, extra["recent_losses"])
    log = MetricsLog(directory / "metrics.jsonl", after_step=done, write=world.leads)
    trackers = Trackers(phase, directory, write=world.leads)
    autocast = compute_context(phase, device, cache=not sharded)
    parameters = [p for _, p in attached.named_trainable()]
    loss_value = log.last_loss
    model.train()
    if phase.activation_checkpointing:
        enable_checkpointing(attached.model)
    writer = checkpoint.Writer(directory, phase.save_total_limit, world, sharded=sharded)

    def save(step: int) -> None:
        spent = seconds + time.monotonic() - started
        extra = {
            "scheduler": plain(scheduler.state_dict()), "tokens": tokens, "seconds": spent, "batch": schedule.batch,
            "recent_losses": list(spikes.recent),
        }  # fmt: skip
        writer.save(step, attached, optimizer, extra)

    started = time.monotonic()
    window_tokens, window_started = 0, started
    total = schedule.steps * schedule.batch * phase.sequence_length
    with (
        exact_kernels(device),
        contextlib.closing(writer),
        preemption() as preempted,
        progress(f"training {phase.name}", total=total, unit="tokens") as bar,
    ):
        for step in range(done + 1, schedule.steps + 1):
            first = (step - 1) * schedule.batch
            arrays = own_rows(data, first, schedule.batch, world)
            labels, mass = world.total(*label_mass(arrays))
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            # penalties are alike in all processes, so that averaging gradients over them changes nothing; they come
            # first because DDP exchanges gradients at the end of the last micro-batch
            term = attached.loss_term()
            if term is not None:
                term.backward()  # type: ignore[no-untyped-call]
            penalty = sum(g.backward(attached, step) for g in guards)
            batches = list(micro_batches(arrays, schedule.micro, device))
            for number, batch in enumerate(batches, start=1):
                with accumulating(model, last=number == len(batches)):
                    with autocast():
                        loss_sum, _ = token_loss(model, batch)
                        loss = loss_sum / (mass or 1.0)
                    (loss * world.size).backward()  # gradients are averaged over the processes
                step_loss += loss.detach()
            attached.before_clip(step)
            norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, phase.max_grad_norm or math.inf)))
            loss_value = world.total(float(step_loss))[0]
            bad = directory / "bad_batch.json"
            error = check_step(loss_value, norm, spikes, step=step, phase=phase, where=bad)
            if error is not None:
                if world.leads:
                    write_bad_batch(bad, step, data.describe_rows(first, schedule.batch))
                raise world.same(error)
            rate = float(scheduler.get_last_lr()[0])
            optimizer.step()
            attached.after_step(step)
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            read = int(labels) + sum(g.tokens(step) for g in guards)
            tokens += read
            window_tokens += read
            bar.update(step * schedule.batch * phase.sequence_length, loss=loss_value)
            if step % phase.logging_steps == 0 or step in (1, schedule.steps):
                now = time.monotonic()
                row = {
                    "phase": phase.name, "step": step, "steps": schedule.steps, "tokens": tokens, "loss": loss_value,
                    **({"guards": penalty} if guards else {}),
                    "learning_rate": rate, "grad_norm": norm,
                    "tokens_per_second": round(window_tokens / max(now - window_started, 1e-9), 1),
                    "seconds": round(seconds + now - started, 3), **attached.metrics(),
                }  # fmt: skip
                log.write(row)
                trackers.log(row)
                window_tokens, window_started = 0, now
            stopping = world.total(preempted.is_set)[0] > 0
            if step % phase.save_steps == 0 or step == schedule.steps or stopping:
                save(step)
            if stopping:
                writer.wait()
                raise world.same(
                    PreemptedError(
                        f"stopped by SIGTERM after step {step} of {schedule.steps}; the state is saved",
                        "run the same command again to continue",
                    )
                )
        writer.wait()
    trackers.close()
    model.eval()
    return TrainResult(schedule.steps, tokens, seconds + time.monotonic() - started, loss_value)


def label_mass(arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[float, float]:
    """Number of labels, and the sum of their weights, by which the loss is divided."""
    carries = arrays["labels"][:, 1:] != -100
    weights = arrays.get("weights")
    return float(carries.sum()), float(carries.sum() if weights is None else weights[:, 1:][carries].sum(dtype=float))


def own_rows(data: TrainingData, first: int, batch: int, world: World) -> dict[str, np.ndarray[Any, Any]]:
    """This process's sequences of a step, as many as any process has; what is too many carries no label.

    Every process must make the same number of forward passes, for sharded layers are gathered in each of them.
    """
    start, count = world.rows(batch)
    share = -(-batch // world.size)
    # a process without sequences reads the step's last one: behind the last step there is none
    arrays = data.batch(first + min(start, batch - 1), max(count, 1))
    if count == share:
        return arrays
    arrays = {k: np.concatenate([v[:count], np.repeat(v[:1], share - count, axis=0)]) for k, v in arrays.items()}
    arrays["labels"][count:] = -100
    return arrays


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (transformers renamed the call in 5.x)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def disable_checkpointing(model: Any) -> None:
    """Undo :func:`enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def compile_layers(model: Any) -> None:
    """``torch.compile`` of every decoder layer, in place: modules, names and the chunked head stay as they are."""
    require_compiler("torch_compile")
    for layer in decoder_layers(model):
        layer.compile()


def compute_dtype(phase: Phase, device: torch.device) -> torch.dtype | None:
    """Type of the matrix products: bf16 on GPUs (``auto``) or where asked for; None: the weights' own (pure bf16)."""
    if phase.master_weights == "model":
        return None
    if phase.precision == "bf16" or (phase.precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def compute_context(phase: Phase, device: torch.device, *, cache: bool = True) -> Any:
    """A factory of autocast contexts, empty where the products run in the weights' own type.

    Args:
        cache: keep 16-bit copies of weights for a whole forward pass; they would undo sharding.
    """
    if compute_dtype(phase, device) == torch.bfloat16:
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
    return contextlib.nullcontext


def step_batches(data: TrainingData, schedule: Schedule) -> Iterator[list[dict[str, Tensor]]]:
    """The phase's micro-batches on the CPU, one list per optimizer step, for strategies that look at the data first."""
    for step in range(schedule.steps):
        arrays = data.batch(step * schedule.batch, schedule.batch)
        yield list(micro_batches(arrays, schedule.micro, torch.device("cpu")))


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


def plain(state: Any) -> Any:
    """A scheduler's state as plain data: torchao keeps learning rates as tensors."""
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [plain(v) for v in state]
    return float(state) if isinstance(state, Tensor) else state
