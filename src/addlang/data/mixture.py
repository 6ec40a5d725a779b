"""The order of training sequences: a pure function of the packed sources, their weights and the seed.

Sequence ``k`` of a run is known without reading anything before it, so the position in the data is one integer and a
resumed run sees exactly what an uninterrupted one would have seen.

Interleaving: source ``s`` is due at the times ``(j + u_s) / rate_s``, ``j = 0, 1, ...``, where ``rate_s`` is
proportional to its share divided by its mean tokens per sequence and ``u_s`` in (0, 1) comes from the seed; sequences
are taken in the order of these times. So every prefix has nearly the shares, and a larger budget only appends.

Within a source every epoch is a permutation seeded by (seed, source, epoch), and holds every sequence exactly once.

Budget: real tokens are counted, not padding. The run has the smallest number of sequences whose tokens reach the
budget, rounded up to a multiple of ``multiple_of`` (the global batch), so that every optimizer step is full.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from addlang.data.packing import Packed
from addlang.data.shares import shares
from addlang.errors import AddlangError, AddlangWarning

MANY_EPOCHS = (
    4  # beyond four passes repeated text helps little (Muennighoff et al. 2023, "Scaling Data-Constrained LMs")
)


class Mixture:
    """Training sequences from one or more packed sources.

    Args:
        sources: what to draw from.
        weights: share of the training tokens per source. If all are given they are ratios; a source with None takes
            part in what the others leave of 1, in proportion to its tokens.
        seed: of permutations and interleaving.
        tokens: budget in real tokens; or
        sequences: budget in sequences (exactly one of the two).
        multiple_of: the number of sequences is rounded up to a multiple of this.
        names: of the sources, for warnings and reports; default: ``dataset 1``, ...

    Attributes:
        shares: (sources,) target shares of tokens, summing to 1.
        tokens: (sources,) real tokens drawn from each source over the whole run.
        epochs: (sources,) passes over each source.

    Raises:
        AddlangError: no source, a weight that leaves nothing for the sources without one.
    """

    def __init__(
        self,
        sources: Sequence[Packed],
        weights: Sequence[float | None],
        *,
        seed: int,
        tokens: int | None = None,
        sequences: int | None = None,
        multiple_of: int = 1,
        names: Sequence[str] | None = None,
    ) -> None:
        if not sources:
            raise AddlangError("there is no training data", "name at least one dataset")
        assert len(sources) == len(weights), "one weight (or None) per source"
        assert (tokens is None) != (sequences is None), "give the budget in tokens or in sequences"
        self.sources = list(sources)
        self.names = list(names) if names is not None else [f"dataset {i + 1}" for i in range(len(sources))]
        self.seed = seed
        sizes = np.array([s.tokens_total for s in sources], dtype=np.float64)
        self.shares = shares(sizes, weights)
        self._order = lru_cache(maxsize=4 * len(sources))(self._permutation)
        means = sizes / np.array([len(s) for s in sources])
        rates = self.shares / means  # sequences per token of the budget
        due = np.random.default_rng([seed, 0x6D6978]).random(len(sources))
        wanted = sequences if sequences is not None else int(np.ceil(rates.sum() * float(tokens or 0))) + len(sources)
        while True:
            self._source, self._turn = _schedule(rates, due, wanted + multiple_of)
            if sequences is not None:
                number = wanted
                break
            reached = np.cumsum(self._lengths())
            number = int(np.searchsorted(reached, float(tokens or 0))) + 1
            if number <= len(reached):
                break
            wanted = 2 * wanted  # the sequences drawn were shorter than the mean
        number = -(-number // multiple_of) * multiple_of
        if number > len(self._source):
            self._source, self._turn = _schedule(rates, due, number)
        self._source, self._turn = self._source[:number], self._turn[:number]
        lengths = self._lengths()
        self.tokens = np.bincount(self._source, lengths, len(sources)).astype(np.int64)
        self.epochs = np.bincount(self._source, minlength=len(sources)) / np.array([len(s) for s in sources])
        for name, epochs in zip(self.names, self.epochs, strict=True):
            if epochs >= MANY_EPOCHS + 0.5:  # whole batches may pass a little over what was asked for
                message = (
                    f"the budget passes {epochs:.1f} times over {name}; beyond {MANY_EPOCHS} times little is gained"
                )
                warnings.warn(message, AddlangWarning, stacklevel=2)

    def __len__(self) -> int:
        """Number of sequences in the run."""
        return len(self._source)

    @property
    def tokens_total(self) -> int:
        """Real tokens of the whole run."""
        return int(self.tokens.sum())

    def locate(self, k: int) -> tuple[int, int, int]:
        """``(source, sequence index within it, epoch)`` of sequence ``k``."""
        if not 0 <= k < len(self):
            raise IndexError(f"sequence {k} is outside the run of {len(self)}")
        source, index, epoch = self.locate_many(k, 1)
        return int(source[0]), int(index[0]), int(epoch[0])

    def locate_many(self, k0: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Sources, sequence indices and epochs, each (n,), of the sequences from ``k0`` on."""
        source = self._source[k0 : k0 + n].astype(np.int64)
        turn = self._turn[k0 : k0 + n].astype(np.int64)
        sizes = np.array([len(s) for s in self.sources])[source]
        epoch, place = turn // sizes, turn % sizes
        index = np.empty_like(place)
        for s, e in {(int(s), int(e)) for s, e in zip(source, epoch, strict=True)}:
            here = (source == s) & (epoch == e)
            index[here] = self._order(s, e)[place[here]]
        return source, index, epoch

    def batch(
        self, k0: int, n: int, *, sequence_length: int, pad_id: int, isolate: bool = True
    ) -> dict[str, NDArray[np.int64]]:
        """Sequences ``k0 .. k0 + n - 1`` as arrays, each (n, sequence_length); see :meth:`Packed.batch`."""
        if not 0 <= k0 <= k0 + n <= len(self):
            raise IndexError(f"sequences {k0} to {k0 + n} are outside the run of {len(self)}")
        source, index, _ = self.locate_many(k0, n)
        out = {key: np.empty((n, sequence_length), np.int64) for key in ("input_ids", "labels", "position_ids")}
        for s in np.unique(source):
            here = source == s
            for key, value in self.sources[s].batch(index[here], sequence_length, pad_id, isolate).items():
                out[key][here] = value
        return out

    def summary(self) -> list[dict[str, Any]]:
        """Per source: its share as asked for, and tokens, sequences and epochs of the run; plain data for reports."""
        return [
            {
                "name": self.names[i],
                "fingerprint": source.fingerprint,
                "share": float(self.shares[i]),
                "tokens": int(self.tokens[i]),
                "sequences": int((self._source == i).sum()),
                "epochs": float(self.epochs[i]),
            }
            for i, source in enumerate(self.sources)
        ]

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, source, epoch]).permutation(len(self.sources[source]))

    def _lengths(self) -> NDArray[np.int64]:
        """Real tokens of every scheduled sequence."""
        out = np.empty(len(self._source), np.int64)
        for s, source in enumerate(self.sources):
            turns = int((self._source == s).sum())
            epochs = -(-turns // len(source))
            drawn = [source.lengths(self._permutation(s, e)) for e in range(epochs)]
            out[self._source == s] = np.concatenate([np.empty(0, np.int64), *drawn])[:turns]
        return out


def _schedule(
    rates: NDArray[np.float64], due: NDArray[np.float64], number: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The first ``number`` sequences: their sources (int16) and how many of that source came before."""
    counts = np.ceil(rates / rates.sum() * number).astype(np.int64) + 2
    source = np.repeat(np.arange(len(rates), dtype=np.int16), counts)
    turn = np.concatenate([np.arange(c) for c in counts])
    order = np.lexsort((source, (turn + due[source]) / rates[source]))[:number]
    return source[order], turn[order]
