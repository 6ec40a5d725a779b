"""Packed data: one flat token stream on disk, memory-mapped, cut into sequences.

Raw text: every document is ``[bos, if the tokenizer adds one] + tokens + eos``; the documents stand one behind the
other and the stream is cut every ``sequence_length`` tokens: nothing is lost and only the last sequence may be short.
Control tokens that happen to be spelt out in a text are tokenised as ordinary text.

Conversations: never split over two sequences; they are placed by best-fit decreasing within a bounded window, so that a
sequence is nearly full. A conversation longer than a sequence is dropped and counted, since cutting it would teach
answers without an end; or, if asked for, its beginning fills a sequence.

On disk (see :mod:`addlang.data.cache`): ``tokens.npy`` (uint16 or uint32), ``documents.npy`` (start of every document),
``sequences.npy`` (offsets, one more than there are sequences) and for conversations ``loss.npy`` (uint8).
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from addlang.data.cache import cached, fingerprint, tokenizer_fingerprint
from addlang.data.chat import LossOn, encode_conversation, require_chat_template
from addlang.data.fit import best_fit
from addlang.data.npystream import NpyStream
from addlang.data.readers import row_error
from addlang.data.sources import Row
from addlang.data.tokens import Encode, document_frame, frame, text_encoder
from addlang.errors import AddlangError, AddlangWarning

VERSION = 1  # of the packed form; part of every fingerprint
BATCH_CHARACTERS = 4_000_000  # of text per call of the tokenizer: many words in common, and enough calls to overlap
WINDOW = 4096  # conversations that are fitted into sequences together
IGNORE = -100

Progress = Callable[[int], None]
Long = Literal["drop", "truncate"]
Texts = Iterable[Row] | Iterable[tuple[str, str, int]]


@dataclass(frozen=True)
class Packed:
    """A packed data set, read-only. ``N`` tokens, ``S`` sequences, ``D`` documents.

    Attributes:
        path: its directory.
        tokens: (N,) the stream.
        loss: (N,) 1 where a token carries loss; None: every token does.
        sequences: (S + 1,) sequence ``i`` is ``tokens[sequences[i]:sequences[i + 1]]``.
        documents: (D,) start of every document in the stream.
        meta: ``sequence_length``, ``fingerprint`` and the counts ``rows``, ``documents``, ``tokens``, ``bytes``,
            ``empty``, ``dropped``, ``truncated``, ``licences`` (rows by licence) and
            ``split`` (duplicates and held-out documents, see :meth:`addlang.data.holdout.TrainRows.counts`).
    """

    path: Path
    tokens: NDArray[np.unsignedinteger[Any]]
    loss: NDArray[np.uint8] | None
    sequences: NDArray[np.int64]
    documents: NDArray[np.int64]
    meta: dict[str, Any]

    @classmethod
    def open(cls, path: Path, meta: dict[str, Any]) -> Packed:
        """Map the files of a complete directory into memory."""

        def load(name: str) -> NDArray[Any]:
            array: NDArray[Any] = np.load(path / f"{name}.npy", mmap_mode="r")
            return array

        loss = load("loss") if "loss.npy" in meta["files"] else None
        return cls(path, load("tokens"), loss, load("sequences"), load("documents"), meta)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequences) - 1

    @property
    def tokens_total(self) -> int:
        return int(self.sequences[-1])

    @property
    def fingerprint(self) -> str:
        return str(self.meta["fingerprint"])

    def lengths(self, indices: ArrayLike | slice = slice(None)) -> NDArray[np.int64]:
        """Real tokens of the given sequences (default: all)."""
        lengths: NDArray[np.int64] = np.diff(self.sequences)[
            indices if isinstance(indices, slice) else np.asarray(indices)
        ]
        return lengths

    def batch(
        self, indices: ArrayLike, sequence_length: int, pad_id: int, isolate: bool = True
    ) -> dict[str, NDArray[np.int64]]:
        """Sequences as arrays for a causal language model of transformers.

        There is no attention mask, on purpose: padding stands at the end, where a causal model cannot see it from real
        tokens, and transformers keeps packed documents apart (by position ids that restart) only if neither a mask nor a
        cache is given: call the model with ``use_cache=False``.

        Args:
            indices: (B,) sequence numbers.
            sequence_length: L; at least the length of the longest of these sequences.
            pad_id: token that fills short sequences.
            isolate: positions restart at every document (and at the padding), and the first token of a document carries
                no loss, since nothing of its own document predicts it.

        Returns:
            ``input_ids``, ``labels`` (-100: padding and tokens without loss), ``position_ids``, each (B, L) int64.
        """
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sequence numbers must be in [0, {len(self)}), given {indices.tolist()}")
        begin, lengths = self.sequences[indices], self.lengths(indices)
        if indices.size and lengths.max() > sequence_length:
            raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into {sequence_length}")
        column = np.arange(sequence_length)
        real = column < lengths[:, None]
        at = np.where(real, begin[:, None] + column, 0)
        input_ids = np.where(real, self.tokens[at].astype(np.int64), pad_id)
        carries = real if self.loss is None else real & (self.loss[at] != 0)
        position_ids = np.broadcast_to(column, real.shape)
        if isolate:
            starts = self._is_start(begin, lengths, sequence_length)
            carries = carries & ~starts
            restarts = starts | (column == lengths[:, None])
            position_ids = column - np.maximum.accumulate(np.where(restarts, column, 0), axis=1)
        return {
            "input_ids": input_ids,
            "labels": np.where(carries, input_ids, IGNORE),
            "position_ids": np.ascontiguousarray(position_ids, dtype=np.int64),
        }

    def _is_start(
        self, begin: NDArray[np.int64], lengths: NDArray[np.int64], sequence_length: int
    ) -> NDArray[np.bool_]:
        """(B, L) True where a document begins."""
        first, last = np.searchsorted(self.documents, begin), np.searchsorted(self.documents, begin + lengths)
        counts = last - first
        row = np.repeat(np.arange(len(begin)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.zeros((len(begin), sequence_length), dtype=bool)
        starts[row, self.documents[first[row] + within] - begin[row]] = True
        return starts


def pack_texts(
    texts: Texts,
    tokenizer: Any,
    *,
    sequence_length: int,
    cache_dir: str | os.PathLike[str],
    fingerprint_parts: Sequence[Any],
    progress: Progress | None = None,
) -> Packed:
    """Tokenise raw text and pack it, or open it from the cache (then ``texts`` is not read).

    Args:
        texts: rows with text, or ``(text, file, line)``.
        tokenizer: a transformers tokenizer that has an eos token.
        sequence_length: tokens per sequence.
        cache_dir: the data goes to ``cache_dir/<fingerprint>``.
        fingerprint_parts: plain data that says what ``texts`` yields (``Rows.identity()`` and the settings of a split).
        progress: called with the number of rows of every finished batch.

    Raises:
        AddlangError: no eos token, a conversation among the rows, nothing to pack, the disk is full.
    """
    key = fingerprint("text", VERSION, tokenizer_fingerprint(tokenizer), sequence_length, list(fingerprint_parts))
    directory = Path(cache_dir) / key

    def build(path: Path) -> dict[str, Any]:
        prefix, suffix = document_frame(tokenizer)
        count, licences = Counter[str](), Counter[str]()
        with (
            NpyStream(path / "tokens.npy", _dtype(tokenizer)) as tokens,
            NpyStream(path / "documents.npy", np.int64) as documents,
            ThreadPoolExecutor(
                1
            ) as pool,  # the tokenizer works outside the interpreter's lock, while this thread writes
        ):
            for rows, (ids, lengths) in _ahead(pool, text_encoder(tokenizer), _batches(texts)):
                stream, framed = frame(ids, lengths, prefix, suffix)
                documents.write(tokens.size + np.cumsum(framed) - framed)
                tokens.write(stream)
                kept = [row for row, n in zip(rows, lengths.tolist(), strict=True) if n]
                count["rows"] += len(rows)
                count["empty"] += len(rows) - len(kept)
                count["bytes"] += sum(len(row.content.encode()) for row in kept)
                licences.update(row.license for row in kept if row.license)
                if progress is not None:
                    progress(len(rows))
            total, number = tokens.size, documents.size
        _require(total, count, texts)
        offsets = np.append(np.arange(0, total, sequence_length, dtype=np.int64), total)
        np.save(path / "sequences.npy", offsets)
        return _meta(count, texts, key, sequence_length, total, number, licences)

    return Packed.open(directory, cached(directory, build))


def pack_conversations(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    sequence_length: int,
    loss_on: LossOn,
    cache_dir: str | os.PathLike[str],
    fingerprint_parts: Sequence[Any],
    long: Long = "drop",
    progress: Progress | None = None,
) -> Packed:
    """Encode conversations and pack them whole, or open them from the cache (then ``rows`` is not read).

    Conversations that are longer than ``sequence_length`` are dropped or cut, and those whose messages spell out a control
    token of the tokenizer, which would end a turn in its middle, are dropped; all are counted and warned of.

    Args:
        long: what happens to a conversation that is too long: ``drop``, or ``truncate``, which keeps its first
            ``sequence_length`` tokens, unless none of them carries loss.
        loss_on: which tokens carry loss, see :func:`addlang.data.chat.encode_conversation`.
        rows, tokenizer, sequence_length, cache_dir, fingerprint_parts, progress: as for :func:`pack_texts`.

    Raises:
        AddlangError: no chat template, raw text among the rows, a row that the template refuses (with file and row), or
            nothing is left to pack.
    """
    require_chat_template(tokenizer)
    identity = tokenizer_fingerprint(tokenizer, chat=True)
    key = fingerprint("chat", VERSION, identity, sequence_length, loss_on, long, list(fingerprint_parts))
    directory = Path(cache_dir) / key
    dtype = _dtype(tokenizer)
    control = re.compile("|".join(re.escape(t) for t in tokenizer.all_special_tokens) or r"(?!)")

    def encoded(count: Counter[str], licences: Counter[str]) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
        for row in rows:
            count["rows"] += 1
            if progress is not None:
                progress(1)
            if row.messages is None:
                raise row_error(row.file, row.line, "raw text among conversations", "give each kind its own dataset")
            if any(control.search(m["content"]) for m in row.messages):
                count["control"] += 1
                continue
            try:
                ids, loss = encode_conversation(row.messages, tokenizer, loss_on=loss_on)
            except AddlangError as error:
                raise row_error(row.file, row.line, error.message, error.fix) from error
            if len(ids) > sequence_length:
                if long == "drop" or not any(loss[1:sequence_length]):
                    count["long"] += 1
                    continue
                count["truncated"] += 1
                ids, loss = ids[:sequence_length], loss[:sequence_length]
            count["bytes"] += len(row.content.encode())
            licences.update([row.license] if row.license else [])
            yield np.asarray(ids, dtype), np.asarray(loss, np.uint8)

    def build(path: Path) -> dict[str, Any]:
        count, licences = Counter[str](), Counter[str]()
        with (
            NpyStream(path / "tokens.npy", dtype) as tokens,
            NpyStream(path / "loss.npy", np.uint8) as losses,
            NpyStream(path / "documents.npy", np.int64) as documents,
            NpyStream(path / "sequences.npy", np.int64) as sequences,
        ):
            sequences.write(np.zeros(1, np.int64))
            items = encoded(count, licences)
            for group in best_fit(items, size=lambda c: len(c[0]), capacity=sequence_length, window=WINDOW):
                for ids, loss in group:
                    documents.write(np.array([tokens.size]))
                    tokens.write(ids)
                    losses.write(loss)
                sequences.write(np.array([tokens.size]))
            total, number = tokens.size, documents.size
        count["dropped"] = count["long"] + count["control"]
        if count["long"]:
            _warn(f"{count['long']} of {count['rows']} conversations dropped: longer than {sequence_length} tokens")
        if count["truncated"]:
            _warn(f"{count['truncated']} of {count['rows']} conversations cut to {sequence_length} tokens")
        if count["control"]:
            _warn(f"{count['control']} of {count['rows']} conversations dropped: they spell out a control token")
        _require(total, count, rows)
        return _meta(count, rows, key, sequence_length, total, number, licences)

    return Packed.open(directory, cached(directory, build))


def _warn(message: str) -> None:
    warnings.warn(message, AddlangWarning, stacklevel=2)


def _dtype(tokenizer: Any) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def _require(total: int, count: Counter[str], rows: Any) -> None:
    if total:
        return
    if count["dropped"]:
        message = f"all {count['rows']} conversations were dropped ({count['long']} are too long)"
        raise AddlangError(message, "raise sequence_length")
    message = f"there is no text to pack: {count['rows']} row(s) were read, none holds any"
    raise AddlangError(message, "check the dataset and its limit")


def _meta(
    count: Counter[str], rows: Any, key: str, sequence_length: int, tokens: int, documents: int, licences: Counter[str]
) -> dict[str, Any]:
    skipped = getattr(getattr(rows, "stats", None), "empty", 0)  # sources skip blank rows before they come here
    return {
        "fingerprint": key,
        "sequence_length": sequence_length,
        "rows": count["rows"] + skipped,
        "documents": documents,
        "tokens": tokens,
        "bytes": count["bytes"],
        "empty": count["empty"] + skipped,
        "dropped": count["dropped"],
        "truncated": count["truncated"],
        "licences": dict(sorted(licences.items())),
        "split": rows.counts() if hasattr(rows, "counts") else {},
    }


def _batches(texts: Texts) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for item in texts:
        row = item if isinstance(item, Row) else Row(item[0], None, item[1], item[2])
        if row.text is None:
            raise row_error(row.file, row.line, "a conversation among raw text", "give each kind its own dataset")
        batch.append(row)
        size += len(row.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(
    pool: ThreadPoolExecutor, encode: Encode, batches: Iterator[list[Row]]
) -> Iterator[tuple[list[Row], tuple[NDArray[np.uint32], NDArray[np.int64]]]]:
    """Encode the next batch while the caller works on the current one."""
    pending = None
    for rows in batches:
        future = pool.submit(encode([row.content for row in rows]))
        if pending is not None:
            yield pending[0], pending[1].result()
        pending = rows, future
    if pending is not None:
        yield pending[0], pending[1].result()
