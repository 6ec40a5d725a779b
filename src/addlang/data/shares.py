"""Shares of the training tokens: by weight, by size, or by size flattened with a temperature; per data set or language.

Temperature sampling: a source of ``n`` tokens gets a share in proportion to ``n ** (1 / T)``. ``T = 1`` is in proportion to
size; the larger ``T``, the nearer to equal shares, so that small languages are seen more often. ``1 / T`` is the ``alpha``
of XLM-R (Conneau et al. 2020) and mT5 (Xue et al. 2021), 0.3 in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from addlang.errors import AddlangError, did_you_mean

if TYPE_CHECKING:
    from addlang.recipe import Phase


def phase_weights(phase: Phase, sizes: Sequence[int], languages: Sequence[str]) -> list[float | None]:
    """Weights of a phase's data sets, with its temperature and the weights of languages worked in.

    Args:
        sizes: tokens per data set.
        languages: per data set.
    """
    own = [spec.weight for spec in phase.datasets]
    temperature = phase.sampling_temperature
    if phase.language_weights or phase.sample_languages:
        found = language_shares(sizes, own, languages, language_weights=phase.language_weights, temperature=temperature)
    elif temperature != 1:
        found = shares(sizes, own, temperature)
    else:
        return own
    return [float(share) for share in found]


def shares(sizes: ArrayLike, weights: Sequence[float | None], temperature: float = 1.0) -> NDArray[np.float64]:
    """(n,) shares that sum to 1.

    If every source has a weight they are ratios. Otherwise weights are shares, and what they leave of 1 is divided among
    the sources without one, in proportion to ``size ** (1 / temperature)``.

    Raises:
        AddlangError: the weights leave nothing for the sources without one.
    """
    flattened = np.asarray(sizes, np.float64) ** (1 / temperature)
    open_ = np.array([w is None for w in weights])
    given = np.array([w or 0.0 for w in weights])
    if open_.any():
        left = 1 - given.sum()
        if left <= 0:
            raise AddlangError(
                f"the weights sum to {given.sum():g} and leave nothing for the {open_.sum()} dataset(s) without one",
                "weights are shares of the training tokens: let them sum to less than 1, or give every dataset one",
            )
        given = given + np.where(open_, left * flattened / flattened[open_].sum(), 0)
    result: NDArray[np.float64] = given / given.sum()
    return result


def language_shares(
    sizes: ArrayLike,
    weights: Sequence[float | None],
    languages: Sequence[str],
    *,
    language_weights: Mapping[str, float],
    temperature: float = 1.0,
) -> NDArray[np.float64]:
    """(n,) shares of sources: first of their languages, then of each source within its language.

    Args:
        sizes: tokens per source.
        weights: per source, within its language; see :func:`shares`.
        languages: per source.
        language_weights: per language; those without one share what is left by size and temperature.

    Raises:
        AddlangError: a weight for a language that no source has; weights that leave nothing for the others.
    """
    total = np.asarray(sizes, np.float64)
    known = sorted(set(languages))
    if unknown := sorted(set(language_weights) - set(known)):
        raise AddlangError(
            f"language_weights: no dataset has the language '{unknown[0]}'", did_you_mean(unknown[0], known)
        )
    members = [np.array([i for i, code in enumerate(languages) if code == language]) for language in known]
    outer = shares([total[m].sum() for m in members], [language_weights.get(code) for code in known], temperature)
    result = np.zeros(len(total))
    for share, m in zip(outer, members, strict=True):
        result[m] = share * shares(total[m], [weights[i] for i in m])
    return result
