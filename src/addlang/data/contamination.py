"""Which training rows contain the text of an evaluation item.

Texts are compared as sequences of words: case folded, punctuation and symbols dropped. In scripts that write no spaces
between words, two characters count as a word (Chinese, Japanese), or four (Thai, Lao, Burmese, Khmer).

The rule:

- a text of at least 13 words is contained in a row if at least half of its runs of 13 words stand in the row
  (13-grams: Brown et al. 2020, appendix C; half of the text: Lambert et al. 2024, Tulu 3);
- a text of 8 to 12 words is contained if all of it stands in the row as a sentence or line of its own: "... sort 19 1" is
  not found in "... sort 19 1 42";
- shorter texts are not looked for: they occur by chance. They are counted.

Runs of words that stand in more than a tenth of a task's items (and in more than ten) are its template, not the text of
an item, and are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from addlang.data.cache import fingerprint
from addlang.data.similar import UNSPACED, UNSPACED_LONG, separators

VERSION = 1
GRAM, SHORTEST = 13, 8  # words
HALF = 0.5  # of the runs of a text
TEMPLATE_SHARE, TEMPLATE_ITEMS = 0.1, 10
RULE = (
    f"a row contains an item's text if at least half of the text's runs of {GRAM} words stand in it (of a text of "
    f"{SHORTEST} to {GRAM - 1} words: all of it, as a sentence or line of its own); case and punctuation do not count; in "
    "scripts without spaces two or four characters count as a word"
)
_UNSPACED_LETTER = re.compile(f"([{UNSPACED}])")
_LONG_LETTER = re.compile(f"[{UNSPACED_LONG}]")
_BITS = 24  # of the filter in front of the search
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_COEFFICIENTS = np.random.default_rng(0x6772616D).integers(0, 1 << 63, 4 * GRAM, np.uint64) * np.uint64(2) + np.uint64(
    1
)

Table = tuple[int, NDArray[np.uint64], NDArray[np.int64]]  # length of its runs, their hashes, whose text each is of


@dataclass(frozen=True)
class ItemText:
    """One text of an evaluation item: a question, a passage, a choice."""

    task: str
    item: str
    field: str
    text: str


@dataclass(frozen=True)
class Overlap:
    """A training row that contains an item's text; ``share``: of the text's runs of words that stand in the row."""

    file: str
    row: int
    task: str
    item: str
    field: str
    share: float
    text: str

    def describe(self) -> str:
        """One line for a message."""
        shown = " ".join(self.text.split())
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f'{self.file}, row {self.row}: task {self.task}, item {self.item}, {self.field}: "{shown}"'

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": round(self.share, 3)}


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    text = separators().sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return _UNSPACED_LETTER.sub(r" \1 ", text).split()


class ItemIndex:
    """Finds the texts of evaluation items in rows.

    Attributes:
        tasks: number of different texts by task.
        short: texts that are too short to be looked for; template: texts that are nothing but their task's template.
    """

    def __init__(self, texts: Iterable[ItemText]) -> None:
        self.tasks: Counter[str] = Counter()
        self.short = self.template = 0
        self._texts: list[ItemText] = []
        self._vocabulary: dict[str, int] = {}
        sequences: list[list[str]] = []
        known: set[tuple[str, ...]] = set()
        for text in texts:
            sequence = words(text.text)
            if len(sequence) < SHORTEST * _per_word(sequence):
                self.short += 1
            elif tuple(sequence) not in known:  # a passage stands with each of its questions
                known.add(tuple(sequence))
                self._texts.append(text)
                sequences.append(sequence)
        for sequence in sequences:
            for word in sequence:
                self._vocabulary.setdefault(word, len(self._vocabulary) + 1)
        draw = np.random.default_rng(0x776F7264).integers(0, 1 << 63, len(self._vocabulary) + 1, np.uint64)
        self._hash_of_word = draw * np.uint64(2) + np.uint64(1)
        self._index(sequences)

    def __len__(self) -> int:
        """Number of texts that are looked for."""
        return sum(self.tasks.values())

    def _index(self, sequences: list[list[str]]) -> None:
        """Fill, by run length, sorted hashes and the text that each belongs to."""
        lengths = [min(GRAM * _per_word(sequence), len(sequence)) for sequence in sequences]
        grams = []
        begins: dict[int, list[NDArray[np.uint64]]] = defaultdict(list)
        for sequence, length in zip(sequences, lengths, strict=True):
            values, starts = self._values(sequence)[0], np.arange(len(sequence) - length + 1)
            grams.append(np.unique(_grams(values, length, starts)))
            size = _beginning(length)
            begins[size].append(_grams(values, size, starts))
        members: dict[str, list[int]] = defaultdict(list)
        for owner, text in enumerate(self._texts):
            members[text.task].append(owner)
        self._sizes = np.zeros(len(grams), np.int64)
        self._whole = [
            len(sequence) == n < GRAM * _per_word(sequence) for sequence, n in zip(sequences, lengths, strict=True)
        ]
        parts: dict[int, list[tuple[NDArray[np.uint64], int]]] = defaultdict(list)
        for task, owners in members.items():
            values, counts = np.unique(np.concatenate([grams[i] for i in owners]), return_counts=True)
            most = max(TEMPLATE_ITEMS, TEMPLATE_SHARE * len({self._texts[i].item for i in owners}))
            template = values[counts > most]
            for owner in owners:
                own = np.setdiff1d(grams[owner], template, assume_unique=True)
                self._sizes[owner] = len(own)
                if len(own):
                    parts[lengths[owner]].append((own, owner))
                    self.tasks[task] += 1
                else:
                    self.template += 1
        self._beginnings = []
        for size, hashes in sorted(begins.items()):
            tables = [_table(n, parts[n]) for n in sorted(parts) if _beginning(n) == size]
            self._beginnings.append(_Beginnings(size, np.unique(np.concatenate(hashes)), tables))

    def search(self, text: str, file: str, row: int) -> list[Overlap]:
        """The items whose text stands in this one."""
        values, unknown = self._values(words(text))
        counts: Counter[int] = Counter()
        for beginning in self._beginnings:
            starts = beginning.places(values, unknown)
            if not len(starts):
                continue
            for length, hashes, owners in beginning.tables:
                inside = starts[starts + length < len(unknown)]
                inside = inside[unknown[inside + length] == unknown[inside]]
                own = np.unique(_grams(values, length, inside))
                first, last = np.searchsorted(hashes, own), np.searchsorted(hashes, own, side="right")
                for a, b in zip(first.tolist(), last.tolist(), strict=True):
                    counts.update(owners[a:b].tolist())
        found = []
        for owner, count in sorted(counts.items()):
            item, share = self._texts[owner], count / int(self._sizes[owner])
            if share >= HALF and (not self._whole[owner] or _stands_alone(item.text, text)):
                found.append(Overlap(file, row, item.task, item.item, item.field, share, item.text[:300]))
        return found

    @property
    def fingerprint(self) -> str:
        """Of everything that a search depends on."""
        return fingerprint("items", VERSION, [astuple(text) for text in self._texts])

    def describe(self) -> dict[str, Any]:
        """Plain data for the data card."""
        return {"rule": RULE, "texts": dict(self.tasks), "too_short": self.short, "template": self.template}

    def _values(self, sequence: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(n,) hash of every word, and (n + 1,) how many of the words before each place no item has."""
        numbers = np.fromiter(map(self._vocabulary.get, sequence, repeat(0)), np.int64, len(sequence))
        return self._hash_of_word[numbers], np.concatenate([[0], np.cumsum(numbers == 0)])


