"""Reference execution: dense parameters, gradients of what is frozen set to zero, frozen elements put back.

Zero gradients alone do not freeze: decoupled weight decay shrinks frozen weights all the same (engine.md trap 2), and a
gradient that is masked after clipping has already shrunk the others. So the mask comes before clipping and the frozen
values are copied back after every optimizer step. Tensor hooks are not used: they do not fire under FSDP2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addlang.strategies.base import Attached

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan, Frozen

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Masked(Attached):
    """Executes any plan; costs as much as full fine-tuning."""

    def __init__(self, model: nn.Module, plan: FreezePlan, *, masters: bool = True) -> None:
        super().__init__(model, plan)
        self._partial: list[tuple[nn.Parameter, Frozen, Tensor]] = []
        for name, p in model.named_parameters():
            entry = plan[name]
            p.requires_grad_(entry.kind != "all")
            if entry.kind == "all":
                continue
            if masters and p.dtype in LOW_PRECISION:
                p.data = p.data.float()
            if entry.kind != "none":
                index = _on(entry, p.device)
                self._partial.append((p, index, select_frozen(p.detach(), index).clone()))

    def before_clip(self, step: int) -> None:
        """Set the gradients of frozen elements to zero, so that clipping and moments see only what is trained."""
        for p, entry, _ in self._partial:
            if p.grad is not None:
                fill_frozen(p.grad, entry, 0.0)

    def after_step(self, step: int) -> None:
        """Put the frozen elements back bit for bit: weight decay has moved them."""
        with torch.no_grad():
            for p, entry, values in self._partial:
                fill_frozen(p, entry, values)


def _on(entry: Frozen, device: torch.device) -> Frozen:
    from addlang.freeze.plan import Frozen

    return Frozen(entry.shape, entry.kind, None if entry.index is None else entry.index.to(device))


def select_frozen(tensor: Tensor, entry: Frozen) -> Tensor:
    """The frozen elements of ``tensor``: [..., k] for columns, [k, ...] for rows, [k] for elements."""
    assert entry.index is not None
    if entry.kind == "columns":
        return tensor[..., entry.index]
    return tensor[entry.index]


def fill_frozen(tensor: Tensor, entry: Frozen, values: Tensor | float) -> None:
    """Overwrite the frozen elements of ``tensor`` in place."""
    assert entry.index is not None
    if entry.kind == "columns":
        if isinstance(values, Tensor):
            tensor.index_copy_(tensor.dim() - 1, entry.index, values)
        else:
            tensor.index_fill_(tensor.dim() - 1, entry.index, values)
    elif entry.kind == "rows":
        if isinstance(values, Tensor):
            tensor.index_copy_(0, entry.index, values)
        else:
            tensor.index_fill_(0, entry.index, values)
    elif isinstance(values, Tensor):
        tensor[entry.index] = values
    else:
        tensor.masked_fill_(entry.index, values)
