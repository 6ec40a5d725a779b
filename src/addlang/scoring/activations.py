"""Streaming statistics of every layer's input features: vectors only, pads never counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from addlang.errors import AddlangError
from addlang.models import parameter_kinds
from addlang.scoring import gpu

if TYPE_CHECKING:
    from addlang.data.calibration import CalibrationSet

BLOCK = 1 << 16  # elements: 256 KiB in fp32


class InputStatistics:
    """Sums over calibration tokens, by module.

    Attributes:
        squares: sum of ``x_j^2`` [in]; for a norm, of the *normalised* activation.
        sequence_means: mean over sequences of the per-sequence mean of ``x_j^2``, pads included, raw inputs also for
            norms [in] (the public SSU code's statistic; only when ``reference``).
        tokens: tokens that counted.
    """

    def __init__(self, *, reference: bool = False) -> None:
        self.reference = reference
        self.squares: dict[str, Tensor] = {}
        self.sequence_means: dict[str, Tensor] = {}
        self.tokens = 0
        self.sequences = 0
        self._rows: Tensor | None = None  # [B, T] bool, None when the batch has no pads
        self._weights: Tensor | None = None  # fp32 [B * T], 0 for pads
        self._shared: tuple[Tensor, str] | None = None  # the last layer's input, and the layer
        self._leader: dict[str, str] = {}  # of layers that get the input of another one: q, k and v; gate and up
        self._tables: dict[str, Tensor] = {}  # of a GPU's kernel

    def collect(
        self, model: Any, calibration: CalibrationSet, progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        """Run the decoder (not the head) over the set.

        Raises:
            AddlangError: NaN or infinite activations, naming the module.
        """
        kinds = parameter_kinds(model)
        modules = dict(model.named_modules())
        wanted = {i.module: i.kind for i in kinds.values() if i.kind in ("linear", "norm")}
        handles = [modules[n].register_forward_pre_hook(self._hook(n, kind == "norm")) for n, kind in wanted.items()]
        device = next(model.parameters()).device
        decoder = model.base_model
        heads = {getattr(model.config, k, None) for k in ("num_attention_heads", "num_key_value_heads")}
        try:
            with torch.inference_mode():
                for batch in calibration:
                    ids, mask = batch["input_ids"], batch["attention_mask"]
                    padded, real = not bool(mask.all()), int(mask.sum())  # asked of a GPU, they would wait for it
                    ids, mask = ids.to(device), mask.to(device)
                    if (
                        padded and ids.shape[1] in heads
                    ):  # per-head norms could not tell heads from tokens: one more pad
                        ids, mask = (
                            nn.functional.pad(ids, (0, 1), value=int(ids[0, 0])),
                            nn.functional.pad(mask, (0, 1)),
                        )
                    self._rows = mask.bool() if padded else None
                    self._weights = mask.flatten().float() if padded else None
                    self._shared = None
                    decoder(input_ids=ids, attention_mask=mask if padded else None, use_cache=False)
                    self.tokens += real
                    self.sequences += ids.shape[0]
                    if progress is not None:
                        progress(self.sequences, calibration.sequences, "scoring")
                for name, table in self._tables.items():
                    _add(self.squares, name, table.sum(0))
                for name, leader in self._leader.items():
                    for found in (self.squares, self.sequence_means):
                        if leader != name and leader in found:
                            found[name] = found[leader].clone()
        finally:
            for h in handles:
                h.remove()
            self._shared = self._rows = self._weights = None
            self._tables.clear()
        missing = sorted(set(wanted) - set(self.squares))
        if missing:
            raise AddlangError(
                f"module '{missing[0]}' was never called while scoring", "this architecture is not supported"
            )
        for name, s in self.squares.items():
            if not bool(torch.isfinite(s).all()):
                raise AddlangError(
                    f"the activations entering '{name}' are NaN or infinite on the calibration data",
                    "check the checkpoint; score in fp32 (precision: fp32)",
                )

    def _hook(self, name: str, is_norm: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if not is_norm:
                # q, k and v get one tensor, gate and up another: their statistics are computed once
                leader = self._shared[1] if self._shared is not None and self._shared[0] is x else name
                if self._leader.setdefault(name, leader) != leader:
                    raise AddlangError(
                        f"'{name}' shares its input with another layer in some batches only",
                        "this architecture is not supported",
                    )
                if leader != name:
                    return
                self._shared = (x, name)
            self._count(name, x, module if is_norm else None)
            if self.reference:
                _add(self.sequence_means, name, x.detach().float().square().flatten(1, -2).mean(1).sum(0))

        return hook

    def _count(self, name: str, x: Tensor, norm: nn.Module | None) -> None:
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(norm, nn.LayerNorm) or not gpu.usable(flat):
            _add(self.squares, name, sum_of_squares(x, self._rows, norm))
            return
        weights = self._weights
        if self._rows is not None and x.dim() != 3:
            weights = token_weights(x, self._rows, torch.float32)
        if norm is not None:
            weights = gpu.row_scales(flat, weights, epsilon(norm))
        if name not in self._tables:
            self._tables[name] = gpu.new_table(flat)
        gpu.add_column_squares(self._tables[name], flat, weights)


def _add(table: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in table:
        table[name] += value
    else:
        table[name] = value.to(torch.float64)


def sum_of_squares(x: Tensor, rows: Tensor | None, norm: nn.Module | None = None) -> Tensor:
    """``sum_t x_tj^2`` [features] of ``x`` [B, T, ..., features] or [B, heads, T, features], without pads, in float64.

    Args:
        rows: [B, T] bool of real tokens, None when all are.
        norm: the norm that ``x`` enters: sum the squares of its *normalised* input.
    """
    flat = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = None if rows is None else token_weights(x, rows, wide)
    # block by block, so that squares stay in the processor's cache: ten times as fast as one pass over a large activation
    step = max(1, (BLOCK if x.device.type == "cpu" else flat.numel()) // flat.shape[1])
    total = torch.zeros(flat.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, flat.shape[0], step):
        block = flat[start : start + step].to(wide)
        if isinstance(norm, nn.LayerNorm):
            block = block - block.mean(1, keepdim=True)
        square = block.square()
        weight = None if weights is None else weights[start : start + step]
        if norm is not None:
            scale = 1 / (square.mean(1) + epsilon(norm))
            weight = scale if weight is None else weight * scale
        total += square.sum(0) if weight is None else weight @ square
    return total


def token_weights(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for the rows of the flattened ``x`` that belong to a real token, 0 for pads."""
    if x.shape[:2] == rows.shape:
        shape = rows.shape + (1,) * (x.dim() - 3)
        return rows.view(shape).expand(x.shape[:-1]).reshape(-1).to(dtype)
    assert x.dim() == 4, f"unexpected activation shape {tuple(x.shape)}"
    assert x.shape[2] == rows.shape[1], f"unexpected activation shape {tuple(x.shape)}"
    return rows.unsqueeze(1).expand(x.shape[:-1]).reshape(-1).to(dtype)  # heads were moved to dimension 1


def normalised(x: Tensor, module: nn.Module) -> Tensor:
    """The input features of a norm's weight: ``x`` after normalisation, before scaling."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon(module))


def epsilon(module: nn.Module) -> float:
    """What a norm adds to the variance.

    Raises:
        AddlangError: it has none under a known name.
    """
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if found is None:
        raise AddlangError(f"{type(module).__name__} has no epsilon", "this architecture is not supported")
    return float(found)
