"""Centred kernel alignment between layers of two models (Kornblith et al., 2019; debiased: Nguyen et al., 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from addlang.analyze.base import Analysis, Context, Result

if TYPE_CHECKING:
    import torch


def linear_cka(x: torch.Tensor, y: torch.Tensor, *, debiased: bool = False) -> float:
    """Similarity of two sets of activations of the same rows; 1: equal up to rotation and scale.

    Args:
        x: [n, p].
        y: [n, q].
        debiased: with the unbiased estimator of HSIC (Song et al., 2012), which is near 0 for unrelated activations
            however few rows there are, and may be below 0; needs n >= 4.

    Raises:
        AddlangError: fewer than four rows for the debiased form, or activations that do not vary.
    """
    from addlang.errors import AddlangError

    if debiased and len(x) < 4:
        raise AddlangError(f"debiased CKA needs at least 4 texts, there are {len(x)}", "give more, or debiased: false")
    k, l = _gram(x, debiased), _gram(y, debiased)  # noqa: E741
    product, own = _hsic(k, l, debiased), _hsic(k, k, debiased) * _hsic(l, l, debiased)
    if own <= 0:
        raise AddlangError("the activations of a layer do not vary over the texts, so CKA is not defined")
    return product / own**0.5


def _gram(x: torch.Tensor, debiased: bool) -> torch.Tensor:
    import torch

    x = x.to(torch.float64)
    x = x - x.mean(0)  # without effect on the result of the debiased form, but better conditioned
    gram = x @ x.T
    return gram.fill_diagonal_(0.0) if debiased else gram


def _hsic(k: torch.Tensor, l: torch.Tensor, debiased: bool) -> float:  # noqa: E741
    n = len(k)
    if not debiased:
        return float((k * l).sum())
    whole = k.sum() * l.sum() / ((n - 1) * (n - 2))
    cross = 2.0 / (n - 2) * (k.sum(0) @ l.sum(0))
    return float(((k * l).sum() + whole - cross) / (n * (n - 3)))


class Cka(Analysis):
    """Linear CKA between the layers of a reference model and of each other model."""

    kind: ClassVar[str] = "cka"
    paper: ClassVar[str] = "Kornblith et al., Similarity of Neural Network Representations Revisited (2019)"
    summary: ClassVar[str] = "similarity of layers (CKA)"

    models: tuple[str, ...] = Field((), description="compared; default: all but the reference")
    reference: str | None = Field(None, description="default: the first model")
    debiased: bool = Field(True, description="with the unbiased estimator of HSIC")
    prompts: str | None = Field(None, description="file of prompts; default: built-in English ones")
    limit: int | None = Field(None, gt=3, description="prompts used")
    chat_template: bool | None = Field(None, description="default: where all models have one")
    max_tokens: int = Field(512, gt=0)

    def run(self, context: Context) -> Result:
        from addlang.analyze.drift import pick
        from addlang.analyze.states import choose_prompts

        reference, others = pick(context, self.models, self.reference)
        chosen = choose_prompts(
            context, [reference, *others], self.prompts,
            limit=self.limit, template=self.chat_template, max_tokens=self.max_tokens,
        )  # fmt: skip
        start = context.states(reference, chosen)
        grids = {}
        for name in others:
            end = context.states(name, chosen)
            grids[name] = [[linear_cka(a, b, debiased=self.debiased) for b in end] for a in start]
        depth = {n: min(len(g), len(g[0])) for n, g in grids.items()}
        lowest = {n: min(range(depth[n]), key=lambda i, n=n: grids[n][i][i]) for n in others}  # type: ignore[misc]
        return Result(
            sentence="; ".join(
                f"{n}: the layer least like {reference}'s is {i if i else 'the embedding'} (CKA {grids[n][i][i]:.4f})"
                for n, i in lowest.items()
            ) + ".",
            columns=["layer", *others],
            rows=[
                ["embedding" if i == 0 else str(i), *(f"{grids[n][i][i]:.5f}" if i < depth[n] else "-" for n in others)]
                for i in range(max(depth.values()))
            ],
            data={"reference": reference, "cka": grids},
            settings={"prompts": chosen.source, "chat_template": chosen.template, "debiased": self.debiased},
            notes=["The table has each layer against the same layer; the figure and the data have all pairs."],
            draw=lambda figure: _draw(figure, reference, grids),
            size=(3.4 * len(others) + 0.8, 3.2),
        )  # fmt: skip


def _draw(figure: Any, reference: str, grids: dict[str, list[list[float]]]) -> None:
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for ax, (name, grid) in zip(axes, grids.items(), strict=True):
        image = ax.imshow(grid, origin="lower", vmin=0, vmax=1, cmap="cividis")
        ax.set_xlabel(f"layer of {name}")
        ax.set_ylabel(f"layer of {reference}")
        ax.grid(visible=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(axes), label="CKA")
