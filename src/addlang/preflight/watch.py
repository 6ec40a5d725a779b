"""Source text that is watched: how likely the model finds it, token by token, before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from addlang.errors import AddlangError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from addlang.schema import Calibration

SEQUENCES = 128
BATCH = 32


@dataclass(frozen=True)
class Watched:
    """Source-language conversations with the tokens that are watched (the answers; of plain text all of it).

    Attributes:
        batches: ``input_ids``, ``labels`` (-100: not watched) and ``attention_mask`` [B, T] int64 each.
        source: where they come from, in words.
    """

    batches: tuple[dict[str, torch.Tensor], ...]
    source: str

    @property
    def tokens(self) -> int:
        return sum(int((b["labels"][:, 1:] != -100).sum()) for b in self.batches)


@dataclass(frozen=True)
class Reading:
    """The watched tokens as a model sees them.

    Attributes:
        logp: log-probability of each in nats, [N].
        right: whether it is the most likely one, [N].
    """

    logp: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]

    @property
    def loss(self) -> float:
        """Mean, in nats per token."""
        return -float(self.logp.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def watched(
    calibration: Calibration, tokenizer: Any, *, language: str, sequence_length: int, base_dir: Path | None
) -> Watched:
    """Conversations in the source language: the recipe's calibration data, or the built-in English ones.

    Raises:
        AddlangError: there are none in that language, or no chat template to write them with.
    """
    from addlang.data.builtin_sets import builtin
    from addlang.data.chat import encode_conversation, has_answer
    from addlang.data.holdout import Scan
    from addlang.data.sources import read_rows
    from addlang.schema import DatasetSpec

    specs = calibration.datasets
    if not specs:
        if language.split("-")[0] not in ("en", "eng"):
            raise AddlangError(
                f"there are no built-in conversations in '{language}'", "name some: --calibration.datasets"
            )
        specs = (DatasetSpec.model_validate({"path": str(builtin("calibration_en")), "format": "messages"}),)
    share = -(-SEQUENCES // len(specs))
    chosen: list[tuple[list[int], list[int]]] = []
    for spec in specs:
        # other rows than those on which importance is scored, where there are enough: another seed
        for _, row in Scan.of(read_rows(spec, base_dir=base_dir), share, seed=1).smallest(share):
            if row.messages is not None and getattr(tokenizer, "chat_template", None):
                if not has_answer(row.messages):
                    continue
                ids, loss = encode_conversation(row.messages, tokenizer, loss_on="responses")
            else:
                ids = list(tokenizer(row.content, verbose=False)["input_ids"])
                loss = [1] * len(ids)
            ids, loss = ids[:sequence_length], loss[:sequence_length]
            if any(loss[1:]):
                chosen.append((ids, loss))
    if not chosen:
        raise AddlangError("no source-language text could be watched", "give conversations with answers")
    batches = tuple(collate(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH))
    name = ", ".join(s.path for s in specs) if calibration.datasets else "built-in English conversations"
    return Watched(batches, f"{name} ({len(chosen)})")


def collate(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Ids and loss marks as one padded batch."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    shape = (len(rows), width)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for i, (ids, loss) in enumerate(rows):
        t = torch.tensor(ids)
        batch["input_ids"][i, : len(ids)] = t
        batch["labels"][i, : len(ids)] = t.masked_fill(torch.tensor(loss) == 0, -100)
        batch["attention_mask"][i, : len(ids)] = 1
    return batch


def read(model: Any, text: Watched, autocast: Callable[[], Any] = contextlib.nullcontext) -> Reading:
    """What a model makes of the watched tokens; probabilities in fp32, whatever its type.

    Args:
        autocast: that of training, without which a model whose frozen weights are in 16 bits and whose trained ones are not
            computes nothing.
    """
    import numpy as np
    import torch

    from addlang.evaluate.generation import inference

    logp, right = [], []
    device = next(model.parameters()).device
    with inference(model), autocast():
        for batch in text.batches:
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            where = batch["labels"][:, 1:].to(device) != -100
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][where].float()
            targets = ids[:, 1:][where]
            logp.append(torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].double().cpu().numpy())
            right.append((logits.argmax(-1) == targets).cpu().numpy())
    return Reading(np.concatenate(logp), np.concatenate(right))
