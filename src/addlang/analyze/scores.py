"""Scores by task and language of one or more finished runs: the shape of Tables B6 to B8. No model is loaded."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from addlang.analyze.base import Analysis, Context, Result
from addlang.errors import AddlangError


class Scores(Analysis):
    """Measured values of runs, by model and task."""

    kind: ClassVar[str] = "scores"
    paper: ClassVar[str] = "Exploring Two-Phase Continual Instruction Fine-tuning, Tables B6 to B8"
    summary: ClassVar[str] = "scores by language"

    runs: dict[str, str] = Field({}, description="name -> run directory; default: the run of the specification")
    tasks: tuple[str, ...] = Field(("*",), description="patterns such as xquad_*; the order of the columns")
    metric: str | None = Field(None, description="where tasks have several; default: all")
    labels: tuple[str, ...] = Field((), description="models of a run: before, phase names, after; default: all")

    def run(self, context: Context) -> Result:
        runs = {name: Path(path).expanduser() for name, path in self.runs.items()}
        if not runs and context.run is not None:
            runs = {context.run.name: context.run}
        if not runs:
            raise AddlangError("scores are read from runs, and none is named", "give runs: {name: directory}")
        values = {name: self._values(path) for name, path in runs.items()}
        tasks = list(dict.fromkeys(t for rows in values.values() for row in rows.values() for t in row))
        if not tasks:
            raise AddlangError(f"no result matches {', '.join(self.tasks)}", "check tasks and metric")
        tasks.sort(key=lambda t: next(i for i, p in enumerate(self.tasks) if fnmatch.fnmatch(t, f"{p}*")))
        rows = [
            [run, label, *(_cell(row.get(t)) for t in tasks)]
            for run, labels in values.items()
            for label, row in labels.items()
        ]
        return Result(
            sentence=f"{len(tasks)} measurement(s) in {len(values)} run(s).",
            columns=["run", "model", *tasks],
            rows=rows,
            data={"values": values},
            settings={"runs": {k: str(v) for k, v in runs.items()}},
            notes=["Values as in each run's results.jsonl, with the standard error over items; '-' was not measured."],
        )

    def _values(self, run: Path) -> dict[str, dict[str, list[float | None]]]:
        """Model -> task -> [value, standard error]."""
        from addlang.report.files import read_run

        found: dict[str, dict[str, list[float | None]]] = {}
        for r in read_run(run).results:
            if (self.labels and r["model"] not in self.labels) or self.metric not in (None, r["metric"]):
                continue
            if any(fnmatch.fnmatch(str(r["task"]), p) for p in self.tasks) and isinstance(r.get("value"), int | float):
                found.setdefault(str(r["model"]), {})[f"{r['task']} ({r['metric']})"] = [r["value"], r.get("stderr")]
        return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.3f}" if value[1] is None else f"{value[0]:.3f} [± {value[1]:.3f}]"
