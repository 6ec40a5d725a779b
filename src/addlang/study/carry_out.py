"""Carry a study out and write ``results.json``, ``table.md`` and ``report.html``. Killed, it continues."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.export import write_json
from addlang.study.numbers import at_equal_gain, change, gather, interval, scaled_back, select
from addlang.study.spec import Cell, Study, cells

NUMBERS = "numbers.json"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def run_study(
    study: Study,
    *,
    base_dir: Path,
    command: str,
    jobs: int | None = None,
    processes: int = 1,
    only: Sequence[str] = (),
    finished: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Carry out every run that is not finished; returns the directory and what ``results.json`` holds.

    Args:
        base_dir: directory of the study file: its relative paths start there.
        command: quoted in the report.
        jobs: runs at a time; default: as many as there are GPUs, without GPUs cores, for their processes.
        processes: of each run, with a GPU each.
        only: labels of arms or settings, or seeds as ``seed=N``; the others are not run.
        finished: run nothing; tabulate what is finished.

    Raises:
        AddlangError: a recipe is wrong, a label is unknown, nothing is finished, or there are fewer GPUs than processes. A run that
            fails does not stop the others; it is named in the results.
    """
    from addlang.progress import note, progress
    from addlang.report.study import write_study_report
    from addlang.spread import run_spread
    from addlang.sweep import dealt, devices, sweep

    grid = cells(study, base_dir, files=lambda c: not finished and wanted(study, c, only))
    chosen = {c: data for c, data in grid.items() if wanted(study, c, only)}
    root = Path(study.output_dir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    found: dict[Cell, dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    todo = []
    stale: list[str] = []
    for cell, data in chosen.items():
        try:
            kept = _known(Path(data["output_dir"]), data, base_dir)
        except AddlangError as error:
            stale.append(error.message)
            continue
        if kept is None:
            todo.append((cell, data))
        else:
            found[cell] = kept
    if stale:
        more = [f"and {len(stale) - 3} more"] if len(stale) > 3 else []
        raise AddlangError(
            "\n".join([f"{len(stale)} of {len(chosen)} runs cannot be taken as they are:", *stale[:3], *more]),
            "undo the changes, choose another output_dir, or remove these directories to have their runs done again",
        )
    if not finished and todo:
        gpus = dealt(devices(), processes)
        cores = os.cpu_count() or 1
        workers = max(1, min(jobs or len(gpus) or cores // processes, len(todo)))
        note(f"{len(todo)} of {len(chosen)} runs to do, {workers} at a time; results go to {root}")
        with progress("study", total=len(todo), unit="runs") as bar:
            runs = sweep(
                todo,
                workers=workers,
                threads=max(1, cores // (workers * processes)),
                cache=root / "cache",
                where="study",
                base_dir=base_dir,
                gpus=gpus,
                work=functools.partial(run_spread, processes=processes) if processes > 1 else None,
                on_error=lambda cell, error: failed.append({"run": cell.folder, "error": str(error)}),
            )
            for cell, path in runs:
                found[cell] = _keep(path, study.keep_weights)
                bar.update(len(found) + len(failed) - (len(chosen) - len(todo)))
    for f in failed:
        note(f"failed: {f['run']}: {f['error']}")
    if not found:
        raise AddlangError("no run of this study is finished" + (f": {failed[0]['error']}" if failed else ""))
    result = tabulate(study, {c: found[c] for c in chosen if c in found})
    result |= {"command": command, "failed": failed, "missing": len(chosen) - len(found) - len(failed)}
    write_json(root / "results.json", result)
    write_study_report(root)
    return root, result


def wanted(study: Study, cell: Cell, only: Sequence[str]) -> bool:
    """Whether a run is among those that ``only`` names: its arm, each of its settings and its seed.

    Raises:
        AddlangError: a label that is none of the study.
    """
    from addlang.errors import did_you_mean

    labels = {
        *study.arms,
        *(label for axis in study.axes.values() for label in axis),
        *(f"seed={s}" for s in study.seeds),
    }
    for label in only:
        if label not in labels:
            raise AddlangError(f"--only {label}: no arm, setting or seed", did_you_mean(label, labels))
    groups = [set(study.arms), *(set(axis) for axis in study.axes.values()), {f"seed={s}" for s in study.seeds}]
    mine = {cell.arm, *cell.setting, f"seed={cell.seed}"}
    return all(not (chosen := group & set(only)) or chosen & mine for group in groups)


def _known(path: Path, data: Mapping[str, Any], base_dir: Path) -> dict[str, Any] | None:
    """The numbers of a run that is finished with this very recipe.

    Raises:
        AddlangError: it was finished with other files.
    """
    from addlang.recipe import Recipe
    from addlang.rundir import holds_finished, read_state

    if not holds_finished(path, Recipe.parse(data, base_dir=base_dir), base_dir):
        return None
    kept = path / NUMBERS
    if kept.is_file():
        numbers = dict(json.loads(kept.read_text(encoding="utf-8")))
        started = read_state(path).get("started")
        if numbers.pop("started", started) == started:  # otherwise they are those of the run that was here before
            return numbers
    return gather(path)


def _keep(path: Path, weights: bool) -> dict[str, Any]:
    """Write a run's numbers beside it; remove its weights unless they are wanted."""
    from addlang.rundir import read_state

    numbers = gather(path)
    write_json(path / NUMBERS, {**numbers, "started": read_state(path)["started"]})
    if not weights:
        for folder in (path, *(path / "phases").glob("*")):
            for pattern in WEIGHTS:
                for file in folder.glob(pattern):
                    file.unlink()
    return numbers


def tabulate(study: Study, found: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
    """Per setting: every arm at every learning rate, the front, and the comparison at equal gain.

    An arm whose update was also scaled back (``evaluation.scale_back``) stands there again for every share.
    """
    settings = []
    plain = found
    found = {}
    for cell, run in plain.items():
        found[cell] = run
        for share, results in scaled_back(run["results"]).items():
            found[dataclasses.replace(cell, arm=f"{cell.arm} x {share}")] = {**run, "results": results}
    order = list(dict.fromkeys(c.arm for c in found))
    order.sort(key=lambda arm: list(study.arms).index(arm if arm in study.arms else arm.rpartition(" x ")[0]))
    for setting in dict.fromkeys(c.setting for c in found):
        runs = {c: n for c, n in found.items() if c.setting == setting}
        first = next(iter(runs.values()))["results"]
        points = {c: (change(n["results"], [study.gained]), change(n["results"], study.kept)) for c, n in runs.items()}
        rows: list[dict[str, Any]] = []
        for arm, rate in sorted(
            dict.fromkeys((c.arm, c.learning_rate) for c in runs),
            key=lambda x: (order.index(x[0]), x[1] or 0.0),
        ):
            members = [c for c in runs if (c.arm, c.learning_rate) == (arm, rate)]
            numbers = [runs[c] for c in members]
            rows.append(
                {
                    "arm": arm,
                    "learning_rate": rate,
                    "seeds": len(members),
                    "points": [points[c] for c in members],  # (gained, kept) of every seed
                    "gained": interval([points[c][0] for c in members]),
                    "kept": interval([points[c][1] for c in members]),
                    "after": {
                        key: interval([n["results"][key]["after"] for n in numbers])
                        for key in first
                        if all("after" in n["results"].get(key, {}) for n in numbers)
                    },
                    "tokens": max(n["tokens"] for n in numbers),
                    "seconds": sum(n["train_seconds"] for n in numbers) / len(numbers),
                    "trainable_fraction": numbers[0]["trainable_fraction"],
                    "proof_ok": all(n["proof_ok"] for n in numbers),
                }
            )
        from addlang.evaluate.statistics import pareto_front

        best = pareto_front([(r["gained"][0], r["kept"][0]) for r in rows])
        for i, row in enumerate(rows):
            row["on_front"] = i in best
        curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for cell, point in points.items():
            curves.setdefault(cell.arm, {}).setdefault(cell.seed, []).append(point)
        settings.append(
            {
                "setting": dict(zip(study.axes, setting, strict=True)),
                "before": {key: entry["before"] for key, entry in first.items() if "before" in entry},
                "rows": rows,
                "equal_gain": at_equal_gain(curves, study.against) if study.against in curves else [],
            }
        )
    some = next(iter(found.values()))["results"]
    return {
        "title": study.title or "Study",
        "reference": study.against,
        "gained": _metric(some, study.gained),
        "kept": [_metric(some, key) for key in study.kept],
        "seeds": list(study.seeds),
        "settings": settings,
        "runs": [
            {
                "setting": list(c.setting),
                "arm": c.arm,
                "learning_rate": c.learning_rate,
                "seed": c.seed,
                "folder": c.folder,
                **n,
            }
            for c, n in plain.items()
        ],
    }


def _metric(results: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    name, entry = select(results, key)
    return {"key": name, "unit": entry["unit"], "higher_is_better": entry["higher_is_better"]}
