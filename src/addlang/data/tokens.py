"""Raw text to token ids, fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from addlang.data.memo import Memo, separable
from addlang.errors import AddlangError

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]  # flat ids of some texts, (n,) their lengths
Encode = Callable[[list[str]], Callable[[], Encoded]]


def document_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """``(prefix, suffix)``: the ids before and after the text of a document.

    The prefix is what the tokenizer itself puts before a text (bos, or nothing); the suffix always ends with eos.

    Raises:
        AddlangError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise AddlangError(
            f"the tokenizer '{tokenizer.name_or_path}' has no eos token, so documents cannot be kept apart",
            "set eos_token in its tokenizer_config.json",
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), None)
    prefix = list(framed[:at]) if at is not None else []
    suffix = list(framed[at + len(plain) :]) if at is not None else []
    return prefix, suffix if suffix[-1:] == [tokenizer.eos_token_id] else [*suffix, tokenizer.eos_token_id]


def text_encoder(tokenizer: Any) -> Encode:
    """A function from texts to a function that returns the flat ids of all texts, without frame, and the (n,) lengths.

    Two steps, so that the first, which depends on nothing before, can run while the second works on other texts; the
    second steps must be called one after the other.

    It works on a copy of the tokenizer, without truncation and padding, and takes control tokens that are spelt out in
    a text for ordinary text, so that a web page that quotes ``</s>`` does not end a document.
    """
    if not getattr(tokenizer, "is_fast", False):
        return lambda texts: (
            lambda: _flat(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        )
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer.to_str()
    plain = Tokenizer.from_str(backend)
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    line_ends = separable(backend, tokenizer.eos_token)
    if line_ends is not None:
        return Memo(plain, tokenizer.eos_token, line_ends)
    return lambda texts: lambda: _flat([e.ids for e in plain.encode_batch_fast(texts, add_special_tokens=False)])


def frame(
    ids: NDArray[np.uint32],  # (n,)
    lengths: NDArray[np.int64],  # (documents,)
    prefix: list[int],
    suffix: list[int],
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The flat ids with prefix and suffix around every document, and the new lengths; empty documents vanish."""
    lengths = lengths[lengths > 0]
    framed = lengths + len(prefix) + len(suffix)
    ends = np.cumsum(framed)
    out = np.empty(int(framed.sum()), np.uint32)
    text = np.ones(len(out), dtype=bool)
    for i, token in enumerate(prefix):
        text[ends - framed + i] = False
        out[ends - framed + i] = token
    for i, token in enumerate(reversed(suffix), 1):
        text[ends - i] = False
        out[ends - i] = token
    out[text] = ids
    return out, framed


def _flat(ids: list[list[int]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.uint32, int(lengths.sum())), lengths
