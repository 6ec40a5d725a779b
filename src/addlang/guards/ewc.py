"""EWC: ``weight / 2 * sum F (w - w0)^2`` over what is trained (Kirkpatrick et al., 2017, Eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from addlang.errors import AddlangError
from addlang.guards.base import ActiveGuard, Guard, GuardContext

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.data.calibration import CalibrationSet
    from addlang.strategies.base import Attached


class EWC(Guard):
    """Pulls every trained element to the source's value, the harder the more the source's loss depends on it.

    ``F`` is the empirical Fisher information: the squared gradient of one conversation's token-mean loss, averaged over the
    conversations of the phase's ``calibration``. It is taken through the attached model, so it exists for what is trained
    only, and is computed anew on resume: it takes one backward pass per conversation and no disk.
    """

    name = "ewc"
    paper = "Overcoming catastrophic forgetting in neural networks (Kirkpatrick et al., 2017; arXiv 1612.00796)"
    summary = "pull every trained weight towards its source value, by its Fisher information"

    weight: float = Field(1e4, gt=0, description="lambda: the gradient is lambda times F times the distance")
    sequences: int | None = Field(
        None, gt=0, description="conversations that F is averaged over, spread over lengths; None: all of `calibration`"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"source_text"})

    def start(self, context: GuardContext) -> ActiveGuard:
        return _Active(self, context)


class _Active(ActiveGuard):
    def __init__(self, guard: EWC, context: GuardContext) -> None:
        self.guard = guard
        self.context = context
        self.source: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}

    def begin(self, attached: Attached) -> None:
        # before a checkpoint is loaded: both belong to the source's values, also on resume
        trained = attached.named_trainable()
        self.source = {name: p.detach().clone() for name, p in trained}
        given = self.context.calibration()
        chosen = spread(len(given.ids), self.guard.sequences)
        self.fisher = fisher(attached, given, chosen, self.context)
        self.about = {"sequences": len(chosen), "source": given.source}
        if not any(bool(f.any()) for f in self.fisher.values()):
            raise AddlangError(
                "ewc: the Fisher information of everything that is trained is 0, so the penalty would do nothing",
                "check the calibration data, or leave the guard out",
            )

    def backward(self, attached: Attached, step: int) -> float:
        import torch

        total = 0.0
        with torch.no_grad():
            for name, p in attached.named_trainable():
                distance = p - self.source[name]
                pull = distance * self.fisher[name]
                total += 0.5 * self.guard.weight * float((pull * distance).double().sum())
                if p.grad is None:
                    p.grad = self.guard.weight * pull
                else:
                    p.grad.add_(pull, alpha=self.guard.weight)
        return total

    def describe(self) -> dict[str, Any]:
        return {"guard": self.guard.name, **self.guard.model_dump(mode="json"), **self.about}


def spread(count: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``count`` indices at equal distances; the set is sorted by length."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]


def fisher(attached: Attached, given: CalibrationSet, chosen: list[int], context: GuardContext) -> dict[str, Tensor]:
    """Mean over conversations of the squared gradient of the token-mean loss, for every trained parameter (its shape)."""
    import torch

    trained = attached.named_trainable()
    sums = {name: torch.zeros_like(p) for name, p in trained}
    training = attached.model.training
    attached.model.eval()
    try:
        for done, index in enumerate(chosen, 1):
            ids = torch.tensor([given.ids[index]], device=context.device)
            with torch.enable_grad(), context.autocast():
                logits = attached.model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            for name, p in trained:
                if p.grad is not None:
                    sums[name].addcmul_(p.grad, p.grad, value=1 / len(chosen))
                    p.grad = None
            context.progress(done, len(chosen), "conversations")
    finally:
        attached.model.train(training)
    return sums
