"""The three figures at the top of a report: kept, gained, proved. State in words, not in colour alone."""

from __future__ import annotations

from dataclasses import dataclass

from addlang.report import numbers
from addlang.report.files import RunData
from addlang.report.verdict import BITS, Change, averaged, gained, kept, proof_totals

_STATES = {
    "better": ("good", "▲ better; the interval excludes zero"),
    "worse": ("bad", "▼ worse; the interval excludes zero"),
    "unclear": ("unsure", "≈ no change shown; the interval includes zero"),
    "no interval": ("none", "– no interval, so no statement"),
}


@dataclass(frozen=True)
class Tile:
    """``kind`` is one of good, bad, unsure, none."""

    kind: str
    label: str
    big: str
    more: str
    state: str


def tiles_of(run: RunData) -> list[Tile]:
    """Kept, gained, proved."""
    source, target = numbers.language_name(run.source_language), numbers.language_name(run.language)
    return [
        _kept(f"{source} kept", kept(run)),
        _gained(f"{target} gained", gained(run)),
        _proof(run),
    ]


def _kept(label: str, change: Change | None) -> Tile:
    if change is None:
        return Tile("none", label, "not run", "", "– not measured")
    kind, state = _STATES[change.outcome]
    bits = change.tasks[0].metric in BITS
    if bits:
        return Tile(kind, label, *_bits(change), state)
    low, high = (None if v is None else 1 + v for v in (change.low, change.high))
    more = f"{numbers.interval(low, high, 'share')} of {_what(change)}"
    return Tile(kind, label, numbers.percent(1 + change.change), more, state)


def _gained(label: str, change: Change | None) -> Tile:
    if change is None:
        return Tile("none", label, "not run", "", "– not measured")
    kind, state = _STATES[change.outcome]
    if change.tasks[0].metric in BITS:
        return Tile(kind, label, *_bits(change), state)
    big, _, _ = numbers.relative(change.change, None, None).partition(" (")
    return Tile(
        kind, label, big, f"{numbers.interval(change.low, change.high, 'share', True)} in {_what(change)}", state
    )


def _bits(change: Change) -> tuple[str, str]:
    """Big number and the line below it, in the metric's own direction."""
    big, _, _ = numbers.relative(-change.change, None, None).partition(" (")
    low, high = (None if v is None else -v for v in (change.high, change.low))
    return big, f"{numbers.interval(low, high, 'share', True)} bits per byte"


def _what(change: Change) -> str:
    if len(change.tasks) == 1:
        return f"{numbers.metric_name(change.tasks[0].metric)} ({change.tasks[0].task})"
    return f"scores, {averaged(change.tasks)}"


def _proof(run: RunData) -> Tile:
    proof = proof_totals(run)
    if proof is None:
        return Tile("none", "Proof", "not run", "", "– not checked")
    if not proof.ok:
        return Tile("bad", "Proof", f"{proof.changed:,} changed", f"of {proof.frozen:,} frozen elements", "✕ failed")
    if not proof.frozen:
        return Tile("none", "Proof", "0 frozen", "nothing was declared frozen", "– nothing to check")
    return Tile("good", "Proof", "0 changed", f"of {proof.frozen:,} frozen elements", "✓ bit-identical to the source")
