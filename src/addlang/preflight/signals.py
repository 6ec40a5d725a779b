"""Everything that the forecast may look at, as a flat row of numbers: measured before training, in minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    import torch

    from addlang.data.prepare import PhaseData
    from addlang.preflight.conflict import Conflict
    from addlang.preflight.probe import Probe
    from addlang.preflight.watch import Watched
    from addlang.schema import Phase

CONFLICT_STEPS = 4
DES_SAMPLES = 200
SMALL = 1e-4  # nats; changes below this are noise


@dataclass(frozen=True)
class Similarity:
    """DES of source and target prompts, and what it was measured with."""

    value: float
    low: float
    high: float
    encoder: str
    language_agnostic: bool


def measure_conflict(phase: Phase, source: Path, data: PhaseData, text: Watched, device: torch.device) -> Conflict:
    """Gradients on the first steps of the phase's data against the watched text."""
    import itertools

    import torch

    from addlang.models import load_model
    from addlang.preflight.conflict import gradient_conflict
    from addlang.train.loop import Schedule, step_batches
    from addlang.train.schedule import micro_batch

    model = load_model(source, dtype=torch.float32 if device.type == "cpu" else None, device=device)
    micro = micro_batch(phase, data.batch_size, device.type)
    schedule = Schedule(data.sequences // data.batch_size, data.batch_size, micro)
    steps = itertools.islice(step_batches(data, schedule), CONFLICT_STEPS)
    return gradient_conflict(model, itertools.chain.from_iterable(steps), text)


def measure_similarity(
    phase: Phase,
    source_specs: Any,
    encoder_name: str,
    source: Path,
    device: torch.device,
    base_dir: Path | None,
    seed: int,
) -> Similarity:
    """DES of the phase's target prompts and of source-language prompts.

    Args:
        encoder_name: as for ``addlang analyze des``; ``states``: mean hidden states of the model itself.
    """
    from addlang.analyze.des import STATES, require_check, sample_texts, similarity
    from addlang.analyze.encoders import open_encoder, states_encoder, unit

    if encoder_name == STATES:
        encoder = states_encoder(source, layer=None, max_tokens=256, device=device.type)
    else:
        encoder = open_encoder(encoder_name, pooling="auto", max_tokens=256, device=device.type)
    check = require_check(encoder)

    def vectors(specs: Any) -> Any:
        share = -(-DES_SAMPLES // len(specs))
        texts = [t for spec in specs for t in sample_texts(spec, share, seed, "prompts", base_dir)]
        return unit(encoder.encode(texts))

    target = [s for s in phase.datasets if s.role == "target"]
    if not target:
        raise AddlangError("the phase has no target data", "give a data set of role target")
    found = similarity(vectors(source_specs), vectors(target), seed=seed)
    return Similarity(found.value, found.low, found.high, encoder.name, check.language_agnostic)


def signals(
    *,
    probe: Probe | None,
    conflict: Conflict | None,
    similarity: Similarity | None,
    learning_rate: float,
    steps: int,
    sequence_tokens: int,
    epochs: float,
) -> dict[str, float]:
    """The row of numbers. What was not measured is not there.

    Args:
        steps: optimizer steps of the planned run.
        sequence_tokens: tokens per step.
        epochs: passes over the target data.
    """  # fmt: skip
    row = {
        "log_learning_rate": math.log10(learning_rate),
        "log_steps": math.log10(steps),
        "log_tokens": math.log10(steps * sequence_tokens),
        "log_epochs": math.log10(max(epochs, 1e-3)),
    }
    if probe is not None:
        row |= {
            "probe_steps": float(probe.steps),
            "log_probe_loss": math.log10(max(probe.loss_change, SMALL)),
            "log_probe_shift": math.log10(max(probe.shift, SMALL)),
            "log_probe_accuracy_lost": math.log10(max(probe.accuracy_lost, SMALL)),
            "log_probe_moved": math.log10(max(probe.moved, 1e-9)),
            "log_steps_left": math.log10(steps / probe.steps),
            "probe_target_drop": probe.target_loss[0] - probe.target_loss[1],
            "log_probe_growth": _growth(probe),
        }
    if conflict is not None:
        row |= {
            "conflict": conflict.cosine,
            "push": conflict.push,
            "own_loss": conflict.target_loss,
            "log_norm_ratio": math.log10(max(conflict.target_norm, 1e-9) / max(conflict.source_norm, 1e-9)),
        }
    if similarity is not None:
        row["des"] = similarity.value
    return row


def _growth(probe: Probe) -> float:
    """How the source's loss grew in the second half of the probe against the first, log10; 0: not at all."""
    losses = dict(probe.losses)
    start, middle, end = losses[0], losses.get(probe.steps // 2), losses[probe.steps]
    if middle is None:
        return 0.0
    return math.log10(max(end - start, SMALL) / max(middle - start, SMALL))
