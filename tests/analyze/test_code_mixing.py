"""The measures on the published test vector; tags from scripts and columns; the rule of the SSU paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from addlang.analyze import code_mixing as cm
from addlang.analyze.base import Context, make_analysis, save
from addlang.analyze.languages import is_expected
from addlang.analyze.plots import draw_shares, write_figure
from addlang.cli import app
from addlang.errors import AddlangError
from addlang.schema import DatasetSpec

VECTOR = ["EN", "EN", "HI", "HI", "UNIV", "UNIV", "HI", "HI", "EN", "EN", "EN", "HI", "HI"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("CMI", 45.4545), ("M-index", 0.98361), ("I-index", 0.3), ("entropy", 0.99403), ("burstiness", -0.48351)],
)
def test_the_measures_on_the_test_vector(name: str, value: float) -> None:
    assert cm.METRICS[name](VECTOR) == pytest.approx(value, abs=5e-6 * max(1, abs(value)))


def test_the_measures_at_the_edges() -> None:
    assert cm.cmi(["UNIV"]) is None
    assert cm.cmi(["EN"] * 3) == 0.0
    assert (cm.m_index(["EN"]), cm.entropy(["EN"])) == (0.0, 0.0)
    assert cm.m_index(["A", "B", "C"]) == pytest.approx(1.0)
    assert cm.i_index(["EN", "UNIV"]) is None
    assert cm.burstiness(["EN", "EN"]) is None
    assert cm.burstiness(["EN", "HI", "EN"]) == -1.0


def test_another_measure_can_be_plugged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cm, "METRICS", dict(cm.METRICS))
    cm.register("tokens", lambda tags: float(len(tags)))
    assert cm.summary([VECTOR])["tokens"] == 13.0
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"tags": VECTOR}) + "\n", encoding="utf-8")
    done = CliRunner().invoke(
        app, ["analyze", "code-mixing", str(rows), "--tags", "tags", "--output_dir", str(tmp_path)]
    )
    assert "13.0000" in done.output, done.exception


def test_words_are_tagged_by_the_script_of_their_letters() -> None:
    tags = cm.tag_by_script("He said नमस्ते, 25 times — да!", {"latin": "en", "devanagari": "hi"})
    assert tags == ["en", "en", "hi", "UNIV", "UNIV", "en", "UNIV", "cyrillic", "UNIV"]


def files(tmp_path: Path, rows: list[dict[str, object]]) -> Context:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return Context({}, {"rows": DatasetSpec(path=str(path))})


def test_tags_are_read_from_a_column(tmp_path: Path) -> None:
    context = files(tmp_path, [{"tags": VECTOR}, {"tags": "EN EN"}])
    analysis = make_analysis("code-mixing", {"tags": "tags"})
    found = json.loads(save(analysis.run(context), analysis, tmp_path).read_text())["data"]["sets"]["rows"]
    assert (tmp_path / "code-mixing.svg").is_file()
    assert found["CMI"] == pytest.approx(45.4545 / 2, abs=1e-3)
    assert found["mixed_rows"] == 0.5
    assert found["languages"] == pytest.approx({"EN": 7 / 15, "HI": 6 / 15, "UNIV": 2 / 15})
    with pytest.raises(AddlangError, match="no list of tags"):
        make_analysis("code-mixing", {"tags": "tag"}).run(context)


def test_a_set_that_is_not_judged_has_no_bar(tmp_path: Path) -> None:
    both: dict[str, dict[str, float]] = {"none": {}, "some": {"en": 1.0}}
    counted = []

    def draw(figure: Any) -> None:
        draw_shares(figure, both)
        counted.extend(p for p in figure.axes[0].patches if p.get_width() == 1.0)

    write_figure(tmp_path / "shares.svg", draw, (4, 2))
    assert len(counted) == 1
    context = files(tmp_path, [{"output": "ok"}])
    result = make_analysis("languages", {}).run(context)
    assert result.sentence == "rows: not judged."
    assert result.rows[0][:4] == ["rows", "1", "0", "not judged"]


def test_replies_are_judged_by_sentence(tmp_path: Path) -> None:
    english = "This is a plain English sentence about the weather in the mountains."
    german = "Das ist ein deutscher Satz über das Wetter in den hohen Bergen."
    context = files(tmp_path, [{"output": f"{english} {german}"}, {"output": english}, {"output": "ok"}])
    found = make_analysis("languages", {}).run(context).data["sets"]["rows"]
    assert found["expected"] == pytest.approx(2 / 3)
    assert found["replies_with_other"] == 0.5
    assert found["judged_replies"] == 2
    assert found["sentences"] == 3
    with pytest.raises(AddlangError, match="columns are output"):
        make_analysis("languages", {"column": "reply"}).run(context)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"eng_Latn": 0.85, "ibo_Latn": 0.05, "fra_Latn": 0.1}, True),  # 0.944 among the two
        ({"eng_Latn": 0.80, "ibo_Latn": 0.15}, False),  # 0.842 among the two
        ({"eng_Latn": 0.40, "fra_Latn": 0.6}, False),  # the first choice is another
        ({"eng_Latn": 0.9, "ibo_Latn": 0.1}, True),
        ({"ibo_Latn": 0.4, "ibo_Arab": 0.1, "eng_Latn": 0.5}, False),  # every script of the target counts
    ],
)
def test_the_ssu_papers_rule(probabilities: dict[str, float], expected: bool) -> None:
    assert is_expected(probabilities, "eng", "ibo") is expected


def test_glotlid_without_the_file_or_the_target_says_what_is_missing(tmp_path: Path) -> None:
    context = files(tmp_path, [{"output": "x"}])
    with pytest.raises(AddlangError, match="does not exist"):
        make_analysis("languages", {"glotlid": "model.bin", "target": "ibo"}).run(context)
    with pytest.raises(AddlangError, match="three-letter code"):
        make_analysis("languages", {"glotlid": "model.bin", "target": "ig"})
