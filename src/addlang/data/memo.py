"""Exact tokenisation several times faster than the tokenizer alone: every different word is tokenised once.

The common byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, OLMo 2 and their kin) first cut a text with a regular
expression and then encode each part by itself. For the expressions listed here every match is either white space, or
text without white space with at most one character in front. So a single space between two visible characters always
starts a new part, and what stands between two such spaces can be encoded alone and remembered. Words repeat so much that
on real text most of them are found.

Only tokenizers for which this holds are treated so (:func:`separable`); all others go the ordinary way.
"""

from __future__ import annotations

import json
import re
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({GPT2, LLAMA3, QWEN2, O200K})

MOST_PIECES = 1_000_000  # remembered at once; then everything is forgotten
MOST_CHARACTERS = 30_000_000
_CHUNK = 256  # pieces per string given to the tokenizer
# Keys: 'word' stands for ' word'. These marks, which no valid text contains, stand in front of other pieces.
_FIRST = "\ud800"  # begins a text: no space in front
_EXACT = "\ud801"  # begins or ends a text, and may begin or end with white space
_MARKS = (_FIRST, _EXACT)


def separable(backend: str, separator: str) -> bool:
    """True if texts may be cut at single spaces, and ``separator`` keeps pieces apart that are encoded together.

    Args:
        backend: the JSON of a ``tokenizers.Tokenizer``.
        separator: content of a control token.
    """
    config = json.loads(backend)
    normalizer, cutter, model = config["normalizer"], config["pre_tokenizer"] or {}, config["model"]
    if (
        normalizer is not None and normalizer.get("type") != "NFC"
    ):  # composition never joins a space with its neighbours
        return False
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    parts = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    own = len(parts) == 1 and parts[0].get("type") == "ByteLevel" and parts[0].get("use_regex") is True
    split = len(parts) == 2 and _splits(parts[0]) and parts[1].get("use_regex") is False
    if not (own or split) or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space") is not False:
        return False
    added = config["added_tokens"]
    for token in added:
        flags = token["lstrip"] or token["rstrip"] or token["single_word"]
        across = re.search(r"\S \S|\S $", token["content"])  # it could reach over a space that separates pieces
        if flags or (across and not token["special"]):
            return False
    return any(t["content"] == separator and t["special"] and not t["normalized"] for t in added)


