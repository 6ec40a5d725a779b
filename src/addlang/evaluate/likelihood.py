"""Log-likelihood of token sequences: the one place where bits per byte and cloze accuracy get their numbers from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from addlang.errors import AddlangError
from addlang.evaluate.generation import inference

POSITIONS = 2048  # positions whose logits are held in fp32 at once: 1 GiB for a vocabulary of 128 k


def start_token(tokenizer: Any) -> int:
    """Token that stands before a text: beginning-of-sequence, or end-of-sequence where a model has no other.

    Raises:
        AddlangError: the tokenizer has neither, so the first token of a text could not be predicted.
    """
    for value in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    raise AddlangError("the tokenizer has neither a beginning- nor an end-of-sequence token", "set its eos_token")


def log_likelihoods(
    model: Any,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Log-probability in nats of ``sequence[start:]`` given ``sequence[:start]``, summed over tokens.

    The logits are turned into log-probabilities in fp32 whatever the model's dtype, and sums are kept in fp64.

    Args:
        model: a causal language model of transformers.
        sequences: token ids.
        starts: first scored position of each, at least 1.
        batch_size: sequences per forward pass; does not change the result beyond rounding.
        progress: called with the number of sequences done and of all sequences.

    Raises:
        AddlangError: a sequence is longer than the model's positions.
    """
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(s) for s in sequences), default=0) - 1  # the last token is only predicted
    if limit is not None and longest > limit:
        raise AddlangError(f"a text of {longest} tokens exceeds the model's {limit} positions", "shorten the window")
    sums = [0.0] * len(sequences)
    # longest first: little padding, and memory runs out in the first batch or not at all
    scorable = [i for i, sequence in enumerate(sequences) if len(sequence) > starts[i]]  # nothing to score: 0
    order = sorted(scorable, key=lambda i: -len(sequences[i]))
    with inference(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            width = len(sequences[rows[0]])
            ids = torch.zeros((len(rows), width), dtype=torch.long)  # (B, L), padded on the right
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            scored = torch.zeros((len(rows), width), dtype=torch.bool)
            for row, i in enumerate(rows):
                n = len(sequences[i])
                ids[row, :n] = torch.tensor(sequences[i], dtype=torch.long)
                mask[row, :n] = 1
                scored[row, starts[i] : n] = True
            ids, mask, scored = (t.to(model.device) for t in (ids, mask, scored))
            logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits  # (B, L-1, V)
            where = scored[:, 1:].nonzero()  # (N, 2): only these positions become fp32
            targets = ids[:, 1:][scored[:, 1:]]
            totals = torch.zeros(len(rows), dtype=torch.float64)
            for at in range(0, len(targets), POSITIONS):
                part = where[at : at + POSITIONS]
                loss = torch.nn.functional.cross_entropy(
                    logits[part[:, 0], part[:, 1]].float(), targets[at : at + POSITIONS], reduction="none"
                )
                totals.index_add_(0, part[:, 0].cpu(), -loss.double().cpu())
            for row, i in enumerate(rows):
                sums[i] = float(totals[row])
            if progress is not None:
                progress(first + len(rows), len(order))
    return sums
