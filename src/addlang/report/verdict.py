"""What a run shows, in words. An interval that includes zero is never called a gain or a loss."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from addlang.evaluate.measurement import by_items
from addlang.report import numbers
from addlang.report.files import Comparison, RunData, read_run
from addlang.report.phases import stopped_sentence

Outcome = Literal["better", "worse", "unclear", "no interval", "not run"]
BITS = ("answer_bits_per_byte", "bits_per_byte")  # what the first measures, the second measures less well
ROLES = ("source", "target", "safety")  # in the order in which they are shown


@dataclass(frozen=True)
class Change:
    """Mean relative change over tasks; plus is better whatever the metric's direction.

    The interval adds half-widths in quadrature where items are different, so that they are independent, and linearly where
    several metrics are about the same items: as if these erred alike, which is never too narrow.
    """

    change: float
    low: float | None
    high: float | None
    tasks: tuple[Comparison, ...]

    @property
    def outcome(self) -> Outcome:
        """What the interval allows one to say."""
        return outcome(self.low, self.high)


def outcome(low: float | None, high: float | None) -> Outcome:
    """Read an interval of an improvement."""
    if low is None or high is None:
        return "no interval"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def mean_change(rows: Sequence[Comparison]) -> Change | None:
    """Mean relative change over the rows that have one; None where none has."""
    pairs = [(row, r) for row in rows if (r := row.relative_improvement()) is not None]
    if not pairs:
        return None
    k = len(pairs)
    mean = math.fsum(r[0] for _, r in pairs) / k
    down = [None if r[1] is None else r[0] - r[1] for _, r in pairs]
    up = [None if r[2] is None else r[2] - r[0] for _, r in pairs]
    low = high = None
    if None not in down and None not in up:
        groups = by_items(range(k), lambda i: _items_of(pairs[i][0]))
        low = mean - math.hypot(*(math.fsum(down[i] or 0.0 for i in group) for group in groups)) / k
        high = mean + math.hypot(*(math.fsum(up[i] or 0.0 for i in group) for group in groups)) / k
    return Change(mean, low, high, tuple(row for row, _ in pairs))


def _items_of(row: Comparison) -> str:
    """What the items of a row are called; runs of earlier versions do not say, and the metrics of one task share them."""
    return row.items_id or row.task


def averaged(rows: Sequence[Comparison]) -> str:
    """``mean over 3 tasks``; scores of the same items are not called tasks."""
    sets = len(by_items(rows, _items_of))
    if sets == len(rows):
        return f"mean over {len(rows)} tasks"
    return f"mean over {len(rows)} results on " + ("the same items" if sets == 1 else f"{sets} sets of items")


def rows_of(run: RunData, role: str) -> list[Comparison]:
    """Comparisons of one role."""
    return [c for c in run.comparison or [] if c.role == role]


class HasMetric(Protocol):
    """A comparison or a measurement."""

    @property
    def metric(self) -> str: ...


M = TypeVar("M", bound=HasMetric)


def about_replies(row: HasMetric) -> bool:
    """Whether a row says how the model replies (language, repetition): no ability, so not averaged with abilities."""
    return row.metric in ("sentences_in_language", "degenerate_replies")


def abilities(rows: Sequence[M]) -> list[M]:
    """Rows that measure what the model can do: neither bits per byte nor the manner of replies."""
    return [r for r in rows if r.metric not in BITS and not about_replies(r)]


def of_text(rows: Sequence[M]) -> list[M]:
    """Rows of bits per byte: of answers where conversations were measured, else of text."""
    return next((found for metric in BITS if (found := [r for r in rows if r.metric == metric])), [])


def kept(run: RunData) -> Change | None:
    """How much of the source language was kept: over abilities, or over bits per byte where no ability was measured."""
    rows = rows_of(run, "source")
    return mean_change(abilities(rows)) or mean_change(of_text(rows))


def gained(run: RunData) -> Change | None:
    """How much target language was gained: bits per byte, or abilities where that was not measured."""
    rows = rows_of(run, "target")
    return mean_change(of_text(rows)) or mean_change(abilities(rows))


@dataclass(frozen=True)
class Proof:
    """Totals over all phases."""

    ok: bool
    frozen: int
    changed: int
    trainable: int
    moved: int


def proof_totals(run: RunData) -> Proof | None:
    """Sums of the proof; None where it was not run."""
    if run.proof is None:
        return None
    phases = run.proof.get("phases") or []

    def total(key: str) -> int:
        return sum(int(p.get(key) or 0) for p in phases)

    changed = total("frozen_changed")
    ok = bool(run.proof.get("ok")) and changed == 0
    return Proof(ok, total("frozen_elements"), changed, total("trainable_elements"), total("trainable_moved"))


def finished(run: RunData) -> bool:
    """Whether the run came to its end."""
    return run.state.get("status") == "finished"


def verdict(out_dir: str | os.PathLike[str]) -> str:
    """One sentence: English kept, target gained, proof."""
    return verdict_of(read_run(out_dir))


def verdict_of(run: RunData) -> str:
    """:func:`verdict` of data already read."""
    parts = [source_sentence(run), target_sentence(run)]
    parts += replies_sentence(run)
    proof = proof_totals(run)
    if proof is not None and not proof.ok:
        parts.insert(0, proof_sentence(proof))
    else:
        parts.append(proof_sentence(proof))
    if stopped := stopped_sentence(run):
        parts.insert(0, stopped)
    if not finished(run):
        parts.insert(0, f"this run is not finished (status: {run.state.get('status') or 'unknown'})")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def source_sentence(run: RunData) -> str:
    """What happened to the source language."""
    name = numbers.language_name(run.source_language)
    change = kept(run)
    if change is None:
        return f"{name} was not measured" + _reason(run, "source")
    if all(r.metric in BITS for r in change.tasks):
        return _bits_sentence(name, change, "loss")
    text = _share(1 + change.change, _plus(change.low), _plus(change.high))
    what = _over(change.tasks)
    match change.outcome:
        case "better":
            return f"{name} improved to {text} of {what}"
        case "unclear":
            assert change.low is not None
            loss = numbers.percent(-change.low)
            return f"{name} kept {text} of {what}, which shows no loss but does not exclude one of {loss}"
        case _:
            return f"{name} kept {text} of {what}"


def target_sentence(run: RunData) -> str:
    """What happened to the target language."""
    name = numbers.language_name(run.language)
    change = gained(run)
    if change is None:
        return f"{name} was not measured" + _reason(run, "target")
    if all(r.metric in BITS for r in change.tasks):
        return _bits_sentence(name, change, "gain")
    what = _over(change.tasks)
    text = numbers.relative(change.change, change.low, change.high)
    match change.outcome:
        case "better":
            return f"{name} gained {text} in {what}"
        case "worse":
            return f"{name} got worse: {text} in {what}"
        case "unclear":
            return f"no gain in {name} is shown: {text} in {what}"
        case _:
            return f"{name} changed by {text} in {what}"


def _bits_sentence(name: str, change: Change, looked_for: str) -> str:
    amount, low, high = abs(change.change), change.low, change.high
    what = f"{name} text costs" if change.tasks[0].metric == "bits_per_byte" else f"{name} answers cost"
    if change.outcome == "unclear":
        minus = numbers.relative(-change.change, None if high is None else -high, None if low is None else -low)
        return f"no {looked_for} in {name} is shown: bits per byte changed by {minus}"
    if change.change >= 0:
        return f"{what} {_share(amount, low, high)} fewer bits per byte"
    flipped = _share(amount, None if high is None else -high, None if low is None else -low)
    return f"{what} {flipped} more bits per byte" + (": nothing was gained" if looked_for == "gain" else "")


def replies_sentence(run: RunData) -> list[str]:
    """Said only where free replies are shown to have become worse."""
    texts = []
    for row in rows_of(run, "source"):
        _, low, high = row.improvement()
        if about_replies(row) and outcome(low, high) == "worse":
            before, after = numbers.value(row.before, row.unit), numbers.value(row.after, row.unit)
            change = numbers.difference(row.difference, row.low, row.high, row.unit)
            texts.append(f"{reply_metric(row)} went from {before} to {after} ({change})")
    return texts


def reply_metric(row: Comparison) -> str:
    """``reply sentences in English``."""
    if row.metric == "sentences_in_language":
        return f"reply sentences in {numbers.language_name(row.language)}"
    return numbers.metric_name(row.metric)


def proof_sentence(proof: Proof | None) -> str:
    """What the proof says."""
    if proof is None:
        return "the proof was not run"
    counts = f"{proof.changed:,} of {proof.frozen:,} frozen elements changed"
    if not proof.ok:
        return f"THE PROOF FAILED: {counts}"
    return f"proof: {counts}" if proof.frozen else "proof: nothing was frozen, so there is nothing to check"


def _share(x: float, low: float | None, high: float | None) -> str:
    return numbers.with_interval(x, low, high, "share")


def _plus(x: float | None) -> float | None:
    return None if x is None else 1 + x


def _over(rows: Sequence[Comparison]) -> str:
    if len(rows) == 1:
        return f"{numbers.metric_name(rows[0].metric)} ({rows[0].task})"
    metrics = {numbers.metric_name(r.metric) for r in rows}
    what = metrics.pop() if len(metrics) == 1 else "scores"
    return f"{what} ({averaged(rows)})"


def _reason(run: RunData, role: str) -> str:
    zero = [c.task for c in rows_of(run, role)]
    if zero:
        return f" in relative terms: the value before is 0 ({', '.join(zero)})"
    return "" if run.comparison is not None else ": evaluation was not run"


def summary_rows(out_dir: str | os.PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """The final table of the terminal: (columns, rows), everything as text with units and intervals."""
    run = read_run(out_dir)
    columns = ["", "task", "metric", "before", "after", "difference [95 %]", "relative [95 %]", "n", "p (Holm)"]
    rows = []
    table = sorted(run.comparison or [], key=lambda c: (*ROLES, c.role).index(c.role))
    for c, adjusted in zip(table, holm_of(table), strict=True):
        rows.append(
            [
                role_name(run, c.role),
                c.task,
                reply_metric(c),
                numbers.value(c.before, c.unit),
                numbers.value(c.after, c.unit),
                numbers.difference(c.difference, c.low, c.high, c.unit),
                numbers.relative(c.relative, c.relative_low, c.relative_high),
                numbers.integer(c.n),
                numbers.p_value(adjusted),
            ]
        )
    for missing in run.state.get("not_run") or []:
        rows.append(["not run", str(missing.get("task")), str(missing.get("reason"))] + ["not run"] * 2 + ["-"] * 4)
    return columns, rows


def holm_of(rows: Sequence[Comparison]) -> list[float | None]:
    """p values of one table, corrected for their number."""
    from addlang.evaluate.statistics import holm

    return holm([r.p for r in rows])


def role_name(run: RunData, role: str) -> str:
    """``English kept``, ``Igbo gained``, ``safety``."""
    if role == "source":
        return f"{numbers.language_name(run.source_language)} kept"
    return f"{numbers.language_name(run.language)} gained" if role == "target" else role


def as_dict(change: Change | None) -> dict[str, Any] | None:
    """For ``--json``."""
    if change is None:
        return None
    tasks = [c.task for c in change.tasks]
    return {"change": change.change, "low": change.low, "high": change.high, "outcome": change.outcome, "tasks": tasks}
