"""One pass over a phase's rows: copies across its data sets, near copies, and rows that contain evaluation items.

It is made only where there is something to look for, and kept in the cache under everything that it depends on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from addlang.data.cache import cached, fingerprint
from addlang.data.contamination import ItemIndex, Overlap
from addlang.data.duplicates import Duplicates
from addlang.data.similar import normalise
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning

VERSION = 1
SHOWN, KEPT = 10, 1000  # overlaps in a message, and in the data card

Deduplicate = Literal["none", "exact", "near"]
OnItems = Literal["error", "drop", "allow"]


class Screen(Protocol):
    """:func:`inspect` with its settings: takes rows per data set and what identifies them."""

    def __call__(self, sources: Sequence[Iterable[Row]], identities: Sequence[Any], /) -> Inspected: ...


class Remaining:
    """The rows of a source without those at the given places; every iteration reads the source again."""

    def __init__(self, rows: Iterable[Row], left_out: NDArray[np.int64], counts: dict[str, int]) -> None:
        self._rows, self._left_out, self._counts = rows, left_out, counts

    @property
    def stats(self) -> Any:
        """What the latest pass over the source read, if the source tells."""
        return getattr(self._rows, "stats", None)

    def counts(self) -> dict[str, Any]:
        """Those of the source, and what is left out here."""
        own = self._rows.counts() if hasattr(self._rows, "counts") else {}
        return {**own, **self._counts}

    def __iter__(self) -> Iterator[Row]:
        left_out = set(self._left_out.tolist())
        return (row for place, row in enumerate(self._rows) if place not in left_out)


@dataclass(frozen=True)
class Inspected:
    """Result of :func:`inspect`.

    Attributes:
        rows: per source, without what is left out.
        fingerprints: per source, of what is left out; empty where nothing is.
        overlap: for the data card: the rule, the number of texts looked for and of rows that contain one, the rows.
    """

    rows: list[Remaining]
    fingerprints: list[str]
    overlap: dict[str, Any]


def inspect(
    sources: Sequence[Iterable[Row]],
    identities: Sequence[Any],
    *,
    deduplicate: Deduplicate,
    near: float,
    items: ItemIndex,
    on_items: OnItems,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
) -> Inspected:
    """Find the rows that are not to be trained on.

    Args:
        sources: rows per data set; of two copies the earlier one is kept.
        identities: plain data per source that says what its rows are.
        deduplicate: ``exact``: copies of a row of an earlier source (within a source they are left out before);
            ``near``: also near copies, within and across sources; ``none``.
        near: estimated similarity that makes a near copy.
        items: texts of the evaluation.
        on_items: what happens to rows that contain one of them.
        cache_dir: findings are kept there.
        progress: called with 1 for every row.

    Raises:
        AddlangError: rows contain evaluation items, and that is an error; or nothing of a source is left.
    """
    needed = len(items) > 0 or deduplicate == "near" or (deduplicate == "exact" and len(sources) > 1)
    if not needed:
        nothing = np.empty(0, np.int64)
        return Inspected([Remaining(s, nothing, {}) for s in sources], [""] * len(sources), {})
    key = fingerprint("inspect", VERSION, list(identities), deduplicate, near, items.fingerprint, on_items == "drop")
    directory = cache_dir / key

    def build(path: Path) -> dict[str, Any]:
        return _search(sources, deduplicate, near, items, on_items == "drop", path, progress)

    found = cached(directory, build)
    overlap = {**items.describe(), **found["overlap"]} if len(items) else {}
    _judge([Overlap(**o) for o in found["overlap"]["found"]], found["overlap"]["rows"], on_items)
    rows, prints = [], []
    for number, (source, counts) in enumerate(zip(sources, found["counts"], strict=True)):
        left_out = np.load(directory / f"left_out_{number}.npy")
        if len(left_out) == counts["kept"] + len(left_out):
            raise AddlangError(
                f"data set {number + 1}: nothing is left of its {len(left_out)} rows ({_in_words(counts)})",
                "leave it out, or set deduplicate: none",
            )
        rows.append(Remaining(source, left_out, {k: v for k, v in counts.items() if k != "kept"}))
        prints.append(fingerprint(left_out.tolist()) if len(left_out) else "")
    return Inspected(rows, prints, overlap)


def _search(
    sources: Sequence[Iterable[Row]],
    deduplicate: Deduplicate,
    near: float,
    items: ItemIndex,
    drop: bool,
    path: Path,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    duplicates = Duplicates(near if deduplicate == "near" else None)
    overlaps: list[dict[str, Any]] = []
    contaminated = 0
    all_counts = []
    for number, source in enumerate(sources):
        left_out: list[int] = []
        counts = {"copies_across": 0, "near_copies": 0, "contaminated": 0, "kept": 0}
        for place, row in enumerate(source):
            hits = items.search(row.content, row.file, row.line) if len(items) else []
            counts["contaminated"] += bool(hits)
            overlaps += [hit.plain() for hit in hits[: KEPT - len(overlaps)]]
            kind = duplicates.add(normalise(row.content)) if deduplicate != "none" else None
            counts["copies_across"] += kind == "copy"
            counts["near_copies"] += kind == "near"
            if kind is not None or (drop and hits):
                left_out.append(place)
            else:
                counts["kept"] += 1
            if progress is not None:
                progress(1)
        contaminated += counts["contaminated"]
        all_counts.append(counts)
        np.save(path / f"left_out_{number}.npy", np.array(left_out, np.int64))
    return {"counts": all_counts, "overlap": {"rows": contaminated, "found": overlaps}}


def _judge(found: Sequence[Overlap], rows: int, on_items: OnItems) -> None:
    if not rows:
        return
    pairs = list({(o.file, o.row, o.task, o.item): o for o in reversed(found)}.values())[
        ::-1
    ]  # the first field of each
    lines = "\n".join(f"  {overlap.describe()}" for overlap in pairs[:SHOWN])
    more = "\n  ..." if len(pairs) > SHOWN else ""
    message = f"{rows} training row(s) contain evaluation items:\n{lines}{more}"
    if on_items == "error":
        raise AddlangError(
            message,
            "take these rows out (drop_contaminated: true leaves them out), or train on them all the same with "
            "allow_contamination: true, and do not report these tasks",
        )
    done = "they are left out" if on_items == "drop" else "the results of these tasks are not to be trusted"
    warnings.warn(f"{message}\n{done}", AddlangWarning, stacklevel=3)


def _in_words(counts: dict[str, int]) -> str:
    names = {
        "copies_across": "copies of earlier rows",
        "near_copies": "near copies",
        "contaminated": "evaluation items",
    }
    return ", ".join(f"{counts[key]} {text}" for key, text in names.items() if counts[key])
