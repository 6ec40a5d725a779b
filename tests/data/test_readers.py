"""Every way a file can be bad ends in an error that names the file, the row and the remedy."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard

from addlang.data.readers import kind_of, read_records
from addlang.data.sources import read_rows
from addlang.errors import AddlangError
from addlang.recipe import DatasetSpec


def texts(path: Path) -> list[str]:
    return [record["text"] for _, record in read_records(path)]


def fails(path: Path, *parts: str) -> None:
    with pytest.raises(AddlangError) as caught:
        list(read_records(path))
    for part in (str(path), *parts):
        assert part in str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ROWS = [{"text": "one, two"}, {"text": 'say "ụlọ"\nagain'}, {"text": "three"}]
JSONL = "".join(json.dumps(r) + "\n" for r in ROWS)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_every_kind_reads_the_same_rows_plain_and_compressed(tmp_path: Path, kind: str, compression: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = tmp_path / f"plain{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), plain)
    else:
        csv = 'text\n"one, two"\n"say ""ụlọ""\nagain"\nthree\n'
        txt = 'one, two\n\n\nsay "ụlọ"\nagain\n \nthree\n'
        write(plain, {".jsonl": JSONL, ".json": json.dumps(ROWS), ".csv": csv, ".txt": txt}[kind])
    data = plain.read_bytes()
    packed = {"": data, ".gz": gzip.compress(data), ".zst": zstandard.ZstdCompressor().compress(data)}[compression]
    assert texts(write(tmp_path / f"data{kind}{compression}", packed)) == [r["text"] for r in ROWS]


def test_zst_files_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    lines = [json.dumps({"text": "x" * 50_000 + str(i)}) + "\n" for i in range(20)]
    path = write(tmp_path / "a.jsonl.zst", b"".join(compress(line.encode()) for line in lines))
    assert len(texts(path)) == 20


def test_json_may_hold_its_rows_under_data(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))) == [r["text"] for r in ROWS]


def test_txt_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    assert list(read_records(write(tmp_path / "a.txt", "\n\na\nb\n"))) == [(3, {"text": "a\nb"})]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + JSONL.encode()))[0] == "one, two"


def test_corrupt_json_row_names_row_and_column(tmp_path: Path) -> None:
    fails(
        write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"\n'), "row 3", "not valid JSON", "correct or remove"
    )


def test_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.jsonl", '{"text": "a"}\n["b"]\n'), "row 2", "a list")


def test_jsonl_named_json_is_recognised(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.json", JSONL), "row 2", "rename it to .jsonl")


def test_json_of_another_shape_is_refused(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.json", '{"rows": []}'), "['rows']")
    fails(write(tmp_path / "b.json", '"text"'), "a string")


def test_wrong_encoding_names_row_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    fails(path, "row 2", "not UTF-8 at byte 27", "iconv -f")
    assert path.read_bytes()[27:28] == b"\xe9"


def test_utf16_is_recognised(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.txt", "hello".encode("utf-16")), "row 1", "UTF-16", "iconv -f UTF-16")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.jsonl", b""), "is empty")


def test_truncated_compression_is_noticed(tmp_path: Path) -> None:
    data = os.urandom(300_000).hex().encode()
    row = b'{"text": "' + data + b'"}\n'
    fails(write(tmp_path / "a.jsonl.gz", gzip.compress(row * 3)[:-90_000]), "truncated or corrupt")
    fails(
        write(tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compress(row * 3)[:-90_000]), "truncated or corrupt"
    )
    fails(write(tmp_path / "b.jsonl.gz", b"no gzip at all"), "truncated or corrupt")
    fails(write(tmp_path / "b.jsonl.zst", b"no zstd at all"), "truncated or corrupt")


def test_csv_with_wrong_number_of_fields_names_the_row(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.csv", "text,n\na,1\nb,2,3\n"), "row 2", "more than the header")
    fails(write(tmp_path / "b.csv", "text,n\na,1\nb\n"), "row 2", "fewer fields")
    fails(write(tmp_path / "c.csv", 'text\n"a\n'), "row 1", "not valid CSV")


def test_corrupt_parquet_is_refused(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.parquet", b"PAR1 and nothing else"), "parquet")


def test_missing_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", JSONL)
    if os.geteuid() == 0:  # nothing is forbidden to root

        def refuse(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    else:
        path.chmod(0)
    fails(path, "no permission", "chmod u+r")


def test_disk_errors_while_reading_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    path = write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.setattr(Path, "open", broken)
    fails(path, "Input/output error")


def test_unsupported_type_lists_the_supported_ones(tmp_path: Path) -> None:
    fails(write(tmp_path / "a.docx", b"x"), ".jsonl", ".parquet")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("a.b.JSON.GZ", (".json", ".gz")),
        ("v1.2.csv.zst", (".csv", ".zst")),
        ("a.gz", None),
        ("a", None),
    ],
)
def test_kind_is_read_from_the_name(name: str, kind: tuple[str, str] | None) -> None:
    assert kind_of(Path(name)) == kind


def test_long_csv_fields_are_not_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 500_000 + "\n")
    assert [len(r.content) for r in read_rows(DatasetSpec(path=str(path)))] == [500_000]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, name: str) -> None:
    rows = '{"text": "fine \\ud83d\\ude00"}|{"text": "half \\ud83d"}'
    content = rows.replace("|", "\n") if name == "a.jsonl" else f"[{rows.replace('|', ',')}]"
    fails(write(tmp_path / name, content), "row 2", "half a surrogate pair (\\ud83d)")
