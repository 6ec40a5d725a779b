"""One pass finds copies across data sets and evaluation items; what is left out is said and is the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from addlang.data.contamination import ItemIndex, ItemText
from addlang.data.inspect import Inspected, inspect
from addlang.data.sources import Row
from addlang.errors import AddlangError, AddlangWarning

ITEM = "Which of these rivers flows through the old capital city of the kingdom of Hungary today?"
LONG = "the quick brown fox jumps over the lazy dog while five wizards pack a box of liquor jugs at midnight "


def rows(name: str, *texts: str) -> list[Row]:
    return [Row(text, None, name, i) for i, text in enumerate(texts, 1)]


class Unreadable(list[Row]):
    def __iter__(self) -> Any:
        raise AssertionError("read again")


def run(tmp_path: Path, *sources: list[Row], items: tuple[str, ...] = (), **settings: Any) -> Inspected:
    index = ItemIndex(ItemText("rivers", str(i), "question", text) for i, text in enumerate(items))
    identities = [[row.content for row in source] for source in sources if not isinstance(source, Unreadable)]
    options: dict[str, Any] = {"deduplicate": "exact", "near": 0.8, "on_items": "error", **settings}
    return inspect(sources, identities, items=index, cache_dir=tmp_path, **options)


def texts(found: Inspected) -> list[list[str]]:
    return [[row.content for row in source] for source in found.rows]


def test_of_two_copies_that_of_the_earlier_data_set_is_kept(tmp_path: Path) -> None:
    found = run(tmp_path, rows("a", "One.", "Two."), rows("b", "three", "TWO", "one"))
    assert texts(found) == [["One.", "Two."], ["three"]]
    assert found.rows[1].counts()["copies_across"] == 2
    assert found.fingerprints[0] == ""
    assert found.fingerprints[1] != ""


def test_near_copies_are_left_out_only_if_asked_for(tmp_path: Path) -> None:
    a, b = rows("a", LONG * 3), rows("b", LONG * 3 + "too", "other")
    assert texts(run(tmp_path, a, b)) == [[LONG * 3], [LONG * 3 + "too", "other"]]
    found = run(tmp_path, a, b, deduplicate="near")
    assert texts(found) == [[LONG * 3], ["other"]]
    assert found.rows[1].counts()["near_copies"] == 1


def test_none_keeps_every_copy(tmp_path: Path) -> None:
    found = run(tmp_path, rows("a", "One."), rows("b", "One."), deduplicate="none")
    assert texts(found) == [["One."], ["One."]]


def test_a_data_set_of_copies_alone_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(AddlangError, match=r"data set 2: nothing is left of its 1 rows(.|\n)*deduplicate: none"):
        run(tmp_path, rows("a", "One."), rows("b", "One."))


def test_contamination_is_an_error_that_names_file_row_task_and_item(tmp_path: Path) -> None:
    source = rows("train.jsonl", "fine", f"Q: {ITEM} A: the Danube")
    with pytest.raises(AddlangError, match=r"train\.jsonl, row 2: task rivers, item 0, question"):
        run(tmp_path, source, items=(ITEM,))


def test_contaminated_rows_are_left_out_or_kept_with_a_warning(tmp_path: Path) -> None:
    source = rows("train.jsonl", "fine", f"Q: {ITEM}")
    with pytest.warns(AddlangWarning, match="they are left out"):
        found = run(tmp_path, source, items=(ITEM,), on_items="drop")
    assert texts(found) == [["fine"]]
    with pytest.warns(AddlangWarning, match="not to be trusted"):
        found = run(tmp_path, source, items=(ITEM,), on_items="allow")
    assert texts(found) == [["fine", f"Q: {ITEM}"]]
    assert found.overlap["rows"] == 1
    assert found.overlap["found"][0]["row"] == 2
    assert found.overlap["texts"] == {"rivers": 1}


def test_findings_are_kept_and_the_data_not_read_again(tmp_path: Path) -> None:
    sources = [rows("a", "One."), rows("b", "One.", "Two.")]
    first = run(tmp_path, *sources)
    identities = [[row.content for row in source] for source in sources]
    again = inspect(
        [Unreadable(s) for s in sources], identities, deduplicate="exact", near=0.8, items=ItemIndex(()),
        on_items="error", cache_dir=tmp_path,
    )  # fmt: skip
    assert again.fingerprints == first.fingerprints


def test_one_source_without_items_is_not_read_at_all(tmp_path: Path) -> None:
    found = run(tmp_path, Unreadable(rows("a", "One.")))
    assert found.overlap == {}
    assert not list(tmp_path.iterdir())
