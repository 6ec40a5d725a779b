"""Random: a seeded choice, the control of every comparison (SSU paper, Table 4)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from addlang.scoring.base import Granularity, Scorer

if TYPE_CHECKING:
    from addlang.models import ParamInfo


class Random(Scorer):
    name = "random"
    needs_calibration = False

    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        shape = weight.shape
        if weight.dim() == 2 and granularity != "element":
            shape = shape[-1:] if granularity == "column" else shape[:1]
        return torch.rand(shape, generator=generator(self.seed, name), dtype=torch.float64).to(weight.device)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every parameter, so that a choice does not depend on the order of parameters."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
