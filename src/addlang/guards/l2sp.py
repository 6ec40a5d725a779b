"""L2-SP: ``weight / 2 * ||w - w0||^2`` over what is trained (Li et al., 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from addlang.guards.base import ActiveGuard, Guard, GuardContext, compact, total

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.strategies.base import Attached


class L2SP(Guard):
    """Pulls every trained element to the source's value with the same strength; keeps a copy of those values."""

    name = "l2sp"
    paper = (
        "Explicit Inductive Bias for Transfer Learning with Convolutional Networks (Li et al., 2018; arXiv 1802.01483)"
    )
    summary = "pull every trained weight towards its source value"
    pulls_weights = True

    weight: float = Field(0.01, gt=0, description="lambda: the gradient is lambda times the distance from the source")

    def kept_bytes(self, stored: int, master: int) -> int:
        return min(stored, master)

    def start(self, context: GuardContext) -> ActiveGuard:
        return _Active(self)


class _Active(ActiveGuard):
    def __init__(self, guard: L2SP) -> None:
        self.guard = guard
        self.source: dict[str, Tensor] = {}

    def begin(self, attached: Attached) -> None:
        # before a checkpoint is loaded: on resume the source's values must not be those of the checkpoint
        self.source = {name: compact(p.detach()) for name, p in attached.named_trainable()}

    def backward(self, attached: Attached, step: int) -> float:
        import torch

        terms: list[Tensor] = []
        with torch.no_grad():
            for name, p in attached.named_trainable():
                if not p.requires_grad:  # asleep (lisa): it stands still
                    continue
                distance = p - self.source[name]
                terms.append(distance.square().sum(dtype=torch.float64))
                if p.grad is None:
                    p.grad = self.guard.weight * distance
                else:
                    p.grad.add_(distance, alpha=self.guard.weight)
        return 0.5 * self.guard.weight * total(terms)  # only now does the host wait for a GPU

    def describe(self) -> dict[str, Any]:
        return {"guard": self.guard.name, **self.guard.model_dump(mode="json")}
