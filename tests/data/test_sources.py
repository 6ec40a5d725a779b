"""Rows of every format come out alike; what is wrong is named with file, row and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addlang.data.sources import Row, read_rows
from addlang.errors import AddlangError, AddlangWarning
from addlang.recipe import DatasetSpec

Write = Callable[..., Path]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path: Path | str, **options: Any) -> list[Row]:
    return list(read_rows(DatasetSpec(path=str(path), **options)))


def fails(path: Path | str, *parts: str, **options: Any) -> None:
    with pytest.raises(AddlangError) as caught:
        read(path, **options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": TURNS},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Instruction: Hi ### Response: Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"id": "flan.1", "system_prompt": "", "question": "Hi", "response": "Hello"},
        {"question": "Hi", "response": "Hello"},
    ],
)
def test_every_chat_format_is_detected(write_jsonl: Write, row: dict[str, Any]) -> None:
    (found,) = read(write_jsonl(row))
    assert found.messages == TURNS
    assert found.text is None


def test_alpaca_input_follows_the_instruction_after_a_blank_line(write_jsonl: Write) -> None:
    (row,) = read(write_jsonl({"instruction": "Sum up.", "input": "A text.", "output": "Short."}))
    assert row.messages == [
        {"role": "user", "content": "Sum up.\n\nA text."},
        {"role": "assistant", "content": "Short."},
    ]


def test_the_system_prompt_of_openorca_is_the_first_message(write_jsonl: Write) -> None:
    (row,) = read(write_jsonl({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}))
    assert row.messages == [{"role": "system", "content": "Be brief."}, *TURNS]


def test_openorca_without_its_columns_names_them(write_jsonl: Write) -> None:
    fails(write_jsonl({"question": "Hi", "answer": "Hello"}), "row 1", "no column 'response'", format="openorca")


def test_sharegpt_system_turns_are_kept(write_jsonl: Write) -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello")]
    (row,) = read(write_jsonl({"conversations": [{"from": f, "value": v} for f, v in turns]}))
    assert [m["role"] for m in row.messages or ()] == ["system", "user", "assistant"]


def test_text_rows_carry_file_line_and_licence(write_jsonl: Write) -> None:
    path = write_jsonl({"text": "a", "license": "CC0"}, {"text": "b"})
    assert read(path, license="MIT") == [Row("a", None, str(path), 1, "CC0"), Row("b", None, str(path), 2, "MIT")]


def test_named_text_column_wins_over_detection(write_jsonl: Write) -> None:
    path = write_jsonl({"body": "the text", "prompt": "p", "completion": "c"})
    assert [r.text for r in read(path, text_column="body")] == ["the text"]


def test_given_format_overrides_detection(write_jsonl: Write) -> None:
    path = write_jsonl({"instruction": "Hi", "output": "Hello", "text": "all of it"})
    assert [r.text for r in read(path, format="text")] == ["all of it"]


def test_limit_counts_rows_over_all_files(tmp_path: Path, write_jsonl: Write) -> None:
    write_jsonl({"text": "a"}, {"text": "b"}, name="1.jsonl")
    write_jsonl({"text": "c"}, {"text": "d"}, name="2.jsonl")
    assert [r.text for r in read(tmp_path, limit=3)] == ["a", "b", "c"]
    assert [r.text for r in read(tmp_path, limit=2)] == ["a", "b"]


def test_directory_reads_all_supported_files_in_order_each_in_its_own_format(
    tmp_path: Path, write_jsonl: Write
) -> None:
    write_jsonl({"text": "b"}, name="b.jsonl")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.csv").write_text("prompt,completion\nHi,Hello\n")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert [r.content for r in read(tmp_path)] == ["a", "b", "Hi\nHello"]


def test_directory_of_translations_is_read_without_what_stands_beside_them(tmp_path: Path) -> None:
    for name in ("de.jsonl", "de.jsonl.journal.jsonl", "de.jsonl.rejects.jsonl", "alone.journal.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "de.jsonl.about.json").write_text("{}")
    rows = list(read_rows(DatasetSpec(path=str(tmp_path))))
    assert [row.text for row in rows] == ["alone.journal.jsonl", "de.jsonl"]


def test_directory_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    fails(tmp_path, "no supported file", ".parquet")


def test_relative_paths_are_resolved_against_base_dir(tmp_path: Path, write_jsonl: Write) -> None:
    write_jsonl({"text": "a"})
    assert len(list(read_rows(DatasetSpec(path="data.jsonl"), base_dir=tmp_path))) == 1


def test_rows_can_be_read_again_and_tell_what_they_read(write_jsonl: Write) -> None:
    rows = read_rows(DatasetSpec(path=str(write_jsonl({"text": "a"}, {"text": " "}, {"text": None}))))
    for _ in range(2):
        with pytest.warns(AddlangWarning, match=r"2 empty row\(s\) skipped, the first is .*data.jsonl, row 2"):
            assert [r.text for r in rows] == ["a"]
        assert (rows.stats.rows, rows.stats.empty) == (1, 2)


def test_empty_answers_count_as_empty_rows(write_jsonl: Write) -> None:
    path = write_jsonl({"instruction": "Hi", "output": "Hello"}, {"instruction": "Hi", "output": ""})
    with pytest.warns(AddlangWarning, match="1 empty row"):
        assert len(read(path)) == 1


def test_only_empty_rows_is_an_error(write_jsonl: Write) -> None:
    fails(write_jsonl({"text": ""}, {"text": "\n"}), "every one of its 2 rows is empty")


def test_file_of_blank_lines_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    fails(tmp_path / "a.jsonl", "a.jsonl", "no rows")


def test_missing_column_suggests_the_nearest(write_jsonl: Write) -> None:
    fails(write_jsonl({"texts": "a", "id": 1}), "row 1", "no column 'text'", "Did you mean 'texts'?", "text_column")


def test_column_missing_in_a_later_row_names_that_row(write_jsonl: Write) -> None:
    fails(write_jsonl({"text": "a"}, {"txt": "b"}), "data.jsonl, row 2", "Did you mean 'txt'?")
    fails(write_jsonl({"messages": TURNS}, {"message": TURNS}), "row 2", "Did you mean 'message'?")


def test_column_that_is_no_text_is_refused(write_jsonl: Write) -> None:
    fails(write_jsonl({"text": "a"}, {"text": 5}), "row 2", "must be text, it is int")


@pytest.mark.parametrize(
    ("turns", "parts"),
    [
        ([{"role": "usr", "content": "Hi"}], ("message 1", "unknown role 'usr'", "Did you mean 'user'?")),
        ([{"role": "human", "content": "Hi"}], ("unknown role 'human'",)),
        ([TURNS[0], {"role": "assistant", "content": None}], ("message 2", "must be text, it is null")),
        ([TURNS[0], {"role": "assistant"}], ("message 2 has no 'content'",)),
        ([{"rol": "user", "content": "Hi"}], ("message 1 has no 'role'", "Did you mean 'rol'?")),
        (["Hi"], ("message 1 must have 'role' and 'content', it is str",)),
        ("[{", ("not valid JSON",)),
        (5, ("must be a list of messages",)),
    ],
)
def test_bad_messages_name_row_and_message(write_jsonl: Write, turns: Any, parts: tuple[str, ...]) -> None:
    fails(write_jsonl({"messages": TURNS}, {"messages": turns}), "data.jsonl, row 2", *parts)


def test_missing_file_suggests_its_neighbours(write_jsonl: Write) -> None:
    path = write_jsonl({"text": "a"}, name="igbo.jsonl")
    fails(path.with_name("igbo.json"), "does not exist", "did you mean", "igbo.jsonl")


def test_misspelt_local_name_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "igbo_news").mkdir()
    monkeypatch.chdir(tmp_path)
    fails("igbo_new", "no such file or directory", "igbo_news")
    fails("./data/igbo", "does not exist")


def test_hub_id_while_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("someone/data", "'someone/data'", "HF_HUB_OFFLINE", "give a local path")


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fails("someone/data", "'someone/data'", "no route to host", "check the connection")


def test_hub_rows_are_streamed_with_id_and_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(path: str, name: str | None, **options: Any) -> Any:
        asked.update(options, path=path, name=name)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": "b"}]))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("someone/data", name="ig", revision="abc", license="CC-BY-4.0")
    assert rows[1] == Row("b", None, "hub:someone/data", 2, "CC-BY-4.0")
    assert asked == {"path": "someone/data", "name": "ig", "split": "train", "revision": "abc", "streaming": True}


def test_identity_changes_with_the_file_and_with_the_settings(write_jsonl: Write) -> None:
    path = write_jsonl({"text": "a"})
    before = read_rows(DatasetSpec(path=str(path))).identity()
    assert read_rows(DatasetSpec(path=str(path))).identity() == before
    assert read_rows(DatasetSpec(path=str(path), limit=1)).identity() != before
    write_jsonl({"text": "other"})
    assert read_rows(DatasetSpec(path=str(path))).identity() != before


def test_templates_make_a_conversation_of_any_columns(write_jsonl: Any) -> None:
    path = write_jsonl(
        {"query": "kal {x} barish?", "parse": "[IN:WEATHER]", "n": 3}, {"query": "b", "parse": None, "n": 4}
    )
    spec = {"path": str(path), "prompt_template": "Parse {n}: {query}", "completion_template": "{parse}"}
    with pytest.warns(AddlangWarning, match="1 empty row"):
        (row,) = list(read_rows(DatasetSpec.model_validate(spec)))
    assert row.messages == [
        {"role": "user", "content": "Parse 3: kal {x} barish?"},
        {"role": "assistant", "content": "[IN:WEATHER]"},
    ]
    wrong = DatasetSpec.model_validate({**spec, "completion_template": "{pars}"})
    with pytest.raises(AddlangError, match=r"row 1: there is no column 'pars'(.|\n)*parse"):
        list(read_rows(wrong))


def test_one_template_alone_is_refused(write_jsonl: Any) -> None:
    with pytest.raises(ValueError, match="stand together"):
        DatasetSpec.model_validate({"path": "x", "prompt_template": "{a}"})