def _splits(part: dict[str, Any]) -> bool:
    matches = (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
    return part.get("type") == "Split" and matches and part["pattern"].get("Regex") in PATTERNS


class Memo:
    """Encodes texts by looking their pieces up; new pieces are encoded by the tokenizer itself.

    Args:
        plain: backend that takes control tokens for ordinary text.
        control: copy of it that recognises them, so that ``separator`` can keep pieces apart.
        separator: a control token; see :func:`separable`.
    """

    def __init__(self, plain: Any, control: Any, separator: str) -> None:
        self._plain, self._control, self._separator = plain, control, separator
        self._separator_id = control.token_to_id(separator)
        special = [t.content for t in control.get_added_tokens_decoder().values() if t.special]
        self._special = re.compile("|".join(map(re.escape, special)))
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, int] = {}  # number of every piece, from 1
        self._new: list[str] = []  # pieces that have a number and no ids yet
        self._characters = 0
        self._ids = np.empty(0, np.uint32)
        self._starts = self._lengths = np.zeros(1, np.int64)  # by piece; 0 is the mark of what cannot be looked up

    def __call__(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Flat ids of all texts and their (n,) lengths."""
        if len(self._known) > MOST_PIECES or self._characters > MOST_CHARACTERS:
            self._forget()
        numbers, counts = self._look_up(texts)
        bounds = np.cumsum(counts)
        odd = np.unique(np.searchsorted(bounds, np.flatnonzero(numbers == 0), side="right"))
        if len(odd):
            parts: list[NDArray[np.int64]] = []
            done = 0
            for i in odd.tolist():
                pieces = _glued_pieces(texts[i])
                parts += [numbers[done : bounds[i] - counts[i]], self._numbers(pieces)]
                done, counts[i] = bounds[i], len(pieces)
            numbers = np.concatenate([*parts, numbers[done:]])
            bounds = np.cumsum(counts)
        self._encode_new()
        starts, lengths = self._starts[numbers], self._lengths[numbers]
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return self._ids[at], np.diff(ends[bounds - 1], prepend=0)

    def _look_up(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of all pieces of texts cut at every space, and the number of pieces per text (at least one).

        Arrow cuts the texts and finds the different pieces; only these are looked up one by one.
        """
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        cut = [text.partition(" ") for text in texts]
        first = [(_FIRST if space else _EXACT) + head for head, space, _ in cut]
        rest = pa.array([tail if space else None for _, space, tail in cut], pa.large_string())
        split = pc.split_pattern(rest, pattern=" ")
        coded = split.flatten().dictionary_encode()
        of_different = self._numbers(coded.dictionary.to_pylist())
        counts = 1 + pc.fill_null(pc.list_value_length(split), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        numbers = np.empty(int(counts.sum()), np.int64)
        inner = np.ones(len(numbers), dtype=bool)
        begins = np.cumsum(counts) - counts
        inner[begins] = False
        numbers[begins] = self._numbers(first)
        numbers[inner] = of_different[coded.indices.to_numpy()]
        return numbers, counts

    def _numbers(self, keys: list[str]) -> NDArray[np.int64]:
        """Number per key; 0 where the spaces around a piece separate nothing, as beside another space."""
        numbers = np.fromiter(map(self._known.get, keys, repeat(-1)), np.int64, len(keys))
        unknown = np.flatnonzero(numbers < 0)
        missed = [keys[i] for i in unknown.tolist()]
        new = [key for key in dict.fromkeys(missed) if key[:1] == _EXACT or (key and key.strip() == key)]
        self._known.update(zip(new, range(len(self._known) + 1, len(self._known) + len(new) + 1), strict=True))
        self._new += new
        self._characters += sum(map(len, new))
        numbers[unknown] = np.fromiter(map(self._known.get, missed, repeat(0)), np.int64, len(missed))
        return numbers

    def _encode_new(self) -> None:
        new = [key[1:] if key[:1] in _MARKS else " " + key for key in self._new]
        self._new.clear()
        alone: list[int] = []  # pieces that spell out a control token; first look whether there is any at all
        if self._special.search("\n".join(new)):
            alone = [i for i, piece in enumerate(new) if self._special.search(piece)]
        together = sorted(set(range(len(new))).difference(alone)) if alone else list(range(len(new)))
        chunks = [together[i : i + _CHUNK] for i in range(0, len(together), _CHUNK)]
        joined = [self._separator.join(new[i] for i in chunk) for chunk in chunks]
        order: list[int] = []  # of the pieces in ``ids``
        ids: list[NDArray[np.uint32]] = []
        sizes: list[NDArray[np.int64]] = []
        encodings = self._control.encode_batch_fast(joined, add_special_tokens=False)
        for chunk, encoding in zip(chunks, encodings, strict=True):
            found = np.array(encoding.ids, np.uint32)
            cuts = np.flatnonzero(found == self._separator_id)
            if len(cuts) == len(chunk) - 1:
                order += chunk
                ids.append(found[found != self._separator_id])
                sizes.append(np.diff(cuts, prepend=-1, append=len(found)) - 1)
            else:  # the end of a piece and the separator formed another control token
                alone += chunk
        encodings = self._plain.encode_batch_fast([new[i] for i in alone], add_special_tokens=False)
        order += alone
        ids += [np.array(e.ids, np.uint32) for e in encodings]
        sizes.append(np.fromiter((len(e.ids) for e in encodings), np.int64, len(alone)))
        lengths = np.concatenate(sizes)
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        back = np.argsort(order)
        self._starts = np.concatenate([self._starts, starts[back]])
        self._lengths = np.concatenate([self._lengths, lengths[back]])
        self._ids = np.concatenate([self._ids, *ids])


def _glued_pieces(text: str) -> list[str]:
    """The keys of a text cut only at single spaces between two visible characters."""
    runs: list[list[str]] = [[]]
    for part in text.split(" "):
        before = runs[-1][-1] if runs[-1] else ""
        if before and part and not before[-1].isspace() and not part[0].isspace():
            runs.append([])
        runs[-1].append(part)
    first, *rest = (" ".join(run) for run in runs)
    if rest and rest[-1][-1].isspace():
        rest[-1] = f"{_EXACT} {rest[-1]}"
    return [_EXACT + first, *rest]
