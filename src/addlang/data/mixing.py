"""From packed data sets to a phase's mixture: its budget in tokens or epochs, the parts that it stands for, and replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from addlang.data.mixture import Mixture
from addlang.data.packing import Packed
from addlang.data.shares import shares
from addlang.train.schedule import budget, global_batch

if TYPE_CHECKING:
    from addlang.schema import Part, Phase


@dataclass(frozen=True)
class Mixed:
    """A mixture and how it came about.

    Attributes:
        tokens: the budget before it was rounded up to whole batches.
        batch: sequences per optimizer step.
        notes: what a user should know about the batch and the parts.
    """

    mixture: Mixture
    tokens: int
    batch: int
    notes: tuple[str, ...]


def mix(
    phase: Phase, packed: Sequence[Packed], weights: Sequence[float | None], *, seed: int, devices: int = 1
) -> Mixed:
    """The phase's mixture without replay: a whole number of optimizer steps, rounded up.

    Tokens that guards read count towards the budget, so that arms of one budget cost the same. A mixture with parts has
    from each of them as many tokens, and altogether as many steps, as the parts would have as phases of their own.
    """
    names = [spec.path for spec in phase.datasets]
    spans = [slice(0, len(packed))]
    owners: Sequence[Part | Phase] = [phase]
    if phase.parts:
        ends = np.cumsum([part.datasets for part in phase.parts]).tolist()
        spans = [slice(end - part.datasets, end) for part, end in zip(phase.parts, ends, strict=True)]
        owners = phase.parts
    budgets = []
    for owner, span in zip(owners, spans, strict=True):
        roles = [spec.role for spec in phase.datasets[span]]
        budgets.append(round(planned(owner, roles, packed[span], weights[span]) * (1 - phase.read_by_guards)))
    batch, scaled = global_batch(phase, min(budgets), devices)
    notes = [scaled] if scaled else []
    if not phase.parts:
        mixture = Mixture(packed, weights, seed=seed, tokens=budgets[0], multiple_of=batch, names=names)
        return Mixed(mixture, budgets[0], batch, tuple(notes))
    steps, wanted = [], []
    for span, tokens in zip(spans, budgets, strict=True):
        alone = Mixture(packed[span], weights[span], seed=seed, tokens=tokens, multiple_of=batch, names=names[span])
        steps.append(len(alone) // batch)
        wanted += (alone.shares * tokens).tolist()
    mixture = Mixture(packed, wanted, seed=seed, sequences=sum(steps) * batch, names=names)
    listed = " + ".join(f"{part.name} {n}" for part, n in zip(phase.parts, steps, strict=True))
    notes.append(f"as many steps as the phases it stands for: {listed} = {sum(steps)}")
    return Mixed(mixture, sum(budgets), batch, tuple(notes))


def planned(
    owner: Part | Phase, roles: Sequence[str], packed: Sequence[Packed], weights: Sequence[float | None]
) -> int:
    """Tokens that a phase or part asks for.

    ``epochs`` (without ``tokens``: one, at most the paper's tokens) are passes over its target data, or over all its data
    where none is target data; what is mixed in by weight comes on top, as its share demands.
    """
    if owner.tokens is not None:
        return owner.tokens
    sizes = np.array([p.tokens_total for p in packed], dtype=np.float64)
    own = np.array([role == "target" for role in roles])
    if not own.any():
        own[:] = True
    once = float(sizes[own].sum()) / float(shares(sizes, weights)[own].sum())
    return budget(owner, round(once)) if owner.epochs is None else round(owner.epochs * once)


def add_replay(mixed: Mixed, replayed: Packed, *, share: float, append: bool, name: str) -> Mixed:
    """The mixture with replay in it: ``share`` of its tokens on top of them, or in their place."""
    old = mixed.mixture
    tokens = round(mixed.tokens * (1 + share)) if append else mixed.tokens
    weight = share / (1 + share) if append else share
    mixture = Mixture(
        [*old.sources, replayed],
        [*(old.shares * (1 - weight)).tolist(), weight],
        seed=old.seed,
        tokens=tokens,
        multiple_of=mixed.batch,
        names=[*old.names, name],
    )
    return Mixed(mixture, tokens, mixed.batch, mixed.notes)
