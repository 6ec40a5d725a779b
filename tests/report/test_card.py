"""The model card: valid front matter, everything a reader of a model needs, nothing that breaks Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import many_rows, write_run

from addlang.report import model_card, write_model_card
from addlang.report.card import escape, is_hub_id, published


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    data = yaml.safe_load(card[4:].partition("\n---\n")[0])
    assert isinstance(data, dict)
    return data


def test_front_matter(tmp_path: Path) -> None:
    data = front_matter(model_card(write_run(tmp_path)))
    assert data == {
        "language": ["en", "ig"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "allenai/OLMo-2-1124-7B-Instruct",
        "base_model_relation": "finetune",
        "tags": ["addlang", "continual-pretraining", "multilingual", "ssu"],
    }


def test_a_known_licence_is_stated(tmp_path: Path) -> None:
    assert front_matter(model_card(write_run(tmp_path, license="apache-2.0")))["license"] == "apache-2.0"


def test_a_local_base_model_is_named_in_the_text_only(tmp_path: Path) -> None:
    card = model_card(write_run(tmp_path, model="lab"))
    assert "base_model" not in front_matter(card)
    assert "# The lab model adapted to Igbo" in card


def test_directories_of_the_machine_are_not_published(tmp_path: Path) -> None:
    card = model_card(write_run(tmp_path, model="/home/someone/models/base-20m"))
    assert "# base-20m adapted to Igbo" in card
    assert "/home" not in card
    assert published("source: /data/private/chat.jsonl, sequences: 200") == "source: chat.jsonl, sequences: 200"
    for kept in ("bits/byte", "lab://sw?split=eval", "https://example.org/a/b", "data/ha.jsonl", "1 / 2 and 3/4"):
        assert published(kept) == kept


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_hub_id("owner/name-1.5")
    assert not is_hub_id("a/b")
    assert not is_hub_id("lab")
    assert not is_hub_id("/models/x")


def test_the_card_has_method_data_results_proof_and_limits(tmp_path: Path) -> None:
    card = model_card(write_run(tmp_path, rows=many_rows()))
    for text in (
        "Mitigating Catastrophic Forgetting in Target Language Adaptation",
        "| English kept | lab | exact match (higher is better) | 80.0 % | 77.7 % | -2.3 points \\[-3.8, -0.8\\]",
        "not run: ifeval",
        "CC-BY-4.0 (20,000), ODC-BY (431)",
        "Proof: 0 of 168,192 frozen elements changed. Of 406,784 trainable elements",
        f"addlang verify {tmp_path.name}",
        "One run, one seed",
        "Warning of the run: calibration used 480 of 500 sequences",
    ):
        assert text in card, text


def test_tables_stay_tables_whatever_the_data(tmp_path: Path) -> None:
    rows = [{**r, "task": "a|b\n# c"} for r in many_rows()]
    card = model_card(write_run(tmp_path, rows=rows))
    lines = [x for x in card.splitlines() if x.startswith("| English kept")]
    assert len(lines) == 4
    assert all(x.replace("\\|", "").count("|") == 9 for x in lines)


def test_escape() -> None:
    assert escape("a_b [x](http://e) <b>&\n# c|d") == "a\\_b \\[x\\](http://e) &lt;b&gt;&amp; \\# c\\|d"


def test_it_is_written_atomically(tmp_path: Path) -> None:
    assert write_model_card(write_run(tmp_path)).name == "README.md"
    assert not list(tmp_path.glob("*.tmp"))
