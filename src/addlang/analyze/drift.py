"""Representation drift: how much the covariance of each layer's mean activations changed (two-phase paper, section 4.4).

With ``A`` and ``B`` the centred activations [n, d] over ``sqrt(n - 1)``, the covariances are ``A'A`` and ``B'B``. They
are never formed: with ``QR`` of ``[A; B]'``, the non-zero eigenvalues of ``B'B - A'A`` are those of
``R diag(-I, I) R'``, which has 2n rows. Everything is float64: a small change is the difference of two nearly equal
matrices, and in fp32 rounding exceeds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from addlang.analyze.base import Analysis, Context, Result

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Change:
    """``|| cov(after) - cov(before) ||`` and the same over ``|| cov(before) ||``; None where that is 0."""

    spectral: float
    frobenius: float
    spectral_relative: float | None
    frobenius_relative: float | None


Table = tuple[list[str], list[list[str]]]


def covariance_change(before: torch.Tensor, after: torch.Tensor) -> Change:
    """Drift of one layer, exact, in time O(n^2 d) and memory O(n d).

    Args:
        before, after: activations [n, d] of the same n >= 2 rows; they are centred here.
    """
    import torch

    a, b = _centred(before), _centred(after)
    stacked = torch.cat([a, b]).T  # (d, 2n)
    r = torch.linalg.qr(stacked, mode="r").R  # (min(d, 2n), 2n)
    sign = torch.ones(stacked.shape[1], dtype=torch.float64)
    sign[: len(a)] = -1.0
    eigenvalues = torch.linalg.eigvalsh((r * sign) @ r.T)
    own = torch.linalg.svdvals(a).square()
    spectral, frobenius = float(eigenvalues.abs().max()), float(eigenvalues.square().sum().sqrt())
    largest, total = float(own.max()), float(own.square().sum().sqrt())
    return Change(spectral, frobenius, spectral / largest if largest else None, frobenius / total if total else None)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    import torch

    wide = rows.to(torch.float64)
    return (wide - wide.mean(0)) / math.sqrt(len(wide) - 1)


class Drift(Analysis):
    """Covariance drift of every layer against a reference model."""

    kind: ClassVar[str] = "drift"
    paper: ClassVar[str] = "Exploring Two-Phase Continual Instruction Fine-tuning, section 4.4 (Figures 2 and 3)"
    summary: ClassVar[str] = "representation drift by layer"

    models: tuple[str, ...] = Field((), description="compared; default: all but the reference")
    reference: str | None = Field(None, description="drift is measured from this model; default: the first one")
    norm: Literal["spectral", "frobenius"] = Field("spectral", description="norm of the figure; both are in the data")
    relative: bool = Field(True, description="figure: as a share of the reference's covariance")
    center: Literal["prompts", "across_layers"] = Field(
        "prompts",
        description="prompts: a covariance per layer; across_layers: the paper's text, one covariance per model",
    )
    prompts: str | None = Field(None, description="file of prompts such as MT-Bench; default: built-in English ones")
    limit: int | None = Field(None, gt=1, description="prompts used")
    chat_template: bool | None = Field(None, description="default: where all models have one")
    max_tokens: int = Field(512, gt=0)

    def run(self, context: Context) -> Result:
        from addlang.analyze.states import choose_prompts

        reference, others = pick(context, self.models, self.reference)
        chosen = choose_prompts(
            context, [reference, *others], self.prompts,
            limit=self.limit, template=self.chat_template, max_tokens=self.max_tokens,
        )  # fmt: skip
        start = context.states(reference, chosen)
        drift: dict[str, list[Change]] = {}
        for name in others:
            end = same_shape(reference, start, name, context.states(name, chosen))
            if self.center == "across_layers":
                drift[name] = [covariance_change(start.mean(1), end.mean(1))]
            else:
                drift[name] = [covariance_change(a, b) for a, b in zip(start, end, strict=True)]
        data = {n: [vars(c) for c in changes] for n, changes in drift.items()}
        columns, rows = self._by_layer(drift) if len(others) <= 3 else self._by_model(drift)
        return Result(
            sentence=self._sentence(reference, drift),
            columns=columns,
            rows=rows,
            data={"reference": reference, "drift": data},
            settings={"prompts": chosen.source, "chat_template": chosen.template, "precision": "float64"},
            notes=_notes(self.center),
            draw=lambda figure: self._draw(figure, drift),
        )

    def _by_layer(self, drift: dict[str, list[Change]]) -> Table:
        columns = ["layer", *(f"{n}, {self.norm}" for n in drift), *(f"{n}, relative" for n in drift)]
        rows = [
            [
                _layer(layer, self.center),
                *(f"{getattr(changes[layer], self.norm):.4g}" for changes in drift.values()),
                *(_percent(changes[layer], self.norm) for changes in drift.values()),
            ]
            for layer in range(max(map(len, drift.values())))
        ]
        return columns, rows

    def _by_model(self, drift: dict[str, list[Change]]) -> Table:
        """One row per model, where a column per model would not fit."""
        rows = []
        for name, changes in drift.items():
            relative = [getattr(c, f"{self.norm}_relative") or 0.0 for c in changes]
            most = max(range(len(changes)), key=lambda i: relative[i])
            last = changes[-1]
            rows.append(
                [
                    name, f"{100 * sum(relative) / len(relative):.3g} %", f"{100 * relative[most]:.3g} %",
                    _layer(most, self.center), _percent(last, self.norm), f"{getattr(last, self.norm):.4g}",
                ]
            )  # fmt: skip
        return ["model", "mean over layers", "largest", "in", "last layer", f"last layer, {self.norm}"], rows

    def _sentence(self, reference: str, drift: dict[str, list[Change]]) -> str:
        where = {n: max(range(len(c)), key=lambda i, c=c: self._value(c[i])) for n, c in drift.items()}  # type: ignore[misc]
        parts = [f"{n} by {_percent(drift[n][i], self.norm)} ({_layer(i, self.center)})" for n, i in where.items()]
        return (
            f"Covariance of the mean activations, changed from {reference} where it changed most: {', '.join(parts)}."
        )

    def _value(self, change: Change) -> float:
        return float(getattr(change, f"{self.norm}_relative" if self.relative else self.norm) or 0.0)

    def _draw(self, figure: Any, drift: dict[str, list[Change]]) -> None:
        from addlang.analyze.plots import MARKERS

        axes = figure.add_subplot()
        axes.set_ylabel(f"covariance drift, {self.norm}" + (", relative" if self.relative else ""))
        if self.center == "across_layers":
            axes.bar(list(drift), [self._value(changes[0]) for changes in drift.values()], width=0.5)
            return
        for i, (name, changes) in enumerate(drift.items()):
            axes.plot([self._value(c) for c in changes], marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
        axes.set_xlabel("layer (0: embedding)")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()


def _layer(index: int, center: str) -> str:
    return "all layers" if center == "across_layers" else f"layer {index}" if index else "embedding"


def _percent(change: Change, norm: str) -> str:
    value = getattr(change, f"{norm}_relative")
    return "-" if value is None else f"{100 * value:.3g} %"


def _notes(center: str) -> list[str]:
    notes = ["Activations are means over a prompt's tokens without pads and the leading BOS; layer 0 is the embedding."]
    if center == "across_layers":
        notes.append("Centred over layers, as the paper's text says: one covariance per model, which no layer owns.")
    return notes


def pick(context: Context, models: Sequence[str], reference: str | None) -> tuple[str, list[str]]:
    """The reference model and those that are compared with it."""
    wanted = [*([reference] if reference else []), *models] if models else []
    chosen = list(dict.fromkeys(context.choose(wanted, least=2)))
    first = reference or chosen[0]
    context.model(first)
    return first, [n for n in chosen if n != first]


def same_shape(reference: str, start: torch.Tensor, name: str, end: torch.Tensor) -> torch.Tensor:
    """``end``, if the two models have the same layers and width.

    Raises:
        AddlangError: they have not.
    """
    from addlang.errors import AddlangError

    if start.shape != end.shape:
        raise AddlangError(
            f"'{reference}' has {start.shape[0] - 1} layers of width {start.shape[2]}, '{name}' {end.shape[0] - 1} of "
            f"{end.shape[2]}: their covariances cannot be compared",
            "compare checkpoints of one architecture; CKA (kind: cka) also compares different ones",
        )
    return end
