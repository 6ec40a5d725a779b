"""Rows of text or conversations from local files, directories and the Hugging Face hub.

The format of a file is taken from its first row: ``messages``, ``conversations`` (sharegpt), ``prompt`` and
``completion``, ``instruction`` and ``output`` (alpaca), ``question`` and ``response`` (openorca), or the text column.
Chat columns win over a text column, because data sets such as Alpaca also carry the formatted text; ``format`` in the
recipe decides otherwise.

txt: blank lines separate documents; a file without blank lines is one document.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addlang.data.chat import Message, is_blank, to_messages
from addlang.data.readers import COMPRESSIONS, KINDS, Record, kind_of, read_records, row_error
from addlang.errors import AddlangError, AddlangWarning, did_you_mean
from addlang.recipe import DatasetSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TRUE = {"1", "true", "yes", "on"}
LAB = "lab://"
BESIDE = (".journal.jsonl", ".rejects.jsonl", ".about.json")  # see addlang.builders.translate


@dataclass(frozen=True)
class Row:
    """One row: raw text or a conversation, and where it stands."""

    text: str | None
    messages: list[Message] | None
    file: str
    line: int
    license: str | None = None

    @property
    def content(self) -> str:
        """All its text; for a conversation the contents of its messages."""
        return self.text if self.text is not None else "\n".join(m["content"] for m in self.messages or ())


@dataclass
class ReadStats:
    """What the latest pass over a source read: rows that hold something, and blank rows, which are skipped."""

    rows: int = 0
    empty: int = 0


class Rows:
    """The rows of one source; every iteration reads it from the beginning. ``stats`` tells about the latest one."""

    def __init__(self, spec: DatasetSpec, base_dir: Path | None = None) -> None:
        self.spec = spec
        self.stats = ReadStats()
        self.files = _local_files(spec.path, base_dir)
        self._base = base_dir

    def __iter__(self) -> Iterator[Row]:
        stats = self.stats = ReadStats()
        first_empty = ""
        for file, license, records in self._parts():
            format: str | None = None if self.spec.format == "auto" else self.spec.format
            found = False
            for line, record in records:
                found = True
                if self.spec.prompt_template is not None:
                    format = "templates"
                elif format is None:
                    format = detect_format(record, self.spec.text_column, file, line)
                row = _row(record, format, self.spec, file, line, license)
                if row is None:
                    stats.empty += 1
                    first_empty = first_empty or f"{file}, row {line}"
                    continue
                stats.rows += 1
                yield row
                if stats.rows == self.spec.limit:
                    break
            if not found:
                raise AddlangError(f"{file}: the file holds no rows", "remove it from the datasets, or fill it")
            if stats.rows == self.spec.limit:
                break
        if stats.rows == 0:
            message = f"{self.spec.path}: every one of its {stats.empty} rows is empty"
            raise AddlangError(message, "check the column and the format")
        if stats.empty:
            message = f"{self.spec.path}: {stats.empty} empty row(s) skipped, the first is {first_empty}"
            warnings.warn(message, AddlangWarning, stacklevel=2)

    def _parts(self) -> Iterator[tuple[str, str | None, Iterator[Record]]]:
        """``(file, licence, records)`` per file, one part for a data set of the hub."""
        if self.files is None:
            dataset = _load_hub(self.spec)
            license = self.spec.license or getattr(getattr(dataset, "info", None), "license", None) or None
            yield f"hub:{self.spec.path}", license, _hub_records(dataset, self.spec)
            return
        for path in self.files:
            yield str(path), self.spec.license, read_records(path)

    def identity(self) -> dict[str, Any]:
        """What the rows depend on, for fingerprints: size and time of every file, or id and revision on the hub."""
        keys = ("format", "text_column", "limit", "license")
        parts: dict[str, Any] = {key: getattr(self.spec, key) for key in keys}
        if self.spec.prompt_template is not None:
            parts["templates"] = [self.spec.prompt_template, self.spec.completion_template]
        if self.files is None:
            hub = ("path", "name", "split", "revision")
            return parts | {key: getattr(self.spec, key) for key in hub}
        stats = [(str(path.resolve()), path.stat()) for path in self.files]
        return parts | {"files": [[path, s.st_size, s.st_mtime_ns] for path, s in stats]}


def read_rows(spec: DatasetSpec, *, base_dir: Path | None = None) -> Rows:
    """The rows of a source, as something that can be iterated more than once.

    Args:
        spec: what to read.
        base_dir: directory against which a relative local path is resolved; None: the working directory.

    Raises:
        AddlangError: the path does not exist (at once); while iterating: an unreadable file, a corrupt row.
    """
    return Rows(spec, base_dir)


def detect_format(record: Mapping[str, Any], text_column: str, file: str, line: int) -> str:
    """Format of a file from the columns of its first row.

    Raises:
        AddlangError: no known column is there.
    """
    if text_column != "text" and text_column in record:
        return "text"
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "messages" if isinstance(first, dict) and "role" in first else "sharegpt"
    if {"prompt", "completion"} <= set(record):
        return "prompt_completion"
    if {"instruction", "output"} <= set(record):
        return "alpaca"
    if {"question", "response"} <= set(record):
        return "openorca"
    if text_column in record:
        return "text"
    raise row_error(
        file,
        line,
        f"there is no column '{text_column}', nor those of a conversation (messages, conversations, prompt and "
        "completion, instruction and output, question and response)",
        f"{did_you_mean(text_column, record)}; name the column with text_column",
    )


def _row(
    record: Mapping[str, Any], format: str, spec: DatasetSpec, file: str, line: int, license: str | None
) -> Row | None:
    """The row, or None if it is blank."""
    own = record.get("license")
    license = own if isinstance(own, str) and own else license
    if format != "text":
        try:
            messages = _templated(record, spec) if format == "templates" else to_messages(record, format)
        except AddlangError as error:
            raise row_error(file, line, error.message, error.fix) from None
        return None if is_blank(messages) else Row(None, messages, file, line, license)
    if spec.text_column not in record:
        fix = f"{did_you_mean(spec.text_column, record)}; name the column with text_column"
        raise row_error(file, line, f"there is no column '{spec.text_column}'", fix)
    text = record[spec.text_column]
    if text is not None and not isinstance(text, str):
        message = f"column '{spec.text_column}' must be text, it is {type(text).__name__}"
        raise row_error(file, line, message, "choose another text_column")
    return Row(text, None, file, line, license) if text and not text.isspace() else None


def _templated(record: Mapping[str, Any], spec: DatasetSpec) -> list[Message]:
    """One question and answer: the templates with columns in place of ``{column}``."""

    def column(match: re.Match[str]) -> str:
        if match[1] not in record:
            raise AddlangError(f"there is no column '{match[1]}'", did_you_mean(match[1], record))
        value = record[match[1]]
        return "" if value is None else str(value)

    texts = [re.sub(r"\{(\w+)\}", column, str(t)) for t in (spec.prompt_template, spec.completion_template)]
    return [{"role": r, "content": t.strip()} for r, t in zip(("user", "assistant"), texts, strict=True)]


def _local_files(given: str, base_dir: Path | None) -> list[Path] | None:
    """The files of a local path, or None if the path names a data set of the hub."""
    if given.startswith(LAB):
        from addlang.data.prepare import cache_root
        from addlang.lab.uri import dataset_file

        return [dataset_file(given, cache_root())]
    path = Path(given).expanduser()
    path = path if path.is_absolute() or base_dir is None else base_dir / path
    try:
        if path.is_dir():
            files = sorted(
                p for p in path.rglob("*") if p.is_file() and kind_of(p) and p.name[0] != "." and not _about_another(p)
            )
            if not files:
                raise AddlangError(
                    f"{path}: the directory holds no supported file",
                    f"supported are {', '.join(KINDS)}, alone or compressed ({', '.join(COMPRESSIONS)})",
                )
            return files
        if path.exists():
            return [path]
    except PermissionError:
        raise AddlangError(f"{path}: no permission to read it", f"chmod u+rx '{path.parent}'") from None
    near = _nearby(path)
    local = kind_of(path) or given.startswith((".", "~", "/")) or given.endswith("/")
    if local or not _HUB_ID.fullmatch(given):
        raise AddlangError(f"{path}: the file does not exist", near or "check the path")
    if near and "/" not in given:
        message = f"{path}: there is no such file or directory"
        raise AddlangError(message, f"{near} (a data set of the hub is named OWNER/NAME)")
    return None


def _about_another(path: Path) -> bool:
    """Whether a file is what a builder keeps beside its result: a journal, rejects, facts."""
    return any(path.name.endswith(end) and path.with_name(path.name.removesuffix(end)).exists() for end in BESIDE)


def _nearby(path: Path) -> str:
    """``Did you mean ...?`` among the neighbours of a missing path; empty if none is close."""
    try:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except PermissionError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(str(path.parent / n)) for n in near)}?" if near else ""


def _load_hub(spec: DatasetSpec) -> Any:
    """A streaming data set of the hub. Data sets that need code of their own are never run."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").lower() in _TRUE:
            raise AddlangError(
                f"'{spec.path}' is no local file, and {variable} forbids to look for it on the hub",
                f"give a local path, or unset {variable}",
            )
    import datasets

    try:
        return datasets.load_dataset(spec.path, spec.name, split=spec.split, revision=spec.revision, streaming=True)
    except Exception as error:
        raise _hub_error(spec, error) from error


def _hub_records(dataset: Any, spec: DatasetSpec) -> Iterator[Record]:
    try:
        yield from enumerate(dataset, 1)
    except Exception as error:
        raise _hub_error(spec, error) from error


def _hub_error(spec: DatasetSpec, error: Exception) -> AddlangError:
    """The hub's many errors (connection, gated, missing, script, unknown configuration) in one form."""
    name = type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError) or re.search("Connect|Timeout|Offline|MaxRetry", name):
        fix = "check the connection, or download the data and give a local path"
    elif "NotFound" in name:
        fix = "check the id; for a gated or private data set set HF_TOKEN; a local file needs a path that exists"
    else:
        fix = "check name, split and revision of the data set; data sets that need a script are not supported"
    first = next(iter(str(error).strip().splitlines()), "")
    return AddlangError(f"data set '{spec.path}' cannot be read from the hub ({name}: {first})", fix)
