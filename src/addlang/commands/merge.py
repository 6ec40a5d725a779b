"""``addlang merge``: merging without training, and scaling an update back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from addlang.commands.common import Json, Overwrite, emit, parse_value, quiet
from addlang.errors import AddlangError, ProofError


class MergeGroup(TyperGroup):
    """``addlang merge FILE.yaml`` is ``addlang merge file FILE.yaml``; mergekit's names (``dare_ties``) are understood."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith((".yaml", ".yml")):
            args = ["file", *args]
        elif args:
            args = [args[0].replace("_", "-"), *args[1:]]
        return super().resolve_command(ctx, args)


merge_app = typer.Typer(
    cls=MergeGroup,
    no_args_is_help=True,
    help="Merge models without training, or scale an update back; METHOD, or a merge file: addlang merge FILE.yaml.",
)

ModelList = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Hub ids (also owner/name@revision), directories, or 'lab'.")
]
Output = Annotated[str, typer.Option("--output_dir", "--output-dir", help="Where the merged model goes.")]
Base = Annotated[str, typer.Option("--base", "--base_model", help="What the models were tuned from.")]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="Once per MODEL, in order, or once for all. Default: 1.")
]
Densities = Annotated[
    list[float] | None, typer.Option("--density", help="Share kept of an update; once per MODEL or once for all.")
]
Scale = Annotated[float, typer.Option("--lambda", help="Factor of the summed update.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
ConfigFrom = Annotated[
    str | None,
    typer.Option(
        "--config_from", "--config-from", help="Model whose configuration, tokenizer and chat template are copied."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Vocabularies differ: union, base, a MODEL (match rows by token), or ids (by number)."
    ),
]
Restore = Annotated[
    str | None,
    typer.Option(
        "--restore_special_tokens", "--restore-special-tokens", help="Model whose rows of special tokens are put back."
    ),
]


@merge_app.command("file")
def merge_file(
    file: Annotated[Path, typer.Argument(help="Merge file; mergekit's form is understood.")],
    output_dir: Output,
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Carry out a merge FILE (the word 'file' may be left out). Options replace what the file says."""
    from addlang.merge.spec import load

    quiet(as_json)
    _carry_out(load(file, _everywhere(config_from, tokenizer, restore)), output_dir, overwrite, as_json)


@merge_app.command("linear")
def linear(
    models: ModelList, output_dir: Output, weight: Weights = None,
    normalize: Annotated[bool, typer.Option(help="Divide by the sum of the weights.")] = True,
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Weighted mean of models."""
    data = {"models": _weighted(models, weight=weight), "parameters": {"normalize": normalize}}
    _merge("linear", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("slerp")
def slerp(
    base: Annotated[str, typer.Argument(metavar="MODEL", help="At t = 0.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="At t = 1.")],
    output_dir: Output,
    t: Annotated[str, typer.Option("--t", help="0 to 1, or a list over the depth: [0, 0.5, 1].")] = "0.5",
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Spherical interpolation between two models, tensor by tensor."""
    data = {"base_model": base, "models": [other], "parameters": {"t": parse_value(t)}}
    _merge("slerp", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("task-arithmetic")
def task_arithmetic(
    models: ModelList, base: Base, output_dir: Output, weight: Weights = None, scale: Scale = 1.0,
    normalize: Annotated[bool, typer.Option(help="Divide by the sum of the weights.")] = False,
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """The base plus the weighted sum of the models' updates."""
    data = {
        "base_model": base, "models": _weighted(models, weight=weight), "parameters": {"lambda": scale, "normalize": normalize},
    }  # fmt: skip
    _merge("task_arithmetic", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("ties")
def ties(
    models: ModelList, base: Base, output_dir: Output, weight: Weights = None, density: Densities = None, scale: Scale = 1.0,
    normalize: Annotated[bool, typer.Option(help="Average what agrees in sign; otherwise add it.")] = True,
    seed: Seed = 0, config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Trim every update to its largest share (--density, default 0.2), elect signs, merge what agrees."""
    data = {
        "base_model": base, "models": _weighted(models, weight=weight, density=density), "seed": seed,
        "parameters": {"lambda": scale, "normalize": normalize},
    }  # fmt: skip
    _merge("ties", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


def _dare(name: str, about: str) -> None:
    @merge_app.command(name, help=about)
    def dare(
        models: ModelList, base: Base, output_dir: Output, weight: Weights = None, density: Densities = None, scale: Scale = 1.0,
        rescale: Annotated[str, typer.Option(help="density: divide by it (the paper); l1: keep sum |update| (mergekit); none.")] = "density",
        seed: Seed = 0, config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
        overwrite: Overwrite = False, as_json: Json = False,
    ) -> None:  # fmt: skip
        data = {
            "base_model": base, "models": _weighted(models, weight=weight, density=density), "seed": seed,
            "parameters": {"lambda": scale, "rescale": rescale},
        }  # fmt: skip
        _merge(name.replace("-", "_"), data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


_dare("dare-linear", "Drop elements of every update at random (--density is kept), rescale, add.")
_dare("dare-ties", "Drop elements of every update at random, rescale, elect signs, add what agrees.")


@merge_app.command("chat-vector")
def chat_vector(
    model: Annotated[str, typer.Argument(help="The model that is to chat: one pre-trained further in a language.")],
    chat: Annotated[str, typer.Option("--chat", help="Chat model: gives the vector, the configuration and the chat template.")],
    base: Annotated[str, typer.Option("--base", "--base_model", help="What the chat model was tuned from.")],
    output_dir: Output,
    ratio: Annotated[float, typer.Option(help="r in w + r (w_chat - w_base).")] = 1.0,
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Add what made a base model chat: w + r (w_chat - w_base)."""
    data = {"model": model, "chat_model": chat, "base_model": base, "parameters": {"ratio": ratio}}
    _merge("chat_vector", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("layer-swap")
def layer_swap(
    task: Annotated[str, typer.Option("--task", help="Model that gives the middle layers.")],
    language: Annotated[str, typer.Option("--language", help="Model that gives the bottom and top layers.")],
    output_dir: Output,
    bottom: Annotated[int | None, typer.Option(help="Layers from the language model at the bottom. Default: 5 of 32.")] = None,
    top: Annotated[int | None, typer.Option(help="And at the top. Default: 2 of 32.")] = None,
    transition: Annotated[int | None, typer.Option(help="Averaged layers beside them. Default: 1 of 32.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Find bottom and top by the relative change of layers; needs --base.")] = False,
    base: Annotated[str | None, typer.Option("--base", "--base_model", help="What both were tuned from (with --auto).")] = None,
    config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Middle layers of a task model between bottom and top layers of a language model."""
    numbers = {"bottom": bottom, "top": top, "transition": transition, "auto": auto}
    data = {
        "task_model": task, "language_model": language, "base_model": base,
        "parameters": {k: v for k, v in numbers.items() if v is not None},
    }  # fmt: skip
    _merge("layer_swap", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("revert")
def revert(
    model: Annotated[str, typer.Argument(help="The trained model, or a run's directory.")],
    output_dir: Output,
    source: Annotated[str | None, typer.Option("--source", help="What it was trained from. Default: the run's model.")] = None,
    scale: Annotated[float, typer.Option(help="Share of the update that is kept.")] = 1.0,
    module: Annotated[list[str] | None, typer.Option(help="TYPE=FACTOR, such as down_proj=0.5; multiplies --scale.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="LAYERS=FACTOR, such as 0-3=0; multiplies too.")] = None,
    density: Annotated[float, typer.Option(help="Share of every tensor's elements whose update is kept: the largest changes.")] = 1.0,
    criterion: Annotated[str, typer.Option(help="Of --density: magnitude, or relative (to the source's weight).")] = "magnitude",
    plan: Annotated[str | None, typer.Option(help="Freeze plan or run: what it freezes goes back to the source.")] = None,
    seed: Seed = 0, config_from: ConfigFrom = None, tokenizer: Tokenizer = None, restore: Restore = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Keep a part of an update: w0 + m (w - w0), with m by module type, layer or weight."""
    data = {
        "model": model, "source_model": source or _source_of(model), "seed": seed,
        "parameters": {
            "scale": scale, "modules": _factors("--module", module), "layers": _factors("--layer", layer),
            "density": density, "criterion": criterion, "plan": plan,
        },
    }  # fmt: skip
    _merge("revert", data, output_dir, config_from, tokenizer, restore, overwrite, as_json)


@merge_app.command("revert-to-budget")
def revert_to_budget(
    model: Annotated[str, typer.Argument(help="A run's directory, or the trained model with --source.")],
    keep: Annotated[
        float, typer.Option(help="Least share of the source language, such as 0.97: lower end of its interval.")
    ],
    by: Annotated[str, typer.Option(help="overall: one share; module or layer: one for each.")] = "overall",
    steps: Annotated[int, typer.Option(min=2, help="Shares are tested upward in steps of 1/STEPS.")] = 20,
    source: Annotated[
        str | None, typer.Option("--source", help="What it was trained from. Default: the run's model.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", "--output-dir", help="Default: MODEL-keep-KEEP.")
    ] = None,
    watch: Annotated[
        list[str] | None, typer.Option(help="Task of the source language that counts. Default: all but bits per byte.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Target language. Default: the run's.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated, as in 'evaluate'. Default: the run's.")] = "",
    text: Annotated[
        list[str] | None, typer.Option(help="Held-out target text. Default: what the run held out.")
    ] = None,
    source_text: Annotated[
        list[str] | None,
        typer.Option("--source_text", "--source-text", help="Held-out source text. Default: the run's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task. Default: the run's.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The largest share of an update that keeps the source language: searched, confirmed, written. Exit code 3 if none does."""
    from addlang.merge.budget_report import sentence, table
    from addlang.merge.to_budget import Wanted
    from addlang.merge.to_budget import revert_to_budget as search

    quiet(as_json)
    out = Path(output_dir or f"{model.rstrip('/')}-keep-{keep:g}")
    wanted = Wanted(language, tasks, tuple(text or ()), tuple(source_text or ()), limit)
    record = search(
        model, out, keep=keep, by=by, steps=steps, source=source, watch=watch or (), wanted=wanted, overwrite=overwrite
    )
    if as_json:
        emit({"output_dir": str(out), **record})
        return
    from addlang.report import render_table

    render_table(*table(record["budget"]))
    print(
        f"\n{sentence(record['budget'])}.\n{record['budget']['looks']}\n\nmodel   {out}\nreport  {out / 'report.html'}"
    )


@merge_app.command("special-tokens")
def special_tokens(
    model: Annotated[str, typer.Argument(help="Model that gets them.")],
    source: Annotated[str, typer.Option("--source", help="Model whose rows of special tokens are put back.")],
    output_dir: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put a model's rows of special tokens (embedding and head) into another."""
    _merge("special_tokens", {"model": model}, output_dir, None, None, source, overwrite, as_json)


def _weighted(models: list[str], **given: list[float] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"model": m, "parameters": {}} for m in models]
    for key, values in given.items():
        values = values or []
        if len(values) == 1:
            values = values * len(models)
        if values and len(values) != len(models):
            raise AddlangError(
                f"{len(models)} models but {len(values)} values of --{key}",
                f"give --{key} once per MODEL, in the same order, or once for all",
            )
        for row, value in zip(rows, values, strict=False):
            row["parameters"][key] = value
    return rows


def _factors(option: str, given: list[str] | None) -> dict[str, float]:
    out: dict[str, float] = {}
    for item in given or []:
        name, _, value = item.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            raise AddlangError(
                f"{option} {item} is not NAME=FACTOR", f"write for example {option} {name or 'NAME'}=0.5"
            ) from None
    return out


def _source_of(model: str) -> str:
    from addlang.merge.run_source import source_of_run

    return source_of_run(Path(model))


def _merge(
    method: str, data: dict[str, Any], output_dir: str, config_from: str | None, tokenizer: str | None, restore: str | None,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from addlang.merge.spec import parse

    quiet(as_json)
    spec = parse(
        {"merge_method": method, **data, **_everywhere(config_from, tokenizer, restore)},
        where=f"addlang merge {method.replace('_', '-')}",
    )
    _carry_out(spec, output_dir, overwrite, as_json)


def _everywhere(config_from: str | None, tokenizer: str | None, restore: str | None) -> dict[str, str]:
    """Keys of every merge that were given as options."""
    given = {"config_from": config_from, "tokenizer_source": tokenizer, "restore_special_tokens": restore}
    return {k: v for k, v in given.items() if v is not None}


def _carry_out(spec: Any, output_dir: str, overwrite: bool, as_json: bool) -> None:
    from addlang.merge.card import happened
    from addlang.merge.write import merge_models
    from addlang.progress import note

    for line in spec.notes():
        note(line)
    record = merge_models(spec, Path(output_dir), overwrite=overwrite)
    if as_json:
        emit({"output_dir": output_dir, **record})
        return
    from addlang.report import render_table

    render_table(["model", "weights (SHA-256)"], [[m["model"], m["hash"]] for m in record["models"]])
    for key, value in record["decided"].items():
        print(f"{key}: {value}")
    for line in happened(record):
        print(line)
    print(f"{record['title']}: {record['parameters']:,} weights in {record['seconds']:.1f} s\n\nmodel   {output_dir}")


def show_merge_proof(directory: Path, as_json: bool) -> None:
    """``addlang verify`` of a merged model.

    Raises:
        ProofError: a tensor is not what the merge gives.
    """
    from addlang.merge.verify import verify_merge

    result = verify_merge(directory)
    names = result["differing"]
    failure = ProofError(f"{len(names)} tensor(s) are not what the merge gives: {', '.join(names[:10])}")
    if as_json:
        emit(result if result["ok"] else {**result, "error": str(failure), "exit_code": failure.exit_code})
        raise typer.Exit(0 if result["ok"] else failure.exit_code)
    if not result["ok"]:
        raise failure
    print(f"merged again: all {result['tensors']} tensors are bit-identical ({result['hash']})")
