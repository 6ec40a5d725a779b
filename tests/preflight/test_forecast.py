"""The forecast on data where the truth is known: its intervals cover, it widens and it refuses; and advice from it."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from addlang.preflight.advice import Candidate, advise
from addlang.preflight.forecast import Coefficients, Forecast, expit, fit, forecast, logit, shipped

ROOT = Path(__file__).resolve().parents[2]


def world(n: int, seed: int) -> tuple[list[dict[str, float]], list[float]]:
    """Rows whose loss is a logistic function of two signals, with noise."""
    rng = np.random.default_rng(seed)
    a, b, noise = rng.normal(size=n), rng.uniform(-1, 1, n), rng.normal(0, 0.5, n)
    rows = [{"a": float(x), "b": float(y)} for x, y in zip(a, b, strict=True)]
    return rows, [expit(v) for v in -0.5 + 1.5 * a + b + noise]


@pytest.fixture(scope="module")
def fitted() -> Coefficients:
    return fit(*world(80, 0), ("a", "b"), penalty=1.0, level=0.9, fitted_on="a test", parameters=1000, probe_steps=32)


def test_intervals_cover_what_was_not_seen(fitted: Coefficients) -> None:
    rows, lost = world(1000, 1)
    said = [forecast(row, fitted) for row in rows]
    inside = [f.low <= y <= f.high for f, y in zip(said, lost, strict=True) if f.lost is not None]
    assert 0.85 <= np.mean(inside) <= 0.96
    error = [abs((f.lost or 0) - y) for f, y in zip(said, lost, strict=True)]
    assert np.mean(error) < 0.1


def test_the_quantile_is_that_of_refits_without_each_row() -> None:
    rows, lost = world(12, 3)
    whole = fit(rows, lost, ("a", "b"), penalty=0.0, level=0.5, fitted_on="", parameters=1, probe_steps=32)
    residuals = []
    for i in range(12):
        rest = [r for j, r in enumerate(rows) if j != i], [y for j, y in enumerate(lost) if j != i]
        without = fit(*rest, ("a", "b"), penalty=0.0, level=0.5, fitted_on="", parameters=1, probe_steps=32)
        z = [(rows[i][f] - m) / s for f, m, s in zip(("a", "b"), without.mean, without.scale, strict=True)]
        x = without.intercept + sum(w * v for w, v in zip(without.weights, z, strict=True))
        residuals.append(abs(logit(lost[i]) - x))
    assert whole.quantile == pytest.approx(sorted(residuals)[6])


def test_outside_of_the_fitted_range_it_widens_and_then_refuses(fitted: Coefficients) -> None:
    inside = forecast({"a": 0.0, "b": 0.0}, fitted)
    near = forecast({"a": 0.0, "b": fitted.high[1] + 0.4}, fitted)
    assert near.outside == ("b",)
    assert (near.high or 0) - (near.low or 0) > (inside.high or 0) - (inside.low or 0)
    assert any("widened" in line for line in near.why)
    far = forecast({"a": 0.0, "b": 9.0}, fitted)
    assert (far.lost, far.low, far.high) == (None, None, None)
    assert any("too far" in line for line in far.why)


def test_it_refuses_without_its_signals_and_for_other_probes(fitted: Coefficients) -> None:
    assert forecast({"a": 0.0}, fitted).lost is None
    other = forecast({"a": 0.0, "b": 0.0, "probe_steps": 16.0}, fitted)
    assert other.lost is None
    assert "probes of 32" in other.why[0]


def test_a_model_of_another_size_is_told_that_coverage_is_not_known(fitted: Coefficients) -> None:
    assert not forecast({"a": 0.0, "b": 0.0}, fitted, parameters=2000).why
    assert "not known" in forecast({"a": 0.0, "b": 0.0}, fitted, parameters=7_000_000_000).why[0]


@pytest.mark.parametrize("part", ["free", "held"])
def test_what_ships_reached_its_goal_on_pairs_it_has_not_seen(part: str) -> None:
    text = (ROOT / "src" / "addlang" / "preflight" / "forecast.json").read_text(encoding="utf-8")
    judged = json.loads(text)[part]["judged"]["unseen"]
    assert shipped(held=part == "held").pairs >= 60
    assert judged["pairs"] >= 20
    assert judged["spearman"] >= 0.8
    assert 0.85 <= judged["covered"] <= 0.95


def candidate(label: str, gained: float, lost: float | None, half: float = 0.02) -> Candidate:
    said = Forecast(lost, None if lost is None else max(0.0, lost - half), None if lost is None else lost + half)
    return Candidate(label, label, {}, 1e-3, gained, 0.1, 0.1, 1.0, said)


def test_advice_takes_the_gain_among_those_that_keep_enough() -> None:
    sure, more, worse = (
        candidate("sure", 0.5, 0.01, 0.01),
        candidate("more", 0.9, 0.2),
        candidate("less", 0.3, 0.0, 0.01),
    )
    advice = advise([more, sure, worse], keep=0.97)
    assert advice.candidate is sure
    strategy, ratio, rate = advice.choices
    assert strategy[:2] == ("strategy", "sure")
    assert "more at 0.001: +0.900 gained, 20.0% lost" in strategy[2]
    assert ratio == ("ratio", "-", "this strategy has none")
    assert rate == ("learning rate", "0.001", "no other was probed (--rates)")
    likely = advise([candidate("likely", 0.5, 0.02, 0.1), more], keep=0.97)
    assert likely.candidate is not None
    assert likely.candidate.label == "likely"
    assert "not at its upper end" in likely.reasons[0]


def test_ratio_and_learning_rate_have_reasons_of_their_own() -> None:
    """Each is compared with what was probed in its place and nothing else."""

    def shield(ratio: float, rate: float, gained: float, lost: float | None) -> Candidate:
        found = candidate("shield", gained, lost)
        return replace(found, label=f"shield, ratio {ratio}", ratio=ratio, learning_rate=rate)

    rows = [
        shield(0.5, 2e-3, 0.9, 0.3), shield(0.5, 1e-3, 0.8, 0.1), shield(0.75, 2e-3, 0.7, 0.2),
        shield(0.75, 1e-3, 0.6, 0.02), candidate("full", 1.0, 0.5),
    ]  # fmt: skip
    advice = advise(rows, keep=0.97)
    assert advice.candidate is rows[3]
    reasons = {what: (value, reason) for what, value, reason in advice.choices}
    assert reasons["strategy"] == (
        "shield",
        "+0.600 gained, 2.0% lost; in its place full at 0.001: +1.000 gained, 50.0% lost",
    )
    assert reasons["ratio"] == (
        "0.75",
        "+0.600 gained, 2.0% lost; in its place 0.5 at 0.001: +0.800 gained, 10.0% lost",
    )
    assert reasons["learning rate"] == (
        "0.001",
        "+0.600 gained, 2.0% lost; in its place 0.002: +0.700 gained, 20.0% lost",
    )
    unknown = advise([shield(0.5, 1e-3, 0.8, None), shield(0.75, 1e-3, 0.6, None)], keep=0.97)
    assert "source changed by 0.100" in unknown.choices[1][2]


def test_advice_says_when_nothing_keeps_enough_or_nothing_is_known() -> None:
    advice = advise([candidate("a", 0.5, 0.3), candidate("b", 0.5, 0.2)], keep=0.97)
    assert advice.candidate is not None
    assert advice.candidate.label == "b"
    assert advice.reasons[0].startswith("None of 2")
    unknown = advise([candidate("a", 0.5, None), candidate("b", 0.9, None)], keep=0.97)
    assert unknown.candidate is not None
    assert unknown.candidate.label == "b"
    assert "guess" in unknown.reasons[1]
    assert advise([], keep=0.97).candidate is None


@pytest.fixture(scope="module")
def bench() -> Any:
    folder = ROOT / "benchmarks" / "forecast"
    sys.path.insert(0, str(folder))
    try:
        modules = {}
        for name in ("sets", "pairs", "fit"):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            modules[name] = importlib.util.module_from_spec(spec)
            sys.modules[name] = modules[name]
            spec.loader.exec_module(modules[name])
        yield modules
    finally:
        sys.path.remove(str(folder))
        for name in ("sets", "pairs", "fit"):
            sys.modules.pop(name, None)


def test_the_grid_has_the_pairs_that_were_promised(bench: Any) -> None:
    from addlang.recipe import Recipe

    grid = bench["pairs"].pairs()
    groups = {
        g: [p for p in grid if p.group == g] for g in ("fit", "unseen", "volume", "content", "held-fit", "held-unseen")
    }
    for fitted, unseen in (("fit", "unseen"), ("held-fit", "held-unseen")):
        assert len(groups[fitted]) >= 60
        assert len(groups[unseen]) >= 20
        assert not {p.content for p in groups[fitted]} & set(bench["pairs"].NEW)
    assert all(bool(p.guard) == p.group.startswith("held") for p in grid)
    assert {p.content for p in groups["volume"]} == {"similar-sw", "dissimilar"}
    assert len({p.tokens for p in groups["content"]}) == 1
    for pair in grid[::20]:
        assert Recipe.parse(bench["pairs"].recipe(pair, Path("root")))


def test_every_kind_of_content_is_made_and_mixed_by_its_share(bench: Any) -> None:
    rows = bench["sets"].rows
    for kind in bench["sets"].KINDS:
        assert rows(kind, 3, 1) == rows(kind, 3, 1)
        assert len({json.dumps(r) for r in rows(kind, 3, 1)}) > 1
    mixed = rows("similar-sw+dissimilar@0.25", 400, 2)
    pure = {json.dumps(r) for r in rows("dissimilar", 400, 2)}
    assert 0.15 < sum(json.dumps(r) in pure for r in mixed) / 400 < 0.35
    assert all(ord(c) > 127 or not c.isalpha() for c in rows("raw-cyrillic", 1, 1)[0]["text"])