class _Beginnings:
    """The first ``size`` words of all runs that are at least so long: a quick no for nearly all of an unrelated text."""

    def __init__(self, size: int, hashes: NDArray[np.uint64], tables: list[Table]) -> None:
        self.tables = tables
        self._size, self._hashes = size, hashes
        self._filter = np.zeros(1 << _BITS, dtype=bool)
        self._filter[hashes >> np.uint64(64 - _BITS)] = True

    def places(self, values: NDArray[np.uint64], unknown: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where one of the runs may begin."""
        starts = np.arange(max(len(values) - self._size + 1, 0))
        starts = starts[unknown[starts + self._size] == unknown[starts]]
        grams = _grams(values, self._size, starts)
        maybe = self._filter[grams >> np.uint64(64 - _BITS)]
        starts, grams = starts[maybe], grams[maybe]
        at = np.minimum(np.searchsorted(self._hashes, grams), len(self._hashes) - 1)
        return starts[self._hashes[at] == grams]


def _beginning(length: int) -> int:
    """Words of a run of that length that are looked for first; only runs of characters are so long."""
    return SHORTEST if length < 2 * SHORTEST else 2 * SHORTEST


def _table(length: int, found: list[tuple[NDArray[np.uint64], int]]) -> Table:
    hashes = np.concatenate([own for own, _ in found])
    owners = np.repeat([owner for _, owner in found], [len(own) for own, _ in found])
    order = np.argsort(hashes, kind="stable")
    return length, hashes[order], owners[order]


def _grams(values: NDArray[np.uint64], length: int, starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hashes of the runs of ``length`` words that begin at the given places."""
    hashes = np.zeros(len(starts), np.uint64)
    for place in range(length):
        hashes += values[starts + place] * _COEFFICIENTS[place]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))


def _stands_alone(item: str, text: str) -> bool:
    """Whether the words of an item stand in a text as a sentence, a line or a quotation, not running on into others."""
    between = separators().pattern.removesuffix("+") + "*"
    inner = between.join(map(re.escape, words(item)))
    edge = r"[^\S\n]*(?:[^\w\s]|\n|{})"
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.search(rf"(?:^|[^\w\s]|\n)[^\S\n]*{inner}" + edge.format("$"), folded) is not None


def _per_word(sequence: list[str]) -> int:
    """Entries of a sequence that count as one word: characters, where most are of a script without spaces."""
    letters = [w for w in sequence if len(w) == 1 and _UNSPACED_LETTER.match(w)]
    if 2 * len(letters) <= len(sequence):
        return 1
    return 4 if 2 * sum(_LONG_LETTER.match(w) is not None for w in letters) > len(letters) else 2
