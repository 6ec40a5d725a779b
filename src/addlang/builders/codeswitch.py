"""Synthetic code-switching: sentences of one language in which words, phrases or clauses stand in the other.

From word-aligned parallel text: a stretch of the matrix sentence is replaced by what is aligned with it. A stretch is only
replaced if it and its counterpart are whole (no link leaves either of them), as phrases are extracted for translation
(Koehn, Och and Marcu 2003).
"""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from addlang.analyze.code_mixing import UNIVERSAL, cmi
from addlang.builders.align import Links
from addlang.builders.parallel import Pair
from addlang.data.similar import UNSPACED, content_hash, separators

Unit = Literal["word", "phrase", "clause"]
LONGEST_PHRASE = 5  # words
LINKED = {
    "word": 1.0,
    "phrase": 0.5,
    "clause": 0.3,
}  # share of the words of both sides that must be linked to each other
_CLAUSE_END = set(",;:.!?—–،؛؟।॥。、，；：！？።፣፤")


@dataclass(frozen=True)
class Token:
    """A word or a sign, and the white space in front of it."""

    text: str
    space: str

    @property
    def is_word(self) -> bool:
        return any(unicodedata.category(c)[0] == "L" for c in self.text)


@dataclass(frozen=True)
class Span:
    """Words ``begin .. end - 1`` of the matrix sentence, and of the other one."""

    begin: int
    end: int
    other_begin: int
    other_end: int


@functools.cache
def _token_pattern() -> re.Pattern[str]:
    inside = separators().pattern.removeprefix("[").removesuffix("]+")
    letter = f"[^{inside}{UNSPACED}]"
    return re.compile(rf"(\s*)([{UNSPACED}]|{letter}+(?:['’\-]{letter}+)*|\S)")


def tokenise(text: str) -> list[Token]:
    """Words and signs; in scripts without spaces every character is a word."""
    return [Token(match[2], match[1]) for match in _token_pattern().finditer(text.strip())]


def tokenise_at_spaces(text: str) -> list[Token]:
    """Words between white space, as alignment files count them."""
    return [Token(match[2], match[1]) for match in re.finditer(r"(\s*)(\S+)", text.strip())]


def spans(matrix: Sequence[Token], other: Sequence[Token], links: Links, unit: Unit) -> list[Span]:
    """Stretches that can be replaced."""
    if unit == "word":
        ranges = [(i, i + 1) for i, token in enumerate(matrix) if token.is_word]
    elif unit == "phrase":
        size = len(matrix)
        ranges = [(i, k) for i in range(size) for k in range(i + 2, min(i + LONGEST_PHRASE, size) + 1)]
        ranges = [(i, k) for i, k in ranges if all(t.is_word for t in matrix[i:k])]
    else:
        ends = [i for i, token in enumerate(matrix) if token.text in _CLAUSE_END]
        begins = [0, *(end + 1 for end in ends)]
        ranges = [(a, b) for a, b in zip(begins, [*ends, len(matrix)], strict=True) if a < b]
    found = []
    for begin, end in ranges:
        inside = [(i, j) for i, j in links if begin <= i < end]
        if not inside:
            continue
        first, last = min(j for _, j in inside), max(j for _, j in inside) + 1
        if any(first <= j < last and not begin <= i < end for i, j in links):
            continue
        own, others = len({i for i, _ in inside}), len({j for _, j in inside})
        if own < LINKED[unit] * (end - begin) or others < LINKED[unit] * (last - first):
            continue
        if unit != "clause" and not all(token.is_word for token in other[first:last]):
            continue
        if _text(matrix[begin:end]).casefold() != _text(other[first:last]).casefold():
            found.append(Span(begin, end, first, last))
    return found


def choose(candidates: Sequence[Span], words: int, ratio: float, rng: random.Random) -> list[Span]:
    """Stretches that do not overlap and together have about ``ratio`` of the sentence's words."""
    wanted = ratio * words
    taken: list[Span] = []
    done = 0.0
    for span in rng.sample(list(candidates), len(candidates)):
        size = span.end - span.begin
        if done + size / 2 <= wanted and all(span.end <= t.begin or t.end <= span.begin for t in taken):
            taken.append(span)
            done += size
    return sorted(taken, key=lambda span: span.begin)


