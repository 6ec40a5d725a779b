"""Wanda: ``|w_ij| ||x_j||_2``, the norm over all calibration tokens (SSU paper section 3.1; Sun et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from addlang.scoring.activations import InputStatistics
from addlang.scoring.base import Granularity, Progress, Scorer, reduce

if TYPE_CHECKING:
    from torch import nn

    from addlang.data.calibration import CalibrationSet
    from addlang.models import ParamInfo


class Wanda(Scorer):
    """Column score ``||x_j|| sum_i |w_ij|``.

    ``reference_code`` is the public code's: ``||W[:, j]||_2 E[x_j^2]`` for columns, ``||W[i, :]||_2`` (no activations at
    all) for rows, ``|w| (1 + E[x^2])`` for elements and 1-D parameters; the mean is per sequence, pads included.
    """

    name = "wanda"
    has_reference_code = True

    def collect(
        self, model: nn.Module, calibration: CalibrationSet | None, granularity: Granularity, progress: Progress | None
    ) -> None:
        assert calibration is not None
        self.statistics = InputStatistics(reference=self.reference_code)
        self.statistics.collect(model, calibration, progress)

    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        if self.reference_code:
            return self._reference(weight, info, granularity)
        if info.kind == "bias":  # its input is the constant 1
            return weight.abs()
        norm = self.statistics.squares[info.module].sqrt().to(weight)
        if weight.dim() == 1:
            return weight.abs() * norm
        if granularity == "column":
            return weight.abs().sum(0) * norm
        if granularity == "row":
            return weight.abs() @ norm
        return reduce(weight.abs() * norm, granularity)

    def _reference(self, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        mean = (self.statistics.sequence_means[info.module] / self.statistics.sequences).to(weight)
        if weight.dim() == 2 and granularity == "column":
            return weight.norm(dim=0) * mean
        if weight.dim() == 2 and granularity == "row":
            return weight.norm(dim=1)
        if info.kind == "bias":  # the public code cuts or stretches the input's statistics to the output's width
            mean = mean[: weight.numel()]
            if mean.numel() != weight.numel():
                mean = interpolate(mean.view(1, 1, -1), size=weight.numel(), mode="linear", align_corners=False).view(
                    -1
                )
        return weight.abs() * (1 + mean)
