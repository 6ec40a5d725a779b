"""The lab's report: the front, intervals over seeds, and the fair comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import lab, write_json, write_lab
from test_html import Checker

from addlang.errors import AddlangError
from addlang.report import lab_html, lab_table, write_lab_report
from addlang.report.front import Arm, front_figure


def test_the_front_and_the_notes_are_shown(tmp_path: Path) -> None:
    html = lab_html(write_lab(tmp_path))
    page = Checker(html)
    for text in (
        "Swahili bits per byte (bits/byte) (lower is better, axis reversed)",
        "English exact match (%)",
        "source model: English 81.9",
        "What this does and does not show",
        "a tiny model has no outlier features",
        "At equal gain",
        "full, 1.2e\u22123",
    ):
        assert text in page.text, text
    assert html.count('class="front"') >= 2


def test_one_seed_is_labelled_and_has_no_interval(tmp_path: Path) -> None:
    tables = lab_table(write_lab(tmp_path))
    title, columns, rows = tables[1]
    assert title == "Two-phase tuning on instructions"
    seeds = columns.index("seeds")
    assert {r[seeds] for r in rows} == {"one seed, no interval"}
    assert not any("[" in cell for r in rows for cell in r)
    assert "One seed, no interval" in lab_html(tmp_path)


def test_several_seeds_have_t_intervals(tmp_path: Path) -> None:
    data = lab()
    arm = data["experiments"][0]["arms"][0]
    for run, english in zip(arm["runs"], (0.40, 0.42, 0.44), strict=True):
        run["english"] = english
    write_json(tmp_path / "lab.json", data)
    _, columns, rows = lab_table(tmp_path)[0]
    # mean 0.42, s 0.02, t(2) 4.3027: half width 4.3027 * 0.02 / sqrt(3) = 0.0497
    assert rows[0][columns.index("English exact match")] == "42.0 % [37.0, 47.0]"


def test_the_front_holds_the_arms_that_no_other_beats(tmp_path: Path) -> None:
    _, columns, rows = lab_table(write_lab(tmp_path))[0]
    on = {r[0] for r in rows if r[columns.index("on the front")] == "yes"}
    assert on == {"full, 2e-3", "full, 1.2e-3", "full + 10 % replay, 2e-3"}


def test_equal_gain_reads_full_fine_tuning_off_at_the_arms_own_gain(tmp_path: Path) -> None:
    data = lab()
    by_name = {a["name"]: a for a in data["experiments"][0]["arms"]}
    for name, english, gain in (
        ("full-2e-3", 0.40, 0.36),
        ("full-1.2e-3", 0.70, 0.38),
        ("ssu-wanda", 0.65, 0.37),
        ("ssu-random", 0.65, 0.39),
    ):
        for run, offset in zip(by_name[name]["runs"], (-0.01, 0.0, 0.01), strict=True):
            run.update(english=english + offset, target_bpb=gain)
    write_json(tmp_path / "lab.json", data)
    text = Checker(lab_html(tmp_path)).text
    table = text[text.index("At equal gain") : text.index("random columns, 2e\u22123", text.index("At equal gain"))]
    # halfway between .40 and .70; the seeds shift both alike, so the interval has no width
    for cell in ("65.0\u00a0%", "55.0\u00a0%", "+10.0\u00a0points", "[+10.0, +10.0]", "better"):
        assert cell in table, cell
    assert "outside its range in 3 of 3 runs" in text


def test_arms_on_different_texts_are_not_compared_by_bits_per_byte(tmp_path: Path) -> None:
    data = lab()
    for i, arm in enumerate(data["experiments"][1]["arms"]):
        arm["data"] = f"set-{i % 2}"
        for run in arm["runs"]:
            run["target_bpb"] = 1.0
    write_json(tmp_path / "lab.json", data)
    assert not any("bits per byte" in c for c in lab_table(tmp_path)[1][1])


def test_a_failed_proof_is_shown(tmp_path: Path) -> None:
    data = lab()
    data["experiments"][0]["arms"][2]["runs"][1]["proof_ok"] = False
    write_json(tmp_path / "lab.json", data)
    assert "SSU-Wanda, 2e-3, seed 1" in Checker(lab_html(tmp_path)).text


def test_missing_and_empty_labs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="does not exist"):
        lab_html(tmp_path)
    write_json(tmp_path / "lab.json", {"experiments": [{"name": "cpt-sw", "arms": []}]})
    with pytest.raises(AddlangError, match="has no runs"):
        lab_html(tmp_path)


def test_it_is_written_atomically(tmp_path: Path) -> None:
    assert write_lab_report(write_lab(tmp_path)).name == "report.html"
    assert not list(tmp_path.glob("*.tmp"))
    assert json.loads((tmp_path / "lab.json").read_text(encoding="utf-8"))["language"] == "sw"


def test_labels_do_not_cover_each_other() -> None:
    import re

    arms = [
        Arm(f"an arm with a name {i}", (0.37 + 0.0004 * i, None, None), (60 + 0.3 * i, None, None)) for i in range(9)
    ]
    figure = front_figure(arms, x_label="x", y_label="y", x_higher_is_better=False)
    pattern = r'<text x="([\d.]+)" y="([\d.]+)" class="t halo" text-anchor="(\w+)">'
    boxes = []
    for x, y, anchor in re.findall(pattern, str(figure.wide)):
        width = 20 * 12.5 * 0.5
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 9, left + width, float(y)))
    assert len(boxes) == 9
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
