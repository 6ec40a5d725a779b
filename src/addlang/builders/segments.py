"""Texts in the pieces that a translation model takes: whole, or sentence by sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Unit = Literal["text", "sentence"]
# a full stop ends a sentence before white space only; the marks of other scripts end one anywhere
_BORDER = re.compile(r"(?<=[.!?؟۔])[\"'”’»)\]]*\s+|(?<=[।॥።፧。！？])[\"'”’」』)\]]*\s*|\s*\n\s*")


def split(text: str, unit: Unit) -> list[tuple[str, str]]:
    """``(piece, what stands behind it)``; joined they are the text. White space stands at no end of a piece."""
    if unit == "text":
        return _stripped(text, "")
    pieces, at = [], 0
    for border in _BORDER.finditer(text):
        if border.end() == at:
            continue
        quotes = len(border[0]) - len(
            border[0].lstrip("\"'”’»)]」』")
        )  # closing quotation marks belong to the sentence
        pieces += _stripped(text[at : border.start() + quotes], text[border.start() + quotes : border.end()])
        at = border.end()
    return pieces + _stripped(text[at:], "")


def _stripped(piece: str, behind: str) -> list[tuple[str, str]]:
    inner = piece.strip()
    if not inner:
        return [("", piece + behind)]
    begin = piece.index(inner)
    lead = [("", piece[:begin])] if begin else []
    return [*lead, (inner, piece[begin + len(inner) :] + behind)]


def join(pieces: Sequence[tuple[str, str]]) -> str:
    """The text of pieces with what stands behind them."""
    return "".join(piece + behind for piece, behind in pieces)
