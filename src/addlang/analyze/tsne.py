"""t-SNE of mean activations, fitted jointly over the models or languages compared (Figures 1 and D4), with numbers.

A t-SNE picture shows neighbourhoods, not distances, and it looks clustered for chance alone. So every picture comes
with a ratio taken in the full space: the distance of the group's centres over the spread inside the groups.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from addlang.analyze.base import Analysis, Context, Result
from addlang.errors import AddlangError

if TYPE_CHECKING:
    import numpy as np
    import torch

Groups = dict[str, "torch.Tensor"]


def separation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of two groups' means over the mean distance of a point from its own group's mean; [n, d] each.

    Raises:
        AddlangError: the points of the groups do not differ.
    """
    spread = 0.5 * sum(float((g - g.mean(0)).norm(dim=1).mean()) for g in (one, other))
    distance = float((one.mean(0) - other.mean(0)).norm())
    if not spread:
        raise AddlangError("all texts of a group have the same activations", "give different texts")
    return distance / spread


def embed(points: Any, *, perplexity: float, seed: int) -> np.ndarray[Any, Any]:
    """[n, 2] by scikit-learn; the perplexity is lowered where there are too few points.

    Raises:
        AddlangError: scikit-learn is not installed, or fewer than four points.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise AddlangError(
            f"t-SNE needs scikit-learn ({error})", "install it: pip install 'addlang[analyze]'"
        ) from error
    if len(points) < 4:
        raise AddlangError(f"t-SNE of {len(points)} points shows nothing", "give more texts")
    fit = TSNE(perplexity=min(perplexity, (len(points) - 1) / 3), init="pca", random_state=seed, method="exact")
    out: np.ndarray[Any, Any] = fit.fit_transform(points)
    return out


class Tsne(Analysis):
    """Mean activations in two dimensions: models on English prompts, or English against other languages."""

    kind: ClassVar[str] = "tsne"
    paper: ClassVar[str] = "Exploring Two-Phase Continual Instruction Fine-tuning, section 4.4 (Figures 1 and D4)"
    summary: ClassVar[str] = "mean activations by t-SNE"

    models: tuple[str, ...] = Field((), description="default: all")
    parallel: dict[str, str] = Field(
        {}, description="language -> file of sentences, row by row translations; the first is compared with the others"
    )
    points: Literal["texts", "per_layer"] = Field(
        "texts", description="texts: a panel per layer; per_layer: a point per layer, as the paper's X in R^(l x d)"
    )
    layers: tuple[int, ...] = Field((), description="panels; default: four, evenly spaced; 0 is the embedding")
    perplexity: float = Field(30.0, gt=1)
    seed: int = Field(0, ge=0)
    prompts: str | None = Field(None, description="file of prompts; default: built-in English ones")
    limit: int | None = Field(200, gt=3, description="prompts or sentences used")
    chat_template: bool | None = Field(None, description="prompts only; default: where all models have one")
    max_tokens: int = Field(512, gt=0)

    @model_validator(mode="after")
    def _two_languages(self) -> Tsne:
        if len(self.parallel) == 1:
            raise ValueError("parallel needs at least two languages")
        return self

    def run(self, context: Context) -> Result:
        names = context.choose(self.models, least=1 if self.parallel else 2)
        if self.parallel:
            parts, source = self._languages(context, names)
        else:
            parts, source = self._prompts(context, names)
        depth = min(len(s) for groups in parts.values() for s in groups.values())
        chosen = self._layers(depth)
        ratios = {
            part: {
                f"{a} | {b}": [separation(groups[a][i], groups[b][i]) for i in range(depth)]
                for a, b in _pairs(list(groups), first_only=bool(self.parallel))
            }
            for part, groups in parts.items()
        }
        rows = [
            [*([part] if self.parallel else []), pair, *(f"{values[i]:.3f}" for i in range(depth))]
            for part, pairs in ratios.items()
            for pair, values in pairs.items()
        ]
        if self.points == "per_layer":
            panels = {part: self._points_of_layers(groups) for part, groups in parts.items()}
        else:
            panels = {
                f"{part}layer {i}" if not part else f"{part}, layer {i}": self._points(
                    {n: s[i] for n, s in groups.items()}
                )
                for part, groups in parts.items()
                for i in chosen
            }
        last = {p: {k: v[-1] for k, v in pairs.items()} for p, pairs in ratios.items()}
        return Result(
            sentence="In the last layer, "
            + "; ".join(
                f"{p + ': ' if p else ''}the centres of {k.replace(' | ', ' and ')} lie {v:.2f} spreads apart"
                for p, pairs in last.items()
                for k, v in pairs.items()
            )
            + ".",
            columns=[*(["model"] if self.parallel else []), "groups", *(_layer(i) for i in range(depth))],
            rows=rows,
            data={
                "separation": ratios,
                "panels": {t: {n: xy.tolist() for n, xy in p.items()} for t, p in panels.items()},
            },
            settings={"texts": source},
            notes=[
                "The table's ratio is taken in the full space: distance of two groups' centres over the mean distance "
                "of a point from its own centre. Distances in the picture mean nothing.",
                "All groups of a panel are embedded together, with one seed.",
            ],
            draw=lambda figure: _draw(figure, panels, lines=self.points == "per_layer"),
            size=(2.6 * min(len(panels), 4) + 1.4, 2.6 * -(-len(panels) // 4) + 0.5),
        )

    def _prompts(self, context: Context, names: list[str]) -> tuple[dict[str, Groups], str]:
        from addlang.analyze.drift import same_shape
        from addlang.analyze.states import choose_prompts

        chosen = choose_prompts(
            context, names, self.prompts, limit=self.limit, template=self.chat_template, max_tokens=self.max_tokens
        )
        states = {n: context.states(n, chosen) for n in names}
        for name in names[1:]:
            same_shape(names[0], states[names[0]], name, states[name])
        return {"": states}, chosen.source

    def _languages(self, context: Context, names: list[str]) -> tuple[dict[str, Groups], str]:
        from dataclasses import replace

        from addlang.analyze.states import choose_texts
        from addlang.schema import DatasetSpec

        texts = {code: DatasetSpec.model_validate({"path": path}) for code, path in self.parallel.items()}
        context_of = replace(context, texts=texts)
        chosen = {c: choose_texts(context_of, c, limit=self.limit, max_tokens=self.max_tokens) for c in texts}
        sizes = {c: len(s.texts) for c, s in chosen.items()}
        if len(set(sizes.values())) > 1:
            raise AddlangError(
                f"parallel files must have as many rows each; here: {', '.join(f'{c} {n}' for c, n in sizes.items())}",
                "join them by id first, or set limit",
            )
        parts = {n: {c: context.states(n, chosen[c]) for c in texts} for n in names}
        return parts, ", ".join(s.source for s in chosen.values())

    def _layers(self, depth: int) -> list[int]:
        wanted = list(self.layers) or sorted({round(i * (depth - 1) / 3) for i in range(4)})
        bad = [i for i in wanted if not -depth <= i < depth]
        if bad:
            raise AddlangError(f"layers: there is no layer {bad[0]}", f"layers are 0 to {depth - 1}")
        return [i % depth for i in wanted]

    def _points(self, groups: Groups) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        xy = embed(torch.cat(list(groups.values())).numpy(), perplexity=self.perplexity, seed=self.seed)
        ends = list(itertools.accumulate(len(g) for g in groups.values()))
        return {n: xy[end - len(g) : end] for (n, g), end in zip(groups.items(), ends, strict=True)}

    def _points_of_layers(self, groups: Groups) -> dict[str, np.ndarray[Any, Any]]:
        return self._points({n: s.mean(1) for n, s in groups.items()})


def _pairs(names: list[str], *, first_only: bool) -> list[tuple[str, str]]:
    return [(names[0], n) for n in names[1:]] if first_only else list(itertools.combinations(names, 2))


def _layer(i: int) -> str:
    return "embedding" if i == 0 else f"layer {i}"


def _draw(figure: Any, panels: dict[str, dict[str, Any]], *, lines: bool) -> None:
    from addlang.analyze.plots import COLOURS, MARKERS

    columns = min(len(panels), 4)
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes, (title, groups) in zip(grid, panels.items(), strict=False):
        for i, (name, xy) in enumerate(groups.items()):
            style = {"marker": MARKERS[i % 8], "color": COLOURS[i % 8], "label": name}
            if lines:
                axes.plot(xy[:, 0], xy[:, 1], markersize=4, linewidth=0.8, **style)
            else:
                axes.scatter(xy[:, 0], xy[:, 1], s=9, alpha=0.7, linewidths=0, **style)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
