"""Do the target's and the source's losses pull the weights the same way? Cosine of their gradients, by layer type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.preflight.watch import Watched


@dataclass(frozen=True)
class Conflict:
    """Gradients at the source's weights.

    Attributes:
        cosine: over all parameters; below 0 the first target step raises the source's loss.
        groups: by module type.
        target_loss, source_loss: nats per label token.
        target_norm, source_norm: of the gradients of the mean losses.
    """

    cosine: float
    groups: dict[str, float]
    target_loss: float
    source_loss: float
    target_norm: float
    source_norm: float

    @property
    def push(self) -> float:
        """Cosine times the ratio of the norms: how much of the source's slope a target step goes up or down."""
        return self.cosine * self.target_norm / self.source_norm if self.source_norm else 0.0


def gradient_conflict(model: Any, target: Iterable[Mapping[str, Tensor]], source: Watched) -> Conflict:
    """Measure on a few batches. The model's gradients are empty again afterwards.

    Args:
        model: with every parameter trainable, on its device.
        target: batches of ``input_ids``, ``labels`` and maybe ``position_ids`` [B, T].
    """
    from addlang.models import parameter_kinds

    kinds = parameter_kinds(model)
    device = next(model.parameters()).device
    target_loss = accumulate(model, target, device)
    first = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    source_loss = accumulate(model, source.batches, device)
    sums: dict[str, list[float]] = {}
    for name, p in model.named_parameters():
        if p.grad is None or name not in first:
            continue
        a, b = first[name].double().flatten(), p.grad.detach().double().flatten()
        row = sums.setdefault(kinds[name].group, [0.0, 0.0, 0.0])
        for i, value in enumerate((a @ b, a @ a, b @ b)):
            row[i] += float(value)
    model.zero_grad(set_to_none=True)
    dot, tt, ss = (math.fsum(row[i] for row in sums.values()) for i in range(3))
    return Conflict(
        cosine=_cosine(dot, tt, ss),
        groups={group: _cosine(*row) for group, row in sums.items()},
        target_loss=target_loss,
        source_loss=source_loss,
        target_norm=math.sqrt(tt),
        source_norm=math.sqrt(ss),
    )


def _cosine(dot: float, one: float, other: float) -> float:
    return dot / math.sqrt(one * other) if one > 0 and other > 0 else 0.0


def accumulate(model: Any, batches: Iterable[Mapping[str, Tensor]], device: Any) -> float:
    """Leave the gradient of the mean token loss over all batches in the model; returns that loss in nats."""
    from addlang.train.loss import token_loss

    held = [{k: v.to(device) for k, v in b.items()} for b in batches]
    labels = sum(int((b["labels"][:, 1:] != -100).sum()) for b in held)
    total = 0.0
    for batch in held:
        loss, _ = token_loss(model, batch)
        (loss / max(labels, 1)).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total / max(labels, 1)
