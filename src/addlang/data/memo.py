"""Exact tokenisation several times faster than the tokenizer alone: every different word is tokenised once.

The common byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, OLMo 2 and their kin) first cut a text with a regular
expression and then encode each part by itself. For the expressions listed here every match is either white space, or
visible characters with at most one white space in front and line ends behind. So a single space between two visible
characters always starts a new part, and mostly a line end in front of a visible character ends one. What stands between
two such places can be encoded alone and remembered; words repeat so much that most of them are found.

Only tokenizers for which this holds are treated so (:func:`separable`); all others go the ordinary way.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

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
# Line ends after which a text may be cut. LLAMA3, QWEN2, O200K: the last of any run of white space, which is one match up
# to there (in O200K a slash may belong to it: not in front of one). GPT2: white space in front of a word is cut before
# its last character, which makes no difference only if it is one character.
LINE_ENDS = {LLAMA3: "any", QWEN2: "any", O200K: "any", GPT2: "single"}

MOST_PIECES = 1_000_000  # remembered at once; then everything is forgotten
MOST_CHARACTERS = 30_000_000
_CHUNK = 256  # pieces per string given to the tokenizer
# Keys: 'word' stands for ' word'. With a mark in front there is no space; with one behind it ends with a line end after
# which the text may be cut. The mark is a code point that is no character; a text that holds it is not cut at all.
_MARK = "\ufdd0"
_CUT = f"{_MARK} {_MARK}"
# Marks that close a word, and line ends. In front of the first of them an ASCII letter or digit always ends a match, if
# nothing but them follows in a piece: "end." and "end," are encoded as one "end" and two tails.
_CLOSING = string.punctuation + "\n"
_EXACT = "\ud801"  # what follows is the piece, whatever it begins and ends with; no valid text holds this


def separable(backend: str, separator: str) -> str | None:
    """Whether texts may be cut at single spaces, and ``separator`` keeps pieces apart that are encoded together.

    Args:
        backend: the JSON of a ``tokenizers.Tokenizer``.
        separator: content of a control token.

    Returns:
        After which line ends texts may be cut as well (see ``LINE_ENDS``); None if they may not be cut at all.
    """
    config = json.loads(backend)
    normalizer, cutter, model = config["normalizer"], config["pre_tokenizer"] or {}, config["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        return None
    if normalizer is not None and normalizer.get("type") != "NFC":  # which joins nothing with white space
        return None
    parts = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    if parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space") is not False:
        return None
    pattern = ""
    if len(parts) == 1 and parts[0].get("use_regex") is True:
        pattern = GPT2
    elif len(parts) == 2 and parts[0].get("type") == "Split" and parts[1].get("use_regex") is False:
        whole = (parts[0]["behavior"], parts[0]["invert"]) in (("Isolated", False), ("Removed", True))
        pattern = parts[0]["pattern"].get("Regex", "") if whole else ""
    added = config["added_tokens"]
    for token in added:
        flags = token["lstrip"] or token["rstrip"] or token["single_word"]
        across = re.search(r"\S \S|\S $|\n\S", token["content"])  # it could reach over a place where texts are cut
        if flags or (across and not token["special"]):
            return None
    apart = any(t["content"] == separator and t["special"] and not t["normalized"] for t in added)
    return LINE_ENDS.get(pattern) if apart else None


class _Cut(NamedTuple):
    """Keys of the pieces of some texts.

    Attributes:
        first: of the first piece of every text.
        different: of all others, each once.
        indices: of all others, in order, into ``different``.
        counts: (n,) pieces per text, at least one.
    """

    first: list[str]
    different: list[str]
    indices: NDArray[np.int32]
    counts: NDArray[np.int64]


class _Ids:
    """Flat ids of numbered strings, in order; number 0 has none."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.uint32)
        self._lengths = self._starts = np.zeros(1, np.int64)

    def add(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Strings with the next (n,) numbers."""
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])

    def take(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Flat ids and (n,) lengths of the strings with these numbers."""
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[numbers] - (ends - lengths), lengths)
        return self._ids[at], lengths


