"""How abilities fare that the self anchor's conversations leave out: English kept by task, covered and uncovered.

    addlang sweep recipes/ssu/lab/anchor.yaml --output_dir runs/lab-anchor
    python benchmarks/anchor_coverage.py runs/lab-anchor

Reads the items of every run of the study (``samples/``) and splits them by the lab's tasks; the uncovered ones are those whose
instructions the arms called "half ... missing" skip. Means and 95 % t intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from addlang.evaluate.statistics import t_interval

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


if __name__ == "__main__":
    main()
