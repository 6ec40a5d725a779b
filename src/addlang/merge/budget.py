"""``addlang merge revert-to-budget``: the largest share of an update whose source language stays above a bound.

Trying many shares on the same items and keeping the best makes an answer look better than it is. One share overall is
therefore tested upward in steps fixed beforehand, on all items, until the first that fails; shares by module or layer
are chosen on one half of the items and tested likewise on the other. See :mod:`addlang.merge.search`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from addlang.errors import AddlangError, BudgetError
from addlang.evaluate.measurement import Measurement
from addlang.merge.kept import Items, Kept, items_for, items_in, items_to_exclude, share_kept, watched
from addlang.merge.methods import Revert, RevertParameters
from addlang.merge.search import Family, confirmed, family_of, grid, ladder, largest
from addlang.report.verdict import abilities, of_text

if TYPE_CHECKING:
    from addlang.evaluate.suite import Suite
    from addlang.merge.bench import Bench
    from addlang.merge.sources import Models

By = Literal["overall", "module", "layer"]


@dataclass(frozen=True)
class Point:
    """One model that was tried. ``kept`` is on the items ``which``; ``gained`` is the target's mean relative gain."""

    u: float
    parts: str
    which: Items
    kept: Kept
    gained: float | None
    target: dict[str, float]


@dataclass
class Search:
    """Measures points and remembers them.

    Args:
        bench: the source model and the update.
        suite: everything that is measured at a point.
        keep: least share of the source language.
        steps: shares are tested this far apart: 1/steps.
        watch: tasks of the source language that count; empty: its abilities.
    """

    bench: Bench
    suite: Suite
    by: By
    keep: float
    steps: int = 20
    watch: Sequence[str] = ()
    resamples: int = 2000
    progress: Callable[[float], None] = lambda done: None
    points: list[Point] = field(default_factory=list)
    looked: int = 0

    def __post_init__(self) -> None:
        self.source = list(self._measure(self.parameters(Family({}), 0.0)))
        self.before = watched(self.source, self.watch)
        self._require_enough_items()

    def parameters(self, family: Family, u: float) -> RevertParameters:
        """What a point puts into the recipe of the merge."""
        if not family.ratios:
            return RevertParameters(scale=round(u, 4))
        shares = family.shares(u)
        layers = {k.removeprefix("layer "): m for k, m in shares.items() if k.startswith("layer ")}
        modules = {k: m for k, m in shares.items() if not k.startswith("layer ")}
        return RevertParameters(modules=modules, layers=layers)

    @property
    def tested_on(self) -> Items:
        """Items that had no part in choosing what is tested on them."""
        return "all" if self.by == "overall" else "confirm"

    def at(self, family: Family, u: float, which: Items) -> Point:
        """Measure one point and look at some of its items."""
        after = self._measure(self.parameters(family, u))
        kept = share_kept(self.before, after, which, resamples=self.resamples)
        target = {f"{m.task}, {m.metric}": m.value for m in after if m.role == "target"}
        parts = "overall" if not family.ratios else self.by
        point = Point(u, parts, which, kept, self._gain(after), target)
        self.points.append(point)
        return point

    def gained_at(self, parts: str, u: float) -> float:
        """Gain of the target at a point that was measured; 0 at the source itself."""
        return next((p.gained or 0.0 for p in self.points if (p.parts, p.u) == (parts, u)), 0.0)

    def without(self, part: str) -> tuple[float, float]:
        """(gain of the target lost, source kept won) by leaving one part out of the whole update."""
        left_out = {part.removeprefix("layer "): 0.0}
        by_layer = part.startswith("layer ")
        one_less = self._measure(RevertParameters(layers=left_out) if by_layer else RevertParameters(modules=left_out))
        whole = self._measure(RevertParameters())
        kept = [share_kept(self.before, m, "choose", resamples=100).value for m in (whole, one_less)]
        return (self._gain(whole) or 0.0) - (self._gain(one_less) or 0.0), kept[1] - kept[0]

    def _measure(self, parameters: RevertParameters) -> Sequence[Measurement]:
        spec = self.bench.spec.model_copy(update={"parameters": parameters})
        outcome = self.bench.measure(spec, self.suite)
        self.looked += 1
        self.progress(self.looked)
        return outcome.measurements

    def _gain(self, after: Sequence[Measurement]) -> float | None:
        """Mean relative gain in the target language: of its text's bits per byte, or of abilities where there is no text."""
        target = [m for m in self.source if m.role == "target" and m.value != 0]
        chosen = of_text(target) or abilities(target)
        found = {m.key: m.value for m in after}
        changes = [(found[m.key] - m.value) / m.value * (1 if m.higher_is_better else -1) for m in chosen]
        return math.fsum(changes) / len(changes) if changes else None

    def _require_enough_items(self) -> None:
        """Refuse what no result could satisfy."""
        smallest = share_kept(self.before, self.before, self.tested_on, resamples=100)
        if smallest.low < self.keep:
            halves = 1 if self.by == "overall" else 2
            need = halves * items_to_exclude(self.before, 1 - self.keep)
            half = "" if halves == 1 else " (half of them choose, half confirm)"
            raise AddlangError(
                f"{items_in(self.before)} items{half} cannot show that {self.keep:g} is kept: even if not one of {smallest.n} "
                f"changed, a loss of {1 - smallest.low:.1%} would not be excluded",
                f"evaluate on at least {need:,} items (more where some change), or lower --keep",
            )


