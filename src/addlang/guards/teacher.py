"""The source model's answers, stored once: top-k log-probabilities of every next token of some conversations.

With them a model can be held to the source's *distribution* while it trains, and the source need not be in memory. What is
stored per position is the k most likely tokens with their log-probabilities; the rest of the mass is one further bucket, so
that the divergence is a lower bound of the full one and exact as k grows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VERSION = 1


@dataclass(frozen=True)
class Teacher:
    """Rows of packed conversations with the source model's next-token distributions.

    Attributes:
        tokens: int64 [R, L], padded with ``pad``.
        positions: int64 [R, L], restarting at every conversation.
        valid: bool [R, L]: position t predicts t + 1 of the same conversation.
        ids: int32 [N, k] most likely next tokens of the N valid positions, row by row.
        logp: float16 [N, k] their log-probabilities (nats).
        starts: int64 [R + 1] first valid position of every row.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    valid: NDArray[np.bool_]
    ids: NDArray[np.int32]
    logp: NDArray[np.float16]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def save(self, directory: Path, about: dict[str, Any]) -> None:
        """Write atomically."""
        tmp = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for name in ("tokens", "positions", "valid", "ids", "logp", "starts"):
            np.save(tmp / f"{name}.npy", getattr(self, name))
        (tmp / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        if directory.exists() and not (directory / "about.json").is_file():
            shutil.rmtree(directory)
        try:
            os.replace(tmp, directory)
        except OSError:  # another run wrote the same in the meantime
            shutil.rmtree(tmp)

    @classmethod
    def load(cls, directory: Path) -> tuple[Teacher, dict[str, Any]] | None:
        """What :meth:`save` wrote, memory-mapped, or None."""
        if not (directory / "about.json").is_file():
            return None
        read = lambda n: np.load(directory / f"{n}.npy", mmap_mode="r")  # noqa: E731
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        return cls(read("tokens"), read("positions"), read("valid"), read("ids"), read("logp"), read("starts")), about


def pack_rows(
    conversations: Sequence[Sequence[int]], length: int, pad: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole conversations in rows of ``length`` tokens: (tokens, positions), padding has position -1."""
    from addlang.data.fit import best_fit

    rows = list(best_fit(iter([list(c) for c in conversations]), size=len, capacity=length, window=4096))
    tokens = np.full((len(rows), length), pad, np.int64)
    positions = np.full((len(rows), length), -1, np.int64)
    for r, group in enumerate(rows):
        at = 0
        for ids in group:
            tokens[r, at : at + len(ids)] = ids
            positions[r, at : at + len(ids)] = np.arange(len(ids))
            at += len(ids)
    return tokens, positions


def model_positions(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position ids for the model: padding restarts too, as a document of its own that nothing else sees."""
    column = np.arange(positions.shape[1])
    first = np.where(positions < 0, column, positions.shape[1]).min(1, keepdims=True)
    return np.where(positions < 0, column - first, positions)


def ask(
    model: Any,
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    top_k: int,
    rows_at_a_time: int,
    autocast: Any,
    progress: Any,
) -> Teacher:
    """Run the source model over the rows and keep its ``top_k`` next-token log-probabilities."""
    device = next(model.parameters()).device
    follows = np.zeros_like(positions, dtype=bool)
    follows[:, :-1] = positions[:, 1:] > 0
    inputs = model_positions(positions)
    ids, logp = [], []
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast():
        for r in range(0, len(tokens), rows_at_a_time):
            s = slice(r, r + rows_at_a_time)
            batch = torch.from_numpy(np.ascontiguousarray(tokens[s])).to(device)
            place = torch.from_numpy(np.ascontiguousarray(inputs[s])).to(device)
            logits = model(input_ids=batch, position_ids=place, use_cache=False).logits
            picked = logits[torch.from_numpy(np.ascontiguousarray(follows[s])).to(device)]
            best = torch.log_softmax(picked.float(), -1).topk(min(top_k, picked.shape[-1]), -1)
            ids.append(best.indices.to(torch.int32).cpu().numpy())
            logp.append(best.values.half().cpu().numpy())
            progress(min(r + rows_at_a_time, len(tokens)), len(tokens), "asking the source model")
    model.train(was_training)
    starts = np.concatenate([[0], np.cumsum(follows.sum(1))]).astype(np.int64)
    return Teacher(tokens, positions, follows, np.concatenate(ids), np.concatenate(logp), starts)


def divergence(logits: Tensor, ids: Tensor, logp: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(source || model)`` per position, over the stored tokens and one bucket for all others.

    Args:
        logits: [n, V] of the model.
        ids, logp: [n, k] of the source.
        temperature: both distributions are softened by it (1: as they are). Above 1 the bucket is left out and the stored
            tokens are renormalised, since the softened mass of tokens that were not stored is unknown.

    Returns:
        [n] nats, fp32 (fp64 for fp64 logits).
    """
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    p_log = logp.to(wide.dtype)
    if temperature != 1.0:
        p_log = torch.log_softmax(p_log / temperature, -1)
        q_log = torch.log_softmax(wide.gather(1, ids.long()) / temperature, -1)
        return (p_log.exp() * (p_log - q_log)).sum(1) * temperature**2
    q_log = torch.log_softmax(wide, -1).gather(1, ids.long())
    p = p_log.exp()
    known = (p * (p_log - q_log)).sum(1)
    tiny = torch.finfo(wide.dtype).eps
    p_rest = (1 - p.sum(1)).clamp(min=0.0)
    q_rest = (1 - q_log.exp().sum(1)).clamp(min=tiny)
    rest = torch.where(p_rest > tiny, p_rest * (p_rest.clamp(min=tiny).log() - q_rest.log()), torch.zeros_like(p_rest))
    return known + rest


@dataclass
class RowOrder:
    """Which rows a step reads: a pure function of the step, so that resume is exact. Every pass is a new permutation."""

    rows: int
    per_step: float
    seed: int

    def at(self, step: int) -> NDArray[np.int64]:
        """Rows of step ``step`` (from 1); on average ``per_step`` of them."""
        first, last = math.floor((step - 1) * self.per_step), math.floor(step * self.per_step)
        return np.array([self._row(i) for i in range(first, last)], np.int64)

    def _row(self, i: int) -> int:
        epoch, place = divmod(i, self.rows)
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        cached = getattr(self, "_cache", None)
        if cached is None or cached[0] != epoch:
            cached = (epoch, np.random.default_rng([self.seed, 0x616E63, epoch]).permutation(self.rows))
            object.__setattr__(self, "_cache", cached)
        return cached[1]


def slices(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Pieces of at most ``size`` rows."""
    for i in range(0, len(rows), size):
        yield rows[i : i + size]
