"""LF_H2: freeze the layers that the last training phase changed most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from addlang.errors import AddlangError
from addlang.strategies.base import PlanInputs, Strategy
from addlang.strategies.lf_h1 import QKV, check_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan, Frozen
    from addlang.models import Checkpoint, ParamInfo


class LFH2(Strategy):
    """Section 5.2, heuristic 2: layers are ranked by the Frobenius norm of their change from the base to the phase-1 model,
    separately for queries, keys and values; the top 10 of 32 of each are frozen, and of these only that matrix.
    """

    name = "lf_h2"
    paper = "Exploring Two-Phase Continual Instruction Fine-tuning for Multilingual Adaptation in Large Language Models"
    summary = "freeze the query, key and value matrices that the previous phase changed most"
    example = {"reference_model": "the model before that phase"}  # noqa: RUF012 - read only

    reference_model: str = Field(description="the model before the phase whose result is kept: hub id or directory")
    count: int | None = Field(
        None, gt=0, description="layers to freeze of each kind; None: the paper's 10 of 32 as a share of the depth"
    )
    unit: Literal["matrix", "head", "layer"] = Field(
        "matrix",
        description="matrix: rank q, k and v separately and freeze these matrices; head: rank separately for every head "
        "of each and freeze its rows (keys and values have fewer heads than queries); layer: rank by q, k and v together "
        "and freeze whole layers",
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"reference_model"})

    def outline(self, model: nn.Module) -> FreezePlan:
        from addlang.strategies._layers import depth, inside

        layers = depth(inside(model))
        return self._plan(
            model, PlanInputs(), lambda names, units: [[float(layers - i)] * units for i in range(layers)]
        )

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.models import Checkpoint, resolve

        reference = Checkpoint(resolve(self.reference_model))

        def changes(names: list[str], units: int) -> list[list[float]]:
            return [change(model.get_parameter(n), reference, n, units) for n in names]

        return self._plan(model, inputs, changes)

    def _plan(self, model: nn.Module, inputs: PlanInputs, changes: Any) -> FreezePlan:
        """``changes(names, units)``: norm of the change of each unit (head) of each of these parameters."""
        from addlang.strategies._layers import depth, freeze_whole, heads_of, inside

        kinds = inside(model)
        layers = depth(kinds)
        count = check_count(self.count, layers)
        by_group = {g: [n for n, i in kinds.items() if i.kind == "linear" and i.group == g] for g in QKV}
        for group, names in by_group.items():
            if len(names) != layers:
                raise AddlangError(f"lf_h2 needs one {group} in each of the {layers} layers; there are {len(names)}")
        if self.unit == "head":
            entries = freeze_whole(model, kinds, set())
            for group, names in by_group.items():
                heads = heads_of(model, group)
                scores = changes(names, heads)
                tops = [top([s[h] for s in scores], count) for h in range(heads)]
                for layer, name in enumerate(names):
                    entries.update(_rows(model, kinds, name, heads, [h for h in range(heads) if layer in tops[h]]))
            return self.finish(model, inputs, entries)
        norms = {g: [s[0] for s in changes(names, 1)] for g, names in by_group.items()}
        if self.unit == "layer":
            together = [sum(norms[g][i] ** 2 for g in QKV) ** 0.5 for i in range(layers)]
            chosen = {g: top(together, count) for g in QKV}
            frozen = {n for n, i in kinds.items() if i.layer in chosen["q_proj"]}
        else:
            chosen = {g: top(norms[g], count) for g in QKV}
            frozen = {n for n, i in kinds.items() if i.group in QKV and i.layer in chosen[i.group]}
        facts = {g: sorted(c) for g, c in chosen.items()}
        return self.finish(model, inputs, freeze_whole(model, kinds, frozen), layers=facts)


def change(weight: Tensor, reference: Checkpoint, name: str, units: int) -> list[float]:
    """Frobenius norm of ``weight - reference`` of each of ``units`` equal blocks of rows, in float64.

    Raises:
        AddlangError: the reference has no such tensor, or it has another shape.
    """
    old = reference.get(name)
    if old.shape != weight.shape:
        raise AddlangError(
            f"'{name}' has shape {tuple(old.shape)} in {reference.directory} and {tuple(weight.shape)} in the model",
            "give the checkpoint that the model was trained from",
        )
    delta = weight.detach().double().cpu() - old.double()
    norms: list[float] = delta.reshape(units, -1).norm(dim=1).tolist()
    return norms


def top(values: list[float], count: int) -> set[int]:
    """Indices of the ``count`` largest; the lower index first among equals.

    Raises:
        AddlangError: nothing changed, so there is nothing to rank.
    """
    if not any(values):
        raise AddlangError(
            "the reference model's queries, keys or values equal the model's, so no layer changed",
            "set reference_model to the model before the phase whose result is to be kept",
        )
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def _rows(model: Any, kinds: dict[str, ParamInfo], name: str, heads: int, frozen: list[int]) -> dict[str, Frozen]:
    """Entries that freeze the rows of these heads, and the same elements of the bias."""
    import torch

    from addlang.freeze.plan import Frozen

    entries = {}
    for parameter, info in kinds.items():
        if info.module != kinds[name].module or not frozen:
            continue
        shape = tuple(model.get_parameter(parameter).shape)
        size = shape[0] // heads
        index = torch.cat([torch.arange(h * size, (h + 1) * size) for h in frozen])
        whole = len(frozen) == heads
        entries[parameter] = Frozen(shape, "all") if whole else Frozen(shape, "rows", index)
    return entries
