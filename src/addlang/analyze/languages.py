"""In which languages are replies? Sentence by sentence with py3langid, or whole replies with GlotLID as the SSU paper.

The SSU paper's rule for a reply to an English prompt (its code-mixing measure on AlpacaEval): the reply is not English if
GlotLID's first choice is not English, or if P(English) is below 0.9 where only English and the target are possible.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from addlang.analyze.base import Analysis, Context, Result
from addlang.errors import AddlangError

THRESHOLD = 0.9
Predict = Callable[[str], dict[str, float]]


def load_fasttext(path: Path) -> Predict:
    """A fastText model file (its own binary format, no pickle): text -> probability of every label, such as eng_Latn.

    Raises:
        AddlangError: the file or the package is missing, or the file is no fastText model.
    """
    if not path.is_file():
        raise AddlangError(
            f"GlotLID model '{path}' does not exist", "download model.bin of cis-lmu/glotlid and give its path"
        )
    try:
        import fasttext
    except ImportError as error:
        raise AddlangError(
            f"GlotLID needs the package fasttext ({error})",
            "install it: pip install fasttext-wheel, or leave glotlid out",
        ) from error
    try:
        model = fasttext.load_model(str(path))
    except (ValueError, MemoryError) as error:
        raise AddlangError(f"'{path}' is no fastText model ({error})", "download it again") from error

    def predict(text: str) -> dict[str, float]:
        # the inner call: the wrapper's fails with numpy 2
        found = model.f.predict(" ".join(text.split()) + "\n", -1, 0.0, "strict")
        return {label.removeprefix("__label__"): float(p) for p, label in found}

    return predict


def is_expected(probabilities: dict[str, float], expected: str, target: str, threshold: float = THRESHOLD) -> bool:
    """The SSU paper's rule; labels such as ``eng_Latn`` or codes such as ``eng``, which stand for every script of it."""

    def belongs(label: str, code: str) -> bool:
        return label == code or label.split("_")[0] == code

    best = max(probabilities, key=lambda k: probabilities[k])
    own = sum(p for label, p in probabilities.items() if belongs(label, expected))
    other = sum(p for label, p in probabilities.items() if belongs(label, target))
    return belongs(best, expected) and own >= threshold * (own + other)


