"""Synthetic code-switching on sentences whose links are known."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from addlang.analyze.code_mixing import UNIVERSAL, cmi
from addlang.builders.align import Links
from addlang.builders.aligned import aligned
from addlang.builders.codeswitch import Span, choose, codeswitch, mix, spans, tokenise
from addlang.builders.parallel import Pair
from addlang.errors import AddlangError

ENGLISH = tokenise("The old cat sleeps in Kano, and we don't wake it.")
GERMAN = tokenise("Die alte Katze schläft in Kano, und wir wecken sie nicht.")
LINKS: Links = {
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 4),
    (5, 5),
    (6, 6),
    (7, 7),
    (8, 8),
    (9, 11),
    (10, 9),
    (11, 10),
    (12, 12),
}


def run(text: str, other: str, links: Links, **changes: Any) -> dict[str, Any] | None:
    pair = Pair(text, other, "pairs.jsonl", 1)
    settings: dict[str, Any] = {"unit": "word", "ratio": 1.0, **changes}
    (row,) = codeswitch([(pair, tokenise(text), tokenise(other), links)], languages=("en", "de"), **settings)
    return row


def test_texts_are_cut_into_words_and_signs_and_joined_again() -> None:
    for text in ("The cat, don't  wake it!", "बिल्ली सो रही है।", "n'izu ụka mbụ", "日本の東京"):
        assert "".join(token.space + token.text for token in tokenise(text)) == text
    assert [t.text for t in tokenise("बिल्ली सो रही है।")] == ["बिल्ली", "सो", "रही", "है", "।"]
    assert [t.text for t in tokenise("日本 is")] == ["日", "本", "is"]


def test_only_words_that_are_linked_one_to_one_and_differ_are_replaced() -> None:
    found = spans(ENGLISH, GERMAN, LINKS, "word")
    places = {ENGLISH[s.begin].text for s in found}
    assert places == {"The", "old", "cat", "sleeps", "and", "we", "don't", "wake", "it"}, "not 'in', 'Kano' and signs"


def test_phrases_are_whole_on_both_sides() -> None:
    found = {(s.begin, s.end): (s.other_begin, s.other_end) for s in spans(ENGLISH, GERMAN, LINKS, "phrase")}
    assert found[0, 3] == (0, 3)
    assert found[9, 12] == (9, 12), "don't wake it: wecken sie nicht"
    assert (9, 11) not in found, "don't wake: what lies between 'wecken' and 'nicht' is linked to 'it'"
    assert not any(b <= 6 < e for b, e in found), "no phrase crosses the comma"


def test_clauses_end_at_punctuation() -> None:
    assert spans(ENGLISH, GERMAN, LINKS, "clause") == [Span(0, 6, 0, 6), Span(7, 12, 7, 12)]


def test_stretches_do_not_overlap_and_have_about_the_ratio() -> None:
    candidates = spans(ENGLISH, GERMAN, LINKS, "phrase")
    for seed in range(20):
        taken = choose(candidates, 11, 0.4, random.Random(seed))
        assert all(a.end <= b.begin for a, b in itertools.pairwise(taken))
        assert abs(sum(s.end - s.begin for s in taken) - 0.4 * 11) <= 2.5


def test_every_word_is_tagged_and_names_are_of_no_language() -> None:
    text, tokens, tags = mix(ENGLISH, GERMAN, [Span(1, 3, 1, 3)], ("en", "de"))
    assert text == "The alte Katze sleeps in Kano, and we don't wake it."
    tagged = dict(zip(tokens, tags, strict=True))
    assert tagged["alte"] == tagged["Katze"] == "de"
    assert tagged["sleeps"] == "en"
    assert tagged["Kano"] == tagged[","] == UNIVERSAL


def test_capitals_follow_the_place_in_the_sentence() -> None:
    assert (
        mix(tokenise("Now he goes"), tokenise("Er geht jetzt"), [Span(0, 1, 2, 3)], ("en", "de"))[0] == "Jetzt he goes"
    )
    assert mix(tokenise("Now he goes"), tokenise("Er geht jetzt"), [Span(1, 2, 0, 1)], ("en", "de"))[0] == "Now er goes"


def test_words_of_scripts_with_and_without_spaces_do_not_run_together() -> None:
    japanese, english = tokenise("私は猫を見た"), tokenise("I saw a cat")
    assert mix(japanese, english, [Span(2, 3, 3, 4)], ("ja", "en"))[0] == "私は cat を見た"


def test_the_whole_can_be_repeated_and_either_side_can_be_kept() -> None:
    text, other = "The old cat sleeps", "Die alte Katze schläft"
    links: Links = {(i, i) for i in range(4)}
    row = run(text, other, links, ratio=0.5)
    assert row is not None
    assert row == run(text, other, links, ratio=0.5)
    assert row["cmi"] == cmi(row["tags"]) == 50
    assert (row["matrix"], row["embedded"]) == ("en", "de")
    back = run(text, other, links, ratio=0.5, matrix="target")
    assert back is not None
    assert back["matrix"] == "de"
    assert {run(text, other, links, matrix="each", seed=s)["matrix"] for s in range(9)} == {"en", "de"}  # type: ignore[index]


def test_a_sentence_without_links_is_not_mixed() -> None:
    assert run("a b", "c d", set()) is None


def test_given_alignments_count_words_between_spaces(tmp_path: Path) -> None:
    pairs = [Pair("The cat, sleeps", "Die Katze, schläft", "f", 1, number=1)]
    file = tmp_path / "links.txt"
    file.write_text("0-0\n1-1 2-2\n")
    ((_, source, _, links),) = aligned(pairs, unit="word", alignments=file)
    assert [t.text for t in source] == ["The", "cat,", "sleeps"]
    assert links == {(1, 1), (2, 2)}
    file.write_text("0-0\n1-3\n")
    with pytest.raises(AddlangError, match=r"links\.txt, row 2: link 1-3 is outside the sentences of 3 and 3 words"):
        aligned(pairs, unit="word", alignments=file)
    file.write_text("0-0\n")
    with pytest.raises(AddlangError, match="has 1 lines"):
        aligned(pairs, unit="word", alignments=file)
