"""The command line. Thin: every command parses, calls one function and prints; heavy imports happen inside commands."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from addlang.commands.analyze import analyze
from addlang.commands.common import EXTRA, Json, OutputDir, Overwrite, emit, parse_overrides, quiet, split_arguments
from addlang.commands.data import data_app
from addlang.commands.lab import lab_app
from addlang.commands.merge import merge_app, show_merge_proof
from addlang.commands.preflight import preflight
from addlang.commands.sweep import sweep
from addlang.errors import AddlangError, AddlangWarning
from addlang.progress import quiet_libraries

MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE}
app = typer.Typer(
    name="addlang",
    help="Teach an instruction-tuned LLM a new language without losing the ones it has: adapt, measure, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(lab_app, name="lab")
app.add_typer(data_app, name="data")
app.add_typer(merge_app, name="merge")
app.command(context_settings=EXTRA)(sweep)
app.command(context_settings=EXTRA)(analyze)
app.command(context_settings=EXTRA)(preflight)


@app.command(context_settings=EXTRA)
def adapt(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, local directory, or 'lab'.")],
    text: Annotated[
        list[str],
        typer.Argument(help="Raw target text: jsonl, json, csv, parquet, txt (.gz, .zst), directory or hub id."),
    ],
    language: Annotated[str, typer.Option(help="Target language, ISO 639 code such as ig.")],
    output_dir: OutputDir,
    strategy: Annotated[
        str, typer.Option(help="How the source language is protected; see 'addlang strategies'.")
    ] = "ssu",
    tokens: Annotated[
        str | None, typer.Option(help="Training budget, for example 200M. Default: one pass over the text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    weight: Annotated[
        list[float] | None, typer.Option(help="Share of the training tokens, once per TEXT, in order.")
    ] = None,
    replay: Annotated[str | None, typer.Option(help="Source-language data mixed in.")] = None,
    replay_share: Annotated[
        float, typer.Option("--replay_share", "--replay-share", help="Its share of the training tokens.")
    ] = 0.1,
    calibration: Annotated[
        str | None, typer.Option(help="Source-language chat data for scoring. Default: a built-in English set.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Adapt MODEL to a language by continual pre-training on raw TEXT.

    Any recipe key can follow as --key value, for example --learning_rate 1e-4, --ratio 0.4, --tasks ifeval.
    """
    from addlang.adapt import adapt_recipe

    quiet(as_json)
    texts, options = split_arguments([*text, *context.args])
    recipe = adapt_recipe(
        model, texts, language=language, output_dir=output_dir, strategy=strategy, tokens=tokens, seed=seed, weights=weight or [],
        replay=replay, replay_share=replay_share, calibration=calibration, extra=parse_overrides(options),
    )  # fmt: skip
    _execute(recipe, dry_run=dry_run, overwrite=overwrite, as_json=as_json, base_dir=None)


