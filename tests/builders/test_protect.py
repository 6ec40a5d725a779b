"""What is kept from a translator, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addlang.builders.code import code_spans
from addlang.builders.protect import Protector
from chatserver import Job, Server, read

PYTHON = "def area(side):\n    # the area of a square\n    result = side ** 2\n\n    return result\n\nprint(area(3))"
JAVA = "public static int twice(int a)\n{\n    return 2 * a;\n}"
SQL = "SELECT name, MAX(rating)\nFROM vendors\nGROUP BY name;"
SCRIPT = "const names = people.map(p => p.name);\nfor (let i = 0; i < 3; i++) {\n  console.log(names[i]);\n}"
INDENTED_OTHERWISE = (
    "def first(items):\n\u00a0\u00a0\u00a0\u00a0chosen = items[0]\n\u00a0\n\u00a0\u00a0\u00a0\u00a0return chosen"
)


@pytest.mark.parametrize(
    "code", [PYTHON, JAVA, SQL, SCRIPT, INDENTED_OTHERWISE, "x = 5", "import math", "numbers = [1, 2]"]
)
def test_code_without_a_fence_is_found_as_a_whole(code: str) -> None:
    text = f"Here is what you asked for.\n{code}\nThis is how it works."
    assert [text[a:b] for a, b in code_spans(text)] == [code]


@pytest.mark.parametrize(
    "prose",
    [
        "If you have time on Monday: come and see us.",
        "for those who wait:",
        "Area = length times width",
        "Variance = 11.3333",
        "first item;",
        "(see below);",
        "Ingredient(s)",
        "from London with love",
        "import duties on steel",
        "class notes are due tomorrow",
        "Return the book (it is late).",
        "- a list\n  - with another list below it\n    that goes on",
        "{\n  \"title\": \"A walk in the park\",\n  \"pages\": 3\n}",
    ],
)  # fmt: skip
def test_prose_is_not_taken_for_code(prose: str) -> None:
    assert list(code_spans(prose)) == []


def test_what_follows_the_code_without_indentation_is_prose_again() -> None:
    text = "x = 5\nThis sets the number.\n\ny = 6\n\n\n\n\n  And an indented line far below."
    assert [text[a:b] for a, b in code_spans(text)] == ["x = 5", "y = 6"]


@pytest.mark.parametrize(
    "name",
    ["customer_id", "get_price()", "max()", "getElementById", "package.json", "notes.txt", "/usr/local/bin", "~/Music/old", "C:\\Temp\\x"],
)  # fmt: skip
def test_names_of_variables_functions_and_files_are_kept(name: str) -> None:
    text = f"Please look at {name}, and say what it does."
    protected = Protector().protect(text)
    assert protected.kept == (name,)
    assert protected.text == "Please look at ⟦1⟧, and say what it does."


@pytest.mark.parametrize(
    "text", ["either/or and well-known things", "the teacher(s) of 24/7 care", "a re-read e.g. of an iPhone manual"]
)
def test_ordinary_words_are_not_names(text: str) -> None:
    assert Protector().protect(text).kept == ()


def test_a_name_of_the_glossary_beside_something_protected_still_gets_its_translation() -> None:
    protected = Protector({"Kenya": "Kenia"}).protect("Mount Kenya 5,199 m `high`")
    assert protected.text == "Mount ⟦1⟧"
    assert protected.kept == ("Kenia 5,199 m `high`",)


@pytest.mark.parametrize("fence", ["", "```python\n"])
@pytest.mark.parametrize("unit", ["text", "sentence"])
def test_code_over_several_lines_comes_out_as_it_was(
    job: Job, rows_file: Path, tmp_path: Path, unit: str, fence: str
) -> None:
    code = f"{fence}{PYTHON}\n```" if fence else PYTHON
    answer = (
        f"The old man wrote this program in the evening.\n{code}\n- It is short.\n- It prints the area of a square."
    )
    rows_file.write_text(json.dumps({"instruction": "Write a program, please.", "output": answer}) + "\n")
    server = Server()
    job(server, unit=unit, check_language=False)
    out = read(tmp_path / "out.jsonl")[0]["output"]
    assert code in out
    assert out.count("\n") == answer.count("\n")
    assert out.count("\n- ") == 2
    assert not any("side" in text or "result" in text for text in server.texts)
    assert len(server.texts) == (2 if unit == "text" else 4)
