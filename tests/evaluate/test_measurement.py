from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from addlang.errors import AddlangError
from addlang.evaluate.measurement import Item, Measurement, NotMeasuredError


def measurement(items: list[Item], **changes: Any) -> Measurement:
    settings: dict[str, Any] = {
        "task": "toy",
        "version": "1",
        "role": "source",
        "language": "en",
        "metric": "accuracy",
        "higher_is_better": True,
        "items": tuple(items),
        "settings": {"limit": None},
        "unit": "share",
        **changes,
    }
    return Measurement(**settings)


def test_value_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
    m = measurement([Item("a", 10, 1), Item("b", 10, 9)])
    assert m.value == 2.0


def test_stderr_of_a_mean_is_the_textbook_one() -> None:
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    m = measurement([Item(str(i), v) for i, v in enumerate(values)])
    assert m.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_stderr_of_clusters_is_that_of_their_sums() -> None:
    # each item stands twice in its cluster: nothing was learned by asking twice
    twice = [Item(f"{i}{k}", v, cluster=str(i)) for i, v in enumerate([0.0, 1.0, 1.0]) for k in "ab"]
    once = [Item(str(i), v) for i, v in enumerate([0.0, 1.0, 1.0])]
    assert measurement(twice).stderr == pytest.approx(measurement(once).stderr)


def test_stderr_of_a_ratio_by_hand() -> None:
    # value 12/6 = 2; residuals 4-2*1 = 2 and 8-2*5 = -2; sqrt(2/1 * 8) / 6
    m = measurement([Item("a", 4, 1), Item("b", 8, 5)])
    assert m.stderr == pytest.approx(4 / 6)


def test_stderr_of_one_item_is_unknown() -> None:
    assert measurement([Item("a", 1)]).stderr is None


def test_json_round_trip_keeps_everything() -> None:
    m = measurement([Item("a", 1, 2, "passage", {"reply": "ሰላም"})], settings={"shots": 3})
    assert Measurement.from_json(m.to_json()) == m
    corpus = measurement([], aggregate=31.5, aggregate_stderr=0.4, metric="chrf")
    assert Measurement.from_json(corpus.to_json()) == corpus
    assert (corpus.value, corpus.stderr, corpus.n) == (31.5, 0.4, 0)


@pytest.mark.parametrize("cut", [0, 10, -2])
def test_a_torn_file_is_an_error(cut: int) -> None:
    with pytest.raises(AddlangError, match="no measurement"):
        Measurement.from_json(measurement([Item("a", 1)]).to_json()[:cut])


def test_row_is_flat_and_has_the_fields_of_a_result_row() -> None:
    row = measurement([Item("a", 1), Item("b", 0)]).row(model="m", phase="adapt", seed=3)
    assert row["value"] == 0.5
    assert row["n"] == 2
    assert {"model", "phase", "task", "version", "role", "language", "metric", "stderr", "seed", "settings"} <= set(row)


def test_what_cannot_be_measured_is_an_error_and_not_a_number() -> None:
    with pytest.raises(NotMeasuredError, match="nothing to measure"):
        measurement([])
    with pytest.raises(NotMeasuredError, match="none of the 2 items could be judged"):
        measurement([Item("a", 0, 0), Item("b", 0, 0)])
    with pytest.raises(AddlangError, match="item 'a' has value nan"):
        measurement([Item("a", math.nan)])
    with pytest.raises(AddlangError, match="'a' stands twice"):
        measurement([Item("a", 1), Item("a", 0)])
