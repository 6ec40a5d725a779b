"""Conversations in two languages from parallel instruction data: the same rows in a pivot (English) and a target language.

- ``both``: the answer in the pivot first, then in the target language, as in the chat data of X-CIT; in one turn or in two.
- ``then-answer``: the model puts the request into the pivot, then answers in the target language: the reading of
  CrossAlpaca in which a demonstration shows the step of translation before the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from addlang.builders.rows import located, read_file
from addlang.builders.templates import BOTH, IN_PIVOT, NOW_IN_TARGET, THEN_ANSWER
from addlang.data.chat import Message, is_blank, to_messages
from addlang.data.similar import content_hash, normalise
from addlang.errors import AddlangError

Ask = Literal["target", "pivot", "each"]
Style = Literal["both", "two-turns", "then-answer"]


@dataclass(frozen=True)
class Parallel:
    """A conversation in two languages, and where the target's row stands."""

    pivot: tuple[Message, ...]
    target: tuple[Message, ...]
    file: str
    row: int
    license: str | None


def read_parallel(
    pivot: str, target: str, join: str | None, counts: Counter[str], differing_in: str = "assistant"
) -> Iterator[Parallel]:
    """The rows of two files that belong together.

    Args:
        join: column whose values belong together; None: ``id`` if both files have it, the row number if neither has. Where
            only the target's file has ``id`` it is the row number of the pivot's if 'addlang data translate' wrote it.
        counts: ``joined``; ``unmatched`` rows of the target; ``differing``: other roles than the pivot's; ``blank``;
            ``same``: nothing was translated.
        differing_in: role whose texts must not all be the same in both languages (code, numbers): there is nothing to show.

    Raises:
        AddlangError: a column is missing, only one file has ``id``, a key stands twice, or nothing matches.
    """
    left = {}
    left_column, right_column = _columns(pivot, target, join)
    for row, record, format in read_file(pivot, "auto", "text"):
        key = _key(record, row, left_column, pivot)
        if key in left:
            raise AddlangError(f"{pivot}, row {row}: '{key}' stands twice", "give a column with unique values: --join")
        left[key] = (row, record, format)
    for row, record, format in read_file(target, "auto", "text"):
        key = _key(record, row, right_column, target)
        if key not in left:
            counts["unmatched"] += 1
            continue
        other_row, other, other_format = left[key]
        conversation, counterpart = (
            _messages(record, format, target, row),
            _messages(other, other_format, pivot, other_row),
        )
        if is_blank(conversation) or is_blank(counterpart):
            counts["blank"] += 1
        elif [m["role"] for m in conversation] != [m["role"] for m in counterpart]:
            counts["differing"] += 1
        elif _texts(conversation, differing_in) == _texts(counterpart, differing_in):
            counts["same"] += 1
        else:
            counts["joined"] += 1
            licence = record.get("license")
            yield Parallel(
                tuple(counterpart), tuple(conversation), target, row, licence if isinstance(licence, str) else None
            )
    if not counts["joined"]:
        raise AddlangError(f"no row of {target} belongs to one of {pivot}", "name the column that joins them: --join")


def _columns(pivot: str, target: str, join: str | None) -> tuple[str | None, str | None]:
    """The column of each file that joins them, by the files' first rows; None: the row number."""
    if join is not None:
        return join, join
    first, second = (next((record for _, record, _ in read_file(f, "auto", "text")), {}) for f in (pivot, target))
    if "id" in first and "id" in second:
        return "id", "id"
    if "id" not in first and ("id" not in second or "translated_from" in second):
        return None, "id" if "id" in second else None
    # ids may count from 0, or rows be left out: numbers of one kind against the other would pair each answer with a wrong one
    has, lacks = (pivot, target) if "id" in first else (target, pivot)
    raise AddlangError(
        f"{has} has a column 'id', and {lacks} has none (row 1): what belongs together is not known",
        "give both files an 'id' or neither (then the row number joins them), or name a column of both: --join",
    )


def _key(record: dict[str, Any], row: int, column: str | None, file: str) -> str:
    if column is None:
        return str(row)
    if column not in record:
        raise AddlangError(f"{file}, row {row}: there is no column '{column}'", f"columns are {', '.join(record)}")
    return str(record[column])


def _texts(messages: list[Message], role: str) -> list[str]:
    return [normalise(m["content"]) for m in messages if m["role"] == role]


def _messages(record: dict[str, Any], format: str, file: str, row: int) -> list[Message]:
    if format == "text":
        raise AddlangError(f"{file}, row {row}: raw text, not instructions", "give instruction data in both languages")
    try:
        return to_messages(record, format)
    except AddlangError as error:
        raise located(error, file, row) from None


def bilingual(
    rows: Iterable[Parallel],
    *,
    style: Style,
    codes: tuple[str, str],
    names: tuple[str, str],
    ask: Ask = "target",
    request: bool = True,
    labels: bool = True,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Conversations in both languages. Choices depend on a row's own text and the seed.

    Args:
        style: ``both``: pivot and target in one answer; ``two-turns``: the target's answer after a further question;
            ``then-answer``: the request in the pivot, then the target's answer.
        codes, names: of pivot and target.
        ask: language of the request; ``each``: half of the rows in each.
        request: whether the prompt says in which languages to answer.
        labels: whether the name of its language stands before each part of an answer.
    """
    for row in rows:
        drawn = content_hash("\0".join(m["content"] for m in row.target), seed)
        asked = {"target": row.target, "pivot": row.pivot}.get(ask) or (row.pivot, row.target)[drawn % 2]
        yield {
            "messages": _conversation(row, asked, style, names, request, labels, drawn // 2),
            "task": style,
            "language": codes[1],
            "languages": list(codes),
            "from": {"file": Path(row.file).name, "row": row.row},
            **({"license": row.license} if row.license else {}),
        }


def _conversation(
    row: Parallel,
    asked: tuple[Message, ...],
    style: Style,
    names: tuple[str, str],
    request: bool,
    labels: bool,
    drawn: int,
) -> list[Message]:
    pivot, target = names
    templates = {"both": BOTH, "two-turns": IN_PIVOT, "then-answer": THEN_ANSWER}[style]
    found: list[Message] = []
    last = ""  # what the user said in the pivot
    for place, (message, left, right) in enumerate(zip(asked, row.pivot, row.target, strict=True)):
        choice = drawn + place
        if message["role"] == "system":
            found.append(message)
        elif message["role"] == "user":
            last = left["content"]
            ask = templates[choice % len(templates)] if request else "{prompt}"
            # by hand: braces in the prompt are none of the template's
            text = ask.replace("{pivot}", pivot).replace("{target}", target).replace("{prompt}", message["content"])
            found.append({"role": "user", "content": text})
        elif style == "two-turns":
            again = NOW_IN_TARGET[choice % len(NOW_IN_TARGET)].replace("{target}", target)
            found += [
                {"role": "assistant", "content": left["content"]},
                {"role": "user", "content": again},
                {"role": "assistant", "content": right["content"]},
            ]
        else:
            parts = [(pivot, left["content"] if style == "both" else last), (target, right["content"])]
            shown = [f"{name}: {text}" if labels else text for name, text in parts]
            found.append({"role": "assistant", "content": "\n\n".join(shown)})
    return found
