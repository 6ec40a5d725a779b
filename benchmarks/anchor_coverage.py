"""How abilities fare that the self anchor's conversations leave out: English kept by task, covered and uncovered.

    addlang sweep recipes/ssu/lab/anchor-coverage.yaml --output_dir runs/lab-anchor-coverage
    python benchmarks/anchor_coverage.py runs/lab-anchor-coverage

Reads the items of every run of the study (``samples/``) and splits them by the lab's tasks; the uncovered ones are those whose
instructions the arms called "half missing" skip. Means and 95 % t intervals over seeds, by learning rate and at equal gain
against the study's reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from addlang.evaluate.statistics import t_interval
from addlang.study.numbers import at_equal_gain, change

UNCOVERED = {"copy", "reverse", "count", "sort", "first", "last"}


def shares(run: Path, model: str) -> tuple[float, float]:
    """Exact match on covered and on uncovered tasks."""
    (file,) = (run / "samples" / model).glob("lab_tasks.exact_match.json")
    items = json.loads(file.read_text(encoding="utf-8"))["items"]
    found = []
    for uncovered in (False, True):
        values = [i["numerator"] for i in items if (i["detail"]["task"] in UNCOVERED) is uncovered]
        found.append(sum(values) / len(values))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path)
    root: Path = parser.parse_args().study
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    runs = [(r["arm"], r["learning_rate"], root / "runs" / r["folder"]) for r in results["runs"]]
    before = shares(runs[0][2], "before")
    print(f"Before: covered tasks {before[0]:.1%}, uncovered tasks {before[1]:.1%}\n")
    print("| arm | learning rate | covered | uncovered |\n|---|---|---|---|")
    for arm, rate in dict.fromkeys((a, r) for a, r, _ in runs):
        values = [shares(path, "after") for a, r, path in runs if (a, r) == (arm, rate)]
        cells = []
        for side in zip(*values, strict=True):
            i = t_interval(side)
            cells.append(
                f"{100 * i.mean:.1f} %" + ("" if i.low is None else f" [{100 * i.low:.1f}, {100 * i.high:.1f}]")
            )
        print(f"| {arm} | {rate:g} | {cells[0]} | {cells[1]} |")
    for side, name in enumerate(("covered", "uncovered")):
        curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for r in results["runs"]:
            kept = shares(root / "runs" / r["folder"], "after")[side] - before[side]
            point = (change(r["results"], [results["gained"]["key"]]), kept)
            curves.setdefault(r["arm"], {}).setdefault(r["seed"], []).append(point)
        print(f"\n| arm | at gain | change of {name} tasks | {results['reference']} there | difference | p (Holm) |")
        print("|---|---|---|---|---|---|")
        for row in at_equal_gain(curves, results["reference"]):
            if "difference" not in row:
                print(f"| {row['arm']} | {row['gained']:.3f} | {row['note']} | | | |")
                continue
            numbers = " | ".join(points(row[key]) for key in ("kept", "reference_kept", "difference"))
            print(f"| {row['arm']} | {row['gained']:.3f} | {numbers} | {row.get('p_holm', float('nan')):.3f} |")


def points(interval: list[float | None]) -> str:
    mean, low, high = ("-" if v is None else f"{100 * v:+.1f}" for v in interval)
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
