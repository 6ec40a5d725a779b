"""Model parameter difference (two-phase paper, Definition 2), streamed: one tensor of each model at a time."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from addlang.analyze.base import Analysis, Context, Result
from addlang.errors import AddlangError

READINGS = ("tensor", "scalar")


@dataclass(frozen=True)
class Difference:
    """Two readings of "the mean over parameters of the L2 norm of the difference".

    Attributes:
        tensor: mean over tensors of the Frobenius norm.
        scalar: mean over all scalars of the absolute difference.
        groups: module type -> mean Frobenius norm of its tensors.
        layers: decoder layer -> the same.
    """

    tensor: float
    scalar: float
    groups: dict[str, float]
    layers: dict[int, float]


def parameter_difference(one: Path, other: Path) -> Difference:
    """MPD of two checkpoints; sums in float64.

    Raises:
        AddlangError: their tensors differ in names or shapes.
    """
    import torch

    from addlang.freeze.proof import is_buffer
    from addlang.models import Checkpoint

    a, b = Checkpoint(one), Checkpoint(other)
    odd = sorted(n for n in set(a.header) ^ set(b.header) if not is_buffer(n))
    if odd:
        has, lacks = (one, other) if odd[0] in a.header else (other, one)
        raise AddlangError(
            f"{has} has a tensor '{odd[0]}' that {lacks} has not ({len(odd)} such tensors)",
            "compare checkpoints of one architecture, saved alike",
        )
    for name, (_, shape) in a.header.items():
        if not is_buffer(name) and b.header[name][1] != shape:
            raise AddlangError(
                f"'{name}' has shape {shape} in {one} and {b.header[name][1]} in {other}",
                "a grown vocabulary cannot be compared as it is",
            )
    norms: dict[str, float] = {}
    absolute, scalars = 0.0, 0
    for file in a.files:
        for name, left in a.tensors(file):
            if not left.is_floating_point() or is_buffer(name):
                continue
            change = left.to(torch.float64) - b.get(name).to(torch.float64)
            norms[name] = float(change.norm())
            absolute += float(change.abs().sum())
            scalars += change.numel()
    groups: dict[str, list[float]] = {}
    layers: dict[int, list[float]] = {}
    for name, norm in norms.items():
        parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
        groups.setdefault(parts[-1], []).append(norm)
        found = re.search(r"\.(\d+)\.", name)
        if found:
            layers.setdefault(int(found[1]), []).append(norm)
    return Difference(
        math.fsum(norms.values()) / len(norms),
        absolute / scalars,
        {k: math.fsum(v) / len(v) for k, v in groups.items()},
        {k: math.fsum(v) / len(v) for k, v in sorted(layers.items())},
    )


class Mpd(Analysis):
    """Difference of the weights of models, pair by pair."""

    kind: ClassVar[str] = "mpd"
    paper: ClassVar[str] = "Exploring Two-Phase Continual Instruction Fine-tuning, Definition 2 (Table 4)"
    summary: ClassVar[str] = "difference of parameters (MPD)"

    models: tuple[str, ...] = Field((), description="compared; default: all")
    reference: str | None = Field(None, description="compare each model with this one; default: all pairs")
    reduction: Literal["tensor", "scalar"] = Field(
        "tensor",
        description="reading that the sentence is about (both are in the table): mean Frobenius norm per tensor, or mean "
        "absolute difference per scalar",
    )

    def run(self, context: Context) -> Result:
        from addlang.analyze.drift import pick
        from addlang.progress import progress

        if self.reference is None:
            names = context.choose(self.models, least=2)
            pairs = list(itertools.combinations(names, 2))
        else:
            first, others = pick(context, self.models, self.reference)
            pairs = [(first, other) for other in others]
        found: dict[tuple[str, str], Difference] = {}
        with progress("comparing weights", total=len(pairs), unit="pairs") as bar:
            for one, other in pairs:
                found[one, other] = parameter_difference(context.model(one), context.model(other))
                bar.update(len(found))
        shares = {reading: _of_the_largest({p: getattr(d, reading) for p, d in found.items()}) for reading in READINGS}
        share, raw = shares[self.reduction], {pair: getattr(d, self.reduction) for pair, d in found.items()}
        near = min(raw, key=lambda p: raw[p])
        return Result(
            sentence=f"The closest of {len(pairs)} pair(s) in weight space is {near[0]} and {near[1]} "
            f"(MPD {raw[near]:.4g}, {share[near]:.2f} of the largest).",
            columns=["models", *(c for reading in READINGS for c in (f"MPD per {reading}", "normalised"))],
            rows=[
                [
                    f"{a}, {b}",
                    *(c for r in READINGS for c in (f"{getattr(d, r):.4g}", f"{shares[r][a, b]:.2f}")),
                ]
                for (a, b), d in found.items()
            ],
            data={
                "pairs": [
                    {
                        "models": [a, b],
                        "normalised": share[a, b],
                        **{f"{r}_normalised": shares[r][a, b] for r in READINGS},
                        **vars(d),
                    }
                    for (a, b), d in found.items()
                ]
            },
            settings={"reduction": self.reduction},
            notes=[
                "Normalised: over the largest of the pairs in this table, as in the paper's Table 4.",
                "MPD grows with the learning rate and the number of steps: it says how far a model went, not only where.",
            ],
            draw=(lambda figure: _draw(figure, found)) if any(d.layers for d in found.values()) else None,
        )


def _of_the_largest(raw: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    top = max(raw.values())
    return {pair: value / top if top else 0.0 for pair, value in raw.items()}


def _draw(figure: Any, found: dict[tuple[str, str], Difference]) -> None:
    from addlang.analyze.plots import MARKERS

    axes = figure.add_subplot()
    for i, ((a, b), d) in enumerate(found.items()):
        axes.plot(list(d.layers), list(d.layers.values()), marker=MARKERS[i % 8], markersize=4, label=f"{a}, {b}")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("mean Frobenius norm of the difference")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
