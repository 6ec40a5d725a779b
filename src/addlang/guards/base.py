"""What a guard is.

A strategy says what may move; a guard adds a term that holds what moves near the source model (EWC, L2-SP, KL, the self
anchor). A guard is a frozen config; ``start`` prepares it while the source weights are still untouched, and the active
guard then runs its own backward pass once per optimizer step, so that its memory is freed before the next.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from addlang.errors import AddlangError, did_you_mean, options_at

if TYPE_CHECKING:
    import torch

    from addlang.data.calibration import CalibrationSet
    from addlang.strategies.base import Attached


@dataclass(frozen=True)
class GuardContext:
    """What a guard may use to prepare itself.

    Attributes:
        model: the source model on the training device; its weights are still the source's.
        model_hash: of the source weights, for caches.
        cache_dir: where prepared data are kept; keyed by the guard.
        language: the source language.
        sequence_length, batch, micro: of the target data, tokens per sequence, sequences per step and per forward pass.
        read_by_guards: share of all tokens that the phase's guards read together; target text gets the rest.
        autocast: the factory of contexts in which forward passes run.
        calibration: makes the source-language calibration set.
        progress: called with (done, total, what).
    """

    model: Any
    model_hash: str
    tokenizer: Any
    seed: int
    device: torch.device
    cache_dir: Path
    language: str
    sequence_length: int
    batch: int
    micro: int
    steps: int
    autocast: Callable[[], AbstractContextManager[Any]]
    calibration: Callable[[], CalibrationSet]
    progress: Callable[[int, int, str], None]
    read_by_guards: float

    @property
    def behaviour(self) -> str:
        """Of the model's configuration, for caches."""
        from addlang.models import behaviour

        return behaviour(self.model.config, getattr(self.model, "generation_config", None))


class ActiveGuard(ABC):
    """A guard at work."""

    def begin(self, attached: Attached) -> None:  # noqa: B027 - most guards need nothing here
        """Called once when training starts, also on resume, while the trained parameters still have the source's values."""

    @abstractmethod
    def backward(self, attached: Attached, step: int) -> float:
        """Add this step's gradients to those of the target loss; returns the weighted term (nats)."""

    def tokens(self, step: int) -> int:
        """Tokens that this step reads besides the target text; they count towards the budget."""
        return 0

    def tokens_before(self) -> int:
        """Tokens that preparing it reads, once and whether cached or not; they do not count towards the budget."""
        return 0

    def describe(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {}


def compact(values: torch.Tensor) -> torch.Tensor:
    """A copy; in 16 bits where these hold the same values, as of a 16-bit checkpoint in fp32 masters."""
    import torch

    for short in (torch.bfloat16, torch.float16) if values.dtype == torch.float32 else ():
        rounded = values.to(short)
        if total([(rounded - values).abs().sum()]) == 0:
            return rounded
    return values.clone()


def total(terms: Sequence[torch.Tensor]) -> float:
    """The sum of numbers that were computed from trained tensors, alike in all processes.

    A sum over a sharded tensor holds this process's part only, and ``float`` does not say so. All processes must call; they
    exchange one number.
    """
    import torch

    from addlang.train.shard import whole

    return float(whole(functools.reduce(torch.add, terms))) if terms else 0.0


class Guard(BaseModel):
    """Base of every guard.

    Attributes:
        pulls_weights: it holds each trained element near its value in the source, so these must be the model's own weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    pulls_weights: ClassVar[bool] = False

    @property
    def token_share(self) -> float:
        """Share of the budget's tokens that the guard reads, in [0, 1): target text gets the rest."""
        return 0.0

    @property
    def needs_start(self) -> bool:
        """Whether training is held to the weights, or to stored outputs, of the model that the phase starts from."""
        return True

    def requires(self) -> frozenset[str]:
        """A subset of {"source_text", "chat_template"}."""
        return frozenset()

    def kept_bytes(self, stored: int, master: int) -> int:
        """What it keeps beside every trained element, for memory estimates.

        Args:
            stored, master: bytes of an element in the checkpoint and as it is trained.
        """
        return 0

    def begin_bytes(self, stored: int, master: int) -> int:
        """What :meth:`ActiveGuard.begin` needs beside every trained element before there is an optimizer, for memory estimates.

        Args:
            stored, master: as of :meth:`kept_bytes`.
        """
        return 0

    def rows_per_pass(self, micro: int, length: int, vocabulary: int) -> int:
        """Rows in a forward pass of its own that training makes with all their logits, for memory estimates; 0: none.

        Args:
            micro: sequences per forward pass of the target data.
            length: tokens of a row.
        """
        return 0

    def start(self, context: GuardContext) -> ActiveGuard:
        """Prepare (with a cache) and return the active guard. Leaves the weights bit-identical."""
        raise TypeError(f"guard '{self.name}' must define start()")


def available() -> list[str]:
    """Names of all guards."""
    import addlang.guards as package

    return sorted(
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if m.name not in ("anchored", "base", "sampling", "teacher")
    )


def load_guard(name: str) -> type[Guard]:
    """The guard class of that name.

    Raises:
        AddlangError: unknown name, with the nearest known one.
    """
    key = str(name).replace("-", "_").lower()
    if key not in available():
        raise AddlangError(f"unknown guard '{name}'", did_you_mean(str(name), available()))
    module = importlib.import_module(f"addlang.guards.{key}")
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Guard) and v.__module__ == module.__name__ and v.name == key
    )


def make_guard(name: str, options: Mapping[str, Any]) -> Guard:
    """Build a guard from its name and options.

    Raises:
        AddlangError: unknown name or option, or a bad value.
    """
    cls = load_guard(name)
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        lines = []
        for e in error.errors():
            option = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                lines.append(f"guard '{name}': unknown option '{option}'. {did_you_mean(*options_at(cls, e['loc']))}")
            else:
                message = e["msg"].removeprefix("Value error, ")
                given = f", option '{option}': {message} (given: {e.get('input')!r})" if option else f": {message}"
                lines.append(f"guard '{name}'{given}")
        raise AddlangError("; ".join(lines)) from None
