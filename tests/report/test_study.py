"""The report of a study says what was tested, and draws what it promises."""

from __future__ import annotations

import re
from typing import Any

import pytest

from addlang.report.study import study_html


def results(equal_gain: list[dict[str, Any]], seeds: int = 3, **row: Any) -> dict[str, Any]:
    rows = [
        {
            "arm": arm, "learning_rate": None, "seeds": seeds, "gained": [gained, None, None], "kept": [-gained, None, None],
            "after": {}, "tokens": 1, "seconds": 1.0, "trainable_fraction": 1.0, "on_front": True, **row,
        }
        for arm, gained in (("full", 0.5), ("x", 0.4))
    ]  # fmt: skip
    metric = {"key": "target/accuracy/t", "unit": "share", "higher_is_better": True}
    setting = {"setting": {}, "rows": rows, "equal_gain": equal_gain}
    return {
        "title": "Study", "reference": "full", "gained": metric, "kept": [metric, metric], "seeds": list(range(seeds)),
        "settings": [setting], "runs": [], "failed": [], "missing": 0, "command": "addlang sweep study.yaml",
    }  # fmt: skip


def compared(**changes: Any) -> dict[str, Any]:
    values = {"kept": [-0.1, -0.1, -0.1], "reference_kept": [-0.3, -0.3, -0.3], "difference": [0.2, 0.2, 0.2]}
    return {"arm": "x", "gained": 0.4, "seeds": 3, **values, **changes}


@pytest.mark.parametrize(
    ("equal_gain", "seeds", "said"),
    [
        ([], 1, "One seed: nothing is tested."),
        ([compared()], 1, "One seed: nothing is tested."),
        ([], 3, "No arm could be tested against full at equal gain."),
        ([{"arm": "x", "gained": 0.4, "seeds": 3, "note": "no statement"}], 3, "No arm could be tested against full"),
        ([compared(p=0.0, p_holm=0.0)], 3, "Better than full at equal gain (Holm, p &lt; 0.05): x."),
        ([compared(p=0.3, p_holm=0.3)], 3, "At equal gain no difference from full is shown."),
    ],
)
def test_the_verdict_says_what_was_tested(equal_gain: list[dict[str, Any]], seeds: int, said: str) -> None:
    html = study_html(results(equal_gain, seeds))
    assert said in html
    assert ("One seed" in html) == (seeds == 1)


def test_names_with_commas_are_told_apart() -> None:
    assert "On the front: full, x." in study_html(results([]))
    data = results([])
    data["settings"][0]["rows"][1]["arm"] = "x, twice"
    assert "On the front: full; x, twice." in study_html(data)


def test_single_seeds_are_drawn_where_they_are_promised() -> None:
    drawn = study_html(results([], points=[[0.4, -0.4], [0.5, -0.5], [0.6, -0.6]]))
    assert "small dots single seeds" in drawn
    marks = re.findall(r"seed c[12]", drawn)
    assert len(marks) == 2 * 2 * 3, "two widths, two arms, three seeds"
    older = study_html(results([]))
    assert "small dots" not in older
    assert "seed c1" not in older
