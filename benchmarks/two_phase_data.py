"""Files for recipes/two-phase/small: Alpaca, its Chinese translation and MultiAlpaca, cut so that nothing stands in two of them.

    python benchmarks/two_phase_data.py --alpaca alpaca/train.jsonl --alpaca_zh alpaca_zh/train.jsonl \\
        --multialpaca multialpaca/ --output recipes/two-phase/small/data

Alpaca's rows and those of its translation carry the same ``id``. Written are

    english.jsonl       phase 1: rows whose translation is in no other file
    english-other.jsonl rows of the same kind, for replay
    english-test.jsonl  rows of the same kind, for evaluation
    counterparts.jsonl  the rows that zh.jsonl translates
    zh.jsonl            Alpaca in Chinese
    parallel-zh.jsonl   the instructions of both, pair by pair
    es, ja, pt .jsonl   MultiAlpaca
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OTHER, TEST = 150, 150


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows in Alpaca's three columns."""
    kept = [{k: row.get(k) or "" for k in ("instruction", "input", "output")} for row in rows if row.get("output")]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    print(f"{path}: {len(kept)} rows")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--alpaca", type=Path, required=True, metavar="FILE")
    parser.add_argument("--alpaca_zh", type=Path, required=True, metavar="FILE")
    parser.add_argument("--multialpaca", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    given.output.mkdir(parents=True, exist_ok=True)
    english, chinese = read(given.alpaca), read(given.alpaca_zh)
    translated = {row["id"] for row in chinese}
    rest = [row for row in english if row["id"] not in translated]
    random.Random(0).shuffle(rest)
    write(given.output / "english-test.jsonl", rest[:TEST])
    write(given.output / "english-other.jsonl", rest[TEST : TEST + OTHER])
    write(given.output / "english.jsonl", rest[TEST + OTHER :])
    write(given.output / "counterparts.jsonl", [row for row in english if row["id"] in translated])
    write(given.output / "zh.jsonl", chinese)
    questions = {row["id"]: row["instruction"] for row in english}
    pairs = [{"source": questions[row["id"]], "target": row["instruction"]} for row in chinese]
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    (given.output / "parallel-zh.jsonl").write_text("".join(lines), encoding="utf-8")
    for language in ("es", "ja", "pt"):
        write(given.output / f"{language}.jsonl", read(given.multialpaca / f"{language}.jsonl"))


if __name__ == "__main__":
    main()
