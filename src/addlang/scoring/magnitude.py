"""Magnitude: ``|w_ij|``, no data (SSU paper, Table 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from addlang.scoring.base import Granularity, Scorer, reduce

if TYPE_CHECKING:
    from addlang.models import ParamInfo


class Magnitude(Scorer):
    name = "magnitude"
    needs_calibration = False

    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        return reduce(weight.abs(), granularity)
