"""How a phase's budget becomes batches and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.recipe import Phase

PAPER_TOKENS = 200_000_000  # SSU paper, Table 8: 12,208 steps x 32 x 512
PAPER_BATCH = 32
FEWEST_STEPS = 200  # below this a batch of 32 is halved until there are as many steps


def budget(phase: Phase, available: int) -> int:
    """Training tokens: what the recipe says, or one pass over ``available`` target tokens, at most the paper's 200M."""
    return phase.tokens if phase.tokens is not None else min(PAPER_TOKENS, available)


def global_batch(phase: Phase, tokens: int) -> tuple[int, str | None]:
    """Sequences per optimizer step, and a note where the paper's 32 was scaled to a small budget.

    Raises:
        AddlangError: batch_size contradicts per_device_train_batch_size x gradient_accumulation_steps.
    """
    micro, accumulation = phase.per_device_train_batch_size, phase.gradient_accumulation_steps
    if micro and accumulation:
        if phase.batch_size is not None and micro * accumulation != phase.batch_size:
            raise AddlangError(
                f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} is {micro * accumulation}, "
                f"but batch_size is {phase.batch_size}",
                "leave one of the three out",
            )
        return micro * accumulation, None
    if phase.batch_size is not None:
        return phase.batch_size, None
    batch = PAPER_BATCH
    while batch > 1 and tokens < FEWEST_STEPS * batch * phase.sequence_length:
        batch //= 2
    batch = max(batch, micro or 1, accumulation or 1)
    if batch == PAPER_BATCH:
        return batch, None
    return (
        batch,
        f"batch_size {batch} instead of the paper's {PAPER_BATCH}: the budget of {tokens:,} tokens would leave fewer than {FEWEST_STEPS} steps",
    )


def micro_batch(phase: Phase, batch: int, device_type: str) -> int:
    """Sequences per forward pass: as asked for, or the largest divisor of ``batch`` within 16 k tokens on a GPU, 4 k on a CPU.

    Raises:
        AddlangError: ``batch`` is not divisible as asked.
    """
    micro, accumulation = phase.per_device_train_batch_size, phase.gradient_accumulation_steps
    if accumulation and not micro:
        if batch % accumulation:
            raise AddlangError(f"batch_size {batch} is not divisible by gradient_accumulation_steps {accumulation}")
        return batch // accumulation
    if micro:
        if batch % micro:
            raise AddlangError(f"batch_size {batch} is not divisible by per_device_train_batch_size {micro}")
        return micro
    fits = max(1, (16_384 if device_type == "cuda" else 4_096) // phase.sequence_length)
    return max(d for d in range(1, batch + 1) if batch % d == 0 and d <= fits)
