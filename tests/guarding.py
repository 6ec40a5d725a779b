"""What tests of guards share: random data that can be cut off."""

from __future__ import annotations

from typing import Any

import numpy as np


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
