"""The search alone, on synthetic items: it finds the bound, and many looks do not make the answer too good."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from addlang.errors import AddlangError
from addlang.evaluate.measurement import Item, Measurement
from addlang.merge.kept import Kept, items_for, items_to_exclude, part_of, share_kept, smallest_loss, watched
from addlang.merge.search import Family, confirmed, family_of, grid, ladder, largest


def measurement(right: Sequence[bool], task: str = "tasks", **changes: object) -> Measurement:
    items = tuple(Item(f"{task}:{i}", float(r)) for i, r in enumerate(right))
    settings = {"role": "source", "language": "en", "metric": "exact_match", "unit": "share", "higher_is_better": True}
    return Measurement(task=task, version="1", items=items, settings={}, **{**settings, **changes})  # type: ignore[arg-type]


def test_bisection_finds_the_largest_share_that_passes() -> None:
    tried: list[float] = []

    def passes(u: float) -> bool:
        tried.append(u)
        return u <= 0.3

    assert 0.3 - 1 / 64 < largest(passes) <= 0.3
    assert len(tried) == 7
    assert largest(lambda u: True) == 1.0
    assert largest(lambda u: False) == 0.0


def test_testing_upward_stops_at_the_first_failure() -> None:
    tried: list[float] = []

    def passes(u: float) -> bool:
        tried.append(u)
        return u != 0.3

    assert confirmed(grid(10), passes) == 0.2
    assert tried == [0.1, 0.2, 0.3]  # what passes beyond a failure is not even looked at
    assert confirmed(grid(10), lambda u: False) is None
    assert ladder(0.8, 10) == [0.2, 0.4, 0.6, 0.8, 0.9, 1.0]


def test_parts_that_cost_more_than_they_give_get_smaller_shares() -> None:
    family = family_of({"cheap": 2.0, "dear": 1.0, "idle": 0.0}, {"cheap": 1.0, "dear": 4.0, "idle": -0.01})
    shares = family.shares(0.5)
    assert shares["cheap"] > shares["idle"] > shares["dear"]
    assert shares["idle"] == 0.5
    assert set(family.shares(0).values()) == {0.0}
    assert set(family.shares(1).values()) == {1.0}
    assert Family({"a": 1.0, "b": 1.0}).shares(0.37) == {"a": 0.37, "b": 0.37}


def test_the_shares_are_the_best_for_their_price() -> None:
    """Of all shares with the same quadratic loss, those of the family gain most."""
    b, c = np.array([3.0, 1.0, 0.5]), np.array([1.0, 2.0, 0.2])
    ratios = b / c / ((b / b.mean()).mean() / (c / c.mean()).mean() * b.mean() / c.mean())
    m = np.array(list(Family(dict(zip("abc", ratios, strict=True))).shares(0.6).values()))
    gain, loss = -(b * (1 - m) ** 2).sum(), (c * m**2).sum()
    for other in np.random.default_rng(0).uniform(0, 1, (2000, 3)):
        other *= np.sqrt(loss / (c * other**2).sum())
        if (other <= 1).all():
            assert -(b * (1 - other) ** 2).sum() <= gain + 1e-3


def test_halves_are_disjoint_whole_and_the_same_for_every_model() -> None:
    clustered = Measurement(
        "t",
        "1",
        "source",
        "en",
        "acc",
        True,
        tuple(Item(str(i), 1.0, cluster=str(i // 3)) for i in range(30)),
        {},
        "share",
    )
    halves = [{i.id for i in part_of(clustered, w).items} for w in ("choose", "confirm")]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 30
    assert all(len({i for i in half if int(i) // 3 == c}) in (0, 3) for half in halves for c in range(10))
    assert part_of(clustered, "all") is clustered


def test_no_change_on_few_items_does_not_exclude_a_loss() -> None:
    few = measurement([True] * 20)
    kept = share_kept([few], [few], "all")
    assert kept.value == 1
    assert kept.low == pytest.approx(1 - (1 - 0.025 ** (1 / 20)))  # the exact binomial bound: 16.8 %
    many = measurement([True] * 2000)
    assert share_kept([many], [many], "all").low > 0.998
    assert smallest_loss([measurement([True, False] * 50)]) > smallest_loss([measurement([True] * 100)])


def test_four_metrics_of_the_same_items_exclude_no_more_than_one() -> None:
    before = [measurement([True, True, False] * 40, metric=m) for m in "abcd"]
    after = [measurement(([True] * 5 + [False]) * 20, metric=m) for m in "abcd"]
    assert share_kept(before, after, "all") == share_kept(before[:1], after[:1], "all")
    assert smallest_loss(before) == pytest.approx(smallest_loss(before[:1]))
    assert items_to_exclude(before, 0.03) == items_to_exclude(before[:1], 0.03)
    other = [*before, measurement([True, True, False] * 40, task="other")]
    assert share_kept(other, other, "all").n == 240


def test_the_number_of_items_that_is_named_suffices() -> None:
    need = items_to_exclude([measurement([True, True, True, False] * 5)], 0.03)
    for n, enough in ((need + 4, True), (need - 8, False)):
        m = measurement([True, True, True, False] * (n // 4))
        assert (share_kept([m], [m], "all").low >= 0.97) == enough


def test_more_items_are_named_only_where_they_would_help() -> None:
    assert items_for(Kept(0.98, 0.95, 1.0, 100), 0.97) == 900
    assert items_for(Kept(0.96, 0.95, 1.0, 100), 0.97) is None


def test_abilities_are_watched_and_bits_only_where_there_are_none() -> None:
    ability, bits = measurement([True]), measurement([True], "text", metric="bits_per_byte", higher_is_better=False)
    replies = measurement([True], "replies", metric="sentences_in_language")
    assert watched([bits, ability, replies]) == [ability]
    assert watched([bits, replies]) == [bits]
    assert watched([bits, ability], ["text"]) == [bits]
    with pytest.raises(AddlangError, match="no task of the source language is named 'nosuch'"):
        watched([ability], ["nosuch"])
    with pytest.raises(AddlangError, match="nothing of the source language is measured"):
        watched([measurement([True], role="target")])
    with pytest.raises(AddlangError, match="is 0"):
        watched([measurement([False, False])])


def losing(n: int, u: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same items before and after: 80 % right before; of those a share 0.2 u is lost, 0.11 at most, and some are won."""
    before = rng.random(n) < 0.8
    change = rng.random(n)
    return before, np.where(before, change >= 0.2 * min(u, 0.55), change < 0.02)


def test_the_chosen_share_keeps_too_little_no_oftener_than_one_test_errs() -> None:
    """0.895 is truly kept from u = 0.55 on, so 0.9 allows u = 0.5. Taking the largest that passes errs far oftener."""
    trials, errors, naive = 60, 0, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        found = {}
        for u in grid(20):
            before, after = losing(150, u, rng)  # new items at every look: the worst case
            found[u] = share_kept([measurement(before)], [measurement(after)], "all", resamples=200).low >= 0.9
        errors += (confirmed(grid(20), found.__getitem__) or 0) > 0.5
        naive += max((u for u, passes in found.items() if passes), default=0.0) > 0.5
    assert errors <= 4
    assert naive >= 6
