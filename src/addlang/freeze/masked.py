"""Reference execution: dense parameters, gradients of what is frozen set to zero, frozen elements put back.

Zero gradients alone do not freeze: decoupled weight decay shrinks frozen weights all the same (engine.md trap 2), and a
gradient that is masked after clipping has already shrunk the others. So the mask comes before clipping and the frozen
values are copied back after every optimizer step. Tensor hooks are not used: they do not fire under FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addlang.strategies.base import Attached
from addlang.train.shard import local_part, whole

if TYPE_CHECKING:
    from torch import nn

    from addlang.freeze.plan import FreezePlan, Frozen

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Masked(Attached):
    """Executes any plan; costs as much as full fine-tuning."""

    execution = "masked"

    def __init__(self, model: nn.Module, plan: FreezePlan, *, masters: bool = True) -> None:
        super().__init__(model, plan)
        self._partial: dict[str, tuple[Frozen, Tensor]] = {}  # what is frozen of a parameter, and its values
        self._cut = False  # whether that is this process's part only
        for name, p in model.named_parameters():
            entry = plan[name]
            p.requires_grad_(entry.kind != "all")
            if entry.kind == "all":
                continue
            if masters and p.dtype in LOW_PRECISION:
                p.data = p.data.float()
            if entry.kind != "none":
                index = _on(entry, p.device)
                self._partial[name] = (index, select_frozen(p.detach(), index).clone())

    def before_clip(self, step: int) -> None:
        """Set the gradients of frozen elements to zero, so that clipping and moments see only what is trained."""
        with torch.no_grad():
            for p, entry, _ in self._parts():
                if p.grad is not None:
                    fill_frozen(local_part(p.grad)[0], entry, 0.0)

    def after_step(self, step: int) -> None:
        """Put the frozen elements back bit for bit: weight decay has moved them."""
        with torch.no_grad():
            for p, entry, values in self._parts():
                fill_frozen(local_part(p)[0], entry, values)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter; gathered from all processes where it is sharded (all must call)."""
        for n, p in self.named_trainable():
            yield n, whole(p)

    def _parts(self) -> Iterator[tuple[nn.Parameter, Frozen, Tensor]]:
        """Partly frozen parameters with what is frozen of them here; looked up anew, for sharding replaces them."""
        parameters = dict(self.model.named_parameters())
        if not self._cut:
            for name, (entry, values) in self._partial.items():
                local, start = local_part(parameters[name])
                entry, values = cut(entry, values, start, local.shape[0])
                self._partial[name] = (_on(entry, local.device), values.to(local.device))
            self._cut = True
        for name, (entry, values) in self._partial.items():
            yield parameters[name], entry, values


def cut(entry: Frozen, values: Tensor, start: int, count: int) -> tuple[Frozen, Tensor]:
    """What of ``entry`` and its ``values`` lies in the rows ``start`` .. ``start + count - 1`` of the tensor."""
    from addlang.freeze.plan import Frozen

    if count == entry.shape[0]:
        return entry, values
    shape = (count, *entry.shape[1:])
    assert entry.index is not None
    if entry.kind == "elements":
        before, here = int(entry.index[:start].sum()), entry.index[start : start + count]
        return Frozen(shape, "elements", here.clone()), values[before : before + int(here.sum())].clone()
    if entry.kind == "columns" and len(shape) > 1:
        return Frozen(shape, "columns", entry.index), values[start : start + count].clone()
    inside = (entry.index >= start) & (entry.index < start + count)
    return Frozen(shape, entry.kind, entry.index[inside] - start), values[inside].clone()


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
