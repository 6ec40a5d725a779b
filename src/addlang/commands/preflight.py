"""``addlang preflight``: before any training, can it be done, and what will it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from addlang.commands.common import Json, emit, parse_overrides, quiet, split_arguments
from addlang.errors import AddlangError

COMPARE = "full ssu ssu:ratio=0.75 self_anchor full+ewc:data=self"


def preflight(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, local directory or 'lab'; or a YAML recipe.")],
    data: Annotated[list[str] | None, typer.Argument(help="Target data, as for 'adapt'; none with a recipe.")] = None,
    language: Annotated[str | None, typer.Option(help="Target language, ISO 639 code such as ig.")] = None,
    strategy: Annotated[str, typer.Option(help="The planned strategy.")] = "ssu",
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the source ability to keep.")] = 0.97,
    compare: Annotated[
        str,
        typer.Option(
            help="Probed besides the planned run, or 'none': strategies, each with its options and guards as in "
            f"'{COMPARE}', which is the default."
        ),
    ] = COMPARE,
    rates: Annotated[str, typer.Option(help="Multiples of the planned learning rate that are probed.")] = "1 0.5",
    encoder: Annotated[
        str, typer.Option(help="Of DES: hub id or directory (LaBSE), 'states' (the model's own), or 'none'.")
    ] = "states",
    probe_steps: Annotated[
        int, typer.Option("--probe_steps", "--probe-steps", min=0, help="Steps of a probe; the forecast needs 32.")
    ] = 32,
    output: Annotated[str, typer.Option(help="HTML page to write.")] = "preflight.html",
    as_json: Json = False,
) -> None:
    """Before training: audit MODEL and DATA, probe a few settings, forecast what they cost, recommend one.

    Any recipe key can follow as --key value, for example --learning_rate 1e-4, --tokens 10M, --tasks ifeval.
    """
    from addlang.preflight.run import Settings
    from addlang.preflight.run import preflight as look
    from addlang.report.files import check_folder
    from addlang.report.preflight import write_preflight

    quiet(as_json)
    values, options = split_arguments([model, *(data or []), *context.args])
    recipe, base_dir = _recipe(values, options, language, strategy)
    settings = Settings(
        encoder=None if encoder == "none" else encoder,
        probe_steps=probe_steps,
        keep=keep,
        compare=() if compare == "none" else tuple(_method(word) for word in compare.split()),
        rates=tuple(_number(word) for word in rates.split()),
    )
    check_folder(Path(output))
    result = look(recipe, settings, base_dir=base_dir)
    page = write_preflight(result, Path(output))
    if as_json:
        emit(result)
        return
    _show(result)
    print(f"\npage  {page}")


def _recipe(values: list[str], options: list[str], language: str | None, strategy: str) -> tuple[Any, Path | None]:
    """A recipe file with overrides, or the recipe that ``adapt`` would make."""
    overrides = parse_overrides(options)
    path = Path(values[0])
    if path.suffix in (".yaml", ".yml"):
        from addlang.recipe import Recipe

        if len(values) > 1:
            raise AddlangError(f"unexpected argument '{values[1]}'", "a recipe names its own data")
        return Recipe.load(path, overrides), path.resolve().parent
    if len(values) == 1:
        raise AddlangError("no DATA given", "name at least one file, directory or hub id after MODEL")
    if language is None:
        raise AddlangError("--language is missing", "give the target language, for example --language ig")
    from addlang.adapt import adapt_recipe

    return adapt_recipe(
        values[0], values[1:], language=language, output_dir="preflight", strategy=strategy, extra=overrides
    ), None


def _method(word: str) -> Any:
    """``ssu:ratio=0.75+ewc:data=self`` as a strategy with its guards."""
    from addlang.guards.base import make_guard
    from addlang.preflight.run import Method
    from addlang.strategies.base import make_strategy

    first, *rest = (_part(word, part) for part in word.split("+"))
    make_strategy(*first)  # an unknown one is an error before any work
    for guard in rest:
        make_guard(*guard)
    return Method(*first, tuple(rest))


def _part(word: str, text: str) -> tuple[str, dict[str, Any]]:
    """``ssu:ratio=0.75`` as a name with options."""
    from addlang.commands.common import parse_value

    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise AddlangError(
                f"--compare: '{word}' is no strategy with options", "write NAME:KEY=VALUE,KEY=VALUE, guards after a +"
            )
        options[key] = parse_value(value)
    return name, options


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise AddlangError(f"--rates: '{word}' is no multiple", "write positive numbers, for example '1 0.5'")
    return value


def _show(result: dict[str, Any]) -> None:
    """The same sections as on the page, as tables."""
    from addlang.report import render_table
    from addlang.report.preflight import sections

    for section in sections(result):
        print(f"\n{section.title}")
        for line in section.lines:
            print(line)
        for table in section.tables:
            render_table(table.columns, table.rows)
