"""What tests of guards share: random data that can be cut off, and conversations without sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

FEW = {"conversations": 8, "max_answer_tokens": 20, "max_instruction_tokens": 20, "language_filter": False}


def said(_model: object, tokenizer: Any, prompts: list[list[int]], **_: object) -> list[list[int]]:
    """Stands in for sampling, which a random model is no good for."""
    return [tokenizer(f"the cat {i} of {len(p)}")["input_ids"] for i, p in enumerate(prompts)]


class KilledError(BaseException):
    """Stands for the end of the process."""


class Data:
    """Sequences of 16 random tokens; reading step ``kill_at`` ends the process."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at

    def batch(self, first: int, count: int) -> dict[str, np.ndarray[Any, Any]]:
        if self.kill_at == first // count:
            raise KilledError
        ids = np.stack([np.random.default_rng(k).integers(6, 260, 16) for k in range(first, first + count)])
        return {"input_ids": ids, "labels": ids, "position_ids": np.broadcast_to(np.arange(16), ids.shape).copy()}

    def describe_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        return []
