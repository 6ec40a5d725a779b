"""Check what `addlang lab` wrote: every run proved, every arm with all its seeds, a report that stands alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(root: Path) -> None:
    lab = json.loads((root / "lab.json").read_text(encoding="utf-8"))
    problems = []
    for experiment in lab["experiments"]:
        for arm in experiment["arms"]:
            name = f"{experiment['name']}/{arm['name']}"
            if not arm["runs"]:
                problems.append(f"{name}: no runs")
            for run in arm["runs"]:
                if not run["proof_ok"]:
                    problems.append(f"{name}, seed {run['seed']}: the proof failed")
                if not 0 < run["english"] <= 1 or not run["target_bpb"] < run["baseline"]["target_bpb"]:
                    problems.append(
                        f"{name}, seed {run['seed']}: English {run['english']}, target {run['target_bpb']} bits per byte"
                    )
    html = (root / "report.html").read_text(encoding="utf-8")
    if 'src="http' in html or 'href="http' in html.split("<body", 1)[0]:
        problems.append("report.html loads something from a network")
    if problems:
        sys.exit("\n".join(problems))
    runs = sum(len(a["runs"]) for e in lab["experiments"] for a in e["arms"])
    print(f"{runs} runs proved and complete in {lab['seconds']:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
