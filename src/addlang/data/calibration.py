"""Source-language conversations on which the importance of parameters is scored.

The chat template is applied without a generation prompt; conversations longer than ``sequence_length`` are cut. The
sequences are drawn evenly from the whole of every data set, so that a sorted file does not bias them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from addlang.data.builtin_sets import builtin
from addlang.data.cache import fingerprint, tokenizer_fingerprint
from addlang.data.chat import encode_conversation, require_chat_template
from addlang.data.holdout import Scan
from addlang.data.readers import row_error
from addlang.data.sources import Row, read_rows
from addlang.errors import AddlangError, AddlangWarning
from addlang.recipe import Calibration, DatasetSpec

if TYPE_CHECKING:
    import torch

HUB_ROWS = 20  # times the sequences wanted: so many rows of a streamed data set are looked at


@dataclass(frozen=True)
class CalibrationSet:
    """Batches of token ids, longest sequences first; can be iterated more than once.

    Attributes:
        ids: one list of token ids per sequence.
        batch_size: sequences per batch.
        pad_id: token that fills a batch; never counted, see the attention mask.
        source: where the sequences come from, in words.
        fingerprint: of the token ids.
    """

    ids: tuple[tuple[int, ...], ...]
    batch_size: int
    pad_id: int
    source: str
    fingerprint: str

    @property
    def sequences(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, self.ids))

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield ``input_ids`` and ``attention_mask``, each (B, T) int64, padded on the right to the batch's longest."""
        import torch

        for first in range(0, len(self.ids), self.batch_size):
            chunk = self.ids[first : first + self.batch_size]
            shape = (len(chunk), max(map(len, chunk)))
            ids = torch.full(shape, self.pad_id, dtype=torch.int64)
            mask = torch.zeros(shape, dtype=torch.int64)
            for row, sequence in enumerate(chunk):
                ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
                mask[row, : len(sequence)] = 1
            yield {"input_ids": ids, "attention_mask": mask}

    def describe(self) -> dict[str, Any]:
        """Plain data for plans and reports."""
        return {
            "source": self.source,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
        }


def calibration_batches(
    calibration: Calibration, tokenizer: Any, *, language: str, base_dir: Path | None = None
) -> CalibrationSet:
    """Encode the calibration set of a recipe.

    Args:
        calibration: data sets (none: the built-in English set, as much as there is of it), number of sequences, their
            length.
        tokenizer: a fast tokenizer with a chat template.
        language: the source language.
        base_dir: directory against which relative paths are resolved.

    Raises:
        AddlangError: no chat template; the built-in set is wanted for another language than English; fewer sequences
            than asked for without ``allow_fewer``; bad rows, with file and row.
    """
    require_chat_template(tokenizer)
    specs = calibration.datasets
    own = not specs
    if own:
        if language.split("-")[0] not in ("en", "eng"):
            raise AddlangError(
                f"the built-in calibration set is English, but the source language is '{language}'",
                "name conversations in that language under calibration.datasets",
            )
        specs = (DatasetSpec.model_validate({"path": str(builtin("calibration_en")), "format": "messages"}),)
    rows = _draw(specs, calibration.sequences, base_dir)
    if len(rows) < calibration.sequences:
        short = f"{len(rows)} calibration sequences instead of {calibration.sequences}"
        if not own and not calibration.allow_fewer:
            raise AddlangError(
                f"{', '.join(s.path for s in specs)}: only {short}",
                "give more conversations, lower calibration.sequences, or set calibration.allow_fewer: true",
            )
        name = "the built-in English set" if own else "the data"
        warnings.warn(f"importance is scored on {short}: {name} has no more", AddlangWarning, stacklevel=2)
    plain = sum(row.messages is None for row in rows)
    if plain:
        message = f"{plain} of {len(rows)} calibration rows are plain text: the chat template is not applied to them"
        warnings.warn(message, AddlangWarning, stacklevel=2)
    ids = [_encode(row, tokenizer)[: calibration.sequence_length] for row in rows]
    ids.sort(key=len, reverse=True)  # little padding, and a batch that does not fit into memory fails first
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    source = f"built-in English set ({len(ids)} conversations)" if own else ", ".join(s.path for s in specs)
    key = fingerprint("calibration", tokenizer_fingerprint(tokenizer, chat=True), ids)
    return CalibrationSet(tuple(map(tuple, ids)), calibration.batch_size, 0 if pad is None else pad, source, key)


def _encode(row: Row, tokenizer: Any) -> list[int]:
    if row.messages is None:
        return list(tokenizer(row.text)["input_ids"])
    try:
        return encode_conversation(row.messages, tokenizer, loss_on="all")[0]
    except AddlangError as error:
        raise row_error(row.file, row.line, error.message, error.fix) from error


def _draw(specs: tuple[DatasetSpec, ...], number: int, base_dir: Path | None) -> list[Row]:
    """``number`` rows (or all, if there are fewer), divided over the data sets by weight (default: equally).

    Within a data set those with the smallest content hashes are taken: a random sample that depends on no order.
    What one data set lacks is taken from the others.
    """
    weights = np.array([1.0 if spec.weight is None else spec.weight for spec in specs])
    ranked: list[list[Row]] = []
    for spec in specs:
        source = read_rows(spec, base_dir=base_dir)
        if source.files is None and spec.limit is None:  # do not stream all of a large data set for a few rows
            source = read_rows(spec.model_copy(update={"limit": HUB_ROWS * number}), base_dir=base_dir)
        ranked.append([row for _, row in Scan.of(source, number, seed=0).smallest(number)])
    taken = np.zeros(len(specs), np.int64)
    sizes = np.array([len(rows) for rows in ranked])
    for _ in range(min(number, int(sizes.sum()))):
        due = np.where(taken < sizes, (taken + 1) / weights, np.inf)
        taken[int(np.argmin(due))] += 1
    return [row for rows, n in zip(ranked, taken.tolist(), strict=True) for row in rows[:n]]
