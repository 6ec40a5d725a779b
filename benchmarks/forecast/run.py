"""Train every pair of the forecast's grid, measure the signals before each, fit the forecast and judge it.

    python benchmarks/forecast/run.py --output forecast-out [--jobs 1]

Interrupted, the same command continues where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Pair, pairs, recipe, write_data

from addlang.export import write_json
from addlang.sweep import sweep

PAIR = "pair.json"


def train_all(root: Path, jobs: int) -> None:
    """Carry out every pair's run; finished ones of the same pair are taken as they are."""
    grid = pairs()
    write_data(root, grid)
    todo = [(pair, recipe(pair, root)) for pair in grid if not finished(root, pair)]
    done = len(grid) - len(todo)
    for pair, _ in sweep(todo, workers=jobs, threads=1, cache=root / "cache", where="forecast"):
        write_json(root / "runs" / pair.name / PAIR, vars(pair))
        done += 1
        print(f"{done}/{len(grid)} {pair.name}", file=sys.stderr, flush=True)


def finished(root: Path, pair: Pair) -> bool:
    """Whether a pair was run, as it stands in the grid now."""
    path = root / "runs" / pair.name / PAIR
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == vars(pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    train_all(given.output.resolve(), given.jobs)


if __name__ == "__main__":
    main()
