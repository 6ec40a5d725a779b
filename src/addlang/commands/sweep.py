"""``addlang sweep``: many recipes, compared."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from addlang.commands.common import Json, emit, parse_overrides, quiet


def sweep(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(help="YAML study: a recipe, arms, learning rates, seeds.")],
    jobs: Annotated[int | None, typer.Option(help="Runs at a time. Default: one per GPU, or one per core.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of each run, with a GPU each: for models that one cannot train.")
    ] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only this arm, setting or seed=N; again for more.")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="Run nothing; tabulate what is finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Carry out a STUDY, a grid of recipes, and compare its arms at equal target gain. Continues if interrupted.

    Keys of the file can be replaced: --seeds 0,1,2 --output_dir DIR --recipe.tokens 1M.
    """
    from addlang.study.carry_out import run_study, wanted
    from addlang.study.spec import Cell, cells, load_study

    quiet(as_json)
    overrides = dict(parse_overrides(context.args))
    loaded = load_study(study, overrides)
    base_dir = study.resolve().parent
    if dry_run:

        def chosen(cell: Cell) -> bool:
            return wanted(loaded, cell, only or [])

        grid = {c: data for c, data in cells(loaded, base_dir, files=chosen).items() if chosen(c)}
        if as_json:
            emit([{"run": cell.folder, "recipe": data} for cell, data in grid.items()])
            return
        for cell in grid:
            print(cell.folder)
        print(f"{len(grid)} runs", file=sys.stderr)
        return
    from addlang.report import render_table
    from addlang.report.study import study_tables

    spread = ["--processes", str(processes)] if processes > 1 else []
    chosen_labels = [part for label in only or [] for part in ("--only", label)]
    command = shlex.join(["addlang", "sweep", study.name, *chosen_labels, *spread, *context.args])
    path, result = run_study(
        loaded, base_dir=base_dir, command=command, jobs=jobs, processes=processes, only=only or [], finished=finished
    )
    if as_json:
        emit({"output_dir": str(path), **result})
    else:
        print()
        for title, columns, rows in study_tables(result):
            print(title)
            render_table(columns, rows)
            print()
        print(f"report  {path / 'report.html'}")
    if result["failed"]:
        raise typer.Exit(1)
