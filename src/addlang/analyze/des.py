"""Dataset embedding similarity (two-phase paper, Definition 1): are two sets of instructions alike?

500 rows of each set are embedded, averaged, brought to length 1 and multiplied. The interval is a bootstrap over rows.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from addlang.analyze.base import Analysis, Context, Result
from addlang.analyze.encoders import LABSE, Check, Encoder, check_encoder, open_encoder, states_encoder, unit
from addlang.errors import AddlangError, AddlangWarning
from addlang.schema import DatasetSpec

if TYPE_CHECKING:
    import numpy as np

    from addlang.data.sources import Row

STATES = "states"


@dataclass(frozen=True)
class Similarity:
    """A DES with its bootstrap interval."""

    value: float
    low: float
    high: float


def similarity(
    one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Similarity:
    """DES of two sets of sentence vectors [n, d], [m, d]; their rows need not have length 1.

    Each set's rows are drawn anew for the interval. It says how sure the mean of *these sets* is, nothing about others.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)

    def means(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
        return unit(counts @ rows)

    value = float((unit(one.mean(0, keepdims=True)) * unit(other.mean(0, keepdims=True))).sum())
    drawn = (means(one) * means(other)).sum(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Similarity(value, min(float(low), value), max(float(high), value))


def sample_texts(spec: DatasetSpec, n: int, seed: int, what: str, base_dir: Any = None) -> list[str]:
    """``n`` random rows of a data set (all, if it has fewer), as text.

    Args:
        what: ``prompts``: what the user says (raw text: the row); ``rows``: the whole row.
    """
    from addlang.data.holdout import Scan
    from addlang.data.sources import read_rows

    source = read_rows(spec, base_dir=base_dir)
    rows = [row for _, row in Scan.of(source, n, seed=seed).smallest(n)]
    return [text_of(row, what) for row in rows]


def text_of(row: Row, what: str) -> str:
    if row.messages is None or what == "rows":
        return row.content
    return "\n".join(m["content"] for m in row.messages if m["role"] == "user") or row.content


class Des(Analysis):
    """Similarity of instruction sets, pair by pair."""

    kind: ClassVar[str] = "des"
    paper: ClassVar[str] = "Exploring Two-Phase Continual Instruction Fine-tuning, Definition 1 (Table 3)"
    summary: ClassVar[str] = "similarity of data sets (DES)"
    takes: ClassVar[str] = "datasets"

    datasets: tuple[str, ...] = Field((), description="compared; default: all")
    reference: str | None = Field(None, description="compare each set with this one; default: all pairs")
    encoder: str = Field(LABSE, description="hub id or directory, or 'states': mean hidden states of 'model'")
    model: str | None = Field(None, description="for encoder 'states'; default: the first of the models")
    layer: int | None = Field(None, ge=0, description="for encoder 'states'; default: at two thirds of the depth")
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    text: Literal["prompts", "rows"] = Field("prompts", description="embed what the user says, or whole rows")
    samples: int = Field(500, gt=1, description="rows per set (paper: 500)")
    seed: int = Field(0, ge=0)
    resamples: int = Field(1000, ge=100)
    max_tokens: int = Field(256, gt=0)

    def run(self, context: Context) -> Result:
        from addlang.progress import progress

        names = list(self.datasets) or list(context.texts)
        for name in [*names, *([self.reference] if self.reference else [])]:
            context.text(name)
        names = [n for n in names if n != self.reference]
        pairs = [(self.reference, n) for n in names] if self.reference else list(itertools.combinations(names, 2))
        if not pairs:
            raise AddlangError("DES compares at least two data sets", "name two files")
        encoder = self._encoder(context)
        check = require_check(encoder)
        vectors, sizes = {}, {}
        everyone = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
        with progress("embedding", total=len(everyone), unit="sets") as bar:
            for name in everyone:
                texts = sample_texts(context.text(name), self.samples, self.seed, self.text, context.base_dir)
                vectors[name], sizes[name] = unit(encoder.encode(texts)), len(texts)
                bar.update(len(vectors))
        found = {(a, b): similarity(vectors[a], vectors[b], resamples=self.resamples, seed=self.seed) for a, b in pairs}
        top = max(found, key=lambda p: found[p].value)
        return Result(
            sentence=f"The most alike of {len(found)} pair(s) are {top[0]} and {top[1]} "
            f"(DES {found[top].value:.3f}, by {encoder.name}).",
            columns=["sets", "DES", "95 % interval"],
            rows=[[f"{a}, {b}", f"{s.value:.3f}", f"[{s.low:.3f}, {s.high:.3f}]"] for (a, b), s in found.items()],
            data={"pairs": [{"sets": [a, b], **vars(s)} for (a, b), s in found.items()], "rows": sizes},
            settings={
                "encoder": encoder.name,
                "is_labse": encoder.is_labse,
                "embedded": self.text,
                "check": check.describe(),
            },
            notes=self._notes(encoder, check, sizes),
            draw=lambda figure: _draw(figure, found),
            size=(7.0, 0.34 * len(found) + 0.9),
        )

    def _encoder(self, context: Context) -> Encoder:
        if self.encoder != STATES:
            return open_encoder(self.encoder, pooling=self.pooling, max_tokens=self.max_tokens, device=context.device)
        names = list(context.models)
        if not names and self.model is None:
            raise AddlangError("encoder 'states' needs a model", "name one: --model MODEL")
        if self.model is not None and self.model not in context.models:
            from addlang.models import resolve

            directory = resolve(self.model)
        else:
            directory = context.model(self.model or names[0])
        return states_encoder(directory, layer=self.layer, max_tokens=self.max_tokens, device=context.device)

    def _notes(self, encoder: Encoder, check: Check, sizes: dict[str, int]) -> list[str]:
        notes = [f"Embedded: {'what the user says' if self.text == 'prompts' else 'whole rows'}."]
        if not encoder.is_labse:
            notes.append("Not LaBSE: these values cannot be compared with the paper's.")
        if not check.language_agnostic:
            notes.append(FAILED.format(encoder.name))
        short = [f"{n} ({size})" for n, size in sizes.items() if size < self.samples]
        if short:
            notes.append(f"Fewer than {self.samples} rows: {', '.join(short)}.")
        return notes


FAILED = (
    "The encoder failed the check of language: {} does not find translations, so a difference between these values may "
    "be one of language and script, not of content."
)


def require_check(encoder: Encoder) -> Check:
    """Try an encoder on texts of which it is known what is alike; warn where it is not language-agnostic.

    Raises:
        AddlangError: it cannot tell like from unlike in one language either: its similarities mean nothing.
    """
    check = check_encoder(encoder.encode, encoder.known)
    if not (check.tells or check.language_agnostic):
        raise AddlangError(
            f"encoder '{encoder.name}' knows nothing: of texts of which it is known what is alike, it puts "
            f"{check.subjects:.0%} nearest to one on their own subject (p {check.subjects_p:.3f}) and finds "
            f"{max(check.translations.values()):.0%} of translations at best",
            "use a trained sentence encoder such as LaBSE",
        )
    if not check.language_agnostic:
        warnings.warn(FAILED.format(encoder.name), AddlangWarning, stacklevel=2)
    return check


def _draw(figure: Any, found: dict[tuple[str, str], Similarity]) -> None:
    axes = figure.add_subplot()
    for y, s in enumerate(found.values()):
        axes.plot([s.low, s.high], [y, y], color="#0b69a6", linewidth=1.5)
        axes.plot(s.value, y, "o", color="#0b69a6", markersize=4.5)
    axes.set_yticks(range(len(found)), [f"{a}, {b}" for a, b in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("DES")
