"""One task measured on one model, kept item by item so that two models can be compared on the same items.

An item is a pair (numerator, denominator) and the value of the measurement is the ratio of the sums: accuracy has
denominator 1, bits per byte has bits over bytes, the share of English sentences has sentences over sentences. One
paired bootstrap therefore serves every metric.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from addlang.errors import AddlangError

if TYPE_CHECKING:
    import numpy as np

Role = Literal["source", "target", "safety"]
FORMAT = 1
T = TypeVar("T")


class NotMeasuredError(AddlangError):
    """Impossible to measure for this model or these data: reported as "not run" with the reason, never made up."""


@dataclass(frozen=True)
class Item:
    """One unit of a task.

    Attributes:
        id: names the item; the same for every model.
        numerator: what is counted (1 for a right answer, bits, sentences).
        denominator: out of how much (1, bytes, sentences); 0 where nothing could be judged.
        cluster: items of one cluster (questions on one passage) are not independent and are resampled together.
        detail: anything for the reader that JSON can hold, such as the reply.
    """

    id: str
    numerator: float
    denominator: float = 1.0
    cluster: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One task on one model.

    Attributes:
        task, version: what was measured; two versions are never compared.
        role: ``source`` (kept), ``target`` (gained) or ``safety``.
        language: ISO 639 code of the text.
        metric, unit: for example ``bits_per_byte`` in ``bits/byte``, ``accuracy`` in ``share``.
        higher_is_better: direction of the metric.
        items: at least one; their order does not matter.
        settings: everything else that determines the value (few-shot examples, decoding, window).
        aggregate, aggregate_stderr: value and standard error of a corpus-level metric (chrF, BLEU); its items then only
            name what was measured and carry the detail.

    Raises:
        NotMeasuredError: no items and no aggregate, or nothing that could be judged.
        AddlangError: repeated item ids or values that are no numbers.
    """

    task: str
    version: str
    role: Role
    language: str
    metric: str
    higher_is_better: bool
    items: tuple[Item, ...]
    settings: Mapping[str, Any]
    unit: str
    aggregate: float | None = None
    aggregate_stderr: float | None = None

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(item.id for item in self.items).items() if count > 1]
        if repeated:
            raise AddlangError(
                f"{self.task}: item id '{repeated[0]}' stands twice, so two models could not be compared item by item",
                "give every item its own id",
            )
        for item in self.items:
            if not (math.isfinite(item.numerator) and math.isfinite(item.denominator)) or item.denominator < 0:
                raise AddlangError(
                    f"{self.task}: item '{item.id}' has value {item.numerator} / {item.denominator}",
                    "NaN or infinity usually means that the model's weights or activations are broken",
                )
        if self.aggregate is None:
            if not self.items:
                raise NotMeasuredError(f"{self.task}: there is nothing to measure", "give the task at least one item")
            if sum(item.denominator for item in self.items) <= 0:
                raise NotMeasuredError(f"{self.task}: none of the {len(self.items)} items could be judged")
        elif not math.isfinite(self.aggregate):
            raise AddlangError(f"{self.task}: {self.metric} is {self.aggregate}", "the task's metric failed")

    @property
    def key(self) -> tuple[str, str]:
        """(task, metric): what identifies a measurement among those of one model."""
        return self.task, self.metric

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.items)

    @cached_property
    def items_id(self) -> str:
        """Names the items and their clusters. Metrics with the same one are no independent evidence: see :func:`by_items`."""
        names = sorted((i.id, *cluster_key(i)) for i in self.items)
        return hashlib.sha256(repr(names or self.task).encode()).hexdigest()[:16]  # some corpus metrics keep no items

    @cached_property
    def value(self) -> float:
        """Ratio of the sums, or the aggregate."""
        if self.aggregate is not None:
            return float(self.aggregate)
        return math.fsum(item.numerator for item in self.items) / math.fsum(item.denominator for item in self.items)

    @cached_property
    def stderr(self) -> float | None:
        """Standard error of the value over items (in the metric's unit); None where it cannot be known.

        Ratio estimator (delta method; Cochran, Sampling Techniques, 6.4): with residuals ``e = numerator - value *
        denominator`` summed by cluster, ``sqrt(C / (C - 1) * sum(e^2)) / sum(denominator)`` over C clusters. For a mean
        of independent items this is the usual ``s / sqrt(n)``.
        """
        if self.aggregate is not None:
            return self.aggregate_stderr
        sums = self.cluster_sums()
        c = len(sums)
        if c < 2:
            return None
        residuals = sums[:, 0] - self.value * sums[:, 1]
        return math.sqrt(c / (c - 1) * float((residuals**2).sum())) / float(sums[:, 1].sum())

    def cluster_sums(self) -> np.ndarray:
        """(C, 2) sums of numerators and denominators, in order of ids; an item without a cluster is its own."""
        import numpy as np

        groups: dict[tuple[str, str], list[float]] = {}
        for item in sorted(self.items, key=lambda i: i.id):
            sums = groups.setdefault(cluster_key(item), [0.0, 0.0])
            sums[0] += item.numerator
            sums[1] += item.denominator
        return np.array(list(groups.values()), dtype=np.float64).reshape(-1, 2)

    def row(self, *, model: str, phase: str, seed: int | None) -> dict[str, Any]:
        """Flat result row (``results.jsonl``); items stay in the measurement."""
        return {
            "model": model,
            "phase": phase,
            "task": self.task,
            "version": self.version,
            "role": self.role,
            "language": self.language,
            "metric": self.metric,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "value": self.value,
            "stderr": self.stderr,
            "n": self.n,
            "seed": seed,
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """JSON text with every item."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["items"] = [{f.name: getattr(i, f.name) for f in dataclasses.fields(Item)} for i in self.items]
        return json.dumps({"format": FORMAT, **data}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Inverse of :meth:`to_json`.

        Raises:
            AddlangError: the text is torn, not JSON, or of another format.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            data["items"] = tuple(Item(**item) for item in data["items"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, AddlangError):
                raise
            raise AddlangError(f"this is no measurement: {error}", "delete the file; it is measured again") from error


class NotRun(NamedTuple):
    """What could not be measured, and why. Shown as "not run"; no value takes its place."""

    task: str
    reason: str


@dataclass(frozen=True)
class Outcome(Sequence[Measurement]):
    """The measurements of one model, and what could not be measured. As a sequence: the measurements."""

    measurements: list[Measurement] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Measurement]: ...
    def __getitem__(self, index: int | slice) -> Measurement | Sequence[Measurement]:
        return self.measurements[index]

    def __len__(self) -> int:
        return len(self.measurements)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.measurements + other.measurements, self.not_run + other.not_run)

    def to_json(self) -> str:
        """JSON text with every item of every measurement."""
        parts = [json.loads(m.to_json()) for m in self.measurements]
        return json.dumps({"measurements": parts, "not_run": self.not_run}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Inverse of :meth:`to_json`; raises AddlangError as :meth:`Measurement.from_json` does."""
        try:
            data = json.loads(text)
            return cls(
                [Measurement.from_json(json.dumps(part)) for part in data["measurements"]],
                [NotRun(*part) for part in data["not_run"]],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AddlangError(f"these are no measurements: {error}", "delete the file; they are made again") from error


def cluster_key(item: Item) -> tuple[str, str]:
    """Key of an item's cluster; a cluster named like an item does not collide with it."""
    return ("item", item.id) if item.cluster is None else ("cluster", item.cluster)


def by_items(rows: Iterable[T], items_id: Callable[[T], str]) -> list[list[T]]:
    """Rows about the same items together, in order of the first of each: several metrics of one task, for example."""
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(items_id(row), []).append(row)
    return list(groups.values())
