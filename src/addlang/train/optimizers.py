"""Optimizers of a phase, their parameter groups, and the form in which their state is stored.

- ``adamw``: torch's fused AdamW; state in the type of what is trained (fp32 masters: fp32 state).
- ``adamw_8bit``: torchao's AdamW with both moments in 8 bits (block-wise, arXiv 2110.02861); weights in bf16
  (``master_weights: model``) are rounded stochastically, fp32 masters are not touched by that. The input embedding keeps
  fp32 moments.
- ``adamw_bf16_sr``: bf16 weights and gradients, rounded stochastically after an fp32 update, fp32 moments. The moments are
  not bf16 as in torchao's own class: with beta2 = 0.999 a bf16 second moment never decays, because one step's
  change of 0.1 % is less than half of its last place (0.2 %).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from torch import nn

    from addlang.recipe import Phase, TrainSettings
    from addlang.strategies.base import Attached


def build_optimizer(attached: Attached, phase: TrainSettings) -> torch.optim.Optimizer:
    """The phase's optimizer over what is trained, after sharding.

    Raises:
        AddlangError: its library or a compiler is missing.
    """
    groups = parameter_groups(attached, phase)
    betas, eps = (phase.adam_beta1, phase.adam_beta2), phase.adam_epsilon
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=phase.learning_rate, betas=betas, eps=eps, fused=True)
    require_compiler(phase.optimizer)
    if phase.optimizer == "adamw_8bit":
        model: Any = attached.model
        built: torch.optim.Optimizer = _eight_bit_class(model.get_input_embeddings()._parameters["weight"])(
            groups, lr=phase.learning_rate, betas=betas, eps=eps, bf16_stochastic_round=True
        )
        return built
    built = _stochastic_class()(groups, lr=phase.learning_rate, betas=betas, eps=eps, bf16_stochastic_round=True)
    return built


def parameter_groups(attached: Attached, phase: TrainSettings) -> list[dict[str, Any]]:
    """The strategy's groups; embedding and head apart where they have a learning rate of their own, last in the list."""
    groups = attached.param_groups(phase.weight_decay)
    if phase.embedding_learning_rate is None:
        return groups
    outside = {id(p) for p in embedding_and_head(attached.model)}
    inner = [{**g, "params": [p for p in g["params"] if id(p) not in outside]} for g in groups]
    outer = [
        {**g, "params": [p for p in g["params"] if id(p) in outside], "lr": phase.embedding_learning_rate}
        for g in groups
    ]
    found = [g for g in (*inner, *outer) if g["params"]]
    if not any("lr" in g for g in found):
        raise AddlangError(
            "embedding_learning_rate is set, but neither the embedding nor the head is trained",
            "leave it out, or set train_embeddings or train_lm_head in the strategy",
        )
    return found


def embedding_and_head(model: Any) -> list[nn.Parameter]:
    """Weights (and biases) of the input embedding and the head, also where they are sharded or overlaid."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [p for m in modules if m is not None for p in m._parameters.values() if p is not None]


def build_scheduler(optimizer: torch.optim.Optimizer, phase: Phase, steps: int) -> Any:
    """transformers' schedule of that name, alike for all groups."""
    from transformers import get_scheduler

    return get_scheduler(
        phase.lr_scheduler_type, optimizer, num_warmup_steps=warmup(phase, steps), num_training_steps=steps
    )


def warmup(phase: Phase, steps: int) -> int:
    """Steps of the phase's warmup; ``warmup_steps`` below 1 is a share of all ``steps``.

    Raises:
        AddlangError: it would be all of them.
    """
    found = math.ceil(phase.warmup_steps * steps) if phase.warmup_steps < 1 else int(phase.warmup_steps)
    if found >= steps and steps > 1:
        raise AddlangError(
            f"warmup_steps {found} leaves none of the {steps} steps of phase '{phase.name}'",
            "lower warmup_steps or raise tokens",
        )
    return found


def check_steps(phase: Phase, steps: int) -> None:
    """Whether ``steps`` are enough for the warmup, and for what the strategy trains before.

    Raises:
        AddlangError: they are not.
    """
    warmup(phase, steps)
    if steps < phase.strategy.steps_before:
        raise AddlangError(
            f"{phase.strategy.name} warms up for {phase.strategy.steps_before} steps, but phase '{phase.name}' has data for {steps} only",
            "lower strategy.warmup_steps or raise tokens",
        )


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Put learning rates into the groups, in place where they are tensors."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_parts(value: Tensor) -> dict[str, Tensor] | None:
    """The plain tensors that a quantised state is made of (without constants), or None for an ordinary tensor."""
    if hasattr(value, "codes") and hasattr(value, "scale"):
        return {"codes": value.codes, "scale": value.scale}
    return None


