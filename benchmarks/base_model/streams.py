"""Training sequences of the base model: row *k* of a stream follows from data, length and seed alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_LOSS = -100
USER_SHARE = 0.1  # of the conversations carry loss on the user's turn too: enough to learn what people ask


@dataclass(frozen=True)
class Prepared:
    """What ``prepare.py`` wrote."""

    prose: NDArray[np.uint16]
    chat: NDArray[np.uint16]
    starts: NDArray[np.int64]  # of the conversations in ``chat``, and its end
    answers: NDArray[np.int64]  # tokens before each answer
    tokenizer: str
    heldout: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Prepared:
        import json

        with np.load(path, allow_pickle=False) as file:
            chat = file["chat"]
            return cls(
                prose=file["prose"],
                chat=chat,
                starts=np.append(file["starts"].astype(np.int64), len(chat)),
                answers=file["answers"].astype(np.int64),
                tokenizer=file["tokenizer"].tobytes().decode(),
                heldout=json.loads(file["heldout"].tobytes()),
                facts=json.loads(file["facts"].tobytes()),
            )


Rows = tuple[NDArray[np.int64], NDArray[np.int64]]  # tokens and labels, (rows, length)


class Prose:
    """The stream cut into rows, at another offset and in another order every epoch."""

    def __init__(self, tokens: NDArray[np.uint16], length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = len(tokens) // length - 1
        if self.per_epoch < 1:
            raise ValueError(f"{len(tokens)} tokens of prose are too few for rows of {length}")
        self._epoch = -1

    def rows(self, first: int, number: int) -> Rows:
        """Rows ``first`` to ``first + number``."""
        out = np.empty((number, self.length), np.int64)
        for i in range(number):
            epoch, at = divmod(first + i, self.per_epoch)
            if epoch != self._epoch:
                random = np.random.default_rng([self.seed, 1, epoch])
                self._offset = int(random.integers(self.length))
                self._order = random.permutation(self.per_epoch)
                self._epoch = epoch
            begin = self._offset + int(self._order[at]) * self.length
            out[i] = self.tokens[begin : begin + self.length]
        return out, out


class Chats:
    """Whole conversations side by side in rows, shuffled every epoch; one that is longer than a row is cut."""

    def __init__(self, data: Prepared, length: int, seed: int, pad: int) -> None:
        self.data, self.length, self.seed, self.pad = data, length, seed, pad
        fits = data.answers < length  # otherwise nothing of the answer is left
        self._usable = np.flatnonzero(fits)
        self._sizes = np.minimum(np.diff(data.starts), length)
        self._ends = [0]  # rows up to the end of each epoch so far
        self._epochs: dict[int, tuple[NDArray[np.int64], list[int]]] = {}
        self._users: dict[int, NDArray[np.bool_]] = {}
        if not len(self._usable):
            raise ValueError(f"no conversation fits into rows of {length} tokens")

    def _pack(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The order of the conversations, and where in it each row begins (and the last one ends)."""
        order = np.random.default_rng([self.seed, 2, epoch]).permutation(self._usable)
        cuts, room = [0], self.length
        for i, size in enumerate(self._sizes[order]):
            if size > room:
                cuts.append(i)
                room = self.length
            room -= int(size)
        return order, [*cuts, len(order)]

    def epochs(self, rows: int) -> float:
        """How often so many rows show the conversations."""
        return rows / (len(self._get(0)[1]) - 1)

    def _get(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        while epoch not in self._epochs:
            packed = self._pack(len(self._ends) - 1)
            self._epochs[len(self._ends) - 1] = packed
            self._ends.append(self._ends[-1] + len(packed[1]) - 1)
        return self._epochs[epoch]

    def _spoken(self, epoch: int) -> NDArray[np.bool_]:
        """Conversations whose user's turn carries loss in this epoch."""
        if epoch not in self._users:
            random = np.random.default_rng([self.seed, 3, epoch])
            self._users = {epoch: random.random(len(self._sizes)) < USER_SHARE}
        return self._users[epoch]

    def rows(self, first: int, number: int) -> Rows:
        """Rows ``first`` to ``first + number``; answers carry loss, the users of a few conversations do, padding does not."""
        tokens = np.full((number, self.length), self.pad, np.int64)
        labels = np.full((number, self.length), NO_LOSS, np.int64)
        for i in range(number):
            while first + i >= self._ends[-1]:
                self._get(len(self._ends) - 1)
            epoch = bisect_right(self._ends, first + i) - 1
            order, cuts = self._epochs[epoch]
            row = first + i - self._ends[epoch]
            spoken = self._spoken(epoch)
            at = 0
            for c in order[cuts[row] : cuts[row + 1]]:
                size, asked = int(self._sizes[c]), int(self.data.answers[c])
                begin = int(self.data.starts[c])
                tokens[i, at : at + size] = self.data.chat[begin : begin + size]
                quiet = 0 if spoken[c] else asked
                labels[i, at + quiet : at + size] = tokens[i, at + quiet : at + size]
                at += size
        return tokens, labels
