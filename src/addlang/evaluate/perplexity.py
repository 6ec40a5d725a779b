"""Bits per byte of held-out text.

Why this and not perplexity or loss: a token is a different amount of text in every tokenizer and in every language
(one Amharic letter can be one token or three), so loss per token compares neither models nor languages. Bits per byte
divides the cost of the whole text by its size in UTF-8, which no tokenizer can change; it is the compression rate that
the model would reach. Bytes still differ between scripts (Latin 1, Cyrillic 2, Ethiopic and Devanagari 3 per letter),
so values compare models on one text, not languages with each other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from addlang.errors import AddlangError, AddlangWarning
from addlang.evaluate.likelihood import log_likelihoods, start_token
from addlang.evaluate.measurement import Item, Measurement, Role

VERSION = "1"


def windows(tokens: Sequence[int], start: int, sequence_length: int) -> list[list[int]]:
    """Split a document into model inputs of ``sequence_length`` tokens, each after the start token.

    Every token of the document is predicted exactly once; the first one of a later window without what came before.
    """
    step = sequence_length - 1
    return [[start, *tokens[at : at + step]] for at in range(0, len(tokens), step)]


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    documents: Sequence[tuple[str, str]],
    *,
    sequence_length: int,
    batch_size: int,
    role: Role,
    language: str,
    task: str,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Bits that the model needs for the text, over its size in bytes of UTF-8.

    Args:
        documents: (id, text); an item each, with its bits and its bytes. No text is dropped.
        sequence_length: tokens per window with the start token. Longer documents are cut into consecutive windows.
        batch_size: windows per forward pass.
        progress: called with the number of windows done and of all windows.

    Raises:
        AddlangError: ``sequence_length`` below 2 or above the model's positions.
        NotMeasuredError: no documents.
    """
    if sequence_length < 2:
        raise AddlangError(f"a window of {sequence_length} token(s) has nothing to predict", "set it to 2 or more")
    start = start_token(tokenizer)
    sequences: list[list[int]] = []
    owner: list[int] = []
    unknown = 0
    for d, (_, text) in enumerate(documents):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        unknown += tokens.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        parts = windows(tokens, start, sequence_length)
        sequences += parts
        owner += [d] * len(parts)
    if unknown:
        warnings.warn(
            f"{task}: the tokenizer does not know {unknown} token(s) of this text; an unknown token hides the bytes it "
            "stands for, so bits per byte are too low and must not be compared with those of another tokenizer",
            AddlangWarning,
            stacklevel=2,
        )
    values = log_likelihoods(model, sequences, [1] * len(sequences), batch_size=batch_size, progress=progress)
    bits, tokens_of = [0.0] * len(documents), [0] * len(documents)
    for d, value, sequence in zip(owner, values, sequences, strict=True):
        bits[d] -= value / math.log(2)
        tokens_of[d] += len(sequence) - 1
    return Measurement(
        task=task,
        version=VERSION,
        role=role,
        language=language,
        metric="bits_per_byte",
        higher_is_better=False,
        items=tuple(
            Item(name, bits[d], len(text.encode("utf-8")), detail={"tokens": tokens_of[d]})
            for d, (name, text) in enumerate(documents)
        ),
        settings={
            "sequence_length": sequence_length,
            "start": "beginning-of-sequence token, else end-of-sequence",
            "long_documents": "consecutive windows, each after the start token",
            "loss": "fp32",
        },
        unit="bits/byte",
    )
