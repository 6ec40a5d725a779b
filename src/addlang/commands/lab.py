"""``addlang lab``: the embedded world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from addlang.commands.common import Json, OutputDir, Overwrite, emit, quiet

lab_app = typer.Typer(
    help="The embedded lab: a tiny real experiment, with no download. Without a subcommand it runs.",
    add_completion=False,
)


@lab_app.callback(invoke_without_command=True)
def lab(
    context: typer.Context,
    output_dir: OutputDir = "lab-out",
    full: Annotated[
        bool, typer.Option("--full", help="More seeds, learning rates and both languages (190 runs).")
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time. Default: the number of cores.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run the embedded experiment: five ways to learn Swahili, what each costs in English. Continues if interrupted."""
    if context.invoked_subcommand is not None:
        return
    from addlang.lab.grid import run_lab
    from addlang.report import lab_table, render_table

    quiet(as_json)
    path = run_lab(Path(output_dir), full=full, jobs=jobs, overwrite=overwrite)
    if as_json:
        emit(json.loads((path / "lab.json").read_text(encoding="utf-8")))
        return
    print()
    for title, columns, rows in lab_table(path):
        print(title)
        render_table(columns, rows)
        print()
    print(f"report  {path / 'report.html'}")


@lab_app.command("path")
def lab_path(as_json: Json = False) -> None:
    """Print where the lab model is: an ordinary Hugging Face directory."""
    from addlang.lab import lab_model_path

    emit({"model": str(lab_model_path())}) if as_json else print(lab_model_path())


@lab_app.command("build")
def lab_build(
    output_dir: OutputDir = "lab-model",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of 768 tokens.")] = 3600,
    threads: Annotated[int, typer.Option(help="Of torch; the shipped model was built with one.")] = 1,
    as_json: Json = False,
) -> None:
    """Train the lab model again from a seed."""
    from addlang.lab.build import build
    from addlang.progress import progress

    quiet(as_json)
    with progress("building the lab model", total=steps, unit="steps") as bar:
        about = build(
            Path(output_dir),
            seed=seed,
            steps=steps,
            threads=threads,
            progress=lambda done, loss: bar.update(done, loss=loss),
        )
    score = about["exact_match"]
    if as_json:
        emit(about)
    else:
        print(f"wrote {output_dir}: {score['value']:.3f} exact match on {score['items']} English items")


@lab_app.command("text")
def lab_text(
    language: Annotated[
        str, typer.Argument(help="en, sw, hi (raw text); english, similar-sw, similar-hi or dissimilar (chat).")
    ],
    output: Annotated[Path, typer.Option(help="File to write (jsonl).")],
    documents: Annotated[int, typer.Option(help="Number of documents.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Write text or conversations of the lab's world, to try 'adapt' and 'run' on."""
    from addlang.lab.world import write_dataset

    write_dataset(language, output, documents, seed)
    print(output)
