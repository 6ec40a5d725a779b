"""Bits per byte of the answers in held-out conversations, asked through the chat template.

Bits per byte of a conversation as plain text would mostly measure the questions, and a form that the model is not used in:
after tuning on conversations it can rise while every answer becomes likelier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from addlang.evaluate.measurement import Item, Measurement, NotMeasuredError, Role

VERSION = "1"
METRIC = "answer_bits_per_byte"


def answer_bits_per_byte(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[tuple[str, list[dict[str, str]]]],
    *,
    sequence_length: int,
    batch_size: int,
    role: Role,
    language: str,
    task: str,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Bits of the assistant's turns given what stands before them, over their size in bytes of UTF-8.

    The token that ends a turn counts, without bytes of its own: to know when to stop is part of an answer.

    Args:
        conversations: (id, messages); an item each.
        sequence_length: longer conversations are left out, because the end of their answers could not be seen.
        batch_size: conversations per forward pass.
        progress: called with the number of conversations done and of all.

    Raises:
        NotMeasuredError: no conversation fits.
    """
    import torch

    from addlang.data.chat import encode_conversation
    from addlang.evaluate.generation import inference
    from addlang.train.loss import IGNORED, token_losses

    encoded = [(name, m, *encode_conversation(m, tokenizer, loss_on="responses")) for name, m in conversations]
    fitting = [c for c in encoded if len(c[2]) <= sequence_length]
    if not fitting:
        raise NotMeasuredError(f"{task}: no conversation fits into {sequence_length} tokens", "raise sequence_length")
    order = sorted(range(len(fitting)), key=lambda i: -len(fitting[i][2]))  # little padding
    bits = [0.0] * len(fitting)
    with inference(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            width = len(fitting[rows[0]][2])
            ids = torch.zeros((len(rows), width), dtype=torch.long)  # padded on the right, where nothing sees it
            labels = torch.full_like(ids, IGNORED)
            for row, i in enumerate(rows):
                tokens, loss = (torch.tensor(part, dtype=torch.long) for part in fitting[i][2:])
                ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = tokens.masked_fill(loss == 0, IGNORED)
            batch = {"input_ids": ids.to(model.device), "labels": labels.to(model.device)}
            losses, where, _ = token_losses(model, batch)
            sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, where.cpu(), losses.double().cpu())
            for row, i in enumerate(rows):
                bits[i] = float(sums[row]) / math.log(2)
            if progress is not None:
                progress(first + len(rows), len(order))
    items = [
        Item(name, bits[i], _bytes(messages), detail={"tokens": sum(loss)})
        for i, (name, messages, _, loss) in enumerate(fitting)
    ]
    return Measurement(
        task=task,
        version=VERSION,
        role=role,
        language=language,
        metric=METRIC,
        higher_is_better=False,
        items=tuple(items),
        settings={
            "chat_template": True,
            "sequence_length": sequence_length,
            "left_out": len(encoded) - len(fitting),
            "loss": "fp32; assistant's turns with the token that ends them",
        },
        unit="bits/byte",
    )


def _bytes(messages: Sequence[dict[str, str]]) -> int:
    return sum(len(m["content"].encode("utf-8")) for m in messages if m["role"] == "assistant")
