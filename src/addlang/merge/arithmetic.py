"""The arithmetic of merging, block by block: every function takes blocks of the same tensor of several models and yields
the merged tensor's blocks in fp32 (fp64 where a model is stored in it). Nothing here knows files or models.

A tensor that needs a figure of the whole (an angle, a threshold, a norm) is read more than once: ``blocks`` starts anew at
every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from addlang.merge.largest import Largest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Blocks = Callable[[], Iterator[tuple["Tensor", ...]]]
Rescale = Literal["density", "l1", "none"]
Criterion = Literal["magnitude", "relative"]
COLINEAR = 0.9995  # |cosine| above which mergekit's slerp interpolates linearly
EPS = 1e-8


def linear(blocks: Blocks, weights: Sequence[float], normalize: bool = True) -> Iterator[Tensor]:
    """``sum_i weight_i w_i``, divided by the sum of the weights if ``normalize`` (Wortsman et al. 2022, model soups)."""
    total = math.fsum(weights) if normalize else 1.0
    for tensors in blocks():
        yield _weighted(tensors, weights) / total


def slerp(blocks: Blocks, t: float, on_linear: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
    """From the first tensor (``t`` = 0) to the second along the arc between them, both taken as one long vector.

    Nearly colinear tensors (and a zero tensor's) are interpolated linearly, as in mergekit. Two fine-tuned versions of one
    model nearly always are.

    Args:
        on_linear: called when that happens.
    """
    dot = first = second = 0.0
    for a, b in blocks():
        x, y = a.double(), b.double()
        dot += float((x * y).sum())
        first += float((x * x).sum())
        second += float((y * y).sum())
    norms = [n if n > EPS else 1.0 for n in (math.sqrt(first), math.sqrt(second))]
    cosine = max(-1.0, min(1.0, dot / (norms[0] * norms[1])))
    if abs(cosine) > COLINEAR:
        on_linear()
        parts = (1 - t, t)
    else:
        angle = math.acos(cosine)
        parts = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    for tensors in blocks():
        yield _weighted(tensors, parts)


def task_arithmetic(
    blocks: Blocks, weights: Sequence[float], scale: float = 1.0, normalize: bool = False
) -> Iterator[Tensor]:
    """``base + scale sum_i weight_i (w_i - base)``; the base comes first in a block (Ilharco et al. 2023).

    With one model that is the chat vector (Huang et al. 2024) and, with a weight below 1, reverting after training.
    """
    total = _divisor(weights) if normalize else 1.0
    for base, *models in blocks():
        yield base + _weighted([m - base for m in models], weights) * (scale / total)


def ties(
    blocks: Blocks,
    weights: Sequence[float],
    densities: Sequence[float],
    rng: np.random.Generator,
    scale: float = 1.0,
    normalize: bool = True,
) -> Iterator[Tensor]:
    """Trim, elect sign, merge (Yadav et al. 2023): of each difference from the base (the first of a block) the ``density``
    share of largest magnitude is kept; where signs differ, those of the larger sum win; the winners are averaged
    (``normalize``) or added.
    """
    keep = [_trim(blocks, i, density, rng) for i, density in enumerate(densities, 1)]
    for base, *models in blocks():
        deltas = [m - base for m in models]
        deltas = [d if k is None else d * k.mask(d) for d, k in zip(deltas, keep, strict=True)]
        yield base + _elect(deltas, weights, normalize) * scale


def dare(
    blocks: Blocks,
    weights: Sequence[float],
    densities: Sequence[float],
    rng: Callable[[int], np.random.Generator],
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "density",
    elect: bool = False,
) -> Iterator[Tensor]:
    """Drop and rescale (Yu et al. 2024): every element of a difference from the base is kept with probability ``density``.

    Args:
        rng: generator for the model of that number; called for every reading of the blocks.
        rescale: what is kept is divided by ``density`` (the paper: the expected update is unchanged), brought to the norm
            ``sum |delta|`` of before (``l1``, mergekit), or left.
        elect: add what is left with TIES' sign election.
    """
    factors = [1.0] * len(densities)
    if rescale == "density":
        factors = [1 / d for d in densities]
    elif rescale == "l1":
        factors = [_l1_factor(blocks, i, d, rng(i)) for i, d in enumerate(densities, 1)]
    draws = [rng(i) for i in range(1, len(densities) + 1)]
    total = _divisor(weights) if normalize else 1.0
    for base, *models in blocks():
        deltas = [_drop(m - base, d, r) * f for m, d, r, f in zip(models, densities, draws, factors, strict=True)]
        mixed = _elect(deltas, weights, normalize) if elect else _weighted(deltas, weights) / total
        yield base + mixed * scale


def revert(
    blocks: Blocks,
    share: float,
    density: float = 1.0,
    criterion: Criterion = "magnitude",
    rng: np.random.Generator | None = None,
    shielded: Callable[[int, int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """``w = w0 + m (w_ft - w0)``; a block is (w0, w_ft). Exactly ``w_ft`` where m = 1 and exactly ``w0`` where m = 0.

    Args:
        share: m where the update is kept.
        density: share of the elements whose update is kept, those with the largest change; the others go back to ``w0``.
        criterion: size of a change: ``magnitude`` ``|w_ft - w0|``, or ``relative`` to ``|w0|``.
        rng: draws among equal changes.
        shielded: True where ``w0`` is put back, for elements start .. stop - 1 of the flat tensor.
    """
    import torch

    def change(w0: Tensor, w: Tensor) -> Tensor:
        delta = w - w0
        return delta if criterion == "magnitude" else delta / w0.abs().clamp_min(EPS)

    keep = None
    if density < 1:
        assert rng is not None
        total = sum(w.numel() for _, w in blocks())
        keep = Largest(lambda: (change(*pair) for pair in blocks()), max(1, int(density * total)), rng)
    start = 0
    for w0, w in blocks():
        merged = torch.lerp(w0, w, share)
        if keep is not None:
            merged = torch.where(keep.mask(change(w0, w)), merged, w0)
        if shielded is not None:
            merged = torch.where(shielded(start, start + w.numel()).view(w.shape), w0, merged)
        start += w.numel()
        yield merged


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    out = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out.add_(tensor, alpha=weight)
    return out


def _divisor(weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    return total if abs(total) >= EPS else 1.0


def _trim(blocks: Blocks, model: int, density: float, rng: np.random.Generator) -> Largest | None:
    if density >= 1:
        return None
    total = sum(tensors[model].numel() for tensors in blocks())
    return Largest(lambda: (tensors[model] - tensors[0] for tensors in blocks()), max(1, int(density * total)), rng)


def _elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum (or mean) of the differences that have the sign of the sum; a sum of 0 counts as plus."""
    import torch

    weighted = [d * w for d, w in zip(deltas, weights, strict=True)]
    positive = sum(weighted[1:], weighted[0].clone()) >= 0
    mixed = torch.zeros_like(weighted[0])
    divisor = torch.zeros_like(weighted[0])
    for part, weight in zip(weighted, weights, strict=True):
        agrees = (part != 0) & ((part > 0) == positive)
        mixed += part * agrees
        divisor += agrees * weight
    if normalize:
        mixed /= torch.where(divisor == 0, 1.0, divisor)
    return mixed


def _drop(delta: Tensor, density: float, rng: np.random.Generator) -> Tensor:
    return delta if density >= 1 else delta * keep_at_random(tuple(delta.shape), density, rng)


def keep_at_random(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> Tensor:
    """True with probability ``density``."""
    import numpy as np
    import torch

    return torch.from_numpy(rng.random(shape, dtype=np.float32) < density)


def _l1_factor(blocks: Blocks, model: int, density: float, rng: np.random.Generator) -> float:
    before = after = 0.0
    for tensors in blocks():
        delta = (tensors[model] - tensors[0]).double()
        before += float(delta.abs().sum())
        after += float(_drop(delta, density, rng).abs().sum())
    return before / after if min(before, after) > 1e-7 else 1.0
