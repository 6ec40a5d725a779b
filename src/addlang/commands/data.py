"""``addlang data``: look at training data, and make it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from addlang.commands.common import Json, emit, one_of, quiet
from addlang.commands.data_build import bilingual_answers, codeswitch, translate_then_answer, translation_tasks
from addlang.commands.data_translate import translate
from addlang.errors import AddlangError, AddlangWarning

if TYPE_CHECKING:
    from addlang.recipe import DatasetSpec

data_app = typer.Typer(help="Look at training data, and make it.", no_args_is_help=True, add_completion=False)

data_app.command("translate")(translate)
data_app.command("translation-tasks")(translation_tasks)
data_app.command("translate-then-answer")(translate_then_answer)
data_app.command("bilingual-answers")(bilingual_answers)
data_app.command("codeswitch")(codeswitch)


@data_app.command("card")
def card(
    files: Annotated[list[str], typer.Argument(help="Training data: files, directories or hub ids.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokens are counted: hub id, directory, or 'lab'.")],
    language: Annotated[list[str], typer.Option(help="Declared language: once for all, or once per FILE, in order.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation items to search for: 'lab', lm-eval tasks, task YAML files, files of items."),
    ] = None,
    license: Annotated[list[str] | None, typer.Option(help="Licence: once for all, or once per FILE.")] = None,
    format: Annotated[str, typer.Option(help="Format of the rows, as in a recipe.")] = "auto",
    text_column: Annotated[
        str, typer.Option("--text_column", "--text-column", help="Column that holds raw text.")
    ] = "text",
    sequence_length: Annotated[
        int, typer.Option("--sequence_length", "--sequence-length", help="Longer conversations count as dropped.")
    ] = 2048,
    chat_template: Annotated[
        str | None,
        typer.Option("--chat_template", "--chat-template", help="As in a recipe, for a model that has none."),
    ] = None,
    deduplicate: Annotated[
        str, typer.Option(help="none, exact or near: which copies are counted as left out.")
    ] = "near",
    near: Annotated[float, typer.Option(min=0, max=1, help="Similarity that makes a near copy.")] = 0.8,
    allow_contamination: Annotated[
        bool,
        typer.Option("--allow_contamination", "--allow-contamination", help="Exit with 0 although items were found."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the data card of FILES: rows, tokens, languages, lengths, duplicates, licences, overlap with evaluation items.

    Exit code 1 if a row contains an item of the tasks.
    """
    from addlang.data.describe import describe
    from addlang.models import load_tokenizer, resolve
    from addlang.progress import progress
    from addlang.schema import parse_list, template_file

    quiet(as_json)
    one_of("--deduplicate", deduplicate, ("none", "exact", "near"))
    codes, licences = per_file("--language", language, files), per_file("--license", license or [], files)
    specs = [
        spec_of(path, format=format, text_column=text_column, language=code, license=licence)
        for path, code, licence in zip(files, codes, licences, strict=True)
    ]
    loaded = load_tokenizer(resolve(tokenizer), template_file(chat_template, None))
    with progress("reading", unit="rows") as bar, collected(as_json) as messages:
        found = describe(
            specs,
            loaded,
            sequence_length=sequence_length,
            tasks=[name for given in tasks or [] for name in parse_list(given)],
            deduplicate=deduplicate,  # type: ignore[arg-type]
            near=near,
            progress=lambda n: bar.update(bar.done + n),
        )
    rows = found["overlap"].get("rows", 0) if not allow_contamination else 0
    message = f"{rows} row(s) contain evaluation items"
    if as_json:
        found["warnings"] = messages
        emit({**found, "error": message, "exit_code": 1} if rows else found)
        raise typer.Exit(1 if rows else 0)
    show_card(found)
    if rows:
        raise AddlangError(message, "take them out before you train, or leave these tasks out of what you report")


@contextlib.contextmanager
def collected(as_json: bool) -> Iterator[list[str]]:
    """Warnings as a list, where they are to be part of the JSON document; otherwise they are shown as they come."""
    messages: list[str] = []
    if not as_json:
        yield messages
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AddlangWarning)
        yield messages
    messages += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, AddlangWarning))


def show_card(found: dict[str, object]) -> None:
    """The card as tables."""
    from addlang.report import datacard, render_table

    columns, rows = datacard.amounts(found)
    render_table(columns[:-2], [row[:-2] for row in rows])
    print()
    render_table(*datacard.contents(found))
    if text := datacard.overlap(found):
        print(f"\n{text}")


def per_file(option: str, values: list[str], files: list[str]) -> list[str | None]:
    """One value per file, from one for all or one for each."""
    if len(values) <= 1:
        return [values[0] if values else None] * len(files)
    if len(values) != len(files):
        raise AddlangError(
            f"{len(files)} files, but {option} {len(values)} times", "give it once, or once per file, in order"
        )
    return list(values)


def spec_of(path: str, **keys: str | None) -> DatasetSpec:
    """A data set of a recipe."""
    from pydantic import ValidationError

    from addlang.recipe import DatasetSpec

    try:
        return DatasetSpec.model_validate({"path": path, **keys})
    except ValidationError as error:
        first = error.errors()[0]
        raise AddlangError(f"--{first['loc'][0]}: {first['msg']} (given: {first['input']!r})") from None
