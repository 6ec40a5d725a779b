"""What every module of commands shares: output as JSON, common options, ``--key value`` pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from addlang.errors import AddlangError, did_you_mean

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again in an output directory that holds a run.")]
OutputDir = Annotated[str, typer.Option("--output_dir", "--output-dir", help="Where the run goes.")]


def emit(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, ensure_ascii=False, indent=1))


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of those known."""
    if value not in known:
        raise AddlangError(f"{option}: '{value}' is unknown", did_you_mean(value, known))


def quiet(as_json: bool) -> None:
    if as_json:
        from addlang.progress import set_quiet

        set_quiet(True)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Positional values, and ``--key value`` pairs that the parser left among them."""
    values: list[str] = []
    options: list[str] = []
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        if item.startswith("--"):
            options.append(item)
            if "=" not in item and rest and not rest[0].startswith("--"):
                options.append(rest.pop(0))
        else:
            values.append(item)
    if not values:
        raise AddlangError("no TEXT given", "name at least one file, directory or hub id after MODEL")
    return values, options


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """``["--a.b", "1e-4", "--c=x"]`` -> ``[("a.b", 1e-4), ("c", "x")]``; values are read as YAML scalars or lists."""
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or key == "--":
            raise AddlangError(f"unexpected argument '{key}'", "recipe keys are given as --key value")
        name, equals, value = key[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise AddlangError(f"--{name} has no value", f"write --{name} VALUE (for example --{name} true)")
            value = rest.pop(0)
        pairs.append((name, parse_value(value)))
    return pairs


def parse_value(text: str) -> Any:
    """A YAML scalar or list, as it would be read in a recipe."""
    import yaml

    from addlang import strictyaml

    if not text.strip():  # YAML would read nothing as null
        return text
    try:
        return strictyaml.read(text)
    except yaml.YAMLError:
        return text
