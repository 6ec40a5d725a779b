"""Spectrum: choose matrices by the signal-to-noise ratio of their singular values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from addlang.errors import AddlangWarning
from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan

VERSION = 1  # of what is kept in the cache
THRESHOLDS = ("code", "paper")
QUARTILES_OF_NORMAL = 1.349  # the distance between the quartiles of a standard normal distribution


class Ratio(NamedTuple):
    """Signal-to-noise ratio of one matrix, divided by its largest singular value; infinite where no value is noise."""

    value: float
    noise_is_empty: bool

    @classmethod
    def of(cls, value: float | None) -> Ratio:
        """None: no singular value is noise."""
        return cls(math.inf, True) if value is None else cls(value, False)


class Spectrum(Strategy):
    """Section 5.2 and appendix D.1: per module type, matrices are ranked by signal-to-noise ratio and the top half frozen.

    In the original Spectrum (arXiv 2406.06623) the top matrices are the ones that are trained: ``mode: train_top``, where
    norms and the other matrices are frozen.
    """

    name = "spectrum"
    paper = "Spectrum: Targeted Training on Signal to Noise Ratio (2024)"
    summary = "per module type, freeze the half of the matrices whose singular values stand out most from noise"

    ratio: float = Field(0.5, gt=0, lt=1, description="share of each module type that is the top (paper: 0.5)")
    mode: Literal["freeze_top", "train_top"] = Field(
        "freeze_top", description="freeze_top: as in the two-phase paper; train_top: as in the original"
    )
    threshold: Literal["code", "paper"] = Field(
        "code",
        description="what a singular value must exceed to be signal: sigma (1 + sqrt(min / max)), as the original code "
        "has it; or the paper's Eq. 1, (1 / sqrt(N)) sigma (1 + sqrt(M / N)), which is made for the spectrum of W / sqrt(N)",
    )

    select: Literal["signal_to_noise", "random"] = Field(
        "signal_to_noise",
        description="random: as many matrices of each type, drawn by the seed; the control of the ranking",
    )

    def outline(self, model: nn.Module) -> FreezePlan:
        from addlang.strategies._layers import inside

        names = [n for n, i in inside(model).items() if i.kind == "linear"]
        return self._plan(model, PlanInputs(), {n: Ratio(float(-i), False) for i, n in enumerate(names)})

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.strategies._layers import inside, sample

        names = [n for n, i in inside(model).items() if i.kind == "linear"]
        if self.select == "random":
            order = sample(inputs.seed, "spectrum", len(names), len(names), ordered=False)
            return self._plan(model, inputs, {n: Ratio(float(i), False) for n, i in zip(names, order, strict=True)})
        ratios = {name: r[self.threshold] for name, r in all_ratios(model, names, inputs).items()}
        empty = [n for n, r in ratios.items() if r.noise_is_empty]
        if empty:
            warnings.warn(
                f"spectrum: no singular value of {len(empty)} of {len(names)} matrices counts as noise (for example "
                f"'{empty[0]}'); they rank first, in the order of the model",
                AddlangWarning,
                stacklevel=2,
            )
        return self._plan(model, inputs, ratios)

    def _plan(self, model: nn.Module, inputs: PlanInputs, ratios: dict[str, Ratio]) -> FreezePlan:
        from addlang.strategies._layers import freeze_whole, inside

        kinds = inside(model)
        groups: dict[str, list[str]] = {}
        for name in ratios:
            groups.setdefault(kinds[name].group, []).append(name)
        chosen: set[str] = set()
        for names in groups.values():
            ranked = sorted(names, key=lambda n: -ratios[n].value)  # stable: the model's order among equals
            chosen.update(kinds[n].module for n in ranked[: int(len(names) * self.ratio)])
        is_top = {n for n, i in kinds.items() if i.module in chosen}
        frozen = is_top if self.mode == "freeze_top" else set(kinds) - is_top
        facts: dict[str, Any] = {}
        if self.select == "signal_to_noise":
            values = {n: (r.value if math.isfinite(r.value) else "no noise") for n, r in ratios.items()}
            facts = {"signal_to_noise": values}
        return self.finish(model, inputs, freeze_whole(model, kinds, frozen), **facts)


def all_ratios(model: nn.Module, names: Sequence[str], inputs: PlanInputs) -> dict[str, dict[str, Ratio]]:
    """Of every matrix the ratio with each threshold; one matrix at a time.

    They are kept in the cache under the model's hash as they come, so that a run that is killed goes on with the next matrix
    and another run with the same model, whatever its options, computes none.
    """
    from addlang.data.journal import Journal, locked

    if inputs.cache_dir is None or not inputs.model_hash:
        return {n: _ratios(model.get_parameter(n)) for n in names}
    file = inputs.cache_dir / "spectrum" / f"{inputs.model_hash}-{VERSION}.jsonl"
    with locked(file.with_suffix(".lock")):
        journal = Journal(file)
        known = {row["name"]: row for row in journal.rows}
        for done, name in enumerate(names, 1):
            if name not in known:
                ratios = _ratios(model.get_parameter(name))
                known[name] = {"name": name, **{t: r.value if r.value < math.inf else None for t, r in ratios.items()}}
                journal.append([known[name]])
            if inputs.progress is not None:
                inputs.progress(done, len(names), "singular values")
    return {n: {t: Ratio.of(known[n][t]) for t in THRESHOLDS} for n in names}


def _ratios(weight: Tensor) -> dict[str, Ratio]:
    values = singular_values(weight)
    return {t: _ratio(values, weight.shape[0], weight.shape[1], t) for t in THRESHOLDS}


def signal_to_noise(weight: Tensor, threshold: str = "code") -> Ratio:
    """Of one matrix [out, in]."""
    return _ratio(singular_values(weight), weight.shape[0], weight.shape[1], threshold)


def singular_values(weight: Tensor) -> Tensor:
    """Of one matrix, as float64; computed in fp32, or in float64 for a float64 matrix."""
    import torch

    wide = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    return torch.linalg.svdvals(wide).double()


def _ratio(values: Tensor, rows: int, columns: int, threshold: str) -> Ratio:
    import torch

    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64, device=values.device))
    sigma = float(quartiles[1] - quartiles[0]) / QUARTILES_OF_NORMAL
    if threshold == "code":
        bound = sigma * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    else:
        bound = sigma * (1 + math.sqrt(columns / rows)) / math.sqrt(rows)
    signal, noise = float(values[values > bound].sum()), float(values[values <= bound].sum())
    return Ratio.of(None if noise == 0 else signal / noise / float(values.max()))