def mix(
    matrix: Sequence[Token], other: Sequence[Token], chosen: Sequence[Span], tags: tuple[str, str]
) -> tuple[str, list[str], list[str]]:
    """``(text, tokens, tags)`` with the chosen stretches replaced. Names that stand in both are tagged as of no language."""
    tokens: list[Token] = []
    marks: list[str] = []
    names = _names(matrix) & _names(other)
    at = 0

    def tagged(some: Sequence[Token], tag: str) -> list[str]:
        return [tag if token.is_word and token.text.casefold() not in names else UNIVERSAL for token in some]

    for span in [*chosen, Span(len(matrix), len(matrix), 0, 0)]:
        tokens += matrix[at : span.begin]
        marks += tagged(matrix[at : span.begin], tags[0])
        new = list(other[span.other_begin : span.other_end])
        if new:
            new[0] = Token(_cased(new[0].text, matrix[span.begin].text, span), matrix[span.begin].space)
        tokens += new
        marks += tagged(new, tags[1])
        at = max(at, span.end)
    text = ""
    for place, token in enumerate(tokens):
        apart = token.space or (" " if place and _clash(tokens[place - 1].text, token.text, marks, place) else "")
        text += apart + token.text
    return text.strip(), [token.text for token in tokens], marks


def _names(tokens: Sequence[Token]) -> set[str]:
    return {token.text.casefold() for token in tokens if token.text[:1].isupper()}


def _cased(new: str, old: str, span: Span) -> str:
    """Capital or small first letter as its new place asks for; names keep theirs."""
    if span.begin == 0 and old[:1].isupper():
        return new[:1].upper() + new[1:]
    if span.other_begin == 0 and old[:1].islower() and new[1:].islower():
        return new[:1].lower() + new[1:]
    return new


def _clash(before: str, after: str, marks: Sequence[str], place: int) -> bool:
    """Whether two words of different languages would run together."""
    languages = {marks[place - 1], marks[place]} - {UNIVERSAL}
    return len(languages) == 2 and before[-1:].isalnum() and after[:1].isalnum()


def _text(tokens: Sequence[Token]) -> str:
    return " ".join(token.text for token in tokens)


def codeswitch(
    pairs: Iterable[tuple[Pair, Sequence[Token], Sequence[Token], Links]],
    *,
    languages: tuple[str, str],
    unit: Unit,
    ratio: float,
    matrix: Literal["source", "target", "each"] = "source",
    seed: int = 0,
) -> Iterator[dict[str, Any] | None]:
    """A mixed sentence per pair, or None where nothing could be replaced. Choices depend on the pair and the seed.

    Args:
        pairs: with the tokens of both sides and the links between them.
        languages: ISO 639 codes of source and target.
        ratio: share of the matrix sentence's words that is replaced, about.
        matrix: the side whose sentence is kept; ``each``: half of the pairs each.
    """
    for pair, source, target, links in pairs:
        rng = random.Random(content_hash(pair.source + "\0" + pair.target, seed))
        reverse = {"source": False, "target": True}.get(matrix)
        reverse = rng.random() < 0.5 if reverse is None else reverse
        kept, other = (target, source) if reverse else (source, target)
        own = {(j, i) for i, j in links} if reverse else links
        tags = languages[::-1] if reverse else languages
        words = sum(token.is_word for token in kept)
        chosen = choose(spans(kept, other, own, unit), words, ratio, rng)
        if not chosen:
            yield None
            continue
        text, tokens, marks = mix(kept, other, chosen, tags)
        yield {
            "text": text,
            "tokens": tokens,
            "tags": marks,
            "cmi": round(cmi(marks) or 0.0, 2),
            "matrix": tags[0],
            "embedded": tags[1],
            "from": {"file": Path(pair.file).name, "row": pair.row},
            **({"license": pair.license} if pair.license else {}),
        }
