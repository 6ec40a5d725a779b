"""The lab world: deterministic, verifiable, and nothing that is evaluated is trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from addlang.errors import AddlangError
from addlang.lab import lexicon, tasks, world
from addlang.lab.facts import people

LATIN = re.compile(r"[A-Za-z]")
DEVANAGARI = re.compile(r"[ऀ-ॿ]")


def items(task: str, language: str = "en", n: int = 480) -> list[world.Item]:
    return [item for item in world.exact_match_items(n, 3, language) if item.task == task]


def listed(prompt: str, words: tuple[str, ...]) -> list[str]:
    """The words of the list at the end of a prompt, read back from the text alone."""
    found: list[str] = []
    for word in reversed(prompt.split()):
        if word not in words:
            break
        found.insert(0, word)
    return found


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_documents_are_a_function_of_the_seed(language: str) -> None:
    first = world.documents(language, 50, 7)
    assert first == world.documents(language, 50, 7)
    assert first != world.documents(language, 50, 8)
    assert first == world.documents(language, 80, 7)[:50]


@pytest.mark.parametrize("kind", world.CONVERSATION_KINDS)
def test_conversations_are_a_function_of_the_seed(kind: str) -> None:
    first = world.conversations(kind, 50, 7)
    assert first == world.conversations(kind, 50, 7)
    assert first != world.conversations(kind, 50, 8)
    assert all([m["role"] for m in c] == ["user", "assistant"] and all(m["content"] for m in c) for c in first)


def test_world_is_the_same_in_another_process() -> None:
    code = "from addlang.lab import world as w; print(repr((w.documents('hi', 5, 0), w.exact_match_items(32, 0))))"
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": h, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True, encoding="utf-8").stdout
        for h in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1


def test_world_loads_no_torch() -> None:
    code = "import sys, addlang.lab, addlang.lab.world, addlang.lab.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_items_are_distinct_and_balanced_over_tasks(language: str) -> None:
    found = world.exact_match_items(480, 1, language)
    assert len(found) == len({i.prompt for i in found}) == len({i.id for i in found}) == 480
    counts = Counter(i.task for i in found)
    assert set(counts) == set(tasks.tasks_in(language))  # type: ignore[arg-type]
    assert max(counts.values()) - min(counts.values()) <= 1


def test_there_are_sixteen_tasks() -> None:
    assert len(world.TASKS) == 16


@pytest.mark.parametrize("kind", world.CONVERSATION_KINDS)
def test_no_evaluation_prompt_is_in_training_conversations(kind: str) -> None:
    asked = {c[0]["content"] for c in world.conversations(kind, 5000, 0)}
    for language in world.LANGUAGES:
        assert not asked & {i.prompt for i in world.exact_match_items(480, 1, language)}
    if kind != "dissimilar":
        assert not any(world.is_held_out(prompt) for prompt in asked)


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_held_out_documents_are_disjoint_from_training_documents(language: str) -> None:
    train = {d for seed in range(3) for d in world.documents(language, 1500, seed)}
    held_out = {d for seed in range(3) for d in world.documents(language, 300, seed, "eval")}
    assert len(held_out) > 300
    assert not train & held_out


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_cloze_sentences_are_in_no_document(language: str) -> None:
    texts = world.documents(language, 5000, 0) + world.documents(language, 500, 0, "eval")
    sentences = {sentence for text in texts for sentence in re.findall(r"[^.।]+[.।]", text)}
    clozes = world.cloze_items(language, 200, 0)
    assert len({c.id for c in clozes}) == 200
    for c in clozes:
        assert len(set(c.choices)) == len(c.choices) == 8
        assert all(choice.startswith(" ") for choice in c.choices)
        assert c.context == c.context.strip() != ""
        sentence = c.context + c.choices[c.answer]
        assert sentence not in sentences
        assert " " + sentence not in sentences


def test_cloze_answers_are_stated_by_the_training_text() -> None:
    """Another sentence of the same document collection says each fact: person and value in one sentence."""
    sentences = [s for d in world.documents("en", 5000, 0) for s in d.split(". ")]
    for c in world.cloze_items("en", 200, 0):
        person, value = (
            c.id.split("-")[2],
            c.choices[c.answer].strip(" .").removesuffix(" every day").removesuffix(" most"),
        )
        assert any(person in s and value in s for s in sentences), c


def test_wrong_choices_are_false() -> None:
    homes = {p.name.en: p.home.en for p in people()}
    for c in world.cloze_items("en", 200, 1):
        if c.id.startswith("en-home-"):
            assert [x.strip(" .") for x in c.choices].index(homes[c.id.split("-")[2]]) == c.answer


def test_swahili_is_latin_and_hindi_is_devanagari() -> None:
    for text in world.documents("sw", 300, 0):
        assert LATIN.search(text)
        assert not DEVANAGARI.search(text)
    for text in world.documents("hi", 300, 0):
        assert DEVANAGARI.search(text)
        assert not LATIN.search(text)
        assert unicodedata.normalize("NFC", text) == text
    for kind, script, other in (("similar-sw", LATIN, DEVANAGARI), ("similar-hi", DEVANAGARI, LATIN)):
        for user, _ in world.conversations(kind, 300, 0):
            assert not other.search(user["content"])
            assert script.search(user["content"]) or "=" in user["content"]


def test_swahili_numbers_agree_with_the_noun_class() -> None:
    noun = {n.en: n for n in (*lexicon.FOODS, *(a.noun for a in lexicon.ANIMALS), *lexicon.OBJECTS)}
    said = [lexicon.counted(noun[en], k, "sw") for en, k in
            (("goat", 3), ("mango", 2), ("onion", 4), ("banana", 2), ("ball", 5), ("goat", 7))]  # fmt: skip
    assert said == ["mbuzi watatu", "maembe mawili", "vitunguu vinne", "ndizi mbili", "mipira mitano", "mbuzi saba"]


def test_hindi_adjectives_and_plurals_agree() -> None:
    black = next(c for c in lexicon.COLOURS if c.en == "black")
    red = next(c for c in lexicon.COLOURS if c.en == "red")
    assert [black.hindi("m"), black.hindi("f"), black.hindi("m", plural=True), red.hindi("f")] == [
        "काला",
        "काली",
        "काले",
        "लाल",
    ]
    cat = next(a.noun for a in lexicon.ANIMALS if a.noun.en == "cat")
    assert lexicon.counted(cat, 3, "hi") == "तीन बिल्लियाँ"


@pytest.mark.parametrize("language", world.LANGUAGES)
@pytest.mark.parametrize(
    ("task", "solve"),
    [
        ("copy", lambda w: " ".join(w)),
        ("reverse", lambda w: " ".join(w[::-1])),
        ("count", lambda w: str(len(w))),
        ("first", lambda w: w[0]),
        ("last", lambda w: w[-1]),
        ("comma_list", lambda w: ", ".join(w)),
        ("uppercase", lambda w: " ".join(w).upper()),
    ],
)
def test_list_answers_follow_from_the_prompt(task: str, solve: Any, language: str) -> None:
    words = lexicon.LIST_WORDS[language]  # type: ignore[index]
    for item in items(task, language):
        found = listed(item.prompt, words)
        assert 1 <= len(found) <= 4
        assert item.answer == solve(found), item


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_number_answers_follow_from_the_prompt(language: str) -> None:
    minus = {"en": "minus", "sw": "toa", "hi": "घटा"}[language]
    for item in items("arithmetic", language):
        a, b = map(int, re.findall(r"\d+", item.prompt))
        assert int(item.answer) == (a - b if minus in item.prompt else a + b) >= 0
    for item in items("sort", language):
        assert item.answer.split() == sorted(re.findall(r"\d+", item.prompt), key=int)
    for item in items("larger", language):
        assert int(item.answer) == max(map(int, re.findall(r"\d+", item.prompt)))


def test_lookup_answers_follow_from_the_prompt() -> None:
    for item in items("lookup"):
        owner = {thing: name for name, thing in re.findall(r"([A-Z]\w+) has the (\w+)\.", item.prompt)}
        asked = re.findall(r"[Tt]he (\w+)", item.prompt.split(".", len(owner))[-1])
        assert [owner[thing] for thing in asked if thing in owner] == [item.answer]


def test_odd_one_out_has_exactly_one_answer() -> None:
    kind = {w.en: name for name, (_, members) in lexicon.CATEGORIES.items() for w in members}
    for item in items("odd_one_out"):
        words = listed(item.prompt, lexicon.LIST_WORDS["en"])
        counts = Counter(kind[w] for w in words)
        assert [w for w in words if counts[kind[w]] == 1] == [item.answer]


def test_exact_words_answers_have_the_asked_length() -> None:
    for item in items("exact_words"):
        (k,) = map(int, re.findall(r"\d+", item.prompt))
        words = listed(item.prompt, lexicon.LIST_WORDS["en"])
        assert k < len(words)
        assert item.answer.split() == words[:k]


def test_every_language_tells_the_same_facts() -> None:
    home = {p.name.hi: p.home.hi for p in people()}
    asked = [i for i in items("facts", "hi", n=600) if "कहाँ" in i.prompt]
    assert asked
    for item in asked:
        assert item.answer == next(home[n] for n in home if n in item.prompt.split())


def test_exact_match_ignores_spacing_and_the_full_stop_but_not_case() -> None:
    item = world.Item("x", "uppercase", "?", "RED CAT")
    assert world.score_exact_match(" RED  CAT.\n", item)
    assert not world.score_exact_match("red cat", item)
    assert not world.score_exact_match("RED CAT CAT", item)
    assert not world.score_exact_match("", item)


@pytest.mark.parametrize(
    ("kind", "column"), [("en", "text"), ("hi", "text"), ("english", "messages"), ("dissimilar", "messages")]
)
def test_written_data_is_json_lines(kind: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    world.write_dataset(kind, path, 20, 0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert all(list(row) == [column] for row in rows)


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="'swahili'"):
        world.documents("swahili", 1, 0)
    with pytest.raises(AddlangError, match="Did you mean 'similar-sw'"):
        world.conversations("similar-sv", 1, 0)
    with pytest.raises(AddlangError, match="Did you mean 'dissimilar'"):
        world.write_dataset("disimilar", tmp_path / "x", 1, 0)
    with pytest.raises(AddlangError, match="unknown split"):
        world.documents("en", 1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(AddlangError, match="200 cloze items"):
        world.cloze_items("en", 201, 0)


def test_asking_for_more_items_than_exist_is_an_error() -> None:
    with pytest.raises(AddlangError, match="only about"):
        world.exact_match_items(50_000, 0)
