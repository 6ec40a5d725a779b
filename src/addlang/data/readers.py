"""Raw records of local files: jsonl, json, csv, parquet and txt, each also compressed with gzip or zstandard.

Every reader yields ``(row number, record)``. A row number is what a user can look up: the physical line for jsonl and
txt (for txt the line where the document begins), the 1-based record (header not counted) for json, csv and parquet.
Files are streamed, except json (one value) and compressed parquet (needs random access), which are read whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from addlang.errors import AddlangError

Record = tuple[int, dict[str, Any]]

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 1 << 18

csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # the default cuts documents off at 128 KiB


def kind_of(path: Path) -> tuple[str, str] | None:
    """``(kind, compression)`` of a file name, for example ``(".jsonl", ".zst")``; None if it is not supported."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if not suffixes or suffixes[-1] not in KINDS:
        return None
    return suffixes[-1], compression


def row_error(file: str, line: int, message: str, fix: str | None = None) -> AddlangError:
    """An error that names the file and the row."""
    return AddlangError(f"{file}, row {line}: {message}", fix)


def read_records(path: Path) -> Iterator[Record]:
    """Yield ``(row number, record)`` of one file; txt documents come as ``{"text": ...}``.

    Raises:
        AddlangError: the file cannot be read or is empty, or a row is corrupt; names the file and the row.
    """
    kind = kind_of(path)
    if kind is None:
        raise AddlangError(
            f"{path}: files of this type are not supported",
            f"use one of {', '.join(KINDS)}, alone or compressed ({', '.join(COMPRESSIONS)})",
        )
    try:
        if path.stat().st_size == 0:
            raise AddlangError(f"{path}: the file is empty", "remove it from the datasets, or fill it")
        with _open(path, kind[1]) as stream:
            yield from _READERS[kind[0]](stream, str(path))
    except PermissionError:
        raise AddlangError(f"{path}: no permission to read the file", f"chmod u+r '{path}'") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{path}: the compressed data is truncated or corrupt ({error})"
        raise AddlangError(message, "fetch the file again") from None
    except OSError as error:
        raise AddlangError(f"{path}: cannot be read ({error})") from error


class _ZstdReader(io.RawIOBase):
    """Streaming zstandard decoder. The library's own stream reader takes a truncated frame for the end of the file."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._zstd, self._pending = raw, zstandard, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            block = block or self._raw.read(BLOCK)
            if not block:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
            try:
                self._pending = self._frame.decompress(block)
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from None
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(path.open("rb")), BLOCK)
    return path.open("rb")


def _lines(stream: IO[bytes], file: str) -> Iterator[tuple[int, str]]:
    """``(line number, text with its line end)``; a byte order mark is dropped."""
    offset = 0
    for number, raw in enumerate(stream, 1):
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise row_error(file, 1, "the text is UTF-16, not UTF-8", _reencode(file, "UTF-16"))
            if raw.startswith(b"\xef\xbb\xbf"):
                raw, offset = raw[3:], 3
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 at byte {offset + error.start} of the text ({error.reason})"
            raise row_error(file, number, message, _reencode(file, "ENCODING")) from None
        offset += len(raw)


def _reencode(file: str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 '{file}' > converted"


def _object(value: Any, file: str, row: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = f"a row must be an object with named columns, this one is {_json_type(value)}"
        raise row_error(file, row, message, 'write {"text": "..."}')
    return value


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _jsonl(stream: IO[bytes], file: str) -> Iterator[Record]:
    for number, line in _lines(stream, file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise row_error(
                file, number, f"not valid JSON: {error.msg} at column {error.colno}", "correct or remove that line"
            ) from None
        if "\\u" in line:
            _check_surrogates(value, file, number)
        yield number, _object(value, file, number)


def _check_surrogates(value: Any, file: str, row: int) -> None:
    """JSON may spell out half a surrogate pair, which no text file can hold and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = f"\\u{ord(error.object[error.start]):04x}"
        raise row_error(file, row, f"the text holds half a surrogate pair ({shown})", "remove that character") from None


def _json(stream: IO[bytes], file: str) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(stream, file))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "correct the file"
        if error.msg == "Extra data":
            fix = "the file looks like one JSON object per line: rename it to .jsonl"
        raise row_error(file, error.lineno, f"not valid JSON: {error.msg} at column {error.colno}", fix) from None
    if isinstance(value, dict):
        if not isinstance(value.get("data"), list):
            raise AddlangError(
                f"{file}: a .json file must hold a list of rows, or an object with such a list under 'data'; "
                f"this object has {sorted(value)}",
                "put the rows into a list",
            )
        value = value["data"]
    if not isinstance(value, list):
        raise AddlangError(f"{file}: a .json file must hold a list of rows, this one holds {_json_type(value)}")
    for number, row in enumerate(value, 1):
        _check_surrogates(row, file, number)
        yield number, _object(row, file, number)


def _csv(stream: IO[bytes], file: str) -> Iterator[Record]:
    number = 0
    try:
        for number, row in enumerate(csv.DictReader((line for _, line in _lines(stream, file)), strict=True), 1):
            if None in row:
                message = f"{len(row[None])} field(s) more than the header has"
                raise row_error(file, number, message, "quote fields with commas")
            if any(value is None for value in row.values()):
                raise row_error(file, number, "fewer fields than the header has", "write every field, empty ones too")
            yield number, dict(row)
    except csv.Error as error:
        fix = "quote fields that hold quotes or line ends"
        raise row_error(file, number + 1, f"not valid CSV: {error}", fix) from None


def _parquet(stream: IO[bytes], file: str) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    seekable = isinstance(stream, io.BufferedReader) and stream.raw.seekable()
    source: Any = stream if seekable else io.BytesIO(stream.read())
    number = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise row_error(file, number + 1, f"not a valid parquet file: {error}", "write the file again") from None


def _txt(stream: IO[bytes], file: str) -> Iterator[Record]:
    """Blank lines separate documents; a file without blank lines is one document."""
    begin, lines = 0, list[str]()
    for number, line in _lines(stream, file):
        if line.strip():
            begin = begin or number
            lines.append(line)
        elif lines:
            yield begin, {"text": "".join(lines).rstrip("\r\n")}
            begin, lines = 0, []
    if lines:
        yield begin, {"text": "".join(lines).rstrip("\r\n")}


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
