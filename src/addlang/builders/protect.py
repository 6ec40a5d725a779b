"""What a translator must not touch: code, addresses, files, numbers with units, placeholders, formatting, names.

Every such stretch is replaced by a mark such as ``⟦3⟧`` before translation and put back afterwards. A translation in which
a mark is missing, stands twice or was never given is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from addlang.builders.code import code_spans

_UNITS = (
    "km/h|m/s|mph|kmh|km²|km2|m²|m2|m³|m3|cm²|cm³|km|cm|mm|µm|nm|kg|mg|µg|lbs?|oz|ml|mL|dl|cl|GHz|MHz|kHz|Hz|kWh|kW|MW|GW|mA|mAh|"
    "KB|MB|GB|TB|kb|Mbps|Gbps|fps|dpi|px|pt|rpm|kcal|kJ|hPa|kPa|psi|dB|°C|°F|°|ppm|m|g|l|L|W|V|A|J|N|K"
)
_FILES = (
    "py|ipynb|js|ts|tsx|java|cpp|cs|go|rs|rb|php|sh|bat|sql|html?|css|json|ya?ml|toml|ini|xml|csv|tsv|txt|md|log|cfg|pdf|"
    "docx?|xlsx?|pptx?|png|jpe?g|gif|svg|mp[34]|wav|zip|gz|exe|dll"
)
_NUMBER = r"\d+(?:[.,]\d+)*"
_KINDS = (
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)",  # fenced code
    r"`[^`\n]+`",
    r"(?:https?|ftp)://[^\s<>\"'`）】」』]*[^\s<>\"'`.,;:!?()\[\]{}）】」』。，]|www\.[^\s<>\"']*[^\s<>\"'.,;:!?)]",
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    r"\{\{[^{}\n]*\}\}|\$\{[^{}\n]*\}|\{[\w.:!%-]*\}",  # {{x}}, ${VAR}, {x}
    r"(?<![\w%])%(?:\(\w+\))?[-+0#]*\d*(?:\.\d+)?[sdifgxXeu](?!\w)",  # %s, %(name)d, %.2f
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$[^$\n]*[\\^_={}][^$\n]*\$|\$[A-Za-z]\$",  # formulas
    r"</?[A-Za-z][^<>\n]{0,300}>|<!--.*?-->",
    r"\$[A-Z_][A-Z0-9_]+|\[[A-Z][A-Z0-9_]*\]|_{2,}(?!\w)",  # $HOME, [NAME], ____
    r"(?<=[{,])\s*\"(?:[^\"\\\n]|\\.)*\"\s*:",  # keys of JSON
    r"(?<![\w@-])(?:[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+|[a-z]{2,}[A-Z][A-Za-z0-9]*)(?:\(\))?(?![\w-])|(?<!\w)[A-Za-z_][\w.]*\(\)",
    rf"(?<![\w./-])[\w-]+\.(?:{_FILES})(?!\w)|(?<![\w/<:.])(?:~|\.{{1,2}})?(?:/[\w.-]*\w){{2,}}/?|(?<!\w)[A-Z]:\\[\w\\.-]*\w",
    rf"[€$£¥₦]\s?{_NUMBER}|{_NUMBER}\s?(?:[€£¥₦]|(?:%|{_UNITS})(?![\w%]))",
    r"(?<![\d:])\d{4}-\d{2}-\d{2}(?![\d-])|(?<![\d:])\d{1,2}:\d{2}(?::\d{2})?(?![\d:])",  # dates and times
    r"^[ \t]*(?:#{1,6}|[-*+•]|\d{1,3}[.)]|[A-Za-z][.)]|>)[ \t]+|^[ \t]*\|?(?:[ \t]*:?-{3,}:?[ \t]*\|?)+[ \t]*$",  # lists, headings
)
COUNTED = ("**", "__", "|")  # formatting inside a line: too frequent for marks, so only counted


@dataclass(frozen=True)
class Protector:
    """How texts are protected.

    Attributes:
        names: words that are kept (mapped to themselves) or always translated in the same way.
        mark: with ``{}`` for the number; must survive the translator's tokenizer.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    mark: str = "⟦{}⟧"

    def __post_init__(self) -> None:
        before, after = (re.escape(part) for part in self.mark.split("{}"))
        names = sorted(self.names, key=len, reverse=True)
        own = [rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)"] if names else []
        found = re.compile(
            "|".join(f"(?:{kind})" for kind in (rf"{before}\s*\d+\s*{after}", *_KINDS[:-1], *own, _KINDS[-1])),
            re.DOTALL | re.MULTILINE,
        )
        object.__setattr__(self, "_pattern", found)
        object.__setattr__(self, "_marks", re.compile(rf"{before}\s*(\d+)\s*{after}"))

    def protect(self, text: str, *, across_lines: bool = True) -> Protected:
        """The text with marks, and what they stand for. Stretches that only white space separates share a mark.

        Args:
            across_lines: white space may hold line ends; not where the text is still to be cut at them.
        """
        pattern: re.Pattern[str] = self._pattern  # type: ignore[attr-defined]
        groups: list[list[tuple[int, int]]] = []  # of one mark each
        for begin, end in sorted([*(match.span() for match in pattern.finditer(text)), *code_spans(text)]):
            last = groups[-1][-1] if groups else (0, 0)
            between = text[last[1] : begin]
            if begin == end:
                continue
            if groups and begin < last[1]:
                groups[-1][-1] = (last[0], max(end, last[1]))
            elif groups and not between.strip() and (across_lines or "\n" not in between):
                groups[-1].append((begin, end))
            else:
                groups.append([(begin, end)])
        pieces: list[str] = []
        kept: list[str] = []
        at = 0
        for group in groups:
            pieces += [text[at : group[0][0]], self.mark.format(len(kept) + 1)]
            at, stretch = group[0][0], ""
            for begin, end in group:
                stretch += text[at:begin] + self._as_kept(text[begin:end])
                at = end
            kept.append(stretch)
        return Protected("".join([*pieces, text[at:]]), tuple(kept))

    def part(self, piece: str, whole: Protected) -> Protected:
        """A piece of a protected text with marks of its own, counted from 1."""
        marks: re.Pattern[str] = self._marks  # type: ignore[attr-defined]
        kept: list[str] = []

        def own(match: re.Match[str]) -> str:
            kept.append(whole.kept[int(match[1]) - 1])
            return self.mark.format(len(kept))

        text = marks.sub(own, piece)
        return Protected(text, tuple(kept))

    def _as_kept(self, span: str) -> str:
        return self.names.get(span, span)

    def restore(self, reply: str, protected: Protected) -> tuple[str, str | None]:
        """``(text, problem)``: the reply with the marks replaced; the problem names marks that are lost, new or double."""
        marks: re.Pattern[str] = self._marks  # type: ignore[attr-defined]
        seen = [int(number) for number in marks.findall(reply)]
        wanted = range(1, len(protected.kept) + 1)
        missing = [n for n in wanted if n not in seen]
        double = sorted({n for n in seen if seen.count(n) > 1})
        unknown = sorted({n for n in seen if n not in wanted})
        problems = [
            f"{what} {', '.join(self.mark.format(n) for n in numbers)}"
            for what, numbers in (("lost", missing), ("repeated", double), ("invented", unknown))
            if numbers
        ]
        if problems:
            return reply, "; ".join(problems)
        text = marks.sub(lambda match: protected.kept[int(match[1]) - 1], reply)
        for sign in COUNTED:
            if (before := protected.text.count(sign)) != (after := reply.count(sign)):
                return text, f"{after} of {before} '{sign}'"
        return text, None

    def prose(self, text: str) -> str:
        """What is left of a text with marks when the marks are taken out."""
        marks: re.Pattern[str] = self._marks  # type: ignore[attr-defined]
        return marks.sub(" ", text)


@dataclass(frozen=True)
class Protected:
    """A text with marks; ``kept[i]`` is what mark ``i + 1`` stands for."""

    text: str
    kept: tuple[str, ...]


def has_prose(text: str) -> bool:
    """Whether anything can be translated: two letters in a row, in any script."""
    run = 0
    for character in text:
        run = run + 1 if unicodedata.category(character)[0] in "LM" else 0
        if run == 2:
            return True
    return False
