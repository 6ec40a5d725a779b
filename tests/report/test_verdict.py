"""The verdict says what the intervals allow, and no more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from runs import bits, comparison, many_rows, write_run

from addlang.report import render_table, summary_rows, verdict
from addlang.report.files import read_run
from addlang.report.tiles import tiles_of
from addlang.report.verdict import kept, mean_change, source_sentence

NONE: dict[str, Any] = {"low": None, "high": None, "relative_low": None, "relative_high": None, "p": None}


def test_kept_gained_and_proved(tmp_path: Path) -> None:
    assert verdict(write_run(tmp_path)) == (
        "English kept 97.1 % [95.2, 99.0] of exact match (lab); "
        "Igbo text costs 31.0 % [29.0, 33.0] fewer bits per byte; "
        "proof: 0 of 168,192 frozen elements changed."
    )


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            comparison(relative=-0.009, relative_low=-0.03, relative_high=0.012),
            "English kept 99.1 % [97.0, 101.2] of exact match (lab), which shows no loss but does not exclude one of 3.0 %",
        ),
        (
            comparison(relative=0.04, relative_low=0.01, relative_high=0.07),
            "English improved to 104.0 % [101.0, 107.0] of exact match (lab)",
        ),
        (comparison(relative=-0.6, **NONE), "English kept 40.0 % (no interval) of exact match (lab)"),
        (comparison(before=0.0, relative=None, **NONE), "English was not measured in relative terms"),
        (
            bits("text-en", "source", relative=0.04, relative_low=0.03, relative_high=0.05),
            "English text costs 4.0 % [3.0, 5.0] more bits per byte;",
        ),
        (
            bits("text-en", "source", relative=0.004, relative_low=-0.01, relative_high=0.02),
            "no loss in English is shown: bits per byte changed by +0.4 % [-1.0, +2.0]",
        ),
    ],
)
def test_source_wording(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    found = verdict(write_run(tmp_path, rows=[row, bits()]))
    assert text.lower() in found.lower()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            bits(relative=-0.004, relative_low=-0.015, relative_high=0.007),
            "no gain in Igbo is shown: bits per byte changed by -0.4 % [-1.5, +0.7]",
        ),
        (
            bits(relative=0.05, relative_low=0.03, relative_high=0.07),
            "Igbo text costs 5.0 % [3.0, 7.0] more bits per byte: nothing was gained",
        ),
        (
            comparison("cloze", "target", relative=0.5, relative_low=0.4, relative_high=0.6),
            "Igbo gained +50.0 % [+40.0, +60.0] in exact match (cloze)",
        ),
        (
            comparison("cloze", "target", relative=0.1, relative_low=-0.1, relative_high=0.3),
            "no gain in Igbo is shown: +10.0 % [-10.0, +30.0] in exact match (cloze)",
        ),
        (
            comparison("cloze", "target", relative=-0.1, relative_low=-0.2, relative_high=-0.05),
            "Igbo got worse: -10.0 % [-20.0, -5.0] in exact match (cloze)",
        ),
    ],
)
def test_target_wording(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    assert text in verdict(write_run(tmp_path, rows=[comparison(), row]))


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows=None)
    (run / "proof.json").unlink()
    assert verdict(run) == (
        "English was not measured: evaluation was not run; Igbo was not measured: evaluation was not run; "
        "the proof was not run."
    )


def test_a_failed_proof_stands_first(tmp_path: Path) -> None:
    assert verdict(write_run(tmp_path, changed=12)).startswith(
        "THE PROOF FAILED: 12 of 168,192 frozen elements changed;"
    )


def test_nothing_frozen_is_not_a_proof(tmp_path: Path) -> None:
    run = write_run(tmp_path, share=0.0)
    text = (run / "proof.json").read_text(encoding="utf-8")
    import json

    proof = json.loads(text)
    proof["phases"][0]["frozen_elements"] = 0
    (run / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    assert "proof: nothing was frozen, so there is nothing to check" in verdict(run)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    assert verdict(write_run(tmp_path, status="running")).startswith("This run is not finished (status: running)")


def test_worse_replies_are_part_of_the_verdict(tmp_path: Path) -> None:
    found = verdict(write_run(tmp_path, rows=many_rows()))
    assert "reply sentences in English went from 98.5 % to 96.2 % (-2.3 points [-4.1, -0.6])" in found


def test_replies_and_bits_are_not_averaged_with_abilities(tmp_path: Path) -> None:
    change = kept(read_run(write_run(tmp_path, rows=many_rows())))
    assert change is not None
    assert [c.task for c in change.tasks] == ["lab", "gsm8k"]


def test_mean_change_combines_half_widths_in_quadrature(tmp_path: Path) -> None:
    rows = [
        comparison("a", relative=-0.1, relative_low=-0.13, relative_high=-0.07),
        comparison("b", relative=-0.3, relative_low=-0.34, relative_high=-0.26),
    ]
    change = mean_change(read_run(write_run(tmp_path, rows=rows)).comparison or [])
    assert change is not None
    assert change.change == pytest.approx(-0.2)
    assert change.low == pytest.approx(-0.2 - 0.05 / 2)  # sqrt(0.03^2 + 0.04^2) / 2
    assert change.high == pytest.approx(-0.2 + 0.05 / 2)


@pytest.mark.parametrize("items", ["0123456789abcdef", None])
def test_metrics_of_the_same_items_do_not_narrow_the_interval(tmp_path: Path, items: str | None) -> None:
    """Also of a run of an earlier version, whose comparison does not name its items."""
    same = {"relative": -0.1, "relative_low": -0.13, "relative_high": -0.06}
    rows: list[dict[str, Any]] = [
        comparison("ifeval", metric=m, **same, **({"items_id": items} if items else {})) for m in "abcd"
    ]
    run = read_run(write_run(tmp_path, rows=rows))
    change = mean_change(run.comparison or [])
    assert change is not None
    assert (change.change, change.low, change.high) == pytest.approx((-0.1, -0.13, -0.06))
    assert "(mean over 4 results on the same items)" in source_sentence(run)
    assert tiles_of(run)[0].more.endswith("scores, mean over 4 results on the same items")
    rows.append(comparison("gsm8k", relative=-0.1, relative_low=-0.16, relative_high=-0.06))
    both = mean_change(read_run(write_run(tmp_path, rows=rows)).comparison or [])
    assert both is not None
    assert both.low == pytest.approx(-0.1 - math.hypot(4 * 0.03, 0.06) / 5)
    assert "mean over 5 results on 2 sets of items" in source_sentence(read_run(tmp_path))


def test_lower_is_better_flips_value_and_interval(tmp_path: Path) -> None:
    change = mean_change(read_run(write_run(tmp_path, rows=[bits()])).comparison or [])
    assert change is not None
    assert (change.change, change.low, change.high) == pytest.approx((0.31, 0.29, 0.33))
    assert change.outcome == "better"


def test_summary_has_a_unit_and_an_interval_in_every_row(tmp_path: Path) -> None:
    columns, rows = summary_rows(write_run(tmp_path, rows=many_rows()))
    assert columns[5] == "difference [95 %]"
    assert rows[0][:6] == ["English kept", "lab", "exact match", "80.0 %", "77.7 %", "-2.3 points [-3.8, -0.8]"]
    assert all("[" in r[5] or "(no interval)" in r[5] for r in rows[:-1])
    assert rows[-1][:3] == ["not run", "ifeval", "the data set could not be loaded offline"]
    assert {len(r) for r in rows} == {len(columns)}


def test_plain_table_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_table(["task", "value"], [["a [b]", "1.5 %"], ["日本", "-"]])
    assert capsys.readouterr().out.splitlines() == ["task   value", "-----  -----", "a [b]  1.5 %", "日本       -"]


def test_drawn_table_on_a_terminal() -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    render_table(["task", "value"], [["a [b]", "1.5 %"]], Console(file=out, force_terminal=True, width=60))
    assert "a [b]" in out.getvalue()
    assert "\x1b[" in out.getvalue()
