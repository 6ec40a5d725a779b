"""A cap on what a job may cost, that holds with many requests under way."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """Money per million tokens."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


class Budget:
    """Tokens and money spent so far, and what requests under way can still cost at most.

    Args:
        max_tokens: of input and output together; None: no cap.
        max_cost: in the currency of the prices; None: no cap.
        prices: needed for ``max_cost``.
    """

    def __init__(
        self, max_tokens: int | None = None, max_cost: float | None = None, prices: Prices | None = None
    ) -> None:
        assert max_cost is None or prices is not None, "a cap in money needs prices"
        self.max_tokens, self.max_cost, self.prices = max_tokens, max_cost, prices
        self.tokens_in = self.tokens_out = 0
        self._reserved: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    @property
    def cost(self) -> float | None:
        """Money spent; None without prices."""
        return None if self.prices is None else self.prices.cost(self.tokens_in, self.tokens_out)

    def spend(self, tokens_in: int, tokens_out: int) -> None:
        """Count what was paid for."""
        with self._lock:
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def reserve(self, tokens_in: int, tokens_out: int) -> bool:
        """Set aside what a request can cost at most; False if it does not fit under the caps any more."""
        with self._lock:
            all_in = self.tokens_in + sum(r[0] for r in self._reserved) + tokens_in
            all_out = self.tokens_out + sum(r[1] for r in self._reserved) + tokens_out
            if self.max_tokens is not None and all_in + all_out > self.max_tokens:
                return False
            if (
                self.max_cost is not None
                and self.prices is not None
                and self.prices.cost(all_in, all_out) > self.max_cost
            ):
                return False
            self._reserved.append((tokens_in, tokens_out))
            return True

    def release(self, tokens_in: int, tokens_out: int) -> None:
        """Give back what was set aside."""
        with self._lock:
            self._reserved.remove((tokens_in, tokens_out))
