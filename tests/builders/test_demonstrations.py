"""Translation demonstrations: many instructions, both directions, nothing that depends on the order of the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from addlang.builders.demonstrations import demonstrations
from addlang.builders.parallel import Pair
from addlang.builders.templates import (
    BOTH,
    IN_PIVOT,
    NOW_IN_TARGET,
    THEN_ANSWER,
    TRANSLATE,
    check_fields,
    read_templates,
)
from addlang.errors import AddlangError

PAIRS = [Pair(f"Sentence {i} with {{braces}}.", f"Satz {i} mit {{Klammern}}.", "pairs.jsonl", i) for i in range(200)]


def made(pairs: list[Pair] = PAIRS, **changes: Any) -> list[dict[str, Any]]:
    return list(demonstrations(pairs, languages=("en", "de"), names=("English", "German"), **changes))


def test_there_are_more_than_thirty_different_instructions_and_all_are_used() -> None:
    assert len(set(TRANSLATE)) == len(TRANSLATE) >= 30
    assert {row["template"] for row in made()} == set(range(len(TRANSLATE)))


@pytest.mark.parametrize("template", [*TRANSLATE, *THEN_ANSWER, *BOTH, *IN_PIVOT, *NOW_IN_TARGET])
def test_every_template_can_be_filled_in(template: str) -> None:
    required = "text" if template in TRANSLATE else None if template in NOW_IN_TARGET else "prompt"
    check_fields(template, ("source", "target", "text", "pivot", "prompt"), required, "here")
    assert "{target}" in template or template in IN_PIVOT


def test_both_directions_ask_for_one_side_and_answer_with_the_other() -> None:
    forward, backward = made(PAIRS[:1])
    assert (forward["direction"], backward["direction"]) == ("en-de", "de-en")
    assert PAIRS[0].source in forward["messages"][0]["content"]
    assert forward["messages"][1]["content"] == PAIRS[0].target
    assert PAIRS[0].target in backward["messages"][0]["content"]
    assert backward["messages"][1]["content"] == PAIRS[0].source
    assert forward["template"] != backward["template"]
    assert forward["from"] == {"file": "pairs.jsonl", "row": 0}


def test_a_direction_can_be_chosen_and_each_divides_the_pairs() -> None:
    assert {row["direction"] for row in made(direction="forward")} == {"en-de"}
    assert {row["direction"] for row in made(direction="backward")} == {"de-en"}
    each = made(direction="each")
    assert len(each) == len(PAIRS)
    assert 70 < sum(row["direction"] == "en-de" for row in each) < 130


def test_other_pairs_do_not_change_a_demonstration_but_the_seed_does() -> None:
    assert made(PAIRS[50:])[0] == made()[100]
    assert made(seed=1) != made()


def test_own_templates_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("Fassara zuwa {target}:\\n{text}\n\n{text} -> {target}\n")
    own = read_templates(file, ("source", "target", "text"), "text")
    assert own == ("Fassara zuwa {target}:\n{text}", "{text} -> {target}")
    assert made(PAIRS[:1], templates=own[:1])[0]["messages"][0]["content"].startswith(
        "Fassara zuwa German:\nSentence 0"
    )
    for line, message in (
        ("to {tongue}: {text}", r"row 1: unknown field \{tongue\}"),
        ("translate!", r"no \{text\}"),
        ("{text", "row 1"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(AddlangError, match=message):
            read_templates(file, ("source", "target", "text"), "text")
