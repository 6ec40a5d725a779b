"""Conversations in two languages from parallel instruction data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from addlang.builders.bilingual import bilingual, read_parallel
from addlang.errors import AddlangError

ENGLISH = [
    {"id": 7, "instruction": "Name a river.", "input": "", "output": "The Rhine."},
    {"id": 8, "instruction": "Add.", "input": "2 and 3", "output": "Five {x}."},
    {"id": 9, "instruction": "Write code.", "input": "", "output": "print(1)"},
]
GERMAN = [
    {"id": 8, "instruction": "Addiere.", "input": "2 und 3", "output": "Fünf {x}."},
    {"id": 7, "instruction": "Nenne einen Fluss.", "input": None, "output": "Der Rhein."},
    {"id": 9, "instruction": "Schreibe Code.", "input": None, "output": "print(1)"},
    {"id": 5, "instruction": "Übrig.", "input": None, "output": "Ja."},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path, "en.jsonl", ENGLISH), write(tmp_path, "de.jsonl", GERMAN)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def made(files: tuple[str, str], join: str | None = None, **changes: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    counts: Counter[str] = Counter()
    settings: dict[str, Any] = {"style": "both", "request": False, **changes}
    role = "user" if settings["style"] == "then-answer" else "assistant"
    rows = read_parallel(*files, join, counts, role)
    return list(bilingual(rows, codes=("en", "de"), names=("English", "German"), **settings)), counts


def test_rows_are_joined_by_id_in_the_order_of_the_target(files: tuple[str, str]) -> None:
    rows, counts = made(files)
    assert [row["from"]["row"] for row in rows] == [1, 2]
    assert counts == {"joined": 2, "unmatched": 1, "same": 1}
    assert rows[0]["messages"] == [
        {"role": "user", "content": "Addiere.\n\n2 und 3"},
        {"role": "assistant", "content": "English: Five {x}.\n\nGerman: Fünf {x}."},
    ]


def test_the_prompt_may_say_in_which_languages_to_answer(files: tuple[str, str]) -> None:
    rows, _ = made(files, request=True, labels=False)
    for row in rows:
        ask, answer = (m["content"] for m in row["messages"])
        assert "English" in ask
        assert "German" in ask
        assert "Addiere." in ask or "Nenne einen Fluss." in ask
        assert "English:" not in answer


def test_in_two_turns_the_second_answer_follows_a_question(files: tuple[str, str]) -> None:
    rows, _ = made(files, style="two-turns", request=True)
    messages = rows[1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert [messages[i]["content"] for i in (1, 3)] == ["The Rhine.", "Der Rhein."]
    assert "German" in messages[2]["content"]


def test_then_answer_shows_the_request_in_the_pivot_first(files: tuple[str, str]) -> None:
    rows, counts = made(files, style="then-answer")
    assert counts["joined"] == 3, "here the prompts must differ, not the answers"
    assert rows[1]["messages"][1]["content"] == "English: Name a river.\n\nGerman: Der Rhein."


def test_the_request_may_be_in_either_language(files: tuple[str, str]) -> None:
    assert made(files, ask="pivot")[0][1]["messages"][0]["content"] == "Name a river."
    asked = {made(files, ask="each", seed=seed)[0][1]["messages"][0]["content"] for seed in range(12)}
    assert asked == {"Name a river.", "Nenne einen Fluss."}


def test_without_ids_rows_are_joined_by_their_number(tmp_path: Path) -> None:
    english = write(tmp_path, "en.jsonl", [{k: v for k, v in row.items() if k != "id"} for row in ENGLISH])
    plain = [{k: v for k, v in GERMAN[i].items() if k != "id"} for i in (1, 0)]
    translated = [{"id": i, **row, "translated_from": "en"} for i, row in ((2, plain[1]), (1, plain[0]))]
    for target in (plain, translated):  # the latter as 'addlang data translate' numbers them
        rows, counts = made((english, write(tmp_path, "de.jsonl", target)))
        assert counts == {"joined": 2}
        answers = {row["messages"][1]["content"] for row in rows}
        assert answers == {"English: The Rhine.\n\nGerman: Der Rhein.", "English: Five {x}.\n\nGerman: Fünf {x}."}


@pytest.mark.parametrize("bare", [0, 1])
def test_ids_of_one_file_are_not_joined_with_row_numbers_of_the_other(tmp_path: Path, bare: int) -> None:
    rows = (
        [{**row, "id": i} for i, row in enumerate(ENGLISH[:2])],
        [{**row, "id": i} for i, row in enumerate(GERMAN[:2])],
    )
    for row in rows[bare]:
        del row["id"]
    files = write(tmp_path, "en.jsonl", rows[0]), write(tmp_path, "de.jsonl", rows[1])
    with pytest.raises(AddlangError, match=r"has a column 'id', and .* has none \(row 1\)") as caught:
        made(files)
    assert "--join" in (caught.value.fix or "")


def test_a_later_row_without_an_id_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    torn = write(tmp_path, "torn.jsonl", [GERMAN[0], {k: v for k, v in GERMAN[1].items() if k != "id"}])
    with pytest.raises(AddlangError, match=r"torn\.jsonl, row 2: there is no column 'id'"):
        made((files[0], torn))


def test_every_turn_of_a_conversation_is_kept_and_others_do_not_match(tmp_path: Path) -> None:
    def talk(*contents: str) -> dict[str, Any]:
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}

    left = write(tmp_path, "en.jsonl", [talk("a", "b", "c", "d"), talk("a", "b"), talk("a", " ")])
    right = write(tmp_path, "de.jsonl", [talk("A1", "B1", "C1", "D1"), talk("A", "B", "C", "D"), talk("a", "b")])
    rows, counts = made((left, right), labels=False)
    assert counts == {"joined": 1, "differing": 1, "blank": 1}
    assert [m["content"] for m in rows[0]["messages"]] == ["A1", "b\n\nB1", "C1", "d\n\nD1"]


def test_what_cannot_be_joined_is_an_error(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"en\.jsonl, row 1: there is no column 'key'"):
        made(files, join="key")
    with pytest.raises(AddlangError, match=r"'Name a river\.' stands twice"):
        made((write(tmp_path, "twice.jsonl", ENGLISH[:1] * 2), files[1]), join="instruction")
    with pytest.raises(AddlangError, match="no row of"):
        made(files, join="instruction")
    with pytest.raises(AddlangError, match="raw text, not instructions"):
        made((files[0], write(tmp_path, "raw.jsonl", [{"id": 7, "text": "x"}])))
