"""From finished runs to numbers: gained and kept per run, the front, and arms compared at equal gain."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from addlang.errors import AddlangError
from addlang.evaluate.statistics import Interval, holm, interpolate_at, paired_t, pareto_front, t_interval

SCALED = "after-x"  # label of w0 + a (w - w0) in results.jsonl, with a behind it
Point = tuple[float, float]  # gained, kept: both better when higher


def gather(path: Path) -> dict[str, Any]:
    """The numbers of a finished run: every result before and after, what it trained on, time and proof."""
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = f"{row['role']}/{row['metric']}/{row['task']}"
        entry = results.setdefault(key, {k: row[k] for k in ("unit", "higher_is_better")})
        if row["model"] in ("before", "after") or row["model"].startswith(SCALED):
            entry[row["model"]] = row["value"]
    plans = list(state["plan"].values())  # none in a run that ended before its first phase
    return {
        "results": results,
        "tokens": sum(t["tokens"] for t in state["train"].values()),
        "tokens_before": tokens_before(state),
        "seconds": round(state["seconds"], 1),
        "train_seconds": round(sum(t["seconds"] for t in state["train"].values()), 1),
        "trainable_fraction": plans[-1]["trainable_fraction"] if plans else 0.0,
        "proof_ok": json.loads((path / "proof.json").read_text(encoding="utf-8"))["ok"],
    }


def tokens_before(state: Mapping[str, Any]) -> int | None:
    """Tokens that a run read before its steps: for importance scores, a warm-up, or what guards prepare; kept text only.

    None: a guard of it was prepared by a version that did not write them down.
    """
    plans, guards = state["plan"].values(), list(itertools.chain(*state.get("guards", {}).values()))
    if any("tokens_before" not in g for g in guards):
        return None
    read = [p.get("warmup_tokens", 0) + (p.get("calibration") or {}).get("tokens", 0) for p in plans]
    return sum(read) + sum(g["tokens_before"] for g in guards)


def scaled_back(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """share -> the results with the scaled model's values as ``after``, for every share that was measured."""
    shares = sorted({label for entry in results.values() for label in entry if label.startswith(SCALED)})
    return {
        label.removeprefix(SCALED): {
            key: {**entry, "after": entry[label]}
            for key, entry in results.items()
            if label in entry and "before" in entry
        }
        for label in shares
    }


def select(results: Mapping[str, Mapping[str, Any]], key: str) -> tuple[str, Mapping[str, Any]]:
    """The one result that ``role/metric`` or ``role/metric/task`` names.

    Raises:
        AddlangError: none or several.
    """
    found = [name for name in results if name == key or name.startswith(key + "/")]
    found = [name for name in found if {"before", "after"} <= set(results[name])]
    if len(found) == 1:
        return found[0], results[found[0]]
    listed = ", ".join(sorted(found or results))
    what = "names several results" if found else "is not measured in these runs"
    raise AddlangError(f"'{key}' {what}", f"choose one of {listed}")


def change(results: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> float:
    """After minus before, signed so that higher is better; of several keys the mean relative change."""
    entries = [select(results, key)[1] for key in keys]
    signed = [(e["after"] - e["before"]) * (1 if e["higher_is_better"] else -1) for e in entries]
    if len(entries) == 1:
        return float(signed[0])
    if zero := [key for key, e in zip(keys, entries, strict=True) if not e["before"]]:
        raise AddlangError(f"'{zero[0]}' is 0 before training, so it has no relative change", "leave it out of 'kept'")
    return float(sum(s / e["before"] for s, e in zip(signed, entries, strict=True)) / len(entries))


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both."""
    return [points[i] for i in pareto_front(points)]


def interval(values: Sequence[float]) -> list[float | None]:
    """Mean and 95 % t interval over seeds."""
    i: Interval = t_interval(values)
    return [i.mean, i.low, i.high]


def at_equal_gain(curves: Mapping[str, Mapping[int, Sequence[Point]]], reference: str) -> list[dict[str, Any]]:
    """Every arm against the reference at the highest gain that both reach with every seed.

    Each is read off linearly on the front of its own learning rates, seed by seed; an arm with one learning rate is compared
    at what each of its seeds gained. ``over`` is the difference averaged over all gains that both fronts span, which depends
    less on where the highest rates happen to lie. The p values are those of paired t tests over seeds, Holm's correction
    over all arms.

    Args:
        curves: arm -> seed -> one (gained, kept) point per learning rate.
    """
    fronts = {arm: {seed: front(points) for seed, points in by.items()} for arm, by in curves.items()}
    base = fronts[reference]
    rows: list[dict[str, Any]] = []
    for arm, by in fronts.items():
        seeds = sorted(set(by) & set(base))
        if arm == reference or not seeds:
            continue
        if all(len(curves[arm][seed]) == 1 for seed in seeds):
            gains = [by[seed][0][0] for seed in seeds]
        else:
            gains = [min(max(g for g, _ in side[seed]) for side in (by, base) for seed in seeds)] * len(seeds)
        row: dict[str, Any] = {"arm": arm, "gained": sum(gains) / len(gains), "seeds": len(seeds)}
        rows.append(row)
        own, other = ([_read(side[s], g) for s, g in zip(seeds, gains, strict=True)] for side in (by, base))
        if None in own or None in other:
            above = any(g > max(x for x, _ in base[s]) for s, g in zip(seeds, gains, strict=True))
            row["note"] = _out_of_range(arm, reference, None in own, above)
            continue
        mine, theirs = ([v for v in side if v is not None] for side in (own, other))
        row |= {"kept": interval(mine), "reference_kept": interval(theirs)}
        row["difference"] = interval([a - b for a, b in zip(mine, theirs, strict=True)])
        if len(seeds) > 1:
            row["p"] = paired_t(mine, theirs).p_value
        if (span := _shared(by, base, seeds)) is not None:
            averages = [_average(by[s], *span) - _average(base[s], *span) for s in seeds]
            row["over"] = {"from": span[0], "to": span[1], "difference": interval(averages)}
    for row, p in zip(rows, holm([row.get("p") for row in rows]), strict=True):
        if p is not None:
            row["p_holm"] = p
    return rows


def _out_of_range(arm: str, reference: str, below_own: bool, above_reference: bool) -> str:
    """Why a gain is off a front. It is never above the arm's own, but below or above the reference's."""
    if above_reference:
        return f"no statement: {reference} does not gain this with every seed at any of its learning rates"
    return f"no statement: {arm if below_own else reference} gains more than this at every learning rate of its front"


def _shared(
    a: Mapping[int, Sequence[Point]], b: Mapping[int, Sequence[Point]], seeds: Sequence[int]
) -> tuple[float, float] | None:
    """The gains that both fronts span with every seed; None if there are none."""
    sides = [[g for g, _ in side[seed]] for side in (a, b) for seed in seeds]
    low, high = max(map(min, sides)), min(map(max, sides))
    return (low, high) if low < high else None


def _average(points: Sequence[Point], low: float, high: float) -> float:
    """Mean height of the line through ``points`` between two gains that it spans."""
    xs, ys = zip(*sorted(points), strict=True)
    gains = [low, *(x for x in xs if low < x < high), high]
    return float(trapezoid(np.interp(gains, xs, ys), gains)) / (high - low)


def _read(points: Sequence[Point], gain: float) -> float | None:
    return interpolate_at([g for g, _ in points], [k for _, k in points], gain)
