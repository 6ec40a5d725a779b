"""Partly frozen vectors (norms, biases) and rows (special tokens of embedding and head), exact for every optimizer.

The parameter stays what it is, under its own name, so ties and sharding are untouched. But whoever *uses* it gets the
frozen elements of the source laid over it, and the gradient that flows back is zero there. Weight decay may move the
covered elements of the stored parameter; nothing ever reads them, and saving puts the source's values back.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from addlang.errors import AddlangError


class Overlay(nn.Module):
    """Mix-in of modules made by :func:`overlay`."""

    def _parts(self, leaf: str) -> tuple[nn.Parameter, Tensor, Tensor]:
        """The stored parameter, the frozen indices of its first dimension, and the values there."""
        p = self._parameters[leaf]
        assert p is not None
        return p, getattr(self, f"{leaf}_frozen_index"), getattr(self, f"{leaf}_frozen_values")

    def _covered(self, leaf: str) -> Tensor:
        p, index, values = self._parts(leaf)
        if isinstance(p, DTensor):  # FSDP2 looks after its shard; what a forward pass sees is never one
            return p
        covered: Tensor = _Cover.apply(p, index, values)  # type: ignore[no-untyped-call]
        return covered

    @property
    def overlaid(self) -> tuple[str, ...]:
        """Names of the parameters with frozen elements."""
        return tuple(n.removesuffix("_frozen_values") for n in self._buffers if n.endswith("_frozen_values"))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen elements into the stored parameters, also into this rank's part of sharded ones."""
        for leaf in self.overlaid:
            p, index, values = self._parts(leaf)
            local, start = _local(p)
            here = (index >= start) & (index < start + local.shape[0])
            local.index_copy_(0, index[here] - start, values[here].to(local.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise AddlangError(f"'{prefix}' is partly frozen: load_state_dict(assign=True) cannot be used")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        with torch.no_grad():
            for leaf in self.overlaid:
                p, index, values = self._parts(leaf)
                whole = p.full_tensor() if isinstance(p, DTensor) else p
                values.copy_(whole.index_select(0, index))


def overlay(module: nn.Module, leaf: str, index: Tensor) -> Overlay:
    """Freeze ``module.<leaf>[index]`` (elements of a vector, rows of a matrix) at their present values, in place."""
    p = module._parameters[leaf]
    assert p is not None
    index = index.to(p.device)
    leaves = (*module.overlaid, leaf) if isinstance(module, Overlay) else (leaf,)
    base = type(module).__mro__[2] if isinstance(module, Overlay) else type(module)
    values = p.detach().index_select(0, index)
    module.__class__ = _overlay_class(base, tuple(sorted(leaves)))
    module.register_buffer(f"{leaf}_frozen_index", index, persistent=False)
    module.register_buffer(f"{leaf}_frozen_values", values, persistent=False)
    assert isinstance(module, Overlay)
    return module


def remove_overlay(module: Overlay) -> nn.Module:
    """Undo :func:`overlay`, in place."""
    module.restore()
    for leaf in module.overlaid:
        del module._buffers[f"{leaf}_frozen_index"], module._buffers[f"{leaf}_frozen_values"]
    module.__class__ = type(module).__mro__[2]
    return module


@cache
def _overlay_class(base: type[nn.Module], leaves: tuple[str, ...]) -> type[Overlay]:
    """A subclass of (Overlay, base): its method resolution order is [itself, Overlay, base, ...]."""

    def getter(leaf: str) -> property:
        return property(lambda self: self._covered(leaf))

    body = {leaf: getter(leaf) for leaf in leaves}
    return type(f"Overlay{base.__name__}", (Overlay, base), body)


class _Cover(torch.autograd.Function):
    """``p`` with ``values`` at ``index`` of its first dimension; no gradient flows to these."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.index = index
        return p.index_copy(0, index, values.to(p.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_fill(0, ctx.index, 0.0), None, None


def _local(p: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter and where it starts in the first dimension."""
    if not isinstance(p, DTensor):
        return p, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), offset[0] if offset else 0
