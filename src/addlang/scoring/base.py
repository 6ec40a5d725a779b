"""Scores: what a scorer gives, parameter by parameter, and how statistics become scores.

Nothing here holds element-wise scores of a whole model (52 GB at 13B): statistics are vectors over input features, and a
parameter's scores are computed when they are asked for. A missing or non-finite score is an error, never a substitute.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from addlang.errors import AddlangError, did_you_mean
from addlang.models import ParamInfo, parameter_kinds

if TYPE_CHECKING:
    from torch import nn

    from addlang.data.calibration import CalibrationSet

Granularity = Literal["column", "row", "element"]
GRANULARITIES: tuple[Granularity, ...] = ("column", "row", "element")
SCORERS = ("fisher", "magnitude", "random", "sparsegpt", "wanda")
Progress = Callable[[int, int, str], None]


class Scorer(ABC):
    """One importance measure.

    Args:
        seed: for scorers that choose at random.
        reference_code: use the formula of the SSU paper's public code instead of the paper's (``wanda`` only).
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = True
    granularities: ClassVar[tuple[Granularity, ...]] = GRANULARITIES
    has_reference_code: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, reference_code: bool = False) -> None:
        if reference_code and not self.has_reference_code:
            raise AddlangError(
                f"scorer '{self.name}' has no reference_code variant", "remove reference_code, or use scorer: wanda"
            )
        self.seed = seed
        self.reference_code = reference_code

    def collect(  # noqa: B027 - a scorer without statistics has nothing to collect
        self, model: nn.Module, calibration: CalibrationSet | None, granularity: Granularity, progress: Progress | None
    ) -> None:
        """Stream the calibration set through the model and keep what :meth:`score` needs. Weights stay untouched."""

    @abstractmethod
    def score(self, name: str, weight: Tensor, info: ParamInfo, granularity: Granularity) -> Tensor:
        """Importance of one parameter.

        Args:
            weight: fp32 (or fp64) values [out, in] or [n]; for a norm the *effective* weight (``1 + w`` where the
                architecture stores an offset).

        Returns:
            [in] for columns, [out] for rows, the parameter's shape for elements and for every 1-D parameter.
        """


class Scores:
    """Scores of every parameter inside the comparison (embedding and head are outside)."""

    def __init__(self, model: nn.Module, scorer: Scorer, granularity: Granularity) -> None:
        self._parameters = dict(model.named_parameters())
        self._modules = dict(model.named_modules())
        self._kinds = {n: k for n, k in parameter_kinds(model).items() if k.kind not in ("embedding", "head")}
        self._scorer = scorer
        self.granularity = granularity

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        scorer: Scorer,
        granularity: Granularity,
        calibration: CalibrationSet | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Run the scorer over the calibration set.

        Raises:
            AddlangError: undefined granularity, missing calibration data, NaN activations.
        """
        if granularity not in scorer.granularities:
            raise AddlangError(
                f"scorer '{scorer.name}' is undefined for granularity '{granularity}': all rows share their inputs",
                f"use granularity: {' or '.join(scorer.granularities)}",
            )
        if scorer.needs_calibration and calibration is None:
            raise AddlangError(
                f"scorer '{scorer.name}' needs calibration data", "give calibration datasets, or use scorer: magnitude"
            )
        scorer.collect(model, calibration, granularity, progress)
        return cls(model, scorer, granularity)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kinds:
            raise AddlangError(f"no score for parameter '{name}'", did_you_mean(name, self._kinds))
        p = self._parameters[name].detach()
        info = self._kinds[name]
        weight = p if p.dtype == torch.float64 else p.float()
        if info.kind == "norm" and not self._scorer.reference_code:  # the public code takes the stored value
            weight = weight + norm_offset(self._modules[info.module])
        score = self._scorer.score(name, weight, info, self.granularity)
        one_d = weight.dim() == 1
        want = {"column": weight.shape[-1:], "row": weight.shape[:1], "element": weight.shape}[
            "element" if one_d else self.granularity
        ]
        assert score.shape == want, f"{self._scorer.name} gave {tuple(score.shape)} for {name}, expected {tuple(want)}"
        if not bool(torch.isfinite(score).all()):
            raise AddlangError(
                f"scorer '{self._scorer.name}' gave a non-finite score for '{name}'",
                "the model's weights or activations are NaN or infinite; check the checkpoint, or compute in fp32",
            )
        return score


def reduce(elements: Tensor, granularity: Granularity) -> Tensor:
    """Sum element scores [out, in] to columns [in] or rows [out]; 1-D parameters keep their elements."""
    if elements.dim() == 1 or granularity == "element":
        return elements
    return elements.sum(0 if granularity == "column" else 1)


def norm_offset(module: nn.Module) -> float:
    """1.0 where a norm multiplies by ``1 + weight`` (Gemma), 0.0 where by ``weight``; found by trying it.

    Raises:
        AddlangError: the norm does neither.
    """
    weight: Any = module.weight
    gain = torch.full_like(weight.data, 0.5)
    x = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype, device=weight.device).unsqueeze(0) + 0.1
    with torch.no_grad():
        y = torch.func.functional_call(module, {"weight": gain}, (x,)).float()
        one = torch.func.functional_call(module, {"weight": torch.full_like(gain, 1.5)}, (x,)).float()
    # y = (0.5 + offset) n and one = (1.5 + offset) n, so y / one is 1/3 without and 3/5 with the offset
    ratio = float(y.abs().sum() / one.abs().sum())
    if abs(ratio - 1 / 3) < 0.03:
        return 0.0
    if abs(ratio - 3 / 5) < 0.03:
        return 1.0
    raise AddlangError(
        f"{type(module).__name__} multiplies neither by its weight nor by 1 + weight",
        "this architecture is not supported",
    )


def make_scorer(name: str, *, seed: int = 0, reference_code: bool = False) -> Scorer:
    """The scorer of that name."""
    if name not in SCORERS:
        raise AddlangError(f"unknown scorer '{name}'", did_you_mean(name, SCORERS))
    module = importlib.import_module(f"addlang.scoring.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Scorer) and getattr(value, "name", None) == name:
            return value(seed=seed, reference_code=reference_code)
    raise TypeError(f"addlang/scoring/{name}.py defines no Scorer with name '{name}'")
