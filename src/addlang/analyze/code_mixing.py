"""How two or more languages are mixed within a text: CMI, M-index, I-index, language entropy, burstiness.

All are functions of a row of language tags, one per token; ``UNIV`` marks tokens of no language (numbers, names,
punctuation). The S-index of the literature is not here: its formula could not be found. Any other measure can be added
with :func:`register`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from addlang.analyze.base import Analysis, Context, Result
from addlang.errors import AddlangError

UNIVERSAL = "UNIV"
Metric = Callable[[Sequence[str]], "float | None"]


def cmi(tags: Sequence[str]) -> float | None:
    """Code-mixing index, ``100 (1 - max_i w_i / (n - u))`` (Das and Gambäck, 2014); None without a tagged token."""
    counts = _counts(tags)
    return 100.0 * (1 - max(counts.values()) / sum(counts.values())) if counts else None


def m_index(tags: Sequence[str]) -> float | None:
    """Multilingual index, ``(1 - sum p^2) / ((k - 1) sum p^2)`` over the k languages present (Barnett et al., 2000).

    0 for one language, 1 for equal shares.
    """
    counts = _counts(tags)
    if not counts:
        return None
    if len(counts) == 1:
        return 0.0
    total = sum(counts.values())
    squares = sum((c / total) ** 2 for c in counts.values())
    return (1 - squares) / ((len(counts) - 1) * squares)


def i_index(tags: Sequence[str]) -> float | None:
    """Share of places between tagged tokens where the language switches (Guzmán et al., 2017)."""
    own = _tagged(tags)
    return sum(a != b for a, b in itertools.pairwise(own)) / (len(own) - 1) if len(own) > 1 else None


def entropy(tags: Sequence[str]) -> float | None:
    """Bits of the distribution over languages."""
    counts = _counts(tags)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0 if counts else None


def burstiness(tags: Sequence[str]) -> float | None:
    """``(s - m) / (s + m)`` of the lengths of one-language spans (Goh and Barabási, 2008), ``s`` the sample deviation.

    -1: all of one length; towards 1: bursts. None for fewer than two spans.
    """
    spans = [len(list(group)) for _, group in itertools.groupby(_tagged(tags))]
    if len(spans) < 2:
        return None
    deviation, mean = statistics.stdev(spans), statistics.fmean(spans)
    return (deviation - mean) / (deviation + mean)


METRICS: dict[str, Metric] = {
    "CMI": cmi,
    "M-index": m_index,
    "I-index": i_index,
    "entropy": entropy,
    "burstiness": burstiness,
}


def register(name: str, metric: Metric) -> None:
    """Add a measure of a row of tags, such as an S-index, to every later analysis."""
    METRICS[name] = metric


def _tagged(tags: Sequence[str]) -> list[str]:
    return [t for t in tags if t != UNIVERSAL]


def _counts(tags: Sequence[str]) -> Counter[str]:
    return Counter(_tagged(tags))


_WORD = re.compile(r"\w[\w'’\u0300-\u036f\u0900-\u0963]*|\S")
_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "TELUGU", "THAI",
            "ETHIOPIC", "HANGUL", "HIRAGANA", "KATAKANA", "CJK", "GEORGIAN", "ARMENIAN", "KHMER", "MYANMAR", "LAO",
            "GUJARATI", "GURMUKHI", "KANNADA", "MALAYALAM", "SINHALA", "TIBETAN", "ORIYA")  # fmt: skip


def tag_by_script(text: str, languages: Mapping[str, str]) -> list[str]:
    """One tag per word: the language of the script that most of its letters are in.

    Args:
        languages: script, as Unicode names it in lower case (``latin``), -> tag; others are tagged by their script.
    """
    tags = []
    for word in _WORD.findall(text):
        scripts = Counter(_script(c) for c in word if unicodedata.category(c)[0] in "LM")
        scripts.pop("", None)
        best = scripts.most_common(1)[0][0].lower() if scripts else ""
        tags.append(languages.get(best, best) if best else UNIVERSAL)
    return tags


@functools.lru_cache(maxsize=4096)
def _script(character: str) -> str:
    name = unicodedata.name(character, "")
    return next((s for s in _SCRIPTS if name.startswith(s)), "")


class CodeMixing(Analysis):
    """Code-mixing of texts, row by row."""

    kind: ClassVar[str] = "code-mixing"
    paper: ClassVar[str] = "Das and Gambäck (2014); Guzmán et al., Metrics for Modeling Code-Switching (2017)"
    summary: ClassVar[str] = "code-mixing of texts"
    takes: ClassVar[str] = "datasets"

    datasets: tuple[str, ...] = Field((), description="default: all")
    column: str | None = Field(None, description="column with the text; default: as a data set of a recipe is read")
    tags: str | None = Field(None, description="column with one language tag per token; no tagger is used then")
    tagger: Literal["script"] = Field("script", description="script: the language of a word is that of its letters")
    scripts: dict[str, str] = Field({}, description="script -> language, such as {latin: en, devanagari: hi}")
    limit: int | None = Field(None, gt=0, description="rows read per set")

    @model_validator(mode="after")
    def _scripts_are_lower_case(self) -> CodeMixing:
        unknown = [s for s in self.scripts if s.upper() not in _SCRIPTS]
        if unknown:
            raise ValueError(f"unknown script '{unknown[0]}'; known are {', '.join(sorted(_SCRIPTS)).lower()}")
        return self

    def run(self, context: Context) -> Result:
        from addlang.analyze.plots import draw_shares

        names = list(self.datasets) or list(context.texts)
        if not names:
            raise AddlangError("there is no text to look at", "name a file")
        found = {name: summary(self._tags(context, name)) for name in names}
        most = max(found, key=lambda n: found[n]["CMI"] or 0.0)
        columns = list(METRICS)
        return Result(
            sentence=(
                f"Most mixed: {most}, with a mean CMI of {found[most]['CMI']:.1f} and {found[most]['mixed_rows']:.0%} of its "
                "rows in more than one language."
                if found[most]["CMI"]
                else "No row is in more than one language, as far as the tags can tell."
            ),
            columns=["set", "rows", "mixed rows", *columns],
            rows=[
                [
                    n,
                    f"{s['rows']:,}",
                    f"{s['mixed_rows']:.1%}",
                    *("-" if s[c] is None else f"{s[c]:.4f}" for c in columns),
                ]
                for n, s in found.items()
            ],
            data={"sets": found},
            draw=lambda figure: draw_shares(figure, {n: s["languages"] for n, s in found.items()}),
            size=(7.0, 0.42 * len(found) + 1.0),
            settings={"languages_from": self.tags or self.tagger},
            notes=[
                "Means over rows for which the measure is defined: CMI over rows with a tagged token, I-index over rows "
                "with two, burstiness over rows with two spans.",
                "The S-index is not given: its formula could not be found.",
                *(
                    []
                    if self.tags
                    else ["Tagged by script: languages that share a script (Hausa in English) count as one."]
                ),
            ],
        )

    def _tags(self, context: Context, name: str) -> list[list[str]]:
        from addlang.data.sources import read_rows

        spec = context.text(name)
        if self.limit:
            spec = spec.model_copy(update={"limit": self.limit})
        if self.tags is not None:
            return _stored_tags(spec, self.tags, self.limit, context)
        if self.column is not None:
            spec = spec.model_copy(update={"format": "text", "text_column": self.column})
        return [tag_by_script(row.content, self.scripts) for row in read_rows(spec, base_dir=context.base_dir)]


def _stored_tags(spec: Any, column: str, limit: int | None, context: Context) -> list[list[str]]:
    from addlang.data.readers import read_records, row_error
    from addlang.data.sources import read_rows

    rows = []
    for file in read_rows(spec, base_dir=context.base_dir).files or []:
        for line, record in itertools.islice(read_records(file), limit):
            value = record.get(column)
            tags = value.split() if isinstance(value, str) else value
            if not isinstance(tags, list) or not tags or not all(isinstance(t, str) for t in tags):
                raise row_error(str(file), line, f"column '{column}' is no list of tags", 'write ["en", "hi", "UNIV"]')
            rows.append([UNIVERSAL if t.upper() == UNIVERSAL else t for t in tags])
    if not rows:
        raise AddlangError(f"{spec.path}: there are no rows with tags", "give a local file")
    return rows


def summary(rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Means of every metric over rows, and the shares of languages over all tokens."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    tokens: Counter[str] = Counter()
    for tags in rows:
        tokens.update(tags)
        for name, metric in METRICS.items():
            value = metric(tags)
            if value is not None:
                values[name].append(value)
    total = sum(tokens.values())
    return {
        "rows": len(rows),
        "mixed_rows": sum(len(_counts(tags)) > 1 for tags in rows) / len(rows),
        **{name: statistics.fmean(v) if v else None for name, v in values.items()},
        "languages": {tag: n / total for tag, n in tokens.most_common()},
    }