def is_quantised(optimizer: torch.optim.Optimizer) -> bool:
    """Whether states are kept in 8 bits: large ones are, small ones are not, and where it is sharded each part decides."""
    return bool(getattr(optimizer, "quantised", False))


def make_state(optimizer: Any, p: nn.Parameter, kind: str) -> Tensor:
    """An empty state of an 8-bit optimizer, as its first step would make it."""
    state: Tensor = optimizer._new_buffer(p, kind == "exp_avg")
    return state


def _torchao() -> Any:
    try:
        import torchao.optim
    except ImportError as error:
        raise AddlangError(
            f"this optimizer needs torchao: {error}", "pip install 'addlang[optimizers]', or use optimizer: adamw"
        ) from error
    return torchao.optim


def _eight_bit_class(embedding: nn.Parameter | None) -> Callable[..., torch.optim.Optimizer]:
    class EightBit(_torchao().AdamW8bit):  # type: ignore[misc, name-defined]
        """torchao's 8-bit AdamW, but for the input embedding, which keeps fp32 moments (as bitsandbytes advises).

        Most of its rows have no gradient in a step. Where a small second moment was quantised to 0 beside larger ones and
        no new gradient comes, the first moment would be divided by epsilon: a leap of many times the weight.
        """

        quantised = True

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if p is embedding:
                return torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            buffer: Tensor = super()._new_buffer(p, signed)
            return buffer

    return EightBit


def _stochastic_class() -> Callable[..., torch.optim.Optimizer]:
    _torchao()
    from torchao.optim.adam import _AdamW

    class AdamWStochastic(_AdamW):  # type: ignore[misc]
        """torchao's AdamW with fp32 moments for bf16 weights."""

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return torch.zeros_like(p, dtype=torch.float32)

    return AdamWStochastic


def require_libraries(phase: Phase) -> None:
    """What the phase's settings need of this machine besides liger-kernel.

    Raises:
        AddlangError: torchao, a compiler or FlashAttention is missing.
    """
    if phase.optimizer != "adamw":
        _torchao()
        require_compiler(phase.optimizer)
    if phase.torch_compile:
        require_compiler("torch_compile")
    if phase.attn_implementation in ("flash_attention_2", "flash_attention_3"):
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        second = phase.attn_implementation == "flash_attention_2"
        if not (is_flash_attn_2_available if second else is_flash_attn_3_available)():
            raise AddlangError(
                f"attn_implementation '{phase.attn_implementation}' cannot be used: its package is not installed, or there is no GPU",
                "install it (pip install flash-attn), or use attn_implementation: sdpa",
            )


def check_types(phase: Phase, stored: torch.dtype) -> None:
    """Whether the settings of a phase fit the type that its checkpoint is stored in.

    Raises:
        AddlangError: they contradict each other.
    """
    if phase.master_weights == "fp32":
        return
    own = str(stored).removeprefix("torch.")
    wanted = {"auto": stored, "fp32": torch.float32, "bf16": torch.bfloat16}[phase.precision]
    if wanted != stored:
        raise AddlangError(
            f"phase '{phase.name}': precision: {phase.precision} contradicts master_weights: model, for the checkpoint is stored in {own}",
            "leave precision out, or use master_weights: fp32",
        )
    if stored == torch.float16:
        raise AddlangError(
            f"phase '{phase.name}': master_weights: model would train in float16, in which gradients and Adam's second moments round to 0",
            "use master_weights: fp32",
        )
    if phase.optimizer == "adamw_bf16_sr" and stored != torch.bfloat16:
        raise AddlangError(
            f"phase '{phase.name}': optimizer adamw_bf16_sr needs a checkpoint that is stored in bf16; this one is stored in {own}",
            "use optimizer: adamw with master_weights: fp32",
        )


def require_compiler(what: str) -> None:
    """torchao's optimizers and torch_compile build kernels on the machine that trains.

    Raises:
        AddlangError: there is no C++ compiler.
    """
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return  # runs uncompiled
    compiler = os.environ.get("CXX")
    if not any(shutil.which(c) for c in ([compiler] if compiler else ["g++", "clang++", "c++"])):
        raise AddlangError(f"{what} needs a C++ compiler, and none was found", "install g++ or set CXX")
