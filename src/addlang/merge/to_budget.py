"""From a run (or two models) to the chosen model on disk: what is measured, the search, the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from addlang.errors import AddlangError, did_you_mean
from addlang.merge.budget import By, Search, find, parts_of
from addlang.merge.budget_report import summary
from addlang.merge.methods import Revert
from addlang.merge.run_source import recipe_of_run, source_of_run
from addlang.merge.write import Merging, check_output, complete_or_absent, open_models, write_result
from addlang.recipe import Recipe

if TYPE_CHECKING:
    from addlang.evaluate.suite import Suite
    from addlang.merge.sources import Models


@dataclass(frozen=True)
class Wanted:
    """What to measure; what is not given comes from the run's recipe."""

    language: str | None = None
    tasks: str = ""
    text: Sequence[str] = ()
    source_text: Sequence[str] = ()
    limit: int | None = None


def revert_to_budget(
    model: str,
    out: Path,
    *,
    keep: float,
    by: str = "overall",
    source: str | None = None,
    steps: int = 20,
    watch: Sequence[str] = (),
    wanted: Wanted | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model with the largest share of its update that is shown to keep ``keep`` of the source language.

    Args:
        model: a run's directory, or a model with ``source``.
        by: one share overall, or shares by module type or layer.
        steps: shares are tested 1/steps apart.
        watch: tasks of the source language that count; empty: its abilities.

    Returns:
        The content of the result's ``merge.json``; the search stands under ``budget``.

    Raises:
        BudgetError: no share is shown to keep that much.
        AddlangError: bad input, or an evaluation that could show nothing.
    """
    from addlang.merge.bench import Bench
    from addlang.progress import progress
    from addlang.report.budget import write_budget
    from addlang.run import prepare_device

    if not 0 < keep < 1:
        raise AddlangError(f"--keep {keep:g} is no share", "give a number between 0 and 1, such as 0.97")
    if by not in get_args(By):
        raise AddlangError(f"--by {by} is not known", did_you_mean(by, get_args(By)))
    parts = cast(By, by)
    check_output(out, overwrite)
    spec = Revert(model=model, source_model=source or source_of_run(Path(model)))
    try:
        models = open_models(spec)
    except AddlangError as error:
        if error.fix is None or "--tokenizer" not in error.fix:
            raise
        fix = "scale it back with 'addlang merge revert ... --tokenizer union' and measure the result with 'addlang evaluate'"
        raise AddlangError(error.message, fix) from error
    norms = parts_of(models, spec, parts)
    recipe = evaluation_of(model, spec.source_model, wanted or Wanted())
    suite = suite_of(recipe, models, spec)
    bench = Bench(spec, models, prepare_device(recipe))
    with progress(f"searching for the largest share that keeps {keep:g}", unit="models") as bar:
        search = Search(
            bench,
            suite,
            parts,
            keep,
            steps=steps,
            watch=watch,
            resamples=recipe.evaluation.resamples,
            progress=bar.update,
        )
        result = find(search, norms)
    chosen = spec.model_copy(update={"parameters": result.parameters})
    budget = summary(result, search)
    with complete_or_absent(out) as directory:
        record = write_result(Merging(chosen, models), directory, budget=budget)
        write_budget(record, directory)
    return record


def evaluation_of(model: str, source: str, wanted: Wanted) -> Recipe:
    """The run's recipe with what was asked for in place of its own; or one made of that alone.

    Replies are left out: they are no ability, and generating them takes most of the time.
    """
    from addlang.evaluation import evaluation_recipe

    settings: dict[str, Any] = {"replies": None}
    if wanted.tasks or (source == "lab" and recipe_of_run(Path(model)) is None):
        settings["tasks"] = wanted.tasks or "lab"
    if wanted.limit is not None:
        settings["limit"] = wanted.limit
    if wanted.text:
        settings["target_datasets"] = [{"path": p} for p in wanted.text]
    if wanted.source_text:
        settings["source_datasets"] = [{"path": p, "role": "source"} for p in wanted.source_text]
    recipe = recipe_of_run(Path(model))
    if recipe is None:
        if wanted.language is None:
            raise AddlangError(f"'{model}' is no run of addlang, so its language is not known", "give --language")
        return evaluation_recipe(source, wanted.language, settings, "addlang merge revert-to-budget")
    parsed = evaluation_recipe(source, wanted.language or recipe.language, settings, "addlang merge revert-to-budget")
    changes = {k: getattr(parsed.evaluation, k) for k in settings}
    evaluation = recipe.evaluation.model_copy(update=changes)
    return recipe.model_copy(update={"evaluation": evaluation, "language": wanted.language or recipe.language})


def suite_of(recipe: Recipe, models: Models, spec: Revert) -> Suite:
    """The tasks of a search, on the held-out text and conversations that the run itself was measured on."""
    from addlang.data.prepare import labelled_chats, labelled_texts, measured_phase, prepare
    from addlang.evaluate.suite import build_suite
    from addlang.evaluation import context_length
    from addlang.models import load_tokenizer

    directory = models[spec.model].directory
    tokenizer = load_tokenizer(directory)
    given = recipe.evaluation.target_datasets
    heldout, chats = labelled_texts(given), labelled_chats(given)
    is_run = recipe_of_run(directory) is not None
    if not heldout and is_run:
        try:
            data = prepare(recipe, measured_phase(recipe), tokenizer)
            heldout, chats = list(data.heldout), list(data.heldout_chats)
        except AddlangError as error:
            raise AddlangError(
                f"the text that this run held out cannot be read again: {error.message}",
                "start from the directory in which the run was started, or name held-out target text with --text",
            ) from error
    window = recipe.evaluation.sequence_length
    return build_suite(
        recipe.evaluation,
        tokenizer=tokenizer,
        heldout_target=heldout,
        source_language=recipe.source_language,
        target_language=recipe.language,
        sequence_length=window
        or (measured_phase(recipe).sequence_length if is_run else min(512, context_length(directory))),
        heldout_chats=chats,
    )
