"""The files of the small two-phase studies share no row, and counterparts are those of the translation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarking import load


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_no_row_stands_in_two_files_and_counterparts_are_the_translated_rows(tmp_path: Path) -> None:
    english = [{"id": i, "instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(500)]
    chinese = [{"id": i, "instruction": f"问{i}", "input": "", "output": f"答{i}"} for i in range(0, 500, 3)]
    other = [{"instruction": "x", "input": None, "output": "y"}, {"instruction": "z", "input": None, "output": None}]
    for language in ("es", "ja", "pt"):
        write(tmp_path / "multi" / f"{language}.jsonl", other)
    out = tmp_path / "data"
    load("two_phase_data").main(
        [
            "--alpaca", str(write(tmp_path / "en.jsonl", english)), "--alpaca_zh", str(write(tmp_path / "zh.jsonl", chinese)),
            "--multialpaca", str(tmp_path / "multi"), "--output", str(out),
        ]
    )  # fmt: skip
    rows = {
        name: [
            json.loads(line)["instruction"] for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("english", "english-other", "english-test", "counterparts", "zh", "es")
    }
    parts = [rows[name] for name in ("english", "english-other", "english-test", "counterparts")]
    assert sorted(q for part in parts for q in part) == sorted(row["instruction"] for row in english)
    assert rows["counterparts"] == [f"q{row['id']}" for row in chinese]
    assert rows["zh"] == [row["instruction"] for row in chinese]
    assert rows["es"] == ["x"]  # a row without an answer is left out
    pairs = [json.loads(line) for line in (out / "parallel-zh.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs[1] == {"source": "q3", "target": "问3"}
