"""How a phase's budget becomes batches and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from addlang.schema import Part, Phase

PAPER_TOKENS = 200_000_000  # SSU paper, Table 8: 12,208 steps x 32 x 512
PAPER_BATCH = 32
FEWEST_STEPS = 200  # below this a batch of 32 is halved until there are as many steps


def budget(phase: Phase | Part, available: int) -> int:
    """Training tokens: what the recipe says, or one pass over ``available`` target tokens, at most the paper's 200M."""
    return phase.tokens if phase.tokens is not None else min(PAPER_TOKENS, available)


def global_batch(phase: Phase, tokens: int, devices: int = 1) -> tuple[int, str | None]:
    """Sequences per optimizer step over all devices, and a note where the paper's 32 was scaled to a small budget.

    Raises:
        AddlangError: batch_size contradicts per_device_train_batch_size x gradient_accumulation_steps.
    """
    micro, accumulation = phase.per_device_train_batch_size, phase.gradient_accumulation_steps
    if micro and accumulation:
        product = micro * accumulation * devices
        if phase.batch_size is not None and product != phase.batch_size:
            times = f" x {devices} devices" if devices > 1 else ""
            raise AddlangError(
                f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation}{times} is {product}, "
                f"but batch_size is {phase.batch_size}",
                "leave one of the three out",
            )
        return product, None
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


def micro_batch(phase: Phase, batch: int, device_type: str, devices: int = 1) -> int:
    """Sequences per forward pass on one device: as asked for, or the largest divisor within 16 k tokens on a GPU, 4 k on a CPU.

    Args:
        batch: sequences per optimizer step over all devices; each takes its share, rounded up.

    Raises:
        AddlangError: the share is not divisible as asked.
    """
    share = -(-batch // devices)
    what = f"batch_size {batch}" if devices == 1 else f"batch_size {batch} over {devices} devices, {share} each,"
    micro, accumulation = phase.per_device_train_batch_size, phase.gradient_accumulation_steps
    if accumulation and not micro:
        if share % accumulation:
            raise AddlangError(f"{what} is not divisible by gradient_accumulation_steps {accumulation}")
        return share // accumulation
    if micro:
        if share % micro:
            raise AddlangError(f"{what} is not divisible by per_device_train_batch_size {micro}")
        return micro
    fits = max(1, (16_384 if device_type == "cuda" else 4_096) // phase.sequence_length)
    return max(d for d in range(1, share + 1) if share % d == 0 and d <= fits)
