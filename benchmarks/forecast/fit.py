"""Fit the forecasts on the pairs of the groups ``fit`` and ``held-fit`` and judge each on those that it has not seen.

The features are chosen among :data:`CHOICES` by the leave-one-out error on the fitted pairs alone: the fewest that come
within 5 % of the smallest error. What needs an encoder or a gradient of its own cannot be chosen (not every setting that preflight
compares has these), nor what is on another scale for another model (learning rate, norm of the update), nor what does not
know the length of the run, or runs far longer than any that was fitted would get a forecast. These are there to be compared with.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from pairs import NEW, Pair

from addlang.analyze.mpd import parameter_difference
from addlang.lab import lab_model_path
from addlang.models import Checkpoint
from addlang.preflight.forecast import Coefficients, fit, forecast, logit, shipped, solve
from addlang.preflight.probe import STEPS

PENALTY, LEVEL = 1.0, 0.9
NEAR = 1.05  # of the smallest error: among these the fewest features win
# small on purpose: every set is about one thing that could carry the forecast
CHOICES: dict[str, tuple[str, ...]] = {
    "DES": ("des",),
    "plan (learning rate, steps)": ("log_learning_rate", "log_steps"),
    "plan, DES": ("log_learning_rate", "log_steps", "des"),
    "plan, DES, own loss, conflict": ("log_learning_rate", "log_steps", "des", "own_loss", "conflict", "log_norm_ratio"),
    "probe's MPD": ("log_probe_moved", "log_steps_left"),
    "plan, probe's MPD, DES": ("log_learning_rate", "log_steps", "log_probe_moved", "des"),
    "probe's loss": ("log_probe_loss", "log_steps_left"),
    "probe's shift": ("log_probe_shift", "log_steps_left"),
    "probe's shift, loss": ("log_probe_shift", "log_probe_loss", "log_steps_left"),
    "probe's shift, plan": ("log_probe_shift", "log_steps_left", "log_learning_rate"),
    "probe's shift, loss, plan, DES": ("log_probe_shift", "log_probe_loss", "log_steps_left", "log_learning_rate", "des"),
    "everything": (
        "log_probe_shift", "log_probe_loss", "log_steps_left", "log_learning_rate", "log_epochs", "log_probe_moved",
        "log_probe_growth", "conflict", "own_loss", "log_norm_ratio", "des",
    ),
}  # fmt: skip


# what settles grows less in the second half of a probe than in the first
HELD_CHOICES = {
    **CHOICES,
    "probe's shift, growth": ("log_probe_shift", "log_probe_growth", "log_steps_left"),
    "probe's shift alone": ("log_probe_shift",),
    "probe's shift, loss, growth": ("log_probe_shift", "log_probe_loss", "log_probe_growth", "log_steps_left"),
}


@dataclass(frozen=True)
class Row:
    """One pair: what was measured before, and the share of English that was lost. ``mpd``: of the finished run."""

    pair: Pair
    signals: dict[str, float]
    mpd: float
    lost: float
    before: float
    after: float


def load(root: Path, grid: Sequence[Pair]) -> list[Row]:
    """Every pair whose run and signals are complete."""
    rows = []
    for pair in grid:
        results, signals = root / "runs" / pair.name / "results.jsonl", root / "signals" / f"{pair.name}.json"
        if not (results.is_file() and signals.is_file()):
            continue
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        score = {r["model"]: r["value"] for r in lines if r["metric"] == "exact_match"}
        measured = json.loads(signals.read_text(encoding="utf-8"))["signals"]
        mpd = parameter_difference(lab_model_path(), root / "runs" / pair.name).tensor
        rows.append(Row(pair, measured, mpd, 1 - score["after"] / score["before"], score["before"], score["after"]))
    return rows


def of_group(rows: Sequence[Row], group: str) -> list[Row]:
    return [r for r in rows if r.pair.group == group]


def train(rows: Sequence[Row], features: Sequence[str]) -> Coefficients:
    contents = len({r.pair.content for r in rows})
    about = f"{len(rows)} pairs of the lab model and phase-2 sets of {contents} kinds"
    return fit(
        [r.signals for r in rows], [r.lost for r in rows], features, penalty=PENALTY, level=LEVEL, fitted_on=about,
        parameters=lab_parameters(), probe_steps=STEPS,
    )  # fmt: skip


def lab_parameters() -> int:
    return sum(math.prod(shape) for _, shape in Checkpoint(lab_model_path()).header.values())


def loo_error(rows: Sequence[Row], features: Sequence[str]) -> float:
    """Root mean square of the leave-one-out residuals, logit scale."""
    x = np.array([[r.signals[f] for f in features] for r in rows])
    z = np.c_[np.ones(len(x)), (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)]
    t = np.array([logit(r.lost) for r in rows])
    inverse, weights = solve(z, t, PENALTY)
    return float(np.sqrt(np.mean(((t - z @ weights) / (1 - np.einsum("ij,jk,ik->i", z, inverse, z))) ** 2)))


def judge(rows: Sequence[Row], fitted: Coefficients) -> dict[str, Any]:
    """Rank correlation with its bootstrap interval, interval coverage and mean error on pairs not seen."""
    found = [forecast(r.signals, fitted) for r in rows]
    said = [(r, f) for r, f in zip(rows, found, strict=True) if f.lost is not None]
    lost, expected = np.array([r.lost for r, _ in said]), np.array([f.lost for _, f in said])
    rng = np.random.default_rng(0)
    drawn = [spearmanr(lost[i], expected[i]).statistic for i in rng.integers(0, len(said), (2000, len(said)))]
    inside = [f.low <= min(max(r.lost, 0.0), 1.0) <= f.high for r, f in said]  # type: ignore[operator]
    return {
        "pairs": len(rows),
        "refused": len(rows) - len(said),
        "spearman": float(spearmanr(lost, expected).statistic),
        "spearman_95": [float(v) for v in np.nanquantile(drawn, [0.025, 0.975])],
        "covered": float(np.mean(inside)),
        "mean_absolute_error": float(np.mean(np.abs(lost - expected))),
        "mean_width": float(np.mean([f.high - f.low for _, f in said])),  # type: ignore[operator]
    }


def eligible(features: Sequence[str]) -> bool:
    """Whether a choice can be shipped."""
    other = {"des", "conflict", "own_loss", "log_norm_ratio", "log_learning_rate", "log_probe_moved"}
    return "log_steps_left" in features and not other & set(features)


def study(rows: Sequence[Row], *, held: bool = False) -> dict[str, Any]:
    """Choose by leave-one-out on the fitted pairs, then judge every choice on the unseen ones.

    Args:
        held: of the runs with guards; else of the others.
    """
    known, unseen = of_group(rows, "held-fit" if held else "fit"), of_group(rows, "held-unseen" if held else "unseen")
    options = HELD_CHOICES if held else CHOICES
    parts = {
        "unseen": unseen,
        "unseen, kinds of content seen": [r for r in unseen if r.pair.content not in NEW],
        "unseen, new kinds of content": [r for r in unseen if r.pair.content in NEW],
    }
    errors = {name: loo_error(known, features) for name, features in options.items()}
    able = {name: errors[name] for name, features in options.items() if eligible(features)}
    near = [name for name in able if able[name] <= NEAR * min(able.values())]
    chosen = min(near, key=lambda name: (len(options[name]), errors[name]))
    models = {name: train(known, features) for name, features in options.items()}
    return {
        "chosen": chosen,
        "coefficients": models[chosen],
        "choices": {
            name: {"features": features, "loo_error": errors[name], **judge(unseen, models[name])}
            for name, features in options.items()
        },
        "parts": {name: judge(part, models[chosen]) for name, part in parts.items()},
        "alone": {
            signal: float(spearmanr([r.signals[signal] for r in unseen], [r.lost for r in unseen]).statistic)
            for signal in sorted(known[0].signals)
            if signal != "probe_steps"
        },
        "mpd_afterwards": float(spearmanr([r.mpd for r in unseen], [r.lost for r in unseen]).statistic),
        **(
            {"by_guard": by(unseen, models[chosen], "guard"), "free": judge(unseen, shipped())}
            if held
            else {"by_strategy": by(unseen, models[chosen], "strategy"), "referee": referee(rows, models[chosen])}
        ),
    }


def by(rows: Sequence[Row], fitted: Coefficients, what: str) -> dict[str, Any]:
    """Mean loss and mean forecast of the pairs of each strategy or guard: is one of them judged too hard?"""
    out = {}
    for name in sorted({getattr(r.pair, what) for r in rows}):
        own = [
            (r.lost, f.lost)
            for r in rows
            if getattr(r.pair, what) == name and (f := forecast(r.signals, fitted)).lost is not None
        ]
        out[name] = {
            "pairs": len(own),
            "lost": float(np.mean([a for a, _ in own])),
            "forecast": float(np.mean([b for _, b in own])),
        }
    return out


def referee(rows: Sequence[Row], fitted: Coefficients) -> dict[str, Any]:
    """Content fixed and volume varied; volume fixed and content varied: mean loss over seeds, and the forecast's."""

    def cell(group: list[Row]) -> dict[str, Any]:
        said = [f.lost for f in (forecast(r.signals, fitted) for r in group) if f.lost is not None]
        return {
            "lost": float(np.mean([r.lost for r in group])),
            "runs": [round(r.lost, 4) for r in group],
            "forecast": float(np.mean(said)) if said else None,
        }

    volume: dict[str, dict[str, Any]] = {}
    for r in of_group(rows, "volume"):
        volume.setdefault(r.pair.content, {}).setdefault(str(r.pair.tokens), []).append(r)
    content: dict[str, list[Row]] = {}
    for r in of_group(rows, "content"):
        content.setdefault(r.pair.content, []).append(r)
    designed = [*of_group(rows, "volume"), *of_group(rows, "content")]
    return {
        "volume": {c: {t: cell(group) for t, group in by.items()} for c, by in volume.items()},
        "content": {c: cell(group) for c, group in content.items()},
        "judged": judge(designed, fitted) if len(designed) > 2 else None,
    }


def part(result: dict[str, Any]) -> dict[str, Any]:
    """What goes into ``src/addlang/preflight/forecast.json`` of one kind of run."""
    judged = {
        name: {k: round(v, 4) if isinstance(v, float) else v for k, v in part.items()}
        for name, part in result["parts"].items()
    }
    return {"chosen": result["chosen"], **asdict(result["coefficients"]), "judged": judged}
