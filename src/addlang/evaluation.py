"""``addlang evaluate``: measure a model, or two on the same items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError
from addlang.recipe import Evaluation, Recipe


def evaluate_models(
    model: str,
    *,
    against: str | None,
    language: str,
    target_texts: Sequence[str],
    source_texts: Sequence[str],
    tasks: str,
    limit: int | None,
    output: Path | None,
) -> dict[str, Any]:
    """Measure ``model`` (and ``against``).

    Returns:
        ``results`` (flat rows), ``comparison`` (paired differences of model minus against), ``not_run``, and ``table``
        (columns and rows for the terminal).
    """
    from addlang.evaluate.compare import compare
    from addlang.export import write_text

    settings = {
        "tasks": tasks or ("lab" if model == "lab" else ""),
        "limit": limit,
        "replies": {"limit": limit},
        "source_datasets": [{"path": p, "role": "source"} for p in source_texts],
        "target_datasets": [{"path": p} for p in target_texts],
    }
    recipe = evaluation_recipe(model, language, settings, "addlang evaluate")
    names = [n for n in (against, model) if n is not None]
    outcomes = {n: _measure(n, recipe.evaluation, recipe) for n in names}
    rows = [m.row(model=n, phase="", seed=0) for n in names for m in outcomes[n].measurements]
    comparison = compare(outcomes[against].measurements, outcomes[model].measurements) if against is not None else []
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    table = [
        [
            r["model"],
            r["task"],
            r["role"],
            r["metric"],
            f"{r['value']:.4f} ± {r['stderr']:.4f}" if r["stderr"] is not None else f"{r['value']:.4f}",
            str(r["n"]),
        ]
        for r in rows
    ]
    table += [
        [
            "difference",
            c["task"],
            c["role"],
            c["metric"],
            f"{c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}]",
            str(c["n"]),
        ]
        for c in comparison
        if c["low"] is not None
    ]
    not_run = [{"task": t, "reason": r} for n in names[:1] for t, r in outcomes[n].not_run]
    table += [["", row["task"], "", "not run", row["reason"], ""] for row in not_run]
    return {
        "results": rows,
        "comparison": comparison,
        "not_run": not_run,
        "table": [["model", "task", "role", "metric", "value", "n"], table],
    }


def evaluation_recipe(model: str, language: str, settings: dict[str, Any], where: str) -> Recipe:
    """A recipe of which only the evaluation counts: mistakes in the settings are reported as in every recipe."""
    placeholder = {
        "model_name_or_path": model,
        "output_dir": ".",
        "language": language,
        "datasets": [{"path": "."}],
        "strategy": "full",
    }
    return Recipe.parse({**placeholder, "evaluation": settings}, where=where)


def _measure(name: str, evaluation: Evaluation, recipe: Recipe) -> Any:
    import torch

    from addlang.data.prepare import cache_root, labelled_chats, labelled_texts
    from addlang.evaluate.suite import build_suite, cached_evaluate
    from addlang.models import Checkpoint, load_model, load_tokenizer, resolve
    from addlang.progress import progress
    from addlang.run import prepare_device

    directory = resolve(name)
    device = prepare_device(recipe)
    tokenizer = load_tokenizer(directory)
    suite = build_suite(
        evaluation,
        tokenizer=tokenizer,
        heldout_target=labelled_texts(evaluation.target_datasets),
        source_language=recipe.source_language,
        target_language=recipe.language,
        sequence_length=evaluation.sequence_length or min(512, context_length(directory)),
        heldout_chats=labelled_chats(evaluation.target_datasets),
    )
    model = load_model(directory, dtype=torch.float32 if device.type == "cpu" else None, device=device)
    with progress(f"evaluating {name}", total=len(suite.tasks), unit="tasks") as bar:
        return cached_evaluate(
            model, Checkpoint(directory).hash, suite, cache_root() / "evaluations", progress=bar.update
        )


def context_length(directory: Path) -> int:
    """Longest sequence that the model was made for, in tokens."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        longest = config.get("max_position_embeddings") or config["text_config"]["max_position_embeddings"]
    except (OSError, ValueError, AttributeError) as error:
        raise AddlangError(f"{file} cannot be used: {error}", "copy the model again") from error
    except (KeyError, TypeError):
        raise AddlangError(
            f"{file} does not say how long the model's context is", "set max_position_embeddings"
        ) from None
    return int(longest)
