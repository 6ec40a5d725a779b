"""A guard at work that holds the model to a stored :class:`Teacher`: the self anchor and KL on source text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangWarning
from addlang.guards.base import ActiveGuard, GuardContext

if TYPE_CHECKING:
    from addlang.guards.teacher import RowOrder, Teacher
    from addlang.strategies.base import Attached


LOGITS = 1 << 28  # elements: 1 GiB in fp32
MANY_PASSES = 10  # over the conversations: what was measured, see docs/results.md, is half a pass to ten
TOKENS = {"cuda": 16_384, "cpu": 4_096}  # per forward pass


def stored_teacher(
    context: GuardContext, key: str, top_k: int, conversations: Callable[[], tuple[list[list[int]], dict[str, Any]]]
) -> tuple[Teacher, dict[str, Any]]:
    """The source's answers on some conversations, from the cache or made now.

    Args:
        key: names everything that determines them.
        conversations: gives token ids, each at most a row long, and what to tell about them.
    """
    from addlang.data.journal import locked
    from addlang.guards.teacher import Teacher, ask, pack_rows

    directory = context.cache_dir / "anchors" / key
    with locked(directory.with_suffix(".lock")):
        found = Teacher.load(directory)
        if found is None:
            ids, about = conversations()
            tokens, positions = pack_rows(ids, context.sequence_length, context.tokenizer.pad_token_id)
            teacher = ask(
                context.model,
                tokens,
                positions,
                top_k=top_k,
                rows_at_a_time=min(8, rows_at_a_time(context)),
                autocast=context.autocast,
                progress=context.progress,
            )
            teacher.save(directory, {**about, "rows": len(teacher), "tokens": int((positions >= 0).sum())})
            found = Teacher.load(directory)
            assert found is not None
    return found


def rows_at_a_time(context: GuardContext) -> int:
    """Rows per forward pass: so many that their fp32 logits take at most 1 GiB.

    One with FlashAttention, which keeps packed conversations apart in batches of one row only (transformers).
    """
    if str(getattr(context.model.config, "_attn_implementation", "")).startswith("flash"):
        return 1
    vocabulary = int(context.model.get_output_embeddings().weight.shape[0])
    return most_rows(context.sequence_length, vocabulary, context.device.type)


def most_rows(length: int, vocabulary: int, device_type: str = "cuda") -> int:
    """Rows of ``length`` tokens in one forward pass, whatever the target's."""
    return max(1, min(TOKENS[device_type], LOGITS // vocabulary) // length)


def anchored(guard: Any, teacher: Teacher, about: dict[str, Any], context: GuardContext, *, size: str) -> Anchored:
    """Rows of the teacher in every step, as many as give the share asked for.

    Args:
        guard: has ``share``, ``weight``, ``schedule``, ``mode`` and ``temperature``.
        about: has ``conversations`` and ``tokens``, those of the teacher's rows without padding.
        size: the option that says how many conversations there are.
    """
    from addlang.guards.teacher import RowOrder

    # the target's rows are full, the teacher's nearly so
    per_row = about["tokens"] / len(teacher)
    target = 1 - context.read_by_guards
    per_step = context.batch * context.sequence_length * guard.share / target / per_row
    passes = per_step * context.steps / len(teacher)
    if passes > MANY_PASSES:
        enough = math.ceil(about["conversations"] * passes / MANY_PASSES)
        warnings.warn(
            f"{guard.name}: its {about['conversations']:,} conversations are read {passes:.0f} times, and more than "
            f"{MANY_PASSES} were never tried; raise {size} (with {enough:,} it is {MANY_PASSES} times), or lower share",
            AddlangWarning,
            stacklevel=2,
        )
    return Anchored(guard, teacher, RowOrder(len(teacher), per_step, context.seed), about, context)


class Anchored(ActiveGuard):
    """Adds ``weight`` times the mean term over the anchored positions of a step."""

    def __init__(
        self, guard: Any, teacher: Teacher, order: RowOrder, about: dict[str, Any], context: GuardContext
    ) -> None:
        self.guard, self.teacher, self.order, self.about = guard, teacher, order, about
        self.context = context
        self.micro = min(context.micro, rows_at_a_time(context))  # a recipe that lowers the target's means memory

    def tokens(self, step: int) -> int:
        return int((self.teacher.positions[self.order.at(step)] >= 0).sum())

    def tokens_before(self) -> int:
        return int(self.about["tokens"])

    def describe(self) -> dict[str, Any]:
        return {
            "guard": self.guard.name,
            **self.guard.model_dump(mode="json"),
            **{f"sampled_{k}": v for k, v in self.about.items()},
        }

    def weight(self, step: int) -> float:
        done = (step - 1) / max(1, self.context.steps - 1)
        return self.guard.weight * {"constant": 1.0, "decay": 1 - done, "ramp": done}[self.guard.schedule]

    def backward(self, attached: Attached, step: int) -> float:
        import numpy as np
        import torch

        from addlang.guards.teacher import divergence, model_positions, slices

        rows = self.order.at(step)
        weight = self.weight(step)
        total = int(self.teacher.valid[rows].sum()) if len(rows) else 0
        if total == 0 or weight == 0.0:
            return 0.0
        device, value = self.context.device, 0.0
        for piece in slices(rows, self.micro):
            tokens = torch.from_numpy(np.ascontiguousarray(self.teacher.tokens[piece])).to(device)
            places = torch.from_numpy(model_positions(np.ascontiguousarray(self.teacher.positions[piece]))).to(device)
            valid = torch.from_numpy(np.ascontiguousarray(self.teacher.valid[piece])).to(device)
            spans = [slice(self.teacher.starts[r], self.teacher.starts[r + 1]) for r in piece.tolist()]
            with self.context.autocast():
                logits = attached.model(input_ids=tokens, position_ids=places, use_cache=False).logits[valid]
            term = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
            if self.guard.mode in ("kl", "both"):
                ids = torch.from_numpy(np.concatenate([self.teacher.ids[s] for s in spans])).to(device)
                logp = torch.from_numpy(np.concatenate([self.teacher.logp[s] for s in spans])).to(device)
                term = term + divergence(logits, ids, logp, self.guard.temperature).sum()
            if self.guard.mode in ("replay", "both"):
                following = tokens[:, 1:][valid[:, :-1]]
                term = term + torch.nn.functional.cross_entropy(logits.to(term.dtype), following, reduction="sum")
            term = weight * term / total
            term.backward()
            value += float(term.detach())
        return value
