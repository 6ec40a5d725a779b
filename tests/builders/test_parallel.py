"""Parallel text in every form; what is wrong is named with file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addlang.builders.parallel import Cleaning, Pair, clean_pairs, read_pairs
from addlang.errors import AddlangError

PAIRS = [("The cat sleeps.", "Die Katze schläft."), ("It rains.", "Es regnet.")]
COLUMNS = ("source", "target")


def texts(files: list[Path], columns: tuple[str, str] = COLUMNS) -> list[tuple[str, str]]:
    return [(p.source, p.target) for p in read_pairs([str(f) for f in files], columns)]


def test_two_columns_of_jsonl_also_within_a_column(tmp_path: Path) -> None:
    flat, deep = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    flat.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS))
    deep.write_text("".join(json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in PAIRS))
    assert texts([flat]) == texts([deep], ("translation.en", "translation.de")) == PAIRS
    with pytest.raises(AddlangError, match=r"row 1: there is no column 'translation\.eng'(.|\n)*Did you mean 'en'"):
        texts([deep], ("translation.eng", "translation.de"))


def test_tsv_with_and_without_header(tmp_path: Path) -> None:
    bare, named = tmp_path / "a.tsv", tmp_path / "b.tsv"
    bare.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    named.write_text("id\ttarget\tsource\n" + "".join(f"7\t{b}\t{a}\n" for a, b in PAIRS))
    assert texts([bare]) == texts([named]) == PAIRS
    bare.write_text("a\tb\nonly one\n")
    with pytest.raises(AddlangError, match=r"a\.tsv, row 2: 1 column"):
        texts([bare])


def test_aligned_files_must_have_as_many_lines(tmp_path: Path) -> None:
    a, b = tmp_path / "text.en", tmp_path / "text.de"
    a.write_text("".join(f"{x}\n" for x, _ in PAIRS))
    b.write_text("".join(f"{y}\n" for _, y in PAIRS))
    assert texts([a, b]) == PAIRS
    b.write_text("Es regnet.\n")
    with pytest.raises(AddlangError, match=r"text\.de ends after line 1"):
        texts([a, b])


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"gone\.jsonl: the file does not exist"):
        texts([tmp_path / "gone.jsonl"])
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(AddlangError, match="no file of pairs"):
        texts([tmp_path / "a.pdf"])


def test_unusable_pairs_are_left_out_and_counted() -> None:
    usual = [(f"sentence number {i}", f"Satz Nummer {i}") for i in range(20)]
    odd = [("", "leer"), ("Same thing", "same thing!"), usual[3], ("short", "ein sehr langer Satz " * 9)]
    pairs = [Pair(a, b, "f", i) for i, (a, b) in enumerate([*usual, *odd])]
    cleaning = Cleaning()
    kept = list(clean_pairs(pairs, cleaning, max_ratio=4))
    assert [p.row for p in kept] == list(range(20))
    assert cleaning.counts() == {"read": 24, "blank": 1, "identical": 1, "duplicate": 1, "length": 1}
    assert len(list(clean_pairs(pairs, Cleaning(), max_ratio=0))) == 21


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(AddlangError, match="no pair is left of 1"):
        list(clean_pairs([Pair("", "x", "f", 1)], Cleaning()))
