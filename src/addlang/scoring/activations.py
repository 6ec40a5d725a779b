"""Streaming statistics of every layer's input features: vectors only, pads never counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from addlang.errors import AddlangError
from addlang.models import parameter_kinds

if TYPE_CHECKING:
    from addlang.data.calibration import CalibrationSet


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
        self._shared: tuple[Tensor, Tensor, Tensor | None] | None = None

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
        try:
            with torch.inference_mode():
                for batch in calibration:
                    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                    padded = not bool(mask.all())
                    self._rows = mask.bool() if padded else None
                    self._shared = None
                    decoder(input_ids=ids, attention_mask=mask if padded else None, use_cache=False)
                    self.tokens += int(mask.sum())
                    self.sequences += ids.shape[0]
                    if progress is not None:
                        progress(self.sequences, calibration.sequences, "scoring")
        finally:
            for h in handles:
                h.remove()
            self._shared = self._rows = None
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
            # q, k and v get one tensor, gate and up another: their statistics are computed once
            if not is_norm and self._shared is not None and self._shared[0] is x:
                _, total, mean = self._shared
            else:
                total = sum_of_squares(normalised(x, module) if is_norm else x, self._rows)
                mean = x.detach().float().square().flatten(1, -2).mean(1).sum(0) if self.reference else None
                if not is_norm:
                    self._shared = (x, total, mean)
            _add(self.squares, name, total)
            if mean is not None:
                _add(self.sequence_means, name, mean)

        return hook


def _add(table: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in table:
        table[name] += value
    else:
        table[name] = value.double()


def sum_of_squares(x: Tensor, rows: Tensor | None) -> Tensor:
    """``sum_t x_tj^2`` [features] of ``x`` [B, T, ..., features] or [B, heads, T, features], without pads.

    Args:
        rows: [B, T] bool of real tokens, None when all are.
    """
    if rows is not None:
        x = real_tokens(x, rows)
    # one fused pass; x.float().square() would write two temporaries as large as the activation
    return torch.linalg.vector_norm(
        x.reshape(-1, x.shape[-1]), dim=0, dtype=torch.promote_types(x.dtype, torch.float32)
    ).square()


def real_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """Drop pads: [n, ..., features]."""
    if x.shape[:2] == rows.shape:
        return x[rows]
    assert x.dim() == 4, f"unexpected activation shape {tuple(x.shape)}"
    assert x.shape[2] == rows.shape[1], f"unexpected activation shape {tuple(x.shape)}"
    return x.transpose(1, 2)[rows]  # per-head norms after the heads moved to dimension 1


def normalised(x: Tensor, module: nn.Module) -> Tensor:
    """The input features of a norm's weight: ``x`` after normalisation, before scaling."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        raise AddlangError(f"{type(module).__name__} has no epsilon", "this architecture is not supported")
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
