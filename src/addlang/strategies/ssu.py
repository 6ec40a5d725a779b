"""Source-Shielded Updates: freeze the columns that matter most to the source language, train the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan, Kind


class SSU(Strategy):
    """Sections 3.1-3.3 of the paper: score on source data, freeze ``int(n * ratio)`` columns per tensor, adapt."""

    name = "ssu"
    paper = "Mitigating Catastrophic Forgetting in Target Language Adaptation of LLMs via Source-Shielded Updates"
    summary = "freeze the input features (columns) that score highest on source-language data, train the rest"

    scorer: Literal["wanda", "magnitude", "random", "sparsegpt", "fisher"] = Field(
        "wanda", description="importance measure (Table 4)"
    )
    ratio: float = Field(
        0.5,
        ge=0,
        le=0.95,
        description="share of every tensor that is frozen; >= 0.6 source first, <= 0.4 target first (Figure 2)",
    )
    granularity: Literal["column", "row", "element"] = Field("column", description="unit of freezing (Table 3)")
    share_columns: bool = Field(
        False, description="one set of columns for q, k and v and one for gate and up: faster, not what the paper does"
    )
    reference_code: bool = Field(False, description="score as the paper's public code does, not as the paper says")

    @model_validator(mode="after")
    def _defined(self) -> SSU:
        if self.scorer == "sparsegpt" and self.granularity == "row":
            raise ValueError(
                "scorer sparsegpt with granularity row is undefined: all rows share their inputs; use column or element"
            )
        if self.reference_code and self.scorer != "wanda":
            raise ValueError(f"reference_code is defined for scorer wanda only, not for {self.scorer}")
        if self.share_columns and self.granularity != "column":
            raise ValueError(f"share_columns needs granularity: column, not {self.granularity}")
        return self

    def requires(self) -> frozenset[str]:
        return frozenset({"source_text"}) if self.scorer in ("wanda", "sparsegpt", "fisher") else frozenset()

    def outline(self, model: nn.Module) -> FreezePlan:
        import torch

        from addlang.freeze.plan import FreezePlan, Frozen
        from addlang.models import parameter_kinds

        kinds: dict[str, Kind] = {"column": "columns", "row": "rows", "element": "elements"}
        entries = self.outside(model, PlanInputs())
        for name, info in parameter_kinds(model).items():
            shape = tuple(model.get_parameter(name).shape)
            if info.kind in ("embedding", "head"):
                continue
            kind: Kind = kinds[self.granularity] if len(shape) > 1 else "columns"
            count = int((shape[0] if kind == "rows" else shape[-1]) * self.ratio)
            index = torch.arange(count)
            if kind == "elements":
                index = (torch.arange(shape[-1]) < count).expand(shape)  # takes no memory
            entries[name] = Frozen(shape, kind, index) if count else Frozen(shape, "none")
        return FreezePlan({n: entries[n] for n, _ in model.named_parameters()})

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        import torch

        from addlang.errors import AddlangError
        from addlang.freeze.plan import FreezePlan, Frozen
        from addlang.models import same_input
        from addlang.scoring import Scores, make_scorer

        calibration = None
        if self.requires():
            if inputs.calibration is None:
                raise AddlangError(
                    f"strategy '{self.name}' with scorer '{self.scorer}' needs source-language calibration data"
                )
            calibration = inputs.calibration()
        scorer = make_scorer(self.scorer, seed=inputs.seed, reference_code=self.reference_code)
        scores = Scores.collect(model, scorer, self.granularity, calibration, inputs.progress)
        entries = self.outside(model, inputs)
        groups = same_input(scores) if self.share_columns else {}
        shared: dict[str, Tensor] = {}
        ties = 0
        for name in scores:
            group = groups.get(name, (name,))
            if group[0] in shared:
                chosen = shared[group[0]]
            else:
                score = torch.stack([scores[member] for member in group]).sum(0) if len(group) > 1 else scores[name]
                chosen, tied = highest(score, int(score.numel() * self.ratio), inputs.seed, group[0])
                ties += tied
            if len(group) > 1:
                shared[group[0]] = chosen
            shape = tuple(model.get_parameter(name).shape)
            if chosen.numel() == 0:
                entries[name] = Frozen(shape, "none")
            elif self.granularity == "element" and len(shape) > 1:
                mask = torch.zeros(model.get_parameter(name).numel(), dtype=torch.bool)
                mask[chosen] = True
                entries[name] = Frozen(shape, "elements", mask.view(shape))
            else:
                entries[name] = Frozen(
                    shape, "rows" if self.granularity == "row" and len(shape) > 1 else "columns", chosen
                )
        ordered = {n: entries[n] for n, _ in model.named_parameters()}
        provenance = {
            "strategy": self.name,
            **self.model_dump(mode="json"),
            "seed": inputs.seed,
            "ties_broken_by_seed": ties,
            "calibration": None if calibration is None else calibration.describe(),
        }
        return FreezePlan(ordered, inputs.model_hash, provenance)


def highest(score: Tensor, k: int, seed: int, name: str) -> tuple[Tensor, int]:
    """Indices of the ``k`` highest scores of the flattened tensor, and how many of them a tie decided.

    Values equal to the k-th are drawn by a generator seeded with (seed, name), so the choice is deterministic and does
    not favour low indices.

    Returns:
        sorted int64 indices [k] on the CPU, number of chosen values that had an equal that was not chosen.
    """
    import torch

    from addlang.scoring.random import generator

    flat = score.flatten().cpu()
    if k == 0:
        return torch.empty(0, dtype=torch.int64), 0
    threshold = torch.topk(flat, k, sorted=False).values.min()
    above = (flat > threshold).nonzero().flatten()
    equal = (flat == threshold).nonzero().flatten()
    need = k - above.numel()
    if need == equal.numel():
        return torch.cat([above, equal]).sort().values, 0
    drawn = equal[torch.randperm(equal.numel(), generator=generator(seed, name))[:need]]
    return torch.cat([above, drawn]).sort().values, need
