"""Parallel text with its words and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from addlang.builders.align import Links, align, align_with_dictionary, read_alignments, read_dictionary
from addlang.builders.codeswitch import Token, Unit, tokenise, tokenise_at_spaces
from addlang.builders.parallel import Pair
from addlang.errors import AddlangError

Aligned = tuple[Pair, list[Token], list[Token], Links]


def aligned(
    pairs: Sequence[Pair], *, unit: Unit, dictionary: Path | None = None, alignments: Path | None = None
) -> list[Aligned]:
    """Words and links of every pair.

    Args:
        unit: of words only links found in both directions are used; of more, also those next to them.
        dictionary: word list to align with.
        alignments: links made elsewhere, a line for every pair of the input.

    Raises:
        AddlangError: both are given, one cannot be read, or a link is outside its sentence.
    """
    if dictionary is not None and alignments is not None:
        raise AddlangError("--dictionary and --alignments both say what is aligned", "give one of them")
    cut = tokenise if alignments is None else tokenise_at_spaces
    sources, targets = [cut(p.source) for p in pairs], [cut(p.target) for p in pairs]
    if alignments is not None:
        links = _checked(pairs, sources, targets, read_alignments(alignments), alignments)
    else:
        left, right = ([[token.text for token in tokens] for tokens in side] for side in (sources, targets))
        if dictionary is not None:
            links = align_with_dictionary(left, right, read_dictionary(dictionary))
        else:
            links = align(left, right, symmetry="intersect" if unit == "word" else "grow")
    return list(zip(pairs, sources, targets, links, strict=True))


def _checked(
    pairs: Sequence[Pair],
    sources: Sequence[list[Token]],
    targets: Sequence[list[Token]],
    all_links: list[Links],
    file: Path,
) -> list[Links]:
    found = []
    for pair, source, target in zip(pairs, sources, targets, strict=True):
        if pair.number >= len(all_links):
            raise AddlangError(
                f"{file} has {len(all_links)} lines, but there are more pairs", "it needs a line per pair"
            )
        links = all_links[pair.number]
        for i, j in links:
            if i >= len(source) or j >= len(target):
                raise AddlangError(
                    f"{file}, row {pair.number + 1}: link {i}-{j} is outside the sentences of {len(source)} and "
                    f"{len(target)} words ({pair.file}, row {pair.row})",
                    "words are what stands between spaces",
                )
        found.append(links)
    return found
