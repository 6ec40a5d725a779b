"""When two texts count as the same: exactly, after normalisation, or nearly, by shared windows of characters."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# scripts that write no spaces between words: Thai, Lao, Burmese, Khmer; kana, Chinese characters
UNSPACED_LONG = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # a word has about four characters
UNSPACED_SHORT = "\u3040-\u30ff\u3400-\u9fff"  # about two
UNSPACED = UNSPACED_LONG + UNSPACED_SHORT

WINDOW = 24  # characters; about four to five words of an alphabetic script
_CHUNK = 1 << 20  # characters hashed at once
_BITS = 22  # of the filter in front of the search
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@lru_cache(maxsize=1)
def separators() -> re.Pattern[str]:
    """Punctuation, symbols and white space of all scripts. Not ``\\W``: that also drops vowel signs and tone marks."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] in "PSZ" or chr(code).isspace():
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return re.compile("[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges) + "]+")


def normalise(text: str) -> str:
    """Composed, case-folded, without punctuation, symbols and white space; a text of nothing else stays as it is."""
    return separators().sub("", unicodedata.normalize("NFC", text).casefold()) or text


def content_hash(normalised: str, seed: int) -> int:
    """64-bit hash of a normalised text; ``seed`` chooses the hash function."""
    key = seed.to_bytes(16, "little", signed=False)
    return int.from_bytes(hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest())


@lru_cache(maxsize=1)
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(chunk,) powers of the base and of its inverse, modulo 2**64."""
    base = np.full(_CHUNK + WINDOW, _BASE, np.uint64)
    inverse = np.full(_CHUNK + WINDOW, pow(_BASE, -1, 1 << 64), np.uint64)
    base[0] = inverse[0] = 1
    return np.cumprod(base), np.cumprod(inverse)


def window_hashes(normalised: str) -> Iterator[NDArray[np.uint64]]:
    """Hashes of all windows of ``WINDOW`` characters, in chunks; none if the text is shorter than a window."""
    powers, inverses = _powers()
    for begin in range(0, max(len(normalised) - WINDOW + 1, 0), _CHUNK):
        part = normalised[begin : begin + _CHUNK + WINDOW - 1]
        codes = np.frombuffer(part.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(codes * powers[: len(codes)], out=sums[1:])
        hashes = (sums[WINDOW:] - sums[:-WINDOW]) * inverses[: len(codes) - WINDOW + 1]
        hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
        yield hashes ^ (hashes >> np.uint64(29))


class NearIndex:
    """Answers whether a text is nearly the same as one of a fixed set of texts, or contains or is contained in one.

    A text is near if at least ``threshold`` of its windows stand in the set, or at least ``threshold`` of the windows
    of one of the set stand in it. Texts shorter than a window are only ever equal exactly.
    """

    def __init__(self, normalised: Iterable[str], threshold: float) -> None:
        self.threshold = threshold
        owned = [np.unique(np.concatenate([np.empty(0, np.uint64), *window_hashes(text)])) for text in normalised]
        self._sizes = np.array([len(h) for h in owned], dtype=np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *owned])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._owners = np.repeat(np.arange(len(owned)), self._sizes)[order]
        self._filter = np.zeros(1 << _BITS, dtype=bool)  # a quick no for nearly all windows of unrelated text
        self._filter[self._hashes >> np.uint64(64 - _BITS)] = True

    def near(self, normalised: str) -> bool:
        """True if the text is near one of the set."""
        if not len(self._hashes) or len(normalised) < WINDOW:
            return False
        total, found = 0, [np.empty(0, np.uint64)]
        for hashes in window_hashes(normalised):
            total += len(hashes)
            candidates = hashes[self._filter[hashes >> np.uint64(64 - _BITS)]]
            at = np.searchsorted(self._hashes, candidates)
            found.append(candidates[self._hashes[np.minimum(at, len(self._hashes) - 1)] == candidates])
        shared = np.concatenate(found)
        if len(shared) >= self.threshold * total:
            return True
        shared = np.unique(shared)
        first, last = np.searchsorted(self._hashes, shared), np.searchsorted(self._hashes, shared, side="right")
        counts = last - first
        at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        per_owner = np.bincount(self._owners[at], minlength=len(self._sizes))
        return bool(np.any((per_owner >= self.threshold * self._sizes) & (self._sizes > 0)))
