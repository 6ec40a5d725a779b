"""A phase's data: copies, evaluation items, shares and the card, through the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer

from addlang.data.prepare import PhaseData, labelled_chats, labelled_texts, prepare
from addlang.errors import AddlangError, AddlangWarning
from addlang.schema import DatasetSpec
from tinyrun import World, chat_rows, lexicon, text_rows, write_rows

pytestmark = pytest.mark.usefixtures("offline")


def data(world: World, tmp_path: Path, **changes: Any) -> PhaseData:
    recipe = world.recipe(tmp_path / "out", **changes)
    return prepare(recipe, recipe.phases[0], make_tokenizer())


def with_prompts(world: World, tmp_path: Path, *prompts: str) -> dict[str, Any]:
    """An evaluation on these prompts."""
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    return {**world.data(tmp_path)["evaluation"], "replies": {"prompts": file}}


def test_copies_of_an_earlier_data_set_are_not_packed_twice(world: World, tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [*text_rows(60, 1)[:10], *text_rows(60, 9)])
    sources = [{"path": world.text, "role": "source"}, {"path": mixed}]
    card = data(world, tmp_path, datasets=sources).card
    copies = card["sources"][1]["copies_across"]
    assert 8 <= copies <= 10, "some of the ten may be held out"
    kept = data(world, tmp_path, datasets=sources, deduplicate="none").card
    assert kept["sources"][1]["documents"] == card["sources"][1]["documents"] + copies


def test_a_row_with_an_evaluation_item_stops_the_run_unless_it_is_allowed_or_dropped(
    world: World, tmp_path: Path
) -> None:
    prompt = " ".join(lexicon()[:15])
    rows = [*text_rows(60, 1), {"text": f"Once: {prompt}. Done."}]
    settings: dict[str, Any] = {
        "datasets": [{"path": write_rows(tmp_path / "train.jsonl", rows)}],
        "evaluation": with_prompts(world, tmp_path, prompt),
    }
    with pytest.raises(AddlangError) as caught:
        data(world, tmp_path, **settings)
    for part in (
        "train.jsonl, row 61: task replies",
        "prompts.jsonl:1",
        "allow_contamination: true",
        "drop_contaminated",
    ):
        assert part in str(caught.value)
    with pytest.warns(AddlangWarning, match="not to be trusted"):
        allowed = data(world, tmp_path, allow_contamination=True, **settings)
    with pytest.warns(AddlangWarning, match="left out"):
        dropped = data(world, tmp_path, drop_contaminated=True, **settings)
    assert allowed.card["sources"][0]["documents"] == dropped.card["sources"][0]["documents"] + 1
    assert allowed.card["overlap"]["found"][0]["row"] == 61
    assert dropped.card["sources"][0]["contaminated"] == 1


def test_to_allow_and_to_drop_at_once_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match="choose one"):
        world.recipe(tmp_path, allow_contamination=True, drop_contaminated=True)


def test_temperature_and_language_weights_decide_the_shares(world: World, tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", text_rows(15, 5))
    sources = [{"path": world.text, "language": "sw"}, {"path": small, "language": "ha"}]

    def shares(**changes: Any) -> list[float]:
        return [s["share"] for s in data(world, tmp_path, datasets=sources, **changes).card["sources"]]

    plain, flat = shares(), shares(sampling_temperature=1e6)
    assert plain[0] > 0.75
    assert np.allclose(flat, 0.5, atol=1e-3)
    assert np.allclose(shares(language_weights={"ha": 0.3}), [0.7, 0.3])
    drawn = data(world, tmp_path, datasets=sources, language_weights={"ha": 0.3}, tokens=20_000).card["sources"]
    total = sum(s["trained_tokens"] for s in drawn)
    assert drawn[1]["trained_tokens"] / total == pytest.approx(0.3, abs=0.02)


def test_the_card_is_the_same_when_the_data_come_from_the_cache(world: World, tmp_path: Path) -> None:
    first, second = (json.loads(json.dumps(data(world, tmp_path).card)) for _ in range(2))
    assert first == second
    source = first["sources"][0]
    assert {"languages", "lengths", "dropped", "truncated", "licenses", "duplicates"} <= set(source)


def test_evaluation_rows_of_a_directory_have_an_id_each_and_those_of_a_file_keep_theirs(tmp_path: Path) -> None:
    """Ids of single files name cached evaluations."""
    (tmp_path / "sub").mkdir()
    for file, seed in (("a.jsonl", 1), ("sub/a.jsonl", 2)):
        write_rows(tmp_path / file, text_rows(2, seed))
    write_rows(tmp_path / "one.jsonl", chat_rows(2, 9))
    both, one = DatasetSpec(path=str(tmp_path)), DatasetSpec(path=str(tmp_path / "one.jsonl"))
    ids = [name for name, _ in labelled_texts((both, one))]
    assert ids == [f"0:{f}:{n}" for f in ("a.jsonl", "one.jsonl", "sub/a.jsonl") for n in (1, 2)] + ["1:1", "1:2"]
    assert [name for name, _ in labelled_chats((one, both))] == ["0:1", "0:2", "1:one.jsonl:1", "1:one.jsonl:2"]


def test_conversations_without_an_answer_are_held_out_as_text_and_not_as_answers(world: World, tmp_path: Path) -> None:
    rows = chat_rows(60, 7)
    asked = [{"messages": row["messages"][:1]} for row in rows[:30]]
    mixed = write_rows(tmp_path / "mixed.jsonl", [*asked, *rows[30:]])
    found = data(world, tmp_path, datasets=[{"path": mixed}], loss_on="all", sequence_length=128)
    answered = [name for name, messages in found.heldout_chats if messages[-1]["role"] == "assistant"]
    assert 0 < len(answered) == len(found.heldout_chats) < len(found.heldout)
    assert {*answered} < {name for name, _ in found.heldout}
