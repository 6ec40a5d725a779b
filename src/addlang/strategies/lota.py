"""Lottery-ticket adaptation: train briefly, keep the weights that moved most, restart and train only those."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from addlang.errors import AddlangError, AddlangWarning
from addlang.strategies.base import PlanInputs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from addlang.freeze.plan import FreezePlan
    from addlang.recipe import TrainSettings
    from addlang.strategies.costs import Cost


class LoTA(Strategy):
    """Mask calibration, mask extraction, sparse adaptation (section 3 of the paper).

    The warm-up is full fine-tuning from the source with the phase's own optimizer, at its peak learning rates, on the first
    batches of its data; only their schedule, compiled layers and liger-kernel are left out. The delta to the source decides by
    one exact global top-k over the attention and MLP weights; then every weight goes back to the source, bit for bit.
    """

    name = "lota"
    paper = "Lottery Ticket Adaptation: Mitigating Destructive Interference in LLMs (2024)"
    summary = "train 100 steps, keep the 10 % of the weights that moved most, restart and train only those"

    sparsity: float = Field(0.9, gt=0, lt=1, description="share of the attention and MLP weights that is frozen")
    warmup_steps: int = Field(100, gt=0, description="optimizer steps that decide the mask (Table 8)")
    warmup_learning_rate: float | None = Field(
        None,
        gt=0,
        description="constant; None: the phase's learning rate; that of embedding and head keeps its ratio to it",
    )
    include_norms: bool = Field(
        False, description="norms and biases compete for the top too, as in the SSU paper; otherwise they are frozen"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"target_text"})

    @property
    def steps_before(self) -> int:
        return self.warmup_steps

    def outline(self, model: nn.Module) -> FreezePlan:
        import torch

        from addlang.freeze.plan import Frozen

        entries = {}
        for name, competes in self._names(model).items():
            shape = tuple(model.get_parameter(name).shape)
            if not competes:
                entries[name] = Frozen(shape, "all")
                continue
            first = torch.arange(shape[-1]) < int(shape[-1] * self.sparsity)
            entries[name] = Frozen(shape, "elements", first.expand(shape))  # takes no memory
        return self.finish(model, PlanInputs(), entries)

    def plan(self, model: nn.Module, inputs: PlanInputs) -> FreezePlan:
        from addlang.freeze.plan import Frozen

        if inputs.target is None:
            raise AddlangError(f"strategy '{self.name}' needs target text to decide what is trained")
        names = self._names(model)
        deltas, tokens = self._warm_up(model, inputs, [n for n, competes in names.items() if competes])
        total = sum(d.numel() for d in deltas.values())
        masks = largest(deltas, total - int(total * self.sparsity), inputs.seed)
        entries = {}
        for name, competes in names.items():
            shape = tuple(model.get_parameter(name).shape)
            entries[name] = Frozen(shape, "elements", ~masks[name]) if competes else Frozen(shape, "all")
        return self.finish(model, inputs, entries, warmup_tokens=tokens)

    def cost(self, model: nn.Module) -> Cost:
        from addlang.strategies.costs import of_plan

        return of_plan(model, self.outline(model), f"and {self.warmup_steps} warm-up steps beforehand")

    def _names(self, model: nn.Module) -> dict[str, bool]:
        """Every parameter but embedding and head -> whether it competes."""
        from addlang.strategies._layers import inside

        return {n: i.layer is not None and (i.kind == "linear" or self.include_norms) for n, i in inside(model).items()}

    def _warm_up(self, model: Any, inputs: PlanInputs, names: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """What ``warmup_steps`` of training change, in fp32 on the CPU, and the label-bearing tokens that they read; the
        model is left as it was found."""
        import torch

        from addlang.freeze.masked import Masked
        from addlang.recipe import TrainSettings
        from addlang.strategies.full import Full
        from addlang.train.exact import exact_kernels
        from addlang.train.loop import disable_checkpointing, enable_checkpointing

        assert inputs.target is not None
        settings = inputs.settings or TrainSettings()
        rate = self.warmup_learning_rate or settings.learning_rate
        outer_rate = settings.embedding_learning_rate
        rates = {
            "learning_rate": rate,
            "embedding_learning_rate": outer_rate and outer_rate * (rate / settings.learning_rate),
        }
        source = {n: (p.data, p.requires_grad) for n, p in model.named_parameters()}
        training = model.training
        outer = {k: getattr(self, k) for k in Strategy.model_fields}
        plan = Full(**outer).plan(model, inputs)
        try:
            for p in model.parameters():
                p.data = p.data.clone()
            attached = Masked(model, plan, masters=settings.master_weights == "fp32")
            model.train()
            if settings.activation_checkpointing:
                enable_checkpointing(model)
            device = next(model.parameters()).device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), exact_kernels(device):
                torch.manual_seed(inputs.seed)  # of stochastic rounding
                tokens = train_briefly(attached, inputs, settings.model_copy(update=rates), self.warmup_steps)
            with torch.no_grad():
                moved = {n: model.get_parameter(n).detach() for n in names}
                return {n: (w.double() - source[n][0].double()).float().cpu() for n, w in moved.items()}, tokens
        finally:
            if settings.activation_checkpointing:
                disable_checkpointing(model)
            for n, p in model.named_parameters():
                p.grad = None
                p.data, wanted = source[n]
                p.requires_grad_(wanted)
            model.train(training)


def train_briefly(attached: Any, inputs: PlanInputs, settings: TrainSettings, steps: int) -> int:
    """``steps`` optimizer steps at constant rates, in the order of the training loop; returns the label-bearing tokens.

    Raises:
        AddlangError: the data end too early, or the loss is not finite.
    """
    import torch

    from addlang.train.loop import compute_context
    from addlang.train.loss import token_loss
    from addlang.train.optimizers import build_optimizer

    assert inputs.target is not None
    device = next(attached.model.parameters()).device
    autocast = compute_context(settings, device)  # type: ignore[arg-type]
    optimizer = build_optimizer(attached, settings)
    tokens = 0
    batches = iter(inputs.target())
    for step in range(1, steps + 1):
        micro_batches = next(batches, None)
        if micro_batches is None:
            raise AddlangError(
                f"lota warms up for {steps} steps, but the phase has data for {step - 1} only",
                "lower strategy.warmup_steps or raise tokens",
            )
        labels = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)
        tokens += labels
        for batch in micro_batches:
            on_device: Mapping[str, Tensor] = {k: v.to(device) for k, v in batch.items()}
            with autocast():
                loss = token_loss(attached.model, on_device)[0] / max(labels, 1)
            loss.backward()  # type: ignore[no-untyped-call]
        attached.before_clip(step)
        limit = settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in attached.named_trainable()], limit)
        if not math.isfinite(float(norm)):
            raise AddlangError(
                f"the gradient became NaN or infinite at step {step} of lota's warm-up", "lower warmup_learning_rate"
            )
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad(set_to_none=True)
        if inputs.progress is not None:
            inputs.progress(step, steps, "warm-up steps")
    return tokens


def largest(deltas: Mapping[str, Tensor], k: int, seed: int) -> dict[str, Tensor]:
    """Bool masks of the ``k`` entries of largest absolute value over all tensors together: exactly ``k``.

    A threshold alone does not do: in 16 bits most small updates round away, the k-th largest change is then zero, and
    ``>= 0`` is everything. Among entries equal to the k-th the seed decides; if they are zero, a warning says so. The
    tensors are never joined: non-negative fp32 numbers are ordered like their bits, so two histograms of 16 bits find
    the k-th.

    Args:
        deltas: fp32, on the CPU.
        k: 1 .. number of entries.
    """
    import torch

    from addlang.scoring.random import generator

    def ordered(tensor: Tensor) -> Tensor:
        return tensor.abs().contiguous().view(torch.int32).flatten()

    high = torch.zeros(1 << 16, dtype=torch.int64)
    for d in deltas.values():
        if not bool(torch.isfinite(d).all()):
            raise AddlangError("lota's warm-up gave NaN or infinite weights", "lower warmup_learning_rate")
        high += torch.bincount(ordered(d) >> 16, minlength=1 << 16)
    top, rest = _bucket(high, k)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for d in deltas.values():
        bits = ordered(d)
        low += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, need = _bucket(low, rest)
    kth = (top << 16) | bottom
    equal = {n: int((ordered(d) == kth).sum()) for n, d in deltas.items()}
    if kth == 0:
        warnings.warn(
            f"lota: only {k - need:,} of the {k:,} weights to train moved during the warm-up; the other {need:,} are drawn at random",
            AddlangWarning,
            stacklevel=2,
        )
    quotas = _apportion(need, equal)
    masks = {}
    for name, d in deltas.items():
        bits = ordered(d)
        mask = bits > kth
        if quotas[name]:
            at = (bits == kth).nonzero().flatten()
            mask[at[torch.randperm(at.numel(), generator=generator(seed, f"lota:{name}"))[: quotas[name]]]] = True
        masks[name] = mask.view(d.shape)
    return masks


def _bucket(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many of it are among the k largest."""
    above = 0
    for bucket in reversed(histogram.nonzero().flatten().tolist()):
        here = int(histogram[bucket])
        if above + here >= k:
            return bucket, k - above
        above += here
    raise AssertionError("k is larger than the number of entries")


def _apportion(need: int, counts: Mapping[str, int]) -> dict[str, int]:
    """``need`` places in proportion to ``counts`` (largest remainders; the earlier name among equals)."""
    total = sum(counts.values())
    quotas = {n: need * c // total for n, c in counts.items()}
    order = sorted(counts, key=lambda n: -(need * counts[n] % total))
    for name in order[: need - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
