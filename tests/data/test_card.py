"""The data card says what a source holds, and warns where it is not what one would expect."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from addlang.data.card import source_card
from addlang.data.licences import forbids_commercial_use, licence_of
from addlang.data.packing import pack_conversations, pack_texts
from addlang.data.sources import Row
from addlang.errors import AddlangWarning
from addlang.recipe import DatasetSpec

GERMAN = "Der Zug nach Berlin fährt heute leider erst am späten Abend vom anderen Bahnsteig ab."
ENGLISH = "The train to Berlin leaves only late in the evening today, from the other platform."


def card(rows: list[Row], tokenizer: Any, tmp_path: Path, language: str = "de", **spec: Any) -> dict[str, Any]:
    pack = pack_conversations if rows[0].messages else pack_texts
    options: dict[str, Any] = {"loss_on": "responses"} if rows[0].messages else {}
    packed = pack(rows, tokenizer, sequence_length=256, cache_dir=tmp_path, fingerprint_parts=[language], **options)
    return source_card(DatasetSpec(path="some.jsonl", **spec), packed, tokenizer, language=language)


def text_rows(*texts: str, licence: str | None = None) -> list[Row]:
    return [Row(text, None, "some.jsonl", i, licence) for i, text in enumerate(texts, 1)]


def test_languages_and_lengths_are_those_of_the_documents(tokenizer: Any, tmp_path: Path) -> None:
    found = card(text_rows(*[GERMAN] * 3, ENGLISH, "ok"), tokenizer, tmp_path)
    assert found["languages"] == {"sampled": 5, "judged": 4, "detected": {"de": 0.75, "en": 0.25}}
    sizes = sorted(len(tokenizer(t)["input_ids"]) + 1 for t in (GERMAN, GERMAN, GERMAN, ENGLISH, "ok"))
    assert found["lengths"]["p0"] == sizes[0]
    assert found["lengths"]["p50"] == sizes[2]
    assert found["lengths"]["p100"] == sizes[-1]
    assert found["lengths"]["mean"] == pytest.approx(sum(sizes) / 5, abs=0.1)


def test_of_conversations_the_answers_are_judged(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": GERMAN}]
    found = card([Row(None, turns, "some.jsonl", 1)], tokenizer, tmp_path)
    assert found["languages"]["detected"] == {"de": 1.0}
    assert found["kind"] == "conversations"


def test_another_language_than_the_declared_one_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(AddlangWarning, match="declared as 'ig', but 100% of the documents read as 'de'"):
        card(text_rows(*[GERMAN] * 10), tokenizer, tmp_path, language="ig")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AddlangWarning)
        card(text_rows(*[GERMAN] * 10), tokenizer, tmp_path, language="tlh")  # unknown to the identifier
        card(text_rows(*[GERMAN] * 10), tokenizer, tmp_path, language="de")
        card(text_rows(*[GERMAN] * 9), tokenizer, tmp_path, language="ha")  # too few to say


def test_a_licence_for_non_commercial_use_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(AddlangWarning, match="1 row.*'CC BY-NC 4.0', which forbids commercial use"):
        found = card(text_rows(GERMAN, licence="CC BY-NC 4.0"), tokenizer, tmp_path)
    assert found["licenses"] == {"CC BY-NC 4.0": 1}


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "CC BY-NC-SA 4.0", "cc_by_nc", "non-commercial", "Research only"])
def test_non_commercial_licences_are_recognised(licence: str) -> None:
    assert forbids_commercial_use(licence)


@pytest.mark.parametrize("licence", ["CC BY-SA 4.0", "apache-2.0", "MIT", "ODC-BY", "cc0", "openrail", "Once only"])
def test_free_licences_are_not(licence: str) -> None:
    assert not forbids_commercial_use(licence)


def test_known_data_sets_bring_their_licence_unless_the_recipe_gives_one() -> None:
    assert licence_of("tatsu-lab/alpaca", None) == "CC BY-NC 4.0"
    assert licence_of("open-orca/openorca", None) == "MIT"
    assert licence_of("tatsu-lab/alpaca", "bought") == "bought"
    assert licence_of("data/alpaca.jsonl", None) is None
