"""How well a tokenizer fits a language: tokens per word, and what share of the text is in pieces of characters."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addlang.data.similar import UNSPACED

_UNSPACED = re.compile(f"[{UNSPACED}]")
UNKNOWN = 0.001  # share of unknown tokens above which text is lost
FRAGMENTS = 0.2  # share of bytes in pieces of characters above which learning is slow
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Fit:
    """Of a tokenizer on some text.

    Attributes:
        tokens_per_word: words are runs between white space; None where the script writes no spaces.
        tokens_per_character: of Unicode characters without white space.
        bytes_per_token: of UTF-8.
        fragments: share of the text's bytes that stand in tokens which are no whole characters (byte fallback).
        unknown: share of the tokens that are the unknown token: what they stand for cannot be learnt.
    """

    tokens_per_word: float | None
    tokens_per_character: float
    bytes_per_token: float
    fragments: float
    unknown: float

    def describe(self) -> dict[str, Any]:
        return dict(vars(self))


def fit_of(tokenizer: Any, texts: Sequence[str]) -> Fit:
    """Measure a tokenizer on some text, without special tokens."""
    pieces = vocabulary_bytes(tokenizer)
    tokens = words = characters = size = broken = unknown = unspaced = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += len(ids)
        words += len(text.split())
        letters = sum(not c.isspace() for c in text)
        characters += letters
        unspaced += len(_UNSPACED.findall(text))
        size += len(text.encode("utf-8"))
        unknown += sum(i == tokenizer.unk_token_id for i in ids) if tokenizer.unk_token_id is not None else 0
        broken += sum(len(piece) for i in ids if (piece := pieces[i]) is not None)
    return Fit(
        tokens_per_word=None if 2 * unspaced > characters or not words else tokens / words,
        tokens_per_character=tokens / max(characters, 1),
        bytes_per_token=size / max(tokens, 1),
        fragments=broken / max(size, 1),
        unknown=unknown / max(tokens, 1),
    )


def vocabulary_bytes(tokenizer: Any) -> list[bytes | None]:
    """Per token id its bytes, if these are no whole characters; None for every other token."""
    vocabulary = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    special = set(tokenizer.all_special_ids)
    byte_level = _is_byte_level(tokenizer)
    table = {c: b for b, c in byte_characters().items()}
    for token, i in vocabulary.items():
        if i in special:
            continue
        match = _BYTE.fullmatch(token)
        if match:
            value = int(match[1], 16)
            out[i] = bytes([value]) if value >= 0x80 else None  # an ASCII byte is a whole character
        elif byte_level and all(c in table for c in token):
            raw = bytes(table[c] for c in token)
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                out[i] = raw
    return out


def _is_byte_level(tokenizer: Any) -> bool:
    import json

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return "ByteLevel" in json.dumps([backend.get("pre_tokenizer"), backend.get("decoder")])


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for every byte (GPT-2)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + i) for i, b in enumerate(others)}}
