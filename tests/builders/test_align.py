"""Word alignment recovers a known dictionary; its parts agree with examples worked out by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from addlang.builders.align import Links, align, align_with_dictionary, grow, read_alignments, read_dictionary
from addlang.errors import AddlangError


def corpus(number: int, seed: int = 0) -> tuple[list[list[str]], list[list[str]], list[Links]]:
    """Sentences in a made-up language: every word has one translation, and neighbours sometimes change places."""
    r = random.Random(seed)
    words = [f"w{i}" for i in range(80)]
    sources, targets, gold = [], [], []
    for _ in range(number):
        source = r.sample(words, r.randint(4, 9))
        order = list(range(len(source)))
        for i in range(0, len(order) - 1, 2):
            if r.random() < 0.5:
                order[i], order[i + 1] = order[i + 1], order[i]
        sources.append(source)
        targets.append([f"ü{source[i][1:]}" for i in order])
        gold.append({(i, j) for j, i in enumerate(order)})
    return sources, targets, gold


@pytest.mark.parametrize("symmetry", ["intersect", "grow"])
def test_a_known_dictionary_is_recovered(symmetry: str) -> None:
    sources, targets, gold = corpus(400)
    found = align(sources, targets, symmetry=symmetry)  # type: ignore[arg-type]
    right = sum(len(a & b) for a, b in zip(found, gold, strict=True))
    assert right / sum(map(len, found)) > 0.99
    assert right / sum(map(len, gold)) > 0.97


def test_words_without_a_counterpart_stay_unlinked() -> None:
    sources, targets, _ = corpus(400)
    with_noise = [[*target, random.Random(i).choice("xyz")] for i, target in enumerate(targets)]
    found = align(sources, with_noise, symmetry="intersect")
    last = [any(j == len(t) - 1 for _, j in links) for t, links in zip(with_noise, found, strict=True)]
    assert sum(last) < 0.05 * len(last)


def test_words_spelt_alike_are_linked_even_if_seen_once() -> None:
    sources, targets, _ = corpus(50)
    found = align([*sources, ["Kano", "w1", "7"]], [*targets, ["7", "ü1", "Kano"]], symmetry="intersect")
    assert {(0, 2), (2, 0)} <= found[-1]


def test_empty_sides_give_no_links() -> None:
    assert align([["a"], []], [["b"], ["c"]], symmetry="intersect")[1] == set()
    assert align([], [], symmetry="grow") == []


def test_growing_adds_neighbours_of_the_union_whose_word_is_free() -> None:
    forward, backward = {(0, 0), (1, 1), (3, 3)}, {(0, 0), (2, 1), (3, 0)}
    # the intersection is (0, 0); (1, 1) is its diagonal neighbour; (2, 1) then touches (1, 1) and source word 2 is free;
    # (3, 0) touches (2, 1) and source word 3 is free; (3, 3) touches nothing
    assert grow(forward, backward) == {(0, 0), (1, 1), (2, 1), (3, 0)}


def test_a_dictionary_links_each_word_once_the_nearest_first() -> None:
    dictionary = {"cat": {"katze"}, "the": {"die"}}
    found = align_with_dictionary(
        [["The", "cat", "and", "the", "dog"]], [["Die", "Katze", "und", "die", "Ente"]], dictionary
    )
    assert found == [{(0, 0), (1, 1), (3, 3)}]


def test_files_of_words_and_links_are_checked(tmp_path: Path) -> None:
    words, links = tmp_path / "words.tsv", tmp_path / "links.txt"
    words.write_text("Cat\tKatze\ncat\tKater\n")
    assert read_dictionary(words) == {"cat": {"katze", "kater"}}
    words.write_text("cat Katze\n")
    with pytest.raises(AddlangError, match=r"words\.tsv, row 1"):
        read_dictionary(words)
    links.write_text("0-0 1-2\n\n")
    assert read_alignments(links) == [{(0, 0), (1, 2)}, set()]
    links.write_text("0-0\n0:1\n")
    with pytest.raises(AddlangError, match=r"links\.txt, row 2: '0:1' is no link"):
        read_alignments(links)