@app.command(context_settings=EXTRA)
def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run a RECIPE; continue it if it was interrupted.

    Any key of the recipe can be replaced: --learning_rate 1e-4, --strategy.ratio 0.4, --phases.0.tokens 1M.
    """
    from addlang.recipe import Recipe

    quiet(as_json)
    loaded = Recipe.load(recipe, parse_overrides(context.args))
    _execute(loaded, dry_run=dry_run, overwrite=overwrite, as_json=as_json, base_dir=recipe.resolve().parent)


def _execute(recipe: Any, *, dry_run: bool, overwrite: bool, as_json: bool, base_dir: Path | None) -> None:
    if dry_run:
        if as_json:
            emit(recipe.resolved())
        else:
            import yaml

            print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True), end="")
        return
    from addlang.run import execute
    from addlang.train.shard import launched

    path = execute(recipe, overwrite=overwrite, base_dir=base_dir)
    if launched()[0] == 0:  # of several processes the first one speaks
        show_run(path, as_json)


def show_run(path: Path, as_json: bool) -> None:
    """The final table and verdict of a run."""
    from addlang.report import render_table, summary_rows, verdict

    if as_json:
        comparison = path / "comparison.json"
        emit(
            {
                "output_dir": str(path),
                "verdict": verdict(path),
                "comparison": json.loads(comparison.read_text(encoding="utf-8")) if comparison.is_file() else [],
                "proof": proof_summary(path),
                "report": str(path / "report.html"),
            }
        )
        return
    print()
    render_table(*summary_rows(path))
    print(f"\n{verdict(path)}\n\nmodel   {path}\nreport  {path / 'report.html'}")


def proof_summary(path: Path) -> dict[str, Any]:
    """Totals of ``proof.json`` without its tensors."""
    file = path / "proof.json"
    if not file.is_file():
        return {"ok": None}
    proof = json.loads(file.read_text(encoding="utf-8"))
    return {"ok": proof["ok"], "phases": [{k: v for k, v in p.items() if k != "tensors"} for p in proof["phases"]]}


@app.command(context_settings=EXTRA)
def plan(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    gpu: Annotated[
        float | None,
        typer.Option(min=1, help="Memory of one GPU in GiB (24, 48, 80, 141): what fits, and what must change."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs that the run is spread over.")] = 1,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure a few steps here, and say how long it takes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Before a run: what RECIPE will train and freeze, its steps and tokens, its memory. Trains nothing."""
    from addlang.planning import plan_run, show_plan
    from addlang.recipe import Recipe

    quiet(as_json)
    loaded = Recipe.load(recipe, parse_overrides(context.args))
    result = plan_run(loaded, base_dir=recipe.resolve().parent, gpu=gpu, devices=devices, probe=probe)
    if as_json:
        emit(result)
    else:
        show_plan(result)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, run directory, or 'lab'.")],
    language: Annotated[str, typer.Option(help="Target language, ISO 639 code.")],
    text: Annotated[list[str] | None, typer.Option(help="Held-out target text for bits per byte.")] = None,
    source_text: Annotated[
        list[str] | None,
        typer.Option("--source_text", "--source-text", help="Held-out source text. Default: built-in English."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated: 'lab', lm-eval tasks, task YAML files.")] = "",
    limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write result rows (JSONL) here.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model: report paired differences MODEL minus AGAINST.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: source kept, target known, language of its replies."""
    from addlang.evaluation import evaluate_models

    quiet(as_json)
    result = evaluate_models(
        model,
        against=against,
        language=language,
        target_texts=text or [],
        source_texts=source_text or [],
        tasks=tasks,
        limit=limit,
        output=output,
    )
    if as_json:
        emit(result)
    else:
        from addlang.report import render_table

        render_table(*result["table"])


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's output directory.")], as_json: Json = False) -> None:
    """Write report.html and the model card of a run again, from its files."""
    from addlang.run import write_reports
    from addlang.rundir import read_state

    read_state(run_dir)
    write_reports(run_dir)
    show_run(run_dir, as_json)


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="A run's output directory, or a merged model.")],
    source: Annotated[str | None, typer.Option(help="The source model, if it is not where the run found it.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute the proof from the two checkpoints: nothing that was frozen may differ. Exit code 4 if something does.

    Of a merged model: merge again, and compare every bit.
    """
    from addlang.errors import ProofError
    from addlang.merge.verify import is_merge
    from addlang.verify import verify_run

    quiet(as_json)
    if is_merge(run_dir):
        show_merge_proof(run_dir, as_json)
        return
    proof = verify_run(run_dir, source)
    names = [t["name"] for p in proof["phases"] for t in p["tensors"] if t["frozen_changed"]]
    failure = ProofError(f"frozen elements differ in {len(names)} tensor(s): {', '.join(names[:10])}")
    if as_json:
        emit(proof if proof["ok"] else {**proof, "error": str(failure), "exit_code": failure.exit_code})
        raise typer.Exit(0 if proof["ok"] else failure.exit_code)
    for p in proof["phases"]:
        share = p["trainable_moved"] / p["trainable_elements"] if p["trainable_elements"] else 0.0
        print(
            f"phase {p['phase']}: {p['frozen_changed']:,} of {p['frozen_elements']:,} frozen elements differ; "
            f"{p['trainable_moved']:,} of {p['trainable_elements']:,} trainable ones moved ({share:.1%})"
        )
    if not proof["ok"]:
        raise failure
    print("proof holds: everything declared frozen is bit-identical")


@app.command()
def strategies(
    table: Annotated[bool, typer.Option("--table", help="What each costs: trained share, FLOPs, optimizer.")] = False,
    model: Annotated[str, typer.Option(help="With --table: preset (olmo2-7b), directory or hub id.")] = "olmo2-7b",
    measure: Annotated[
        bool, typer.Option("--measure", help="With --table: also time and peak memory of a step, measured here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods, each with its paper, and the guards that combine with them."""
    from addlang import guards
    from addlang.strategies import available, load_strategy

    if table:
        from addlang.strategies.costs import guard_rows
        from addlang.strategies.costs import table as costs

        alone, guarded = costs(model), guard_rows(model)
        found = [*alone, *guarded]
        if measure:
            from addlang.strategies.measured import cells as measured_cells
            from addlang.strategies.measured import measured

            here = measured(
                {r["strategy"]: r["options"] for r in alone}, [g for r in guarded for g in r["options"]["guards"]]
            )
            found = [{**r, **here[r["strategy"]]} for r in found]
        if as_json:
            emit(found)
            return
        from addlang.report import render_table

        cells = [
            [
                r["strategy"],
                f"{r['trained_share']:.1%}",
                f"{r['flops_ratio']:.3f}",
                f"{r['optimizer_ratio']:.3f}",
                *(measured_cells(r["strategy"], here) if measure else []),
                r["note"] or "",
            ]
            for r in found
        ]
        measured_columns = ["time / full here", "memory / full here"] if measure else []
        render_table(["strategy", "trained", "FLOPs / full", "optimizer / full", *measured_columns, "note"], cells)
        if not measure:
            print("--measure adds the time and the peak memory of a step, measured here", file=sys.stderr)
        return
    rows = [
        {"kind": kind, "name": c.name, "paper": c.paper, "summary": c.summary}
        for kind, classes in (
            ("strategy", map(load_strategy, available())),
            ("guard", map(guards.load_guard, guards.available())),
        )
        for c in classes
    ]
    if as_json:
        emit(rows)
        return
    from addlang.report import render_table

    for kind in ("strategy", "guard"):
        lines = [[r["name"], r["summary"], r["paper"]] for r in rows if r["kind"] == kind]
        render_table([kind, "what it does", "paper"], lines)
        print()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, caches, and whether the hub is reachable."""
    from addlang.doctor import examine, show

    quiet(as_json)
    result = examine()
    emit(result) if as_json else show(result)
    if not result["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors for users become one message and an exit code, without a traceback."""
    as_json = "--json" in sys.argv
    show_warnings()
    quiet_libraries()
    try:
        if as_json:  # its usage errors too are one JSON document
            sys.exit(app(standalone_mode=False))
        app()
    except AddlangError as error:
        _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130, as_json)
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        _fail(*known, as_json)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an error that is neither addlang's nor a bug: usage, disk, permissions, memory."""
    if hasattr(error, "format_message"):  # the CLI library's own
        return error.format_message(), int(getattr(error, "exit_code", 2))
    if isinstance(error, RuntimeError | MemoryError):
        from addlang.train.memory import ran_out

        if ran_out(error):  # outside of training, which names the settings that would fit
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fix = "lower evaluation.batch_size or calibration.batch_size (a run starts again with --overwrite), or use more memory"
            return f"memory ran out: {first}\n  fix: {fix}", 1
    number, where = getattr(error, "errno", None), getattr(error, "filename", None)
    if inside := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors does not raise OSError
        number = int(inside[1])
    if number not in MENDABLE:
        return None
    what = os.strerror(number) + (f" ({where})" if where else "")
    return f"{what}\n  fix: free space or fix the permissions, then run the same command again: it continues", 1


def show_warnings() -> None:
    """One plain line per addlang warning; a run also keeps them for its report."""
    import warnings

    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kw: Any) -> None:
        if issubclass(category, AddlangWarning):
            from addlang.progress import note

            note(f"warning: {message}")
        else:
            before(message, category, *args, **kw)

    warnings.simplefilter("always", AddlangWarning)
    warnings.showwarning = show  # type: ignore[assignment]


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        emit({"error": message, "exit_code": code})
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
