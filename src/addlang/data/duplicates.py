"""Copies among the rows of several sources: exact ones by a hash, near ones by min-hashes of their character windows.

Near: the share of windows of 24 characters (of the normalised texts) that two rows have in common, over those that either
has (their Jaccard similarity), is estimated from 120 min-hashes (Broder 1997; standard error 0.04 at 0.8). Only rows that
agree in one of 20 groups of 6 min-hashes are compared: a pair at 0.8 is found with probability 0.998, at 0.7 with 0.92.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from addlang.data.similar import content_hash, window_hashes

Kind = Literal["copy", "near"]

BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS
_CHUNK = 1 << 14  # windows whose hashes are permuted at once
_rng = np.random.default_rng(0x6D696E68)
_FACTORS = _rng.integers(0, 1 << 63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _rng.integers(0, 1 << 63, HASHES, dtype=np.uint64)


def signature(normalised: str) -> NDArray[np.uint64] | None:
    """(HASHES,) min-hashes of a normalised text; None if it is shorter than a window."""
    least = None
    for hashes in window_hashes(normalised):
        for begin in range(0, len(hashes), _CHUNK):
            permuted = hashes[begin : begin + _CHUNK, None] * _FACTORS + _SHIFTS
            smallest = permuted.min(axis=0)
            least = smallest if least is None else np.minimum(least, smallest)
    return least


class Duplicates:
    """Tells of each text, in order, whether one like it came before.

    Args:
        near: estimated similarity from which two texts count as copies; None: only equal texts do.
    """

    def __init__(self, near: float | None) -> None:
        self.near = near
        self._seen: set[int] = set()
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._signatures: list[NDArray[np.uint32]] = []

    def add(self, normalised: str) -> Kind | None:
        """``copy`` or ``near`` if a text like this one was added before; otherwise it is remembered, and None."""
        identity = content_hash(normalised, 0)
        if identity in self._seen:
            return "copy"
        if self.near is not None and self._is_near(normalised, self.near):
            return "near"
        self._seen.add(identity)
        return None

    def _is_near(self, normalised: str, threshold: float) -> bool:
        full = signature(normalised)
        if full is None:
            return False
        short = (full >> np.uint64(32)).astype(np.uint32)
        keys = [(band, short[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        candidates = sorted({row for key in keys for row in self._bands.get(key, ())})
        if any((self._signatures[row] == short).mean() >= threshold for row in candidates):
            return True
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(short)
        return False
