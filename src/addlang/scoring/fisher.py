"""Fisher: ``E[(dL/dw_ij)^2]``, the squared gradient per calibration sequence (SSU paper, Table 4; Kirkpatrick et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from addlang.errors import AddlangError
from addlang.models import parameter_kinds
from addlang.scoring.activations import normalised
from addlang.scoring.base import Granularity, Progress, Scorer

if TYPE_CHECKING:
    from addlang.data.calibration import CalibrationSet
    from addlang.models import ParamInfo


class Fisher(Scorer):
    """Per-sequence gradients of the token-mean loss, squared, summed over the set.

    Column sums need no weight gradient: for one sequence with inputs ``X`` [T, in] and output gradients ``G`` [T, out],
    ``sum_i (dL/dW_ij)^2 = sum_t ((G G^T) X * X)_tj``. Element granularity keeps one fp32 value per weight.
    """

    name = "fisher"

    def collect(
        self, model: Any, calibration: CalibrationSet | None, granularity: Granularity, progress: Progress | None
    ) -> None:
        assert calibration is not None
        self.granularity = granularity
        self.sums: dict[str, Tensor] = {}
        kinds = parameter_kinds(model)
        modules = dict(model.named_modules())
        wanted = {i.module: i.kind for i in kinds.values() if i.kind in ("linear", "norm")}
        grad_flags = [(p, p.requires_grad) for p in model.parameters()]
        handles = [modules[n].register_forward_hook(self._hook(n, kind == "norm")) for n, kind in wanted.items()]
        # no parameter needs a gradient of its own: the graph hangs on the embedding's output
        handles.append(
            model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        )
        device = next(model.parameters()).device
        sequences = 0
        try:
            for p, _ in grad_flags:
                p.requires_grad_(False)
            with torch.enable_grad():
                for batch in calibration:
                    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
                    logits = model(
                        input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False
                    ).logits[:, :-1]
                    token = nn.functional.cross_entropy(
                        logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2),
                        labels,
                        ignore_index=-100,
                        reduction="none",
                    )
                    # sequences do not interact, so the gradient of the sum holds each sequence's own gradient
                    (token.sum(1) / (labels != -100).sum(1).clamp(min=1)).sum().backward()  # type: ignore[no-untyped-call]
                    sequences += ids.shape[0]
                    if progress is not None:
                        progress(sequences, calibration.sequences, "scoring")
        finally:
            for h in handles:
                h.remove()
            for p, flag in grad_flags:
                p.requires_grad_(flag)
        missing = sorted(n for n in wanted if f"{n}.weight" not in self.sums)
        if missing:
            raise AddlangError(
                f"no gradient reached module '{missing[0]}' while scoring", "this architecture is not supported"
            )
        self.sequences = sequences

    def _hook(self, name: str, is_norm: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def on_grad(g: Tensor) -> None:
                self._accumulate(name, module, x, g.detach(), is_norm)

            output.register_hook(on_grad)

        return hook

    def _accumulate(self, name: str, module: nn.Module, x: Tensor, g: Tensor, is_norm: bool) -> None:
        wide = torch.promote_types(g.dtype, torch.float32)
        g = g.to(wide)
        if is_norm:
            per_sequence = (g * normalised(x, module).to(wide)).flatten(1, -2).sum(1)  # [B, features]
            self._add(f"{name}.weight", per_sequence.square().sum(0))
            return
        x = x.to(wide)
        if getattr(module, "bias", None) is not None:
            self._add(f"{name}.bias", g.sum(1).square().sum(0))
        for xb, gb in zip(x, g, strict=True):  # [T, in], [T, out]
            self._add(f"{name}.weight", self._squares(xb, gb))

    def _squares(self, x: Tensor, g: Tensor) -> Tensor:
        t, width = x.shape[0], x.shape[1] + g.shape[1]
        if self.granularity == "element" or t * width > x.shape[1] * g.shape[1]:
            square = (g.T @ x).square()
            return square if self.granularity == "element" else square.sum(0 if self.granularity == "column" else 1)
        if self.granularity == "column":
            return ((g @ g.T) @ x * x).sum(0)
        return ((x @ x.T) @ g * g).sum(0)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone() if self.granularity == "element" else value.double()

    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        if name not in self.sums:
            raise AddlangError(f"no gradient of '{name}' was seen while scoring", "this architecture is not supported")
        return (self.sums[name] / self.sequences).to(weight)
