"""AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks are given to where they matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from addlang.errors import AddlangError
from addlang.strategies._adapters import ADAPTER, AdapterAttached, AdapterStrategy
from addlang.strategies.base import Attached

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan

PAPER_STEPS = 12_208  # of the SSU paper's Table 8, to which the schedule below belongs
PAPER_TINIT, PAPER_TFINAL, PAPER_INTERVAL = 1000, 8546, 20


class AdaLoRA(AdapterStrategy):
    """Table 8 of the SSU paper: from rank 12 to a mean rank of 8 over all matrices.

    The ranks are cut between step ``tinit`` and step ``steps - tfinal``, by importance (smoothed sensitivity times
    uncertainty), every ``interval`` steps; afterwards they stay. A schedule in steps makes sense for one budget only: by
    default all three are the paper's shares of 12,208 steps.

    The public code of the SSU paper configures all this but never calls the allocator, so its AdaLoRA is a LoRA of rank 12
    in SVD form: ``reference_code``.
    """

    name = "adalora"
    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (ICLR 2023)"
    summary = "low-rank updates whose ranks are given to the matrices that need them (peft), merged at the end"

    initial_rank: int = Field(12, gt=1, description="rank of every update at the start")
    target_rank: int = Field(8, gt=0, description="mean rank of the updates at the end")
    tinit: float | None = Field(
        None, ge=0, description="steps before ranks are cut, or a share of all steps below 1; None: 1,000 of 12,208"
    )
    tfinal: float | None = Field(
        None, ge=0, description="last steps, with fixed ranks, or a share below 1; None: 8,546 of 12,208"
    )
    interval: int | None = Field(None, gt=0, description="steps between two cuts (deltaT); None: 20 of 12,208")
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of the uncertainty")
    orthogonal: float = Field(0.5, ge=0, description="weight of the penalty that keeps the factors orthogonal")
    reference_code: bool = Field(False, description="never cut ranks, as the SSU paper's public code")

    @model_validator(mode="after")
    def _shrinks(self) -> AdaLoRA:
        if self.initial_rank <= self.target_rank:
            raise ValueError(f"initial_rank {self.initial_rank} must be larger than target_rank {self.target_rank}")
        return self

    @property
    def width(self) -> int:
        return self.initial_rank

    def _extra(self, out: int) -> int:
        return self.initial_rank

    def schedule(self, steps: int) -> tuple[int, int, int]:
        """(tinit, tfinal, interval) for a phase of ``steps`` steps.

        Raises:
            AddlangError: no step is left in which ranks could be cut.
        """
        share = steps / PAPER_STEPS
        tinit = round(PAPER_TINIT * share) if self.tinit is None else _steps(self.tinit, steps)
        tfinal = round(PAPER_TFINAL * share) if self.tfinal is None else _steps(self.tfinal, steps)
        if self.tfinal is None:
            tfinal = max(0, min(tfinal, steps - tinit - 2))
        interval = self.interval or max(1, round(PAPER_INTERVAL * share))
        if steps - tfinal - tinit < 2:
            raise AddlangError(
                f"adalora: of {steps} steps, tinit {tinit} and tfinal {tfinal} leave none to cut ranks in",
                "raise tokens, or lower tinit and tfinal",
            )
        return tinit, tfinal, interval

    def _attached(self, model: nn.Module, plan: FreezePlan, peft: Any, masters: bool) -> Attached:
        config = peft.AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.target_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            bias="none",
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orthogonal,
            total_step=PAPER_STEPS,  # the schedule is set when the number of steps is known
        )
        seed = int(plan.provenance.get("seed", 0))
        targets = self.targets(model)
        return AdaLoRAAttached(
            model,
            plan,
            lambda m: peft.AdaLoraModel(m, {ADAPTER: config}, ADAPTER),
            targets,
            self,
            config,
            seed,
            masters,
        )


def _steps(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else int(value)


class AdaLoRAAttached(AdapterAttached):
    """Allocates ranks after every step, while the gradients are still there; everything that it remembers is in the state.

    peft adds the orthogonal penalty to the loss of every forward pass, where its weight would depend on how many
    micro-batches a step has and on how their losses are normalised. Here it is added once per step.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FreezePlan,
        tuner: Any,
        targets: list[str],
        strategy: AdaLoRA,
        config: Any,
        seed: int,
        masters: bool,
    ) -> None:
        super().__init__(model, plan, tuner, targets, seed=seed, masters=masters)
        self.strategy, self.config = strategy, config

    def bind(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        super().bind(optimizer, steps)
        self.config.total_step = steps
        self.config.tinit, self.config.tfinal, self.config.deltaT = self.strategy.schedule(steps)

    def _factors(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if "lora_" in n]

    def loss_term(self) -> Tensor | None:
        """``orthogonal`` times the mean over all factors of ``||P P^T - I||_F``."""
        import torch

        if not self.strategy.orthogonal:
            return None
        terms = []
        for name, p in self._factors():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.t() if "lora_A" in name else p.t() @ p
                terms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=p.dtype, device=p.device)))
        return self.strategy.orthogonal * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Needs the step's gradients: the loop clears them afterwards."""
        from addlang.train.exact import any_order

        if not self.strategy.reference_code:
            with any_order():  # peft's threshold is a kthvalue; the rest of the allocator has one order
                self.tuner.update_and_allocate(step)
        super().after_step(step)

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of every targeted weight: singular values that are not masked."""
        pattern = self.config.rank_pattern or {}
        found = {}
        for name in self.targets:
            key = name.removesuffix(".weight") + f".lora_E.{ADAPTER}"
            found[name] = sum(pattern[key]) if key in pattern else self.strategy.initial_rank
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """With the allocator's averages and masks, which peft does not save: a resume would start them from nothing."""
        import torch

        allocator = self.tuner.rankallocator
        state = super().state_dict()
        pattern = self.config.rank_pattern or {}
        for name, p in self._factors():
            for kind in ("exp_avg_ipt", "exp_avg_unc"):
                state[f"adalora/{kind}/{name}"] = getattr(allocator, kind).get(name, torch.zeros_like(p)).detach()
            if "lora_E" in name:
                kept = pattern.get(name, [True] * len(p))
                state[f"adalora/kept/{name}"] = torch.tensor(kept, dtype=torch.uint8)
        flags = [bool(allocator.exp_avg_ipt), bool(pattern)]
        state["adalora/begun"] = torch.tensor(flags, dtype=torch.uint8)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({n: t for n, t in state.items() if not n.startswith("adalora/")})
        allocator = self.tuner.rankallocator
        averages, cut = state["adalora/begun"].tolist()
        allocator.reset_ipt()
        for name, p in self._factors():
            if averages:
                import torch

                allocator.ipt[name] = torch.zeros_like(p)
                for kind in ("exp_avg_ipt", "exp_avg_unc"):
                    getattr(allocator, kind)[name] = state[f"adalora/{kind}/{name}"].to(p.device).clone()
        kept = {n: state[f"adalora/kept/{n}"].bool().tolist() for n, _ in self._factors() if "lora_E" in n}
        self.config.rank_pattern = kept if cut else None
