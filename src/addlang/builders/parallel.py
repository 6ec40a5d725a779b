"""Parallel text: pairs of sentences from a file with two columns, or from two files line by line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from addlang.data.readers import kind_of, read_records, row_error
from addlang.data.similar import content_hash, normalise
from addlang.errors import AddlangError, did_you_mean


@dataclass(frozen=True)
class Pair:
    """Two texts that mean the same, and where they stand; ``number`` counts the pairs of the input from 0."""

    source: str
    target: str
    file: str
    row: int
    license: str | None = None
    number: int = 0


@dataclass
class Cleaning:
    """How many pairs were read, and why some are left out."""

    read: int = 0
    blank: int = 0
    identical: int = 0
    duplicate: int = 0
    length: int = 0
    seen: set[int] = field(default_factory=set, repr=False)

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("read", "blank", "identical", "duplicate", "length")}


def read_pairs(files: Sequence[str], columns: tuple[str, str]) -> Iterator[Pair]:
    """Numbered pairs; see :func:`_read`."""
    return (replace(pair, number=number) for number, pair in enumerate(_read(files, columns)))


def _read(files: Sequence[str], columns: tuple[str, str]) -> Iterator[Pair]:
    """The pairs of one file with two columns, or of two text files that are aligned line by line.

    Args:
        files: one of jsonl, json, csv, tsv, parquet; or two text files. All but tsv also compressed.
        columns: of source and target; ``translation.en`` is a column within a column. A tsv file without a header has its
            source in the first column and its target in the second.

    Raises:
        AddlangError: a file does not exist, a column is missing, or two files have different numbers of lines.
    """
    for file in files:
        if not Path(file).expanduser().is_file():
            raise AddlangError(f"{file}: the file does not exist", "check the path")
    if len(files) == 2:
        return _aligned(files[0], files[1])
    if len(files) != 1:
        raise AddlangError(f"{len(files)} files of parallel text", "give one with two columns, or two that are aligned")
    path = Path(files[0]).expanduser()
    if path.suffix.lower() == ".tsv":
        return _tsv(path, columns)
    if kind_of(path) is None:
        raise AddlangError(f"{path}: no file of pairs", "use jsonl, json, csv, tsv or parquet, or give two text files")
    return (_pair(record, columns, str(path), row) for row, record in read_records(path))


def _pair(record: dict[str, Any], columns: tuple[str, str], file: str, row: int) -> Pair:
    texts = []
    for column in columns:
        value: Any = record
        for key in column.split("."):
            if not isinstance(value, dict) or key not in value:
                known = value if isinstance(value, dict) else record
                raise row_error(file, row, f"there is no column '{column}'", did_you_mean(key, known))
            value = value[key]
        if value is not None and not isinstance(value, str):
            raise row_error(file, row, f"column '{column}' must be text, it is {type(value).__name__}")
        texts.append(value or "")
    licence = record.get("license")
    return Pair(texts[0], texts[1], file, row, licence if isinstance(licence, str) else None)


def _tsv(path: Path, columns: tuple[str, str]) -> Iterator[Pair]:
    """Without quoting, as parallel text is distributed."""
    places: tuple[int, int] | None = None
    try:
        with open(path, encoding="utf-8") as file:
            for row, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                if places is None:
                    header = set(columns) <= set(cells)
                    places = (cells.index(columns[0]), cells.index(columns[1])) if header else (0, 1)
                    if header:
                        continue
                if not line.strip():
                    continue
                if len(cells) <= max(places):
                    raise row_error(str(path), row, f"{len(cells)} column(s)", "separate source and target by a tab")
                yield Pair(cells[places[0]], cells[places[1]], str(path), row)
    except UnicodeDecodeError as error:
        raise AddlangError(f"{path}: not UTF-8 ({error})") from None


def _aligned(source: str, target: str) -> Iterator[Pair]:
    try:
        with (
            open(Path(source).expanduser(), encoding="utf-8") as a,
            open(Path(target).expanduser(), encoding="utf-8") as b,
        ):
            for row, (left, right) in enumerate(zip_longest(a, b), 1):
                if left is None or right is None:
                    short = source if left is None else target
                    raise AddlangError(
                        f"{short} ends after line {row - 1}, the other file goes on", "aligned files have as many lines"
                    )
                yield Pair(left.rstrip("\r\n"), right.rstrip("\r\n"), source, row)
    except UnicodeDecodeError as error:
        raise AddlangError(f"{source} or {target}: not UTF-8 ({error})") from None


def clean_pairs(pairs: Iterable[Pair], cleaning: Cleaning, max_ratio: float = 0.0) -> Iterator[Pair]:
    """Pairs without blank, identical and repeated ones, and without those whose lengths do not fit.

    Args:
        cleaning: counts are added to it.
        max_ratio: a pair is left out if its ratio of lengths is so many times larger or smaller than the mean ratio of all
            pairs (geometric), which depends on the languages; 0: none is.
    """
    kept = []
    for pair in pairs:
        cleaning.read += 1
        identity = content_hash(normalise(pair.source) + "\0" + normalise(pair.target), 0)
        if not pair.source.strip() or not pair.target.strip():
            cleaning.blank += 1
        elif normalise(pair.source) == normalise(pair.target):
            cleaning.identical += 1
        elif identity in cleaning.seen:
            cleaning.duplicate += 1
        else:
            cleaning.seen.add(identity)
            kept.append(pair)
    if not kept:
        raise AddlangError(f"no pair is left of {cleaning.read} ({cleaning.counts()})", "check the columns")
    logs = [math.log(len(p.target) / len(p.source)) for p in kept]
    mean = sum(logs) / len(logs)
    for pair, log in zip(kept, logs, strict=True):
        if max_ratio and abs(log - mean) > math.log(max_ratio):
            cleaning.length += 1
        else:
            yield pair