class Languages(Analysis):
    """Language of replies: from files, or from the replies stored in a run."""

    kind: ClassVar[str] = "languages"
    paper: ClassVar[str] = "SSU paper, code-mixing of replies (with GlotLID); py3langid by sentence otherwise"
    summary: ClassVar[str] = "language of replies"
    takes: ClassVar[str] = "datasets"

    datasets: tuple[str, ...] = Field((), description="default: all; without any, the replies stored in the run")
    column: str = Field("output", description="column with the reply")
    expected: str = Field("en", description="language that replies should be in; for GlotLID eng")
    glotlid: str | None = Field(None, description="GlotLID's model.bin: judge whole replies by the SSU paper's rule")
    target: str | None = Field(None, description="with glotlid: the target language, such as ibo or ibo_Latn")
    limit: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _glotlid_needs_codes(self) -> Languages:
        if self.glotlid is not None and (self.target is None or len(self.target.split("_")[0]) != 3):
            raise ValueError("glotlid needs target, a three-letter code such as ibo or ibo_Latn")
        return self

    def run(self, context: Context) -> Result:
        replies = self._replies(context)
        return self._by_reply(context, replies) if self.glotlid else self._by_sentence(replies)

    def _replies(self, context: Context) -> dict[str, list[str]]:
        names = list(self.datasets) or list(context.texts)
        if names:
            return {name: _column(context, name, self.column, self.limit) for name in names}
        stored = {} if context.run is None else stored_replies(context.run)
        if not stored:
            raise AddlangError(
                "there are no replies to look at", "name files with replies, or a run that measured replies"
            )
        return {label: texts[: self.limit] for label, texts in stored.items()}

    def _by_sentence(self, replies: dict[str, list[str]]) -> Result:
        from addlang.evaluate.replies import identifier_name, identify, is_judged, known_languages, sentences

        if self.expected not in known_languages():
            raise AddlangError(
                f"{identifier_name()} does not know the language '{self.expected}'", "give its ISO 639-1 code"
            )
        found: dict[str, Any] = {}
        for name, texts in replies.items():
            counts: Counter[str] = Counter()
            mixed = judged = 0
            for text in texts:
                codes = [identify(s)[0] for s in sentences(text) if is_judged(s)]
                counts.update(codes)
                judged += bool(codes)
                mixed += any(c != self.expected for c in codes)
            total = sum(counts.values())
            found[name] = {
                "replies": len(texts),
                "judged_replies": judged,
                "sentences": total,
                "languages": {c: n / total for c, n in counts.most_common()},
                "expected": counts[self.expected] / total if total else None,
                "replies_with_other": mixed / judged if judged else None,
            }
        return self._result(found, identifier_name(), "sentences", [
            "Judged sentence by sentence; sentences of fewer than three words or fifteen letters are not judged.",
            "py3langid calls about 97 % of plain English sentences English: compare with the model before, not with 100 %.",
        ])  # fmt: skip

    def _by_reply(self, context: Context, replies: dict[str, list[str]]) -> Result:
        from addlang.schema import beside

        assert self.glotlid is not None
        assert self.target is not None
        predict = load_fasttext(beside(self.glotlid, context.base_dir))
        expected = "eng" if self.expected == "en" else self.expected
        found = {}
        for name, texts in replies.items():
            judged = [predict(t) for t in texts if t.strip()]
            if not judged:
                raise AddlangError(f"'{name}' holds no reply that is not empty", "check the column")
            first = Counter(max(p, key=lambda k: p[k]) for p in judged)
            ok = sum(is_expected(p, expected, self.target) for p in judged)
            found[name] = {
                "replies": len(texts),
                "judged_replies": len(judged),
                "languages": {c: n / len(judged) for c, n in first.most_common()},
                "expected": ok / len(judged),
                "replies_with_other": 1 - ok / len(judged),
            }
        rule = f"A reply counts as {expected} if it is the first choice and P >= {THRESHOLD} among {expected} and {self.target}."
        return self._result(found, f"GlotLID ({self.glotlid})", "replies", [rule])

    def _result(self, found: dict[str, Any], identifier: str, unit: str, notes: Sequence[str]) -> Result:
        from addlang.analyze.plots import draw_shares

        def share(value: float | None) -> str:
            return "not judged" if value is None else f"{value:.1%}"

        return Result(
            sentence="; ".join(
                f"{n}: not judged"
                if s["expected"] is None
                else f"{n}: {s['expected']:.1%} of {unit} in '{self.expected}'"
                for n, s in found.items()
            )
            + ".",
            columns=[
                "set",
                "replies",
                f"{unit} judged",
                f"{unit} in {self.expected}",
                "replies with another language",
                "most frequent",
            ],
            rows=[
                [
                    n,
                    f"{s['replies']:,}",
                    f"{s.get('sentences', s['judged_replies']):,}",
                    share(s["expected"]),
                    share(s["replies_with_other"]),
                    ", ".join(f"{c} {p:.1%}" for c, p in list(s["languages"].items())[:5]),
                ]
                for n, s in found.items()
            ],
            data={"sets": found},
            settings={"identifier": identifier},
            notes=notes,
            draw=lambda figure: draw_shares(figure, {n: f["languages"] for n, f in found.items()}),
            size=(7.0, 0.42 * len(found) + 1.0),
        )


def _column(context: Context, name: str, column: str, limit: int | None) -> list[str]:
    from addlang.data.readers import read_records, row_error
    from addlang.data.sources import read_rows

    spec = context.text(name)
    texts: list[str] = []
    for file in read_rows(spec, base_dir=context.base_dir).files or []:
        for line, record in read_records(file):
            value = record.get(column)
            if not isinstance(value, str):
                names = ", ".join(sorted(record))
                raise row_error(str(file), line, f"there is no text in column '{column}'", f"columns are {names}")
            texts.append(value)
    if not texts:
        raise AddlangError(f"{spec.path}: no local file with replies", "give a local file")
    return texts[:limit]


def stored_replies(run: Path) -> dict[str, list[str]]:
    """Model -> replies to the prompts, as ``addlang`` measured them in a run."""
    found: dict[str, list[str]] = {}
    for file in sorted((run / "samples").glob("*/replies.*.json")):
        items = json.loads(file.read_text(encoding="utf-8")).get("items") or []
        texts = [str(i["detail"]["reply"]) for i in items if "reply" in i.get("detail", {})]
        if texts:
            found.setdefault(file.parent.name, texts)
    return dict(sorted(found.items(), key=lambda kv: (kv[0] == "after", kv[0] != "before")))
