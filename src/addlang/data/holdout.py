"""Deduplication, and the split into training text and held-out text that the training text does not contain.

Which documents are held out depends on their content and the seed alone, not on their order: those with the smallest
hashes. Training text keeps one copy of every document, and none that is held out, equal to a held-out one after
normalisation (case, punctuation, white space), or near one (see :mod:`addlang.data.similar`).

Where whole documents would be too few (one large file, a handful of books), passages of them are held out instead; what
remains of a document around them is still trained on in one piece per gap.

The source is streamed: once to choose, once more whenever the training rows are iterated. What is kept in memory is one
64-bit hash per document and the held-out texts.
"""

from __future__ import annotations

import heapq
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from addlang.data.cache import fingerprint
from addlang.data.similar import NearIndex, content_hash, normalise
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning

VERSION = 1
NEAR = 0.6  # share of windows that makes two texts near
ENOUGH = 8  # held-out documents; with fewer an interval means nothing, so passages are held out instead
MUCH = 0.05  # of the documents lost to near-duplicates: worth a warning
_END = re.compile(r"\n+\s*|[.!?።।॥…][\"'”’»)]*\s+|[。！？][\"'”’»」』)]*")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Split:
    """Result of :func:`split_holdout`.

    Attributes:
        train: rows to train on, without copies and without held-out text; can be iterated more than once.
        heldout: rows held out, in an order that does not depend on that of the source.
        fingerprint: of everything but the rows themselves that determines ``train``.
    """

    train: TrainRows
    heldout: list[Row]
    fingerprint: str

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for reports; see :meth:`TrainRows.counts`."""
        return self.train.counts()

    def excluding(self, texts: Iterable[str]) -> Split:
        """The same split whose training rows contain none of ``texts`` either (held-out text of other sources)."""
        texts = list(texts)
        train = self.train.excluding(texts)
        return replace(self, train=train, fingerprint=fingerprint(self.fingerprint, texts))


def split_holdout(
    rows: Iterable[Row],
    *,
    share: float,
    maximum: int,
    seed: int,
    exclude: Iterable[str] = (),
    near: float = NEAR,
    keep_copies: bool = False,
) -> Split:
    """Deduplicate a source and hold out some of its documents.

    Args:
        rows: something that can be iterated twice, such as :class:`addlang.data.sources.Rows`.
        share: of the different documents to hold out; 0 holds out none.
        maximum: at most so many.
        seed: chooses which.
        exclude: texts that are neither trained on nor held out (evaluation data given separately).
        near: share of windows that makes two texts near; see :class:`addlang.data.similar.NearIndex`.
        keep_copies: train on every copy of a row; copies of held-out text are left out all the same.

    Raises:
        AddlangError: too little text to hold any of it out.
    """
    assert not isinstance(rows, Iterator), "rows must be iterable more than once"
    exclude = list(exclude)
    excluded = {content_hash(normalise(text), seed) for text in exclude}
    passage = None
    scan = Scan.of(rows, maximum, seed, excluded)
    wanted = round(share * scan.different)
    if share and wanted < min(ENOUGH, maximum) and scan.all_text:
        passage = min(2000, max(200, scan.characters // 400))
        documents = scan.different
        scan = Scan.of(rows, maximum, seed, excluded, passage)
        wanted = round(share * scan.different)
        message = (
            f"{share:.1%} of {documents} documents is too few to evaluate on: passages of them are held out instead"
        )
        warnings.warn(message, AddlangWarning, stacklevel=2)
    if share:
        wanted = min(maximum, max(wanted, min(ENOUGH, scan.different // 4)))
        if scan.different < ENOUGH:
            raise AddlangError(
                f"too little target data to hold any of it out: {scan.different} different document(s) or passage(s)",
                "give more text, or evaluation data of its own: evaluation.target_datasets",
            )
    chosen = scan.smallest(wanted)
    held = [row for _, row in chosen]
    train = TrainRows(
        rows,
        held={h for h, _ in chosen} | excluded,
        repeated=set() if keep_copies else scan.repeated,
        index=NearIndex([normalise(t) for t in (*(r.content for r in held), *exclude)], near),
        passage=passage,
        seed=seed,
    )
    copies = 0 if keep_copies else scan.units - scan.different
    train.basis = {"distinct": scan.different, "duplicates": copies, "held_out": len(held)}
    settings = (share, maximum, seed, near, passage, keep_copies)
    key = fingerprint("split", VERSION, *settings, sorted(h for h, _ in chosen), exclude)
    return Split(train, held, key)


class TrainRows:
    """Rows without held-out text, copies and near-copies of held-out text; every iteration reads the source again."""

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        held: set[int],
        repeated: set[int],
        index: NearIndex,
        passage: int | None,
        seed: int,
    ) -> None:
        self._rows, self._held, self._repeated = rows, held, repeated
        self._indices, self._passage, self._seed = [index], passage, seed
        self.basis: dict[str, int] = {}
        self._near: int | None = None

    @property
    def stats(self) -> Any:
        """What the latest pass over the source read (:class:`addlang.data.sources.ReadStats`), if the source tells."""
        return getattr(self._rows, "stats", None)

    def counts(self) -> dict[str, Any]:
        """``distinct`` documents, ``duplicates``, ``held_out``, ``passages``; ``near_duplicates`` after a pass.

        :func:`addlang.data.packing.pack_texts` keeps them in ``meta["split"]``, so that a run that finds the packed
        data in the cache knows the same.
        """
        known = {} if self._near is None else {"near_duplicates": self._near}
        return {**self.basis, "passages": self._passage is not None, **known}

    def excluding(self, texts: Sequence[str]) -> TrainRows:
        """The same rows without these texts and what is near them."""
        normal = [normalise(text) for text in texts]
        index = NearIndex(normal, self._indices[0].threshold)
        held = self._held | {content_hash(text, self._seed) for text in normal}
        other = TrainRows(
            self._rows, held=held, repeated=self._repeated, index=index, passage=self._passage, seed=self._seed
        )
        other._indices, other.basis = [*self._indices, index], self.basis
        return other

    def __iter__(self) -> Iterator[Row]:
        seen: set[int] = set()
        near = kept = 0
        for row in self._rows:
            run: list[str] = []
            for unit in _units(row, self._passage):
                text = normalise(unit)
                identity = content_hash(text, self._seed)
                copy = identity in self._held or identity in seen
                if identity in self._repeated:
                    seen.add(identity)
                if not copy and any(index.near(text) for index in self._indices):
                    copy, near = True, near + 1
                if not copy:
                    kept += 1
                    run.append(unit)
                elif run:
                    yield _joined(row, run)
                    run = []
            if run:
                yield _joined(row, run)
        self._near = near
        if not kept:
            raise AddlangError("no training text is left: all of it is held out, or nearly equal to held-out text")
        if near > MUCH * (kept + near):
            what = f"{near} of {kept + near} documents are nearly equal to held-out text and are not trained on"
            warnings.warn(what, AddlangWarning, stacklevel=2)


@dataclass
class Scan:
    """What one pass over the units (documents, or passages of them) found."""

    units: int
    different: int
    repeated: set[int]
    characters: int
    all_text: bool
    candidates: list[tuple[int, int, Row]]  # (-hash, -number, row): a heap whose first item has the largest hash

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        maximum: int,
        seed: int,
        excluded: AbstractSet[int] = frozenset(),
        passage: int | None = None,
    ) -> Scan:
        """Read everything, keeping one hash per unit and the ``maximum`` units with the smallest different hashes."""
        hashes = array("Q")
        heap: list[tuple[int, int, Row]] = []
        inside: set[int] = set()
        characters, all_text = 0, True
        for row in rows:
            all_text = all_text and row.text is not None
            characters += len(row.content)
            for unit in _units(row, passage):
                identity = content_hash(normalise(unit), seed)
                if identity in excluded:
                    continue
                hashes.append(identity)
                if identity in inside or (len(heap) >= maximum and identity >= -heap[0][0]):
                    continue
                inside.add(identity)
                item = (-identity, -len(hashes), replace(row, text=unit) if row.text is not None else row)
                if len(heap) < maximum:
                    heapq.heappush(heap, item)
                else:
                    inside.discard(-heapq.heapreplace(heap, item)[0])
        values, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
        return cls(len(hashes), len(values), set(values[counts > 1].tolist()), characters, all_text, heap)

    def smallest(self, number: int) -> list[tuple[int, Row]]:
        """The ``number`` units with the smallest hashes, as ``(hash, row)`` in that order."""
        return sorted(((-h, row) for h, _, row in self.candidates), key=lambda item: item[0])[:number]


def _units(row: Row, passage: int | None) -> list[str]:
    return [row.content] if passage is None or row.text is None else split_passages(row.text, passage)


def _joined(row: Row, units: list[str]) -> Row:
    return row if row.text is None else replace(row, text="".join(units))


def split_passages(text: str, size: int) -> list[str]:
    """Cut a text into passages of about ``size`` characters whose concatenation is the text.

    Cuts are made after a line or a sentence, failing that at white space, failing that anywhere.
    """
    passages, begin = [], 0
    while len(text) - begin > 2 * size:
        end = begin + size
        match = _END.search(text, end, begin + 2 * size) or _SPACE.search(text, end, begin + 2 * size)
        end = match.end() if match else end
        passages.append(text[begin:end])
        begin = end
    return [*passages, text[begin:]]
