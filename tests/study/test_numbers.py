"""Numbers of a study: gained and kept, and arms at equal gain."""

from __future__ import annotations

from typing import Any

import pytest

from addlang.errors import AddlangError
from addlang.study.numbers import at_equal_gain, change, front, scaled_back, select


def entry(before: float, after: float, higher: bool = True) -> dict[str, Any]:
    return {"unit": "share", "higher_is_better": higher, "before": before, "after": after}


def test_arms_are_compared_at_the_highest_gain_that_both_reach() -> None:
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {"full": {}, "ssu": {}, "much": {}}
    for seed in range(3):
        shift = 0.01 * seed
        curves["full"][seed] = [(g, -(g**2) - shift) for g in (1.0, 2.0, 3.0)]
        curves["ssu"][seed] = [(1.0, -1.0 - 1.1 * shift), (2.5, -2.5 - 1.2 * shift)]
        curves["much"][seed] = [(4.0, -9.0)]
    rows = {row["arm"]: row for row in at_equal_gain(curves, "full")}
    assert rows["ssu"]["gained"] == 2.5
    assert rows["ssu"]["reference_kept"][0] == pytest.approx(-6.5 - 0.01)  # halfway between 4 and 9
    assert rows["ssu"]["difference"][0] == pytest.approx(4.0 - 0.002)
    assert rows["ssu"]["p_holm"] == rows["ssu"]["p"] < 0.001
    assert rows["much"]["gained"] == 4.0
    assert "full does not gain this" in rows["much"]["note"]
    assert "full" not in rows


def test_a_gain_below_the_reference_is_not_called_out_of_its_reach() -> None:
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {
        "full": {seed: [(0.3 + 0.01 * seed, -0.05), (0.5, -0.2)] for seed in range(3)},
        "little": {seed: [(0.1 + 0.01 * seed, -0.01)] for seed in range(3)},
        "steep": {seed: [(0.6, -0.3), (0.7, -0.4)] for seed in range(3)},
    }
    notes = {row["arm"]: row["note"] for row in at_equal_gain(curves, "full")}
    more = "gains more than this at every learning rate of its front"
    assert notes == {"little": f"no statement: full {more}", "steep": f"no statement: steep {more}"}


def test_an_arm_with_one_learning_rate_is_compared_at_what_each_seed_gained() -> None:
    curves = {
        "full": {seed: [(g, -g) for g in (1.0, 2.0, 3.0)] for seed in range(3)},
        "one": {seed: [(2.0 + 0.2 * seed, -1.0 - 0.1 * seed)] for seed in range(3)},
    }
    (row,) = at_equal_gain(curves, "full")
    assert row["gained"] == pytest.approx(2.2)
    assert row["reference_kept"][0] == pytest.approx(-2.2)
    assert row["difference"][0] == pytest.approx(1.1)
    assert row["p"] < 0.01
    assert "over" not in row


def test_the_difference_over_shared_gains_is_the_area_between_the_curves() -> None:
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {
        "full": {seed: [(1.0, 0.0), (2.0, -1.0), (4.0, -5.0)] for seed in range(2)},
        "ssu": {seed: [(0.0, 0.0), (3.0, -1.5)] for seed in range(2)},
    }
    (row,) = at_equal_gain(curves, "full")
    assert (row["over"]["from"], row["over"]["to"]) == (1.0, 3.0)
    # ssu: mean -1 over [1, 3]; full: -0.5 over [1, 2] and -2 over [2, 3]
    assert row["over"]["difference"][0] == pytest.approx(-1.0 + 1.25)


def test_a_learning_rate_that_another_beats_is_no_part_of_the_curve() -> None:
    assert front([(1.0, -0.5), (2.0, -1.0), (1.5, -3.0)]) == [(1.0, -0.5), (2.0, -1.0)]


def test_a_change_is_positive_when_it_is_good() -> None:
    results = {"target/bits_per_byte/t": entry(5.0, 3.0, higher=False), "source/acc/a": entry(0.5, 0.4)}
    assert change(results, ["target/bits_per_byte"]) == pytest.approx(2.0)
    assert change(results, ["source/acc/a"]) == pytest.approx(-0.1)


def test_of_several_results_the_mean_relative_change_is_taken_as_the_papers_do() -> None:
    results = {"source/acc/a": entry(0.5, 0.4), "source/acc/b": entry(0.2, 0.2)}
    assert change(results, ["source/acc/a", "source/acc/b"]) == pytest.approx(-0.1)
    with pytest.raises(AddlangError, match="is 0 before training"):
        change({**results, "source/acc/b": entry(0.0, 0.1)}, ["source/acc/a", "source/acc/b"])


def test_a_name_of_several_results_or_of_none_lists_what_there_is() -> None:
    results = {"source/acc/a": entry(0.5, 0.4), "source/acc/b": entry(0.2, 0.2)}
    with pytest.raises(AddlangError, match=r"names several results.*\n.*source/acc/a, source/acc/b"):
        select(results, "source/acc")
    with pytest.raises(AddlangError, match="is not measured"):
        select(results, "target/acc")


def test_scaled_back_models_are_results_of_their_own() -> None:
    results = {"source/acc/a": {**entry(0.5, 0.4), "after-x0.8": 0.45}, "source/acc/b": entry(0.2, 0.2)}
    (share, found) = next(iter(scaled_back(results).items()))
    assert share == "0.8"
    assert list(found) == ["source/acc/a"]
    assert (found["source/acc/a"]["before"], found["source/acc/a"]["after"]) == (0.5, 0.45)
