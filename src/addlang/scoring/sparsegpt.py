"""SparseGPT-style: ``E[x_j^2]``, neither weight nor inverse Hessian (SSU paper, appendix B.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addlang.scoring.activations import InputStatistics
from addlang.scoring.base import Granularity, Progress, Scorer, reduce

if TYPE_CHECKING:
    from torch import nn

    from addlang.data.calibration import CalibrationSet
    from addlang.models import ParamInfo


class SparseGPT(Scorer):
    """Constant over a column, so rows are undefined; every bias ties (its input is 1) and is chosen by the seed."""

    name = "sparsegpt"
    granularities = ("column", "element")

    def collect(
        self, model: nn.Module, calibration: CalibrationSet | None, granularity: Granularity, progress: Progress | None
    ) -> None:
        assert calibration is not None
        self.statistics = InputStatistics()
        self.statistics.collect(model, calibration, progress)

    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        if info.kind == "bias":
            return torch.ones_like(weight)
        # a per-head norm sees every token once per head: the mean is over what it saw
        seen = self.statistics.tokens
        mean = (self.statistics.squares[info.module] / seen).to(weight)
        if weight.dim() == 1:
            return mean
        if granularity == "column":
            return mean * weight.shape[0]
        return reduce(mean.expand_as(weight), granularity)
