"""EWC: ``weight / 2 * sum F (w - w0)^2`` over what is trained (Kirkpatrick et al., 2017, Eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from addlang.errors import AddlangError
from addlang.guards.base import ActiveGuard, Guard, GuardContext, compact, total
from addlang.guards.sampling import Sampling, stored_conversations

if TYPE_CHECKING:
    from torch import Tensor

    from addlang.strategies.base import Attached


class EWC(Guard):
    """Pulls every trained element to the source's value, the harder the more the source's predictions depend on it.

    ``F`` is the squared gradient of a conversation's summed loss, over all conversations and per token. With ``data:
    calibration`` these are the phase's source data, and ``F`` is the empirical Fisher information. With ``data: self`` the
    source model samples them itself, as for the self anchor: no source data are needed, ``F`` is the Fisher information
    proper, whose expectation is over the model's own words, and ``sum F (w - w0)^2 / 2`` estimates the KL divergence from
    the source per token in nats (to second order), so that a ``weight`` carries over to another model.

    ``F`` is taken through the attached model, so it exists for what is trained only, and is computed anew on resume: it takes
    one backward pass per conversation and no disk. Beside fp32 masters it is kept in bf16, and the source's values in the
    checkpoint's type: 4 bytes per trained element instead of 8.
    """

    name = "ewc"
    paper = "Overcoming catastrophic forgetting in neural networks (Kirkpatrick et al., 2017; arXiv 1612.00796)"
    summary = "pull every trained weight towards its source value, by its Fisher information"
    pulls_weights = True

    weight: float = Field(100.0, gt=0, description="lambda: the gradient is lambda times F times the distance")
    per: Literal["token", "conversation"] = Field(
        "token",
        description="F per token; or of a conversation's mean loss, which is smaller by a conversation's length, so that "
        "the weight depends on it",
    )
    sequences: int | None = Field(
        None, gt=0, description="conversations that F is averaged over, spread over the set; None: all"
    )

    data: Literal["calibration", "self"] = Field(
        "calibration",
        description="whose conversations: the phase's source data, or sampled from the source model itself",
    )
    sampling: Sampling = Field(Sampling(conversations=500), description="options of `data: self`, as of self_anchor")

    @model_validator(mode="after")
    def _samples_only_its_own(self) -> EWC:
        if self.data == "calibration" and "sampling" in self.model_fields_set and self.sampling != EWC().sampling:
            raise ValueError("sampling has options of data: self; set that, or leave sampling out")
        return self

    def kept_bytes(self, stored: int, master: int) -> int:
        return min(stored, master) + 2

    def begin_bytes(self, stored: int, master: int) -> int:
        return min(stored, master) + 2 * master  # w0, the sums of squares, a conversation's gradients

    def requires(self) -> frozenset[str]:
        return frozenset({"source_text"} if self.data == "calibration" else {"chat_template"})

    def start(self, context: GuardContext) -> ActiveGuard:
        if self.data == "self":
            ids, about = stored_conversations(self.sampling, context)
            return _Active(self, context, ids, {"source": "sampled from the source model", **about})
        given = context.calibration()
        whole = [list(ids) for ids in given.ids]
        return _Active(self, context, whole, {"source": given.source, "fingerprint": given.fingerprint})


class _Active(ActiveGuard):
    def __init__(self, guard: EWC, context: GuardContext, ids: list[list[int]], about: dict[str, Any]) -> None:
        self.guard, self.context = guard, context
        self.ids = [ids[i] for i in spread(len(ids), guard.sequences)]
        self.about = {**about, "sequences": len(self.ids)}
        self.source: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}

    def begin(self, attached: Attached) -> None:
        import torch

        # before a checkpoint is loaded: both belong to the source's values, also on resume
        self.source = {name: compact(p.detach()) for name, p in attached.named_trainable()}
        found = fisher(attached, self.ids, self.context, per=self.guard.per)
        if total([f.sum() for f in found.values()]) == 0:
            raise AddlangError(
                "ewc: the Fisher information of everything that is trained is 0, so the penalty would do nothing",
                "check the conversations, or leave the guard out",
            )
        for name in list(found):  # one by one, so that both forms of one tensor only are there at a time
            f = found.pop(name)
            self.fisher[name] = f.bfloat16() if f.dtype == torch.float32 else f

    def backward(self, attached: Attached, step: int) -> float:
        import torch

        terms: list[Tensor] = []
        with torch.no_grad():
            for name, p in attached.named_trainable():
                if not p.requires_grad:  # asleep (lisa): it stands still
                    continue
                distance = p - self.source[name]
                pull = distance * self.fisher[name]
                terms.append((pull * distance).sum(dtype=torch.float64))
                if p.grad is None:
                    p.grad = self.guard.weight * pull
                else:
                    p.grad.add_(pull, alpha=self.guard.weight)
        return 0.5 * self.guard.weight * total(terms)  # only now does the host wait for a GPU

    def tokens_before(self) -> int:
        return sum(map(len, self.ids))

    def describe(self) -> dict[str, Any]:
        return {"guard": self.guard.name, **self.guard.model_dump(mode="json"), **self.about}


def spread(count: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``count`` indices at equal distances; the set is sorted by length."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]


def fisher(
    attached: Attached, conversations: list[list[int]], context: GuardContext, *, per: str = "token"
) -> dict[str, Tensor]:
    """Diagonal Fisher information of every trained parameter (its shape).

    Args:
        per: ``token``: the squared gradients of the conversations' summed losses, over their tokens; ``conversation``: the mean
            over conversations of the squared gradient of the token-mean loss.
    """
    import torch

    everything = sum(len(conversation) - 1 for conversation in conversations)

    trained = attached.named_trainable()
    sums = {name: torch.zeros_like(p) for name, p in trained}
    training = attached.model.training
    attached.model.eval()
    asleep = [p for _, p in trained if not p.requires_grad]  # lisa: they will wake
    try:
        for p in asleep:
            p.requires_grad_(True)
        for done, conversation in enumerate(conversations, 1):
            ids = torch.tensor([conversation], device=context.device)
            with torch.enable_grad(), context.autocast():
                logits = attached.model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            tokens = len(conversation) - 1
            share = tokens**2 / everything if per == "token" else 1 / len(conversations)
            for name, p in trained:
                if p.grad is not None:
                    sums[name].addcmul_(p.grad, p.grad, value=share)
                    p.grad = None
            context.progress(done, len(conversations), "conversations")
    finally:
        for p in asleep:
            p.requires_grad_(False)
        attached.model.train(training)
    return sums
