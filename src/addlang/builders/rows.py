"""The texts of a data row, and the same row with other texts in their places."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from addlang.data.readers import read_records, row_error
from addlang.data.sources import detect_format
from addlang.errors import AddlangError

Parts = Literal["all", "prompts", "responses"]
Place = tuple[str | int, ...]  # keys and indices that lead to a text, such as ("messages", 0, "content")

_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "alpaca": {"prompts": ("system", "instruction", "input"), "responses": ("output",)},
    "openorca": {"prompts": ("system_prompt", "question"), "responses": ("response",)},
}
_LISTS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
_ANSWERS = {"assistant", "gpt", "model", "bot", "chatgpt"}


def read_file(path: str, format: str, text_column: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """``(row, columns, format)`` of every row of a local file; ``auto`` takes the format from the first row.

    Raises:
        AddlangError: the file does not exist or is corrupt, or no known column is there.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise AddlangError(f"{path}: the file does not exist", "builders read local files: download the data set first")
    for row, record in read_records(file):
        if format == "auto":
            format = detect_format(record, text_column, path, row)
        yield row, record, format


def places(record: Mapping[str, Any], format: str, parts: Parts, columns: Sequence[str] = ("text",)) -> list[Place]:
    """Where the texts of a row are that are to be worked on; empty ones are left out.

    Args:
        columns: of the formats ``text`` and ``columns``.

    Raises:
        AddlangError: the row is not of that format (the caller adds file and row).
    """
    found: list[Place] = []
    if format in ("text", "columns") or format in _COLUMNS:
        own = _COLUMNS.get(format)
        wanted = list(columns) if own is None else [n for part in own if parts in ("all", part) for n in own[part]]
        missing = [name for name in wanted if name not in record and name not in ("system", "input", "system_prompt")]
        if missing:
            raise AddlangError(f"there is no column '{missing[0]}'", f"columns are {', '.join(record)}")
        found = [(name,) for name in wanted]
    elif format in _LISTS:
        found = _in_list(record, "messages" if "messages" in record else "conversations", _LISTS[format], parts)
    elif format == "prompt_completion":
        for column, part in (("prompt", "prompts"), ("completion", "responses")):
            if parts in ("all", part):
                own = record.get(column)
                found += _in_list(record, column, _LISTS["messages"], "all") if isinstance(own, list) else [(column,)]
    else:
        raise AddlangError(f"'{format}' is no format of rows")
    return [place for place in found if isinstance(text := text_at(record, place), str) and text.strip()]


def _in_list(record: Mapping[str, Any], column: str, keys: tuple[str, str], parts: Parts) -> list[Place]:
    role, content = keys
    turns = record.get(column)
    if column == "conversations" and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        role, content = ("role", "content") if "role" in turns[0] else keys
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get(content), str) for t in turns):
        raise AddlangError(f"column '{column}' must be a list of messages with '{role}' and '{content}'")
    wanted = {"all": (True, False), "prompts": (False,), "responses": (True,)}[parts]
    return [(column, i, content) for i, turn in enumerate(turns) if (turn.get(role) in _ANSWERS) in wanted]


def text_at(record: Mapping[str, Any], place: Place) -> Any:
    """What stands there; None where a column is missing."""
    value: Any = record
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
    return value


def with_texts(record: Mapping[str, Any], texts: Mapping[Place, str], format: str) -> dict[str, Any]:
    """A copy of the row with these texts; of alpaca rows without ``text``, which repeats the others in a template."""
    row = copy.deepcopy(dict(record))
    for place, text in texts.items():
        node: Any = row
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = text
    if format == "alpaca":
        row.pop("text", None)
    return row


def write_rows(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> int:
    """Write rows as JSON lines, atomically; returns their number."""
    import os

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    number = 0
    with open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return number


def located(error: AddlangError, path: str, row: int) -> AddlangError:
    """The error with file and row."""
    return row_error(path, row, error.message, error.fix)