class Memo:
    """Encodes texts by looking their pieces up; new pieces are encoded by the tokenizer itself.

    Args:
        tokenizer: of this object alone. It takes control tokens for ordinary text, except where ``separator`` keeps pieces
            apart.
        separator: a control token.
        line_ends: as :func:`separable` returns them.
    """

    def __init__(self, tokenizer: Any, separator: str, line_ends: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator
        self._single_line_ends = line_ends == "single"
        self._separator_id = tokenizer.token_to_id(separator)
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self._special = re.compile("|".join(map(re.escape, special)))
        ordinary = [t.content for t in tokenizer.get_added_tokens_decoder().values() if not t.special]
        self._added = re.compile("|".join(map(re.escape, ordinary))) if ordinary else None
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, int] = {}  # number of every piece, from 1
        self._new: list[str] = []  # pieces that have a number and no ids yet
        self._characters = 0
        self._pieces = _Ids()  # 0 is the mark of what cannot be looked up
        self._known_parts: dict[str, int] = {"": 0}  # number of every head and tail of a piece
        self._parts = _Ids()

    def __call__(self, texts: list[str]) -> Callable[[], tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """Cut the texts; what comes back, called once, looks the pieces up: flat ids of all texts and their (n,) lengths.

        Cutting touches nothing that is remembered, so the next texts can be cut while these are looked up.
        """
        cut = self._cut(texts)
        return lambda: self._encode(texts, cut)

    def _encode(self, texts: list[str], cut: _Cut) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if len(self._known) > MOST_PIECES or self._characters > MOST_CHARACTERS:
            self._forget()
        numbers, counts = self._look_up(cut), cut.counts
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
        ids, lengths = self._pieces.take(numbers)
        return ids, np.diff(np.cumsum(lengths)[bounds - 1], prepend=0)

    def _cut(self, texts: list[str]) -> _Cut:
        """All pieces of texts cut at every space and line end; Arrow cuts the texts and finds the different pieces."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        cut = [(text, "", "") if _MARK in text else self._lines_marked(text).partition(" ") for text in texts]
        first = [(_MARK if space else _EXACT) + head for head, space, _ in cut]
        rest = pa.array([tail if space else None for _, space, tail in cut], pa.large_string())
        split = pc.split_pattern(rest, pattern=" ")
        coded = split.flatten().dictionary_encode()
        counts = 1 + pc.fill_null(pc.list_value_length(split), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return _Cut(first, coded.dictionary.to_pylist(), coded.indices.to_numpy(), counts)

    def _look_up(self, cut: _Cut) -> NDArray[np.int64]:
        """Numbers of all pieces; only different ones are looked up one by one."""
        of_different = self._numbers(cut.different)
        numbers = np.empty(int(cut.counts.sum()), np.int64)
        inner = np.ones(len(numbers), dtype=bool)
        begins = np.cumsum(cut.counts) - cut.counts
        inner[begins] = False
        numbers[begins] = self._numbers(cut.first)
        numbers[inner] = of_different[cut.indices]
        return numbers

    def _lines_marked(self, text: str) -> str:
        """The text with a space, between marks, at the line ends after which it may be cut."""
        if "\n" not in text:
            return text
        text = text.replace("\n", f"\n{_CUT}").replace(f"{_CUT}\n", "\n").replace(f"{_CUT} ", " ")
        return text.replace(f"\n\n{_CUT}", "\n\n") if self._single_line_ends else text

    def _standing_alone(self, key: str) -> bool:
        """False if the places where the piece was cut off are none where texts may be cut, as beside another space."""
        if key[:1] in (_EXACT, "") or key == _MARK:
            return bool(key)
        body = key.strip(_MARK)
        if not body or body[0].isspace() or (key[0] == _MARK and body[0] == "/"):
            return False
        if key[-1] == _MARK:
            return not (self._single_line_ends and body[-2:-1].isspace())
        return not body[-1].isspace()

    def _numbers(self, keys: list[str]) -> NDArray[np.int64]:
        """Number per key; 0 for a piece that cannot stand alone."""
        numbers = np.fromiter(map(self._known.get, keys, repeat(-1)), np.int64, len(keys))
        unknown = np.flatnonzero(numbers < 0)
        missed = [keys[i] for i in unknown.tolist()]
        different = dict.fromkeys(missed)
        new = [k for k in different if (k.strip() == k != "" and _MARK not in k) or self._standing_alone(k)]
        self._known.update(zip(new, range(len(self._known) + 1, len(self._known) + len(new) + 1), strict=True))
        self._new += new
        self._characters += sum(map(len, new))
        numbers[unknown] = np.fromiter(map(self._known.get, missed, repeat(0)), np.int64, len(missed))
        return numbers

    def _encode_new(self) -> None:
        """Give every new piece its ids: those of its head and of its tail, each of which is encoded once."""
        pieces = [_piece(key) for key in self._new]
        self._new.clear()
        heads = [piece.rstrip(_CLOSING) for piece in pieces]
        uncut = {i for i, head in enumerate(heads) if not (head[-1:].isascii() and head[-1:].isalnum())}
        if self._added is not None and self._added.search("\n".join(pieces)):
            uncut |= {i for i, piece in enumerate(pieces) if self._added.search(piece)}
        for i in uncut:
            heads[i] = pieces[i]
        tails = [piece[len(head) :] for piece, head in zip(pieces, heads, strict=True)]
        known = self._known_parts
        new = [part for part in dict.fromkeys([*heads, *tails]) if part not in known]
        known.update(zip(new, range(len(known), len(known) + len(new)), strict=True))
        self._parts.add(*self._encode_parts(new))
        both = np.array([[known[part] for part in heads], [known[part] for part in tails]], np.int64).T
        ids, lengths = self._parts.take(both.ravel())
        self._pieces.add(ids, lengths.reshape(-1, 2).sum(1))

    def _encode_parts(self, new: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Flat ids and (n,) lengths by the tokenizer; many parts at a time, with separators between them."""
        alone: list[int] = []  # pieces that spell out a control token; first look whether there is any at all
        if self._special.search("\n".join(new)):
            alone = [i for i, piece in enumerate(new) if self._special.search(piece)]
        together = sorted(set(range(len(new))).difference(alone)) if alone else list(range(len(new)))
        chunks = [together[i : i + _CHUNK] for i in range(0, len(together), _CHUNK)]
        joined = [self._separator.join(new[i] for i in chunk) for chunk in chunks]
        order: list[int] = []  # of the pieces in ``ids``
        ids: list[NDArray[np.uint32]] = []
        sizes: list[NDArray[np.int64]] = []
        self._tokenizer.encode_special_tokens = False
        encodings = self._tokenizer.encode_batch_fast(joined, add_special_tokens=False)
        for chunk, encoding in zip(chunks, encodings, strict=True):
            found = np.array(encoding.ids, np.uint32)
            cuts = np.flatnonzero(found == self._separator_id)
            if len(cuts) == len(chunk) - 1:
                order += chunk
                ids.append(found[found != self._separator_id])
                sizes.append(np.diff(cuts, prepend=-1, append=len(found)) - 1)
            else:  # the end of a piece and the separator formed another control token
                alone += chunk
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch_fast([new[i] for i in alone], add_special_tokens=False)
        order += alone
        ids += [np.array(e.ids, np.uint32) for e in encodings]
        sizes.append(np.fromiter((len(e.ids) for e in encodings), np.int64, len(alone)))
        table = _Ids()
        table.add(np.concatenate([np.empty(0, np.uint32), *ids]), np.concatenate(sizes))
        return table.take(1 + np.argsort(order))


def _piece(key: str) -> str:
    """The text that a key stands for."""
    if key[0] == _EXACT:
        return key[1:]
    return key.strip(_MARK) if key[0] == _MARK else " " + key.rstrip(_MARK)


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