@dataclass(frozen=True)
class Result:
    """The chosen point and how it was found.

    Attributes:
        parameters: of the revert.
        chosen: its measurement on the items that had no part in choosing it.
        share: ``||m * update|| / ||update||``.
        family: ratios by part; empty for one overall share.
        overall: the best single share on the same items as the shares by part were chosen on; None where there are none.
    """

    parameters: RevertParameters
    chosen: Point
    share: float
    family: Family
    overall: float | None
    points: list[Point]


def find(search: Search, norms: dict[str, float]) -> Result:
    """Search, confirm, choose.

    Args:
        norms: squared Frobenius norm of the update's parts.

    Raises:
        BudgetError: no share is confirmed.
    """

    def passes(family: Family, which: Items) -> Callable[[float], bool]:
        return lambda u: search.at(family, u, which).kept.low >= search.keep

    family, overall, candidates = Family({}), None, grid(search.steps)
    if search.by != "overall":
        overall = u = largest(passes(family, "choose"))
        if overall < 1:
            effects = {p: search.without(p) for p, norm in norms.items() if norm > 0}
            own = family_of({p: e[0] for p, e in effects.items()}, {p: e[1] for p, e in effects.items()})
            own_u = largest(passes(own, "choose"))
            if search.gained_at(search.by, own_u) > search.gained_at("overall", overall):
                family, u = own, own_u
        candidates = ladder(u, search.steps) if u else []

    def holds(u: float) -> bool:
        # half of the items may be lucky: what all of them speak against is not chosen either
        return passes(family, search.tested_on)(u) and (search.tested_on == "all" or passes(family, "all")(u))

    chosen_u = confirmed(candidates, holds)
    if chosen_u is None:
        raise nothing_kept(search)
    chosen = next(p for p in reversed(search.points) if p.which == search.tested_on and p.u == chosen_u)
    parameters = search.parameters(family, chosen_u)
    return Result(parameters, chosen, share_of(parameters, norms), family, overall, search.points)


def nothing_kept(search: Search) -> BudgetError:
    """What to say when no share keeps enough: the update itself, or too few items to tell."""
    tried = [p for p in search.points if p.u > 0]
    promising = [(p, n) for p in tried if (n := items_for(p.kept, search.keep)) is not None]
    lowest = min(tried, key=lambda p: p.u)
    text = (
        f"no share of the update is shown to keep {search.keep:g}: even at {lowest.u:.3g} "
        f"{lowest.kept.value:.3f} [{lowest.kept.low:.3f}, {lowest.kept.high:.3f}] of it is kept on {lowest.kept.n} items"
    )
    if not promising:
        return BudgetError(text, "lower --keep, or adapt with a lower learning rate or a method that protects more")
    point, need = max(promising, key=lambda x: x[0].u)
    total, about = (need, "") if search.by == "overall" else (2 * need, " (half of them confirm)")
    return BudgetError(
        f"{text}; at {point.u:.3g} it is {point.kept.value:.3f}, but {point.kept.n} items leave [{point.kept.low:.3f}, "
        f"{point.kept.high:.3f}]",
        f"evaluate on about {total:,} items{about}, or lower --keep",
    )


def parts_of(models: Models, spec: Revert, by: By) -> dict[str, float]:
    """Squared Frobenius norm of the update by part: module types, or layers (and the module types outside them).

    Raises:
        AddlangError: the two models are the same.
    """
    import torch

    norms: dict[str, float] = {}
    for name, info in models.layout.kinds.items():
        part = f"layer {info.layer}" if by == "layer" and info.layer is not None else info.group
        total = 0.0
        for w0, w in models.part(name).blocks(spec.source_model, spec.model):
            total += float((w - w0).to(torch.float64).square().sum())
        norms[part] = norms.get(part, 0.0) + total
    if not any(norms.values()):
        raise AddlangError(f"'{spec.model}' has the weights of '{spec.source_model}'", "check --source")
    return norms


def share_of(parameters: RevertParameters, norms: dict[str, float]) -> float:
    """``||m * update|| / ||update||``."""

    def factor(part: str) -> float:
        if part.startswith("layer "):
            return parameters.layers.get(part.removeprefix("layer "), 1.0)
        return parameters.modules.get(part, 1.0)

    kept = math.fsum(factor(p) ** 2 * norm for p, norm in norms.items())
    return float(parameters.scale) * math.sqrt(kept / math.fsum(norms.values()))  # type: ignore[arg-type]
