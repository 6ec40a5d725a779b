"""Data cards in words and tables; what nobody counted is a dash, never a zero."""

from __future__ import annotations

from typing import Any

from addlang.report import datacard

SOURCE: dict[str, Any] = {
    "path": "es.jsonl", "role": "target", "language": "es", "documents": 90, "duplicates": 4, "copies_across": 3, "near_copies": 2,
    "bytes": 1000, "tokens": 400, "licenses": {"MIT": 90}, "share": 0.25, "epochs": 1.5, "dropped": 7, "truncated": 0,
    "lengths": {"p5": 3.0, "p50": 8.0, "p95": 20.0, "p100": 31.0}, "languages": {"judged": 1000, "detected": {"es": 0.96, "pt": 0.03, "gl": 0.002}},
}  # fmt: skip


def test_every_kind_of_copy_is_left_out() -> None:
    (row,) = datacard.amounts({"sources": [SOURCE]})[1]
    assert row == ["es.jsonl", "target", "MIT", "90", "9", "1,000", "400", "25.0 %", "1.50"]


def test_languages_and_lengths() -> None:
    (row,) = datacard.contents({"sources": [SOURCE]})[1]
    assert row == ["es.jsonl", "es", "es 96.0 %, pt 3.0 % (of 1,000)", "3", "8", "20", "31", "7", "0"]


def test_what_is_not_known_is_a_dash() -> None:
    card = {"sources": [{"path": "old.jsonl"}]}
    assert datacard.amounts(card)[1] == [["old.jsonl", "-", "not stated", "-", "-", "-", "-", "-", "-"]]
    assert datacard.contents(card)[1] == [["old.jsonl", *["-"] * 8]]
    assert datacard.overlap(card) == ""
    assert datacard.language_shares(card) == ""


def test_shares_of_languages_add_up_over_sources() -> None:
    others = [{**SOURCE, "language": "ja", "share": 0.5}, SOURCE]
    assert datacard.language_shares({"sources": [SOURCE, *others]}) == "es 50.0 %, ja 50.0 %"


def test_the_search_for_evaluation_items_is_told_with_its_rule() -> None:
    found = {"texts": {"mgsm": 250}, "rows": 0, "rule": "13 words", "too_short": 12}
    text = datacard.overlap({"overlap": found})
    assert "mgsm 250" in text
    assert "No training row contains one. The rule: 13 words. 12 texts are too short" in text
    assert "3 training row(s) contain one" in datacard.overlap({"overlap": {**found, "rows": 3}})


def test_a_table_names_the_most_common_licences() -> None:
    given = {"A": 1, "B": 400, "C": 30, "D": 2, "E": 5}
    assert datacard.licence({"licenses": given}) == "B (400), C (30), E (5), 2 more"
    assert datacard.licence({"licenses": {"A": 1}}) == "A"
    assert datacard.licence({"licenses": {}}) == "not stated"
